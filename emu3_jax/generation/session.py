"""A decode session: generates several rows together. It is the host's side of the programs in `engine`.

`start` runs the prompts, each `advance` runs some steps, and `tokens` returns the tokens of a call. `run` does all of
this. Each row has its own schedule, length and end.

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

# Most steps per call of the loop. Between calls the host shows progress and checks whether all rows have ended.
STEPS_PER_CALL = 128

# XLA's attention reads all slots of the cache. So the cache grows in stages of this many slots. For long pictures, this
# halves the slots that are read on average. Each size needs its own program, so more stages would cost more compile
# time than they save. A clip's cache of 100,000 slots grows by an eighth of the next power of two, through 20 sizes.
CACHE_GROWTH = 2048


def bucket(length: int) -> int:
    """Rounds `length` up to a length that programs are compiled for. This gives few shapes and little padding."""
    size = 64 if length <= 512 else 512
    return -(-length // size) * size


def cache_slots(needed: int, final: int, kernels: str) -> int:
    """The size of the cache in slots.

    XLA's attention reads unused slots too, so its cache grows in stages. The cache of other kernels has its final size
    from the start.

    Args:
        needed: number of slots in use.
        final: number of slots at the end of the session.
        kernels: implementation of attention, from `attention.KERNELS`, but not "auto".
    """
    if kernels != "xla":
        return final
    step = max(CACHE_GROWTH, (1 << (int(needed) - 1).bit_length()) // 8)
    return min(-(-needed // step) * step, final)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row must generate.

    Attributes:
        prompt: ids of the prompt.
        schedule: `TokenClass` of each token after the prompt. All rows of a session must be pictures and clips, or all
            must be text.
        negative: ids of the unconditional prompt for guidance, or None for no guidance. In a session with guided rows,
            a row without guidance is computed twice, which does not change its distribution.
    """

    prompt: Sequence[int]
    schedule: np.ndarray
    negative: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes and options that a session's programs are compiled for.

    Attributes:
        rows: B, padded so that the mesh divides the computed rows.
        width: number of slots of the prompts.
        steps: T, padded.
        variant: see `engine.Variant`.
    """

    rows: int
    width: int
    steps: int
    variant: engine.Variant

    @property
    def computed_rows(self) -> int:
        """The number of rows that the decoder computes: with guidance, two per row."""
        return self.rows * (2 if self.variant.guided else 1)

    def slots(self, needed: int) -> int:
        """The size of the cache in slots while `needed` slots are in use."""
        return cache_slots(needed, self.width + self.steps, self.variant.kernels)

    @property
    def first_slots(self) -> int:
        """The size of the cache in slots during prefill."""
        return self.slots(self.width + 1)

    def cache_sizes(self) -> Iterator[int]:
        """Yields the sizes of the cache in slots, as it grows."""
        size = self.first_slots
        yield size
        while (larger := self.slots(size + 1)) > size:
            size = larger
            yield size


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The device's result of one call. Reading it waits for the call to finish.

    Attributes:
        taken: number of steps of the session after the call. A row may have ended earlier.
    """

    taken: int
    _tokens: jax.Array
    _ended: jax.Array


