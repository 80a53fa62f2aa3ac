"""A decode session: rows that are generated together, and the host's side of the programs of `engine`.

`start` runs the prompts, each `advance` a stretch of steps, and `tokens` gives what a call has made. `run` does all of
it. What each row is to emit, how long it is and whether it has ended are kept row by row.

B rows; T steps of the longest schedule.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, forced_ids, sampled_steps, stack_schedules
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.sharding.rules import batch_shards, cache_shardings, use_mesh

# Steps per call of the loop. Between calls the host reports progress and notices that all rows have ended.
STEPS_PER_CALL = 128

# XLA's attention reads all slots of the cache, which therefore grows by this many, so that about half of a long
# picture's are read on average. Each size is a program of its own: more of them cost more compilation than they save.
# A clip's cache of 100,000 slots grows by an eighth of the next power of two, through 20 sizes.
CACHE_GROWTH = 2048


def bucket(length: int) -> int:
    """The padded length that `length` is compiled for: few shapes, and little waste."""
    size = 64 if length <= 512 else 512
    return -(-length // size) * size


def cache_slots(needed: int, final: int, kernels: str) -> int:
    """Slots of the cache while `needed` of them are in use, `final` at the end; all at once where unused ones are free.

    Args:
        needed: slots.
        final: slots.
        kernels: of `attention.KERNELS`, chosen: not "auto".
    """
    if kernels != "xla":
        return final
    step = max(CACHE_GROWTH, (1 << (int(needed) - 1).bit_length()) // 8)
    return min(-(-needed // step) * step, final)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row is to generate.

    Attributes:
        prompt: ids.
        schedule: `TokenClass` of each token that follows the prompt. The rows of a session are all of pictures and
            clips, or all of text.
        negative: ids of the unconditional prompt of guidance. None is no guidance: beside rows that have one, the row
            is computed twice, and its distribution stays as it is.
    """

    prompt: Sequence[int]
    schedule: np.ndarray
    negative: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a session's programs are compiled for.

    Attributes:
        rows: B, filled up so that the mesh splits the rows that are computed.
        width: slots of the prompts.
        steps: T, filled up.
        variant: see `engine.Variant`.
    """

    rows: int
    width: int
    steps: int
    variant: engine.Variant

    @property
    def computed_rows(self) -> int:
        """Rows that the decoder sees: with guidance two of each."""
        return self.rows * (2 if self.variant.guided else 1)

    def slots(self, needed: int) -> int:
        """Slots of the cache while `needed` of them are in use."""
        return cache_slots(needed, self.width + self.steps, self.variant.kernels)

    @property
    def first_slots(self) -> int:
        """Slots of the cache that the prompts are run with."""
        return self.slots(self.width + 1)

    def cache_sizes(self) -> Iterator[int]:
        """The sizes that the cache has in turn, in slots."""
        size = self.first_slots
        yield size
        while (larger := self.slots(size + 1)) > size:
            size = larger
            yield size


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the device has once it has done a call; to read it waits for that call.

    Attributes:
        taken: steps of the session. A row has its schedule's length of them at most.
    """

    taken: int
    _tokens: jax.Array
    _ended: jax.Array


