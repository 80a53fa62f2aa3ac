"""A decode session whose rows are reused: its shapes, its rows in use, and the programs that it needs."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.language import Language
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, grid_length
from emu3_jax.generation.session import DecodeSession
from emu3_jax.generation.session_rows import Reading, Row, Snapshot
from emu3_jax.generation.shapes import bucket
from emu3_jax.media.sizes import MAX_ELONGATION, generate_size
from emu3_jax.models.cache import KVCache
from emu3_jax.models.capability import target_platform

Owner = TypeVar("Owner")

_LEAST_WIDTH = 32
_LAST_DOUBLED = 1024
_SHORT_PROMPT = 64  # tokens of a prompt that a pool of pictures has room for, beside the longest picture


def widths(slots: int) -> list[int]:
    """The numbers of slots that prompts are padded to, in a cache of `slots` slots: each needs its own program.

    They double up to 1,024, and then rise by 1,024, so that the padding of a row takes less than 1,024 slots.
    """
    found, width = [], _LEAST_WIDTH
    while width < slots:
        found.append(width)
        width += min(width, _LAST_DOUBLED)
    return found


def pool_slots(config: DecoderConfig, factor: int) -> list[int]:
    """The sizes of the caches of a server's pools, in slots: one for pictures, and one for all that the model can do.

    If the model's positions are few more than a picture needs, there is only one pool.

    Args:
        config: config of the decoder.
        factor: pixels per code along each side.
    """
    longest = 0
    for ratio in (f"1:{MAX_ELONGATION}", "1:2", "1:1", f"{MAX_ELONGATION}:1"):
        with contextlib.suppress(Emu3Error):  # the area is too small for this ratio
            longest = max(longest, grid_length(generate_size(ratio, config.image_area, factor), "lines"))
    most = config.max_positions
    whole = bucket(most + min([_LEAST_WIDTH, *widths(most)][-1], _LAST_DOUBLED))  # with the most padding of a prompt
    pictures = bucket(_SHORT_PROMPT + longest)
    return [pictures, whole] if pictures < 3 * whole // 4 else [whole]


def rows_that_fit(language: Language, slots: Sequence[int], memory: int) -> int:
    """The number of rows of each pool such that all caches fit into a budget.

    Args:
        language: the decoder.
        slots: sizes of the pools' caches, in slots.
        memory: bytes for caches, on all devices together.

    Raises:
        Emu3Error: not even one row fits.
    """

    def row_bytes(slots: int) -> int:
        """Every row is computed twice, for guidance."""
        cache = jax.eval_shape(
            lambda: KVCache.create(language.config, jnp.zeros((2,), jnp.int32), slots, language.narrow_cache)
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    # While a row joins, its prompt has a cache of its own. A pool that is resized has its old and its new cache: at
    # most those of all rows with and without guidance.
    each, joining = sum(map(row_bytes, slots)), max(map(row_bytes, slots))
    rows = (memory - joining) // (each + (joining // 2 if _resizable(language) else 0))
    if rows < 1:
        raise Emu3Error(
            f"one row takes {each + joining:,} bytes for keys and values, but the server may take {memory:,}: give it "
            "more memory, or quantize the model to int8, caches too"
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all sessions of a server; see `DecodeSession`."""

    parallel: int | str = "off"
    kernels: str = "auto"


@dataclasses.dataclass(frozen=True, order=True)
class Size:
    """A size of a session: each has its own program. The smallest one that its rows fit into is used.

    Attributes:
        rows: number of rows.
        guided: whether rows are computed twice for guidance.
    """

    rows: int
    guided: bool

    def holds(self, rows: int, guided: bool) -> bool:
        """Whether so many rows fit, of which some are or are not `guided`."""
        return rows <= self.rows and self.guided >= guided