class DecodeSession:
    """Generates several rows together.

    In float32 a row's result does not depend on the other rows. In narrower dtypes it does not depend on their content,
    but it may depend on the shapes that the programs are compiled for, because shapes affect the rounding of products.

    Attributes:
        rows: the rows, as given.
        shapes: shapes and options that the programs are compiled for.
        steps: number of steps up to the last sampled token. Later tokens are forced and need no forward pass.
        taken: number of steps that the device was asked for so far.
        state: state of the decode loop; None before `start`.
        plan: constant inputs of the decode loop.
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
        """Prepares a session. Nothing is computed yet.

        Args:
            params: parameters of the decoder. Abstract arrays are enough for `lower_prefill` and `lower_decode`.
            config: config of the decoder.
            rows: the rows, at least one.
            settings: sampling settings of each row, in the host's memory.
            mesh: mesh over which `params` are spread, or None.
            narrow_cache: store keys and values as int8.
            kernels: implementation of attention for single tokens, from `attention.KERNELS`.
            least_rows: smallest number of rows to compile for. Copies of the last row fill the rest.

        Raises:
            Emu3Error: a prompt and its schedule do not fit into the model's positions.
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
        # Steps at which a clip's frame ends. A call ends there, so that the frame can be shown.
        self._stops = np.flatnonzero((schedule == TokenClass.EOF).all(axis=0))
        # Host arrays, because arrays on one device cannot be combined with weights that are spread over processes.
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
        """Asks the device for more steps, without waiting for them.

        Args:
            until: total number of steps after this call. By default, the call ends at the next end of a frame, before
                the cache must grow, or after `STEPS_PER_CALL` steps, whichever is first.

        Returns:
            The result of the call, or None if all `steps` were taken before.
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
        """The ids of each row, int32 [B, steps taken], padded after the end of its schedule."""
        return np.array(snapshot._tokens)[: len(self.rows), : snapshot.taken]

    def ended(self, snapshot: Snapshot) -> np.ndarray:
        """bool [B]: whether a row has emitted the end of its text."""
        return np.asarray(snapshot._ended)[: len(self.rows)]

    def results(self, snapshot: Snapshot) -> np.ndarray:
        """The ids of all steps, int32 [B, T]: forced after the last sampled step, and padded after a row's end."""
        length = max(len(row.schedule) for row in self.rows)
        tokens = np.array(snapshot._tokens)[: len(self.rows), :length]
        if self.shapes.variant.visual_only:
            tokens[:, self.steps :] = self.plan.forced[: len(self.rows), self.steps : length]
        return tokens

    def place(self, step: int) -> None:
        """Pretends that `step` steps were taken, without computing the cache. For benchmarks."""
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
        # Copies, because the next call donates the state's memory.
        return Snapshot(self.taken, jnp.copy(state.tokens), jnp.copy(state.ended))

    # ------------------------------------------------------------------------------------------------ compilation

    def abstract_inputs(self) -> tuple[Any, Any, engine.Plan]:
        """The prompts, their first slots and the plan, as abstract arrays that are replicated on every device."""
        return self._replicated((self._prompts, self._start, self.plan))

    def abstract_state(self, slots: int) -> engine.DecodeState:
        """The state with a cache of `slots` slots, as abstract arrays with the shardings that the programs return."""
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
        """Lowers the program of `start`."""
        with use_mesh(self._mesh):
            return engine.prefill.lower(
                self._params, *self.abstract_inputs(),
                config=self._config, variant=self.shapes.variant, slots=self.shapes.first_slots,
            )  # fmt: skip

    def lower_decode(self, slots: int) -> jax.stages.Lowered:
        """Lowers the program of `advance` for a cache of `slots` slots."""
        _, _, plan = self.abstract_inputs()
        with use_mesh(self._mesh):
            return engine.decode.lower(
                self._params, self.abstract_state(slots), plan, self._replicated(np.int32(0)),
                config=self._config, variant=self.shapes.variant,
            )  # fmt: skip

    def lower_growth(self, old: int, new: int) -> jax.stages.Lowered:
        """Lowers the program that grows a cache from `old` to `new` slots."""
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
        params: parameters of the decoder.
        config: config of the decoder.
        rows: the rows to generate.
        settings: sampling settings of each row.
        on_progress: function that is called with (steps taken, all steps) after each call of the device.
        on_tokens: function that is called with the ids so far, int32 [B, steps taken], after each call of the device,
            while the device continues. The last call has all sampled ids, but not the forced ids after them.
        mesh: mesh over which `params` are spread, or None. The callbacks run outside the mesh's context.
        narrow_cache: store keys and values as int8.
        kernels: implementation of attention for single tokens, from `attention.KERNELS`.
        least_rows: see `DecodeSession`.

    Returns:
        The generated ids, int32 [B, longest schedule]. Rows that end earlier are padded.

    Raises:
        Emu3Error: a prompt and its schedule do not fit into the model's positions.
    """
    session = DecodeSession(
        params, config, rows, settings, mesh=mesh, narrow_cache=narrow_cache, kernels=kernels, least_rows=least_rows
    )
    latest = session.start()
    while True:
        following = session.advance()  # queued before the host reads the results, so that the device never waits
        tokens = session.tokens(latest)
        if on_progress is not None:
            on_progress(latest.taken, session.steps)
        if on_tokens is not None:
            on_tokens(tokens)
        if following is None or session.ended(latest).all():
            return session.results(latest)
        latest = following


def fill_rows(count: int, mesh: Mesh | None, guided: bool) -> int:
    """The smallest number of rows, at least `count`, such that the mesh divides the computed rows."""
    multiple = batch_shards(mesh)
    if guided:
        multiple //= math.gcd(2, multiple)  # guidance computes two rows per row
    return -(-count // multiple) * multiple


def check_positions(config: DecoderConfig, rows: Iterable[tuple[int, int]]) -> None:
    """Raises `Emu3Error` if a row does not fit into the positions that the model was trained for.

    Args:
        config: config of the decoder.
        rows: per row, the length of its longer prompt and the number of tokens to generate.
    """
    for index, (prompt, steps) in enumerate(rows):
        if prompt + steps > config.max_positions:
            raise Emu3Error(
                f"row {index}: a prompt of {prompt} tokens and {steps} tokens to generate exceed the model's "
                f"{config.max_positions} positions: shorten the prompt, or ask for a smaller picture or answer"
            )