class DecodeSession:
    """Rows that are generated together.

    In float32 a row's result does not depend on the rows beside it. In narrower dtypes it does not depend on what these
    are, but it may depend on the shapes that the programs are compiled for, because these decide how products round.

    Attributes:
        rows: as they were given.
        shapes: what the programs are compiled for.
        steps: with a choice of tokens or before one; what follows is forced and needs no forward pass.
        taken: steps that the device has been asked for.
        state: what the programs carry; None before `start`.
        plan: what the programs obey.
    """

    def __init__(
        self,
        params: Any,
        config: DecoderConfig,
        rows: Sequence[Row],
        settings: RowSettings,
        *,
        mesh: Mesh | None = None,
        narrow_cache: bool = False,
        kernels: str = "auto",
        least_rows: int = 1,
    ):
        """Nothing is computed yet.

        Args:
            params: the decoder's parameters; abstract arrays will do for the programs alone.
            config: the decoder's config.
            rows: at least one.
            settings: how each row samples, in the host's memory.
            mesh: what `params` are spread over, if anything.
            narrow_cache: keys and values are kept as int8.
            kernels: what computes attention of single tokens, of `attention.KERNELS`.
            least_rows: the programs are compiled for at least so many; copies of the last row fill them.

        Raises:
            Emu3Error: a prompt with its schedule is longer than the model's positions.
        """
        check_positions(config, ((max(len(row.prompt), len(row.negative or ())), len(row.schedule)) for row in rows))
        self.rows = tuple(rows)
        self._params, self._config, self._mesh = params, config, mesh
        guided = any(row.negative is not None for row in rows)
        filled = [*rows, *[rows[-1]] * (fill_rows(max(len(rows), least_rows), mesh, guided) - len(rows))]
        settings = settings.take(np.minimum(np.arange(len(filled)), len(rows) - 1))
        schedules = [row.schedule for row in filled]
        schedule = stack_schedules(schedules, bucket(max(map(len, schedules))))
        prompts = [row.prompt for row in filled]
        if guided:
            prompts += [row.prompt if row.negative is None else row.negative for row in filled]
        width = bucket(max(map(len, prompts)))
        self._prompts = np.full((len(prompts), width), config.tokens.pad, np.int32)
        self._start = np.asarray([width - len(ids) for ids in prompts], np.int32)
        for padded, start, ids in zip(self._prompts, self._start, prompts, strict=True):
            padded[start:] = ids
        visual_only = not (schedule == TokenClass.FREE).any()
        candidates = config.tokens.visual_count if visual_only else config.vocab_size
        variant = engine.Variant(
            visual_only=visual_only,
            guided=guided,
            use_top_k=bool((np.asarray(settings.top_k) < candidates).any()),
            use_top_p=bool((np.asarray(settings.top_p) < 1).any()),
            narrow_cache=narrow_cache,
            kernels=choose_kernels(kernels, config.head_dim),
        )
        self.shapes = Shapes(len(filled), width, schedule.shape[1], variant)
        self.steps = sampled_steps(schedule)
        # Of clips' frames, which can be shown then.
        self._stops = np.flatnonzero((schedule == TokenClass.EOF).all(axis=0))
        # Arrays of the host: those of one device do not mix with weights that lie on several processes' devices.
        self.plan = engine.Plan(forced=forced_ids(schedule, config.tokens), settings=settings)
        self.state: engine.DecodeState | None = None
        self.taken = 0

    # ------------------------------------------------------------------------------------------------ decoding

    def start(self) -> Snapshot:
        """Runs the prompts and takes the first step."""
        with use_mesh(self._mesh):
            self.state = engine.prefill(
                self._params, self._prompts, self._start, self.plan,
                config=self._config, variant=self.shapes.variant, slots=self.shapes.first_slots,
            )  # fmt: skip
        self.taken = 1
        return self._snapshot()

    def advance(self, until: int | None = None) -> Snapshot | None:
        """Asks the device for more steps, and does not wait for them.

        Args:
            until: how many there will be in all; by default the call ends before the next frame's end, the cache's next
                growth and `STEPS_PER_CALL`.

        Returns:
            What there will be, or None where all `steps` have been taken.
        """
        state = self._started()
        width = self.shapes.width
        if until is None:
            if self.taken >= self.steps:
                return None
            slots = self.shapes.slots(width + self.taken + 1)
            stops = self._stops[self._stops > self.taken][:1]
            until = int(min(self.taken + STEPS_PER_CALL, self.steps, slots - width, *stops))
        slots = self.shapes.slots(width + max(until, self.taken + 1))
        with use_mesh(self._mesh):
            if slots > state.cache.slots:
                state = state.replace(cache=state.cache.grow(slots))
            self.state = engine.decode(
                self._params, state, self.plan, np.int32(until),
                config=self._config, variant=self.shapes.variant,
            )  # fmt: skip
        self.taken = until
        return self._snapshot()

    def tokens(self, snapshot: Snapshot) -> np.ndarray:
        """int32 [B, steps taken]: each row's ids, with padding after its schedule's end."""
        return np.array(snapshot._tokens)[: len(self.rows), : snapshot.taken]

    def ended(self, snapshot: Snapshot) -> np.ndarray:
        """bool [B]: the rows that have emitted the end of their text."""
        return np.asarray(snapshot._ended)[: len(self.rows)]

    def results(self, snapshot: Snapshot) -> np.ndarray:
        """int32 [B, T]: the ids of all steps, those after the snapshot's taken as forced; padding after a row's end."""
        length = max(len(row.schedule) for row in self.rows)
        tokens = np.array(snapshot._tokens)[: len(self.rows), :length]
        if self.shapes.variant.visual_only:
            tokens[:, self.steps :] = self.plan.forced[: len(self.rows), self.steps : length]
        return tokens

    def place(self, step: int) -> None:
        """Puts the session where `step` steps have been taken, with whatever the cache holds: for measurements."""
        state = self._started()
        length = jnp.asarray(self.shapes.width + step - 1, jnp.int32)
        cache = dataclasses.replace(state.cache, length=length)
        self.state, self.taken = state.replace(cache=cache, step=jnp.asarray(step, jnp.int32)), step

    def _started(self) -> engine.DecodeState:
        if self.state is None:
            raise RuntimeError("call start first")
        return self.state

    def _snapshot(self) -> Snapshot:
        state = self._started()
        # Copies: the next call takes the state's own memory.
        return Snapshot(self.taken, jnp.copy(state.tokens), jnp.copy(state.ended))

    # ------------------------------------------------------------------------------------------------ compilation

    def abstract_inputs(self) -> tuple[Any, Any, engine.Plan]:
        """Prompts, where each starts, and the plan, as abstract arrays that are whole on every device."""
        return self._replicated((self._prompts, self._start, self.plan))

    def abstract_state(self, slots: int) -> engine.DecodeState:
        """The state with a cache of `slots`, as abstract arrays where the programs leave them."""
        count, variant = self.shapes.computed_rows, self.shapes.variant
        cache = jax.eval_shape(
            lambda: KVCache.create(self._config, jnp.zeros((count,), jnp.int32), slots, variant.narrow_cache)
        )
        if self._mesh is not None:
            cache = jax.tree.map(_abstract, cache, cache_shardings(self._config, self._mesh, variant.narrow_cache))
        rows = self.shapes.rows
        rest = np.zeros((rows, self.shapes.steps), np.int32), np.zeros((), np.int32), np.zeros((rows,), bool)
        tokens, step, ended = self._replicated(rest)
        return engine.DecodeState(cache=cache, tokens=tokens, step=step, ended=ended)

    def lower_prefill(self) -> jax.stages.Lowered:
        """The program of `start`."""
        with use_mesh(self._mesh):
            return engine.prefill.lower(
                self._params, *self.abstract_inputs(),
                config=self._config, variant=self.shapes.variant, slots=self.shapes.first_slots,
            )  # fmt: skip

    def lower_decode(self, slots: int) -> jax.stages.Lowered:
        """The program of `advance` while the cache has `slots`."""
        _, _, plan = self.abstract_inputs()
        with use_mesh(self._mesh):
            return engine.decode.lower(
                self._params, self.abstract_state(slots), plan, self._replicated(np.int32(0)),
                config=self._config, variant=self.shapes.variant,
            )  # fmt: skip

    def lower_growth(self, old: int, new: int) -> jax.stages.Lowered:
        """The program that makes a cache of `old` slots one of `new`."""
        with use_mesh(self._mesh):
            return jax.jit(lambda cache: cache.grow(new)).lower(self.abstract_state(old).cache)

    def _replicated(self, tree: Any) -> Any:
        place = None if self._mesh is None else NamedSharding(self._mesh, P())
        return jax.tree.map(lambda leaf: _abstract(leaf, place), tree)