def session_sizes(rows: int, language: Language) -> list[Size]:
    """The sizes that a session of at most `rows` rows may have, the smallest first.

    On CPUs the time of a pass grows with the rows that it computes, so there is a quarter of the rows, a quarter of
    that, and so on, down to one; each with and without guidance. Elsewhere a pass takes as long as reading the weights
    does, and there is only one size, as on a mesh.
    """
    if not _resizable(language):
        return [Size(rows, guided=True)]
    counts = {rows, 1}
    while (fewer := min(counts - {1}, default=1) // 4) > 1:
        counts.add(fewer)
    return sorted(Size(count, guided) for count in counts for guided in (False, True))


def _resizable(language: Language) -> bool:
    return language.mesh is None and target_platform() == "cpu"


class Pool(Generic[Owner]):
    """A session whose rows are reused. Each row in use has an owner. All methods belong to the device's thread.

    Attributes:
        rows: largest number of rows.
        slots: size of the cache in slots.
        owners: the owner of each row that the session has now, or None for a row that is free.
    """

    def __init__(self, language: Language, rows: int, slots: int, options: Options):
        self.rows, self.slots = rows, slots
        self._sizes = session_sizes(rows, language)  # those that may be used, in rising order
        self._size = self._sizes[-1]
        self.owners: list[Owner | None] = [None] * rows
        self._guided = [False] * rows  # whether the row of each owner has guidance
        self._language, self._options = language, options
        self._session: DecodeSession | None = None
        self._snapshot: Snapshot | None = None
        self._passes = np.ones(rows, np.int32)  # those of each row, as the host last knew

    def width(self, prompt: int, steps: int) -> int | None:
        """The number of slots that a prompt of `prompt` tokens gets, or None if it and `steps` tokens do not fit."""
        for width in widths(self.slots):
            if width >= prompt and width + steps <= self.slots:
                return width
        return None

    def fits(self, prompt: int, steps: int) -> bool:
        """Whether a row of a prompt of `prompt` tokens and `steps` further tokens fits into this pool."""
        return self.width(prompt, steps) is not None

    @property
    def used(self) -> list[int]:
        """The rows in use."""
        return [index for index, owner in enumerate(self.owners) if owner is not None]

    @property
    def room(self) -> int:
        """The number of rows that jobs may still get."""
        return self.rows - len(self.used)

    def resize(self, joining: int, guided: bool) -> None:
        """Takes the smallest size for the rows in use and those that join. Afterwards rows have other indices.

        Args:
            joining: number of rows that `begin` will be called for.
            guided: whether any of them has guidance.
        """
        used = self.used
        if joining == 0 and not used:
            return
        guided = guided or any(self._guided[row] for row in used)
        size = next(size for size in self._sizes if size.holds(len(used) + joining, guided))
        self._take(size, used)

    def _take(self, size: Size, used: Sequence[int] = ()) -> None:
        """Gives the session a size. If that is another one, it keeps only the rows `used`."""
        if size == self._size:
            return
        self._started().resize(used, size.rows, guided=size.guided)
        rows = [*used, *[0] * (size.rows - len(used))]
        self._passes, self._size = self._passes[rows], size
        self.owners = [self.owners[row] if place < len(used) else None for place, row in enumerate(rows)]
        self._guided = [self._guided[row] for row in rows]

    def begin(self, owner: Owner, row: Row, settings: RowSettings) -> None:
        """Gives a free row to an owner, and runs its prompt. There must be one: see `resize`."""
        width = self.width(max(len(row.prompt), len(row.negative or ())), len(row.schedule))
        session, index = self._started(), self.owners.index(None)
        self.owners[index] = owner  # from now on, an error is the owner's too
        self._guided[index] = row.negative is not None
        session.replace(index, row, settings, width=width)
        self._passes[index] = 1

    def advance(self, passes: int) -> None:
        """Asks the device for up to `passes` passes. `read` then waits for them."""
        self._snapshot = self._started().advance(passes)

    def read(self) -> tuple[Reading, list[int]]:
        """Waits for what `advance` asked for.

        Returns:
            What the rows have, and the number of passes that each took part in since the last time; 0 for free rows.
        """
        if self._snapshot is None:
            raise RuntimeError("all rows are done, but some have owners")
        reading, before, used = self._started().read(self._snapshot), self._passes, self.used
        self._passes = np.array(reading.passes)
        return reading, [int(reading.passes[row] - before[row]) if row in used else 0 for row in range(len(before))]

    def forget(self) -> list[Owner]:
        """Gives up the session, after an error. Returns the owners of its rows. A new session starts when needed."""
        owners = [owner for owner in self.owners if owner is not None]
        self._size = self._sizes[-1]
        self.owners, self._guided = [None] * self.rows, [False] * self.rows
        self._passes = np.ones(self.rows, np.int32)
        self._session, self._snapshot = None, None
        return owners

    def warm_up(self) -> None:
        """Compiles all programs of the session, by using them. There must be no owners, here and below."""
        for compile_one in self.warm_up_least():
            compile_one()
        self.forget()

    def warm_up_least(self) -> list[Callable[[], None]]:
        """Compiles what a short prompt needs, in two sizes: one row and all rows, both with guidance.

        Returns:
            What compiles the other programs, a few at a time. A size is used as soon as all its programs are there. The
            calls must be made in this order, and jobs may be done between them.
        """
        sizes, most = self._sizes, self._sizes[-1]
        there = sorted({size for size in sizes if size in (Size(1, guided=True), most)})
        self._sizes = list(there)
        short, *others = sorted(widths(self.slots), key=lambda width: (width != _SHORT_PROMPT, width))
        self._use(short)  # as a new session, which was not resized
        for size in [*there, there[0]] if len(there) > 1 else []:
            self._take(size)
            self._use(short)
        later: list[Callable[[], None]] = []
        later += [functools.partial(self._use, width, size) for size in there for width in others]
        for size in sizes:
            if size not in there:
                later += [functools.partial(self._use, width, size) for width in (short, *others)]
                later += [functools.partial(self._between, size, other) for other in there]
                later.append(functools.partial(self._allow, size))
                there.append(size)
        return later

    def _allow(self, size: Size) -> None:
        self._sizes = sorted([*self._sizes, size])

    def _between(self, first: Size, second: Size) -> None:
        """Compiles what resizes a session from one size to another, and back."""
        for size in (first, second, first):
            self._take(size)

    def _use(self, width: int, size: Size | None = None) -> None:
        """Uses a session of this size, or as it is: a row with a prompt of this width begins and goes on."""
        if size is not None:
            self._take(size)
        session, tokens = self._started(), self._language.config.tokens
        session.replace(0, Row([tokens.bos], np.full(2, TokenClass.VISUAL, np.int8)), _plain(), width=width)
        for _ in range(2):  # the state that a program returns may differ in layout from the one before
            if (snapshot := session.advance(1)) is not None:
                session.read(snapshot)

    def _started(self) -> DecodeSession:
        if self._session is None:
            self._session = self._new()
            self._session.read(self._session.start())
        return self._session

    def _new(self) -> DecodeSession:
        """A session of the largest size, of rows that are done from the start."""
        language, bos = self._language, self._language.config.tokens.bos
        idle = Row([bos], np.asarray([TokenClass.VISUAL], np.int8), [bos])
        return DecodeSession(
            language.params, language.config, [idle] * self.rows, _plain(self.rows), mesh=language.mesh,
            narrow_cache=language.narrow_cache, parallel=self._options.parallel, kernels=self._options.kernels,
            replaceable=True, slots=self.slots,
        )  # fmt: skip


def _plain(count: int = 1) -> RowSettings:
    return Sampling(defaults.TEMPERATURE, defaults.TOP_K, defaults.TOP_P, 1.0, defaults.SEED).settings(count)


def smallest(pools: Sequence[Pool[Owner]], prompt: int, steps: int) -> Pool[Owner] | None:
    """The pool of the smallest cache that a row fits into, or None."""
    return next((pool for pool in pools if pool.fits(prompt, steps)), None)