def _abstract(leaf: Any, place: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def run(
    params: Any,
    config: DecoderConfig,
    rows: Sequence[Row],
    settings: RowSettings,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
    mesh: Mesh | None = None,
    narrow_cache: bool = False,
    kernels: str = "auto",
    least_rows: int = 1,
) -> np.ndarray:
    """Generates one sequence per row with a `DecodeSession`.

    Args:
        params: the decoder's parameters.
        config: the decoder's config.
        rows: what each row is to generate.
        settings: how each row samples.
        on_progress: called with the steps taken and the steps in all after each call of the device.
        on_tokens: called as often, with the ids so far, int32 [B, steps taken]; the device goes on meanwhile. The last
            call has every id that is sampled, not what is forced after it.
        mesh: what `params` are spread over, if anything. The callbacks run outside of it.
        narrow_cache: keys and values are kept as int8.
        kernels: what computes attention of single tokens, of `attention.KERNELS`.
        least_rows: see `DecodeSession`.

    Returns:
        int32 [B, longest schedule]: the generated ids; rows that end earlier are padded.

    Raises:
        Emu3Error: a prompt with its schedule is longer than the model's positions.
    """
    session = DecodeSession(
        params, config, rows, settings, mesh=mesh, narrow_cache=narrow_cache, kernels=kernels, least_rows=least_rows
    )
    latest = session.start()
    while True:
        following = session.advance()  # the device has its next call before the host looks at what this one made
        tokens = session.tokens(latest)
        if on_progress is not None:
            on_progress(latest.taken, session.steps)
        if on_tokens is not None:
            on_tokens(tokens)
        if following is None or session.ended(latest).all():
            return session.results(latest)
        latest = following


def fill_rows(count: int, mesh: Mesh | None, guided: bool) -> int:
    """The least number of rows, `count` or more, whose computed rows `mesh` splits evenly."""
    multiple = batch_shards(mesh)
    if guided:
        multiple //= math.gcd(2, multiple)  # each row is two
    return -(-count // multiple) * multiple


def check_positions(config: DecoderConfig, rows: Iterable[tuple[int, int]]) -> None:
    """Raises `Emu3Error` if a row does not fit the positions that the model was trained for.

    Args:
        config: the decoder's.
        rows: of each the tokens of its longer prompt, and those to generate.
    """
    for index, (prompt, steps) in enumerate(rows):
        if prompt + steps > config.max_positions:
            raise Emu3Error(
                f"row {index}: a prompt of {prompt} tokens and {steps} to generate exceed the model's "
                f"{config.max_positions} positions: shorten the prompt, or ask for a smaller picture or answer"
            )
