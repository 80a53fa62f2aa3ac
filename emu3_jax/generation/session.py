"""A decode session: generates several rows together. It is the host's side of the programs in `engine`.

`start` runs the prompts, each `advance` runs some passes, and `read` returns what a call has made. `run` does all of
this. Each row has its own schedule, step, length and end.

B rows; T steps of the longest schedule; W tokens of a pass per row (see `parallel`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine
from emu3_jax.generation import zipar as wavefront
from emu3_jax.generation.defaults import MOST_PARALLEL
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.parallel import check_window, choose_window
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, forced_ids, sampled_steps, stack_schedules
from emu3_jax.generation.session_rows import Made, Reading, Row, Snapshot, check_positions, computed_prompts
from emu3_jax.generation.shapes import Shapes, align_right, bucket, fill_rows, spare_slots
from emu3_jax.generation.zipar import check_zipar
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.sharding.rules import batch_shards, cache_shardings, use_mesh

# Most passes per call of the loop, for passes of one token and of several tokens per row. Between calls the host shows
# progress and checks whether all rows are done.
PASSES_PER_CALL = 128
WIDE_PASSES_PER_CALL = 32


class DecodeSession:
    """Generates several rows together.

    In float32 a row's result does not depend on the other rows, nor on W. In narrower dtypes it does not depend on
    their content, but it may depend on the shapes that the programs are compiled for, because shapes affect the
    rounding of products.

    Attributes:
        rows: the rows.
        shapes: shapes and options that the programs are compiled for.
        steps: largest number of steps of a row up to its last sampled token. Later tokens are forced and need no
            forward pass.
        state: state of the decode loop; None before `start`.
        plan: inputs of the decode loop that only `replace` changes.
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
        parallel: int | str = "off",
        zipar: int | None = None,
        replaceable: bool = False,
        slots: int | None = None,
        settled_per_pass: float | None = None,
        kept: Kept | None = None,
    ):
        """Prepares a session. Nothing is computed yet.

        Args:
            params: parameters of the decoder. Abstract arrays are enough for `lower_prefill` and `lower_decode`.
            config: config of the decoder.
            rows: the rows, at least one.
            settings: sampling settings of each row, in the host's memory.
            mesh: mesh over which `params` are spread, or None.
            narrow_cache: store keys and values as int8.
            kernels: implementation of attention in decoding, from `attention.KERNELS`.
            least_rows: smallest number of rows to compile for. Copies of the last row fill the rest.
            parallel: "auto", "off" or the number of tokens W of a pass per row; see `parallel.choose_window`.
            zipar: the number of tokens that a row of the grid is ahead of the next one, or None; see `zipar`. W is then
                the largest number of tokens of a pass, and attention is XLA's.
            replaceable: whether `replace` will be used. All options of the programs are then on.
            slots: only with `replaceable`: the size of the cache, apart from slots for guesses. It then never grows. A
                new row may have a prompt and a schedule of any lengths that fit into it together, see `replace`.
            settled_per_pass: see `engine.Variant`.
            kept: the cache of earlier turns of the same number of rows, with the same weights, or an empty `Kept()`.
                Only what it lacks of the prompts is computed. `keep` gives it the cache of this session.

        Raises:
            Emu3Error: a prompt and its schedule do not fit into the model's positions, or `parallel` or `zipar` is not
                legal.
        """
        check_positions(config, ((max(len(row.prompt), len(row.negative or ())), len(row.schedule)) for row in rows))
        check_window(parallel)
        check_zipar(zipar, parallel)
        self._params, self._config, self._mesh = params, config, mesh
        guided = self._guided = any(row.negative is not None for row in rows)
        filled = (*rows, *[rows[-1]] * (fill_rows(max(len(rows), least_rows), mesh, guided) - len(rows)))
        self._count, self._filled = len(rows), filled
        settings = settings.take(np.minimum(np.arange(len(filled)), len(rows) - 1))
        prompts = computed_prompts(filled, guided)
        width = bucket(max(map(len, prompts)))
        self._kept, self._prompt_slots = kept, width
        self._tail = None if kept is None else kept.take(prompts, config.tokens.pad)
        steps = bucket(max(len(row.schedule) for row in filled)) if slots is None else slots - width
        schedule = stack_schedules([row.schedule for row in filled], steps)
        free = bool((schedule == TokenClass.FREE).any())
        visual = bool((schedule == TokenClass.VISUAL).any())
        candidates = config.vocab_size if free else config.tokens.visual_count
        self._order = None
        with use_mesh(mesh):
            several = choose_kernels(kernels, config.head_dim, config.dtype, window=MOST_PARALLEL)
            computed = len(filled) * (2 if guided else 1) // batch_shards(mesh)
            window = choose_window(parallel, computed, several, visual, config.hidden_size)
        if zipar is not None:
            self._order = wavefront.order([row.schedule for row in filled], steps, int(zipar))
            window, kernels = self._order.steps.shape[2], "xla"
        variant = engine.Variant(
            visual_only=not free and not replaceable,
            mixed=(free and visual) or replaceable,
            guided=guided,
            use_top_k=bool((np.asarray(settings.top_k) < candidates).any()) or replaceable,
            use_top_p=bool((np.asarray(settings.top_p) < 1).any()) or replaceable,
            window=window,
            lockstep=window == 1 and not replaceable and (self._tail is None or self._tail.lockstep),
            narrow_cache=narrow_cache,
            kernels=choose_kernels(kernels, config.head_dim, config.dtype, window=window),
            replaceable=replaceable,
            settled_per_pass=settled_per_pass,
        )
        end = width if self._tail is None else self._tail.end
        fixed = None if slots is None else slots + spare_slots(window)
        self.shapes = Shapes(len(filled), end, steps, variant, kept is not None, fixed)
        self._prompts, self._start = align_right(prompts, width, config.tokens.pad)
        # Host arrays, because arrays on one device cannot be combined with weights that are spread over processes.
        self.plan = self._plan(schedule, settings, self._prompts)
        self.state: engine.DecodeState | None = None
        # What the host knows of the rows.
        self._step, self._done = np.ones(len(filled), np.int32), np.zeros(len(filled), bool)
        self._passes = 0  # of the order that were asked for

    @property
    def rows(self) -> tuple[Row, ...]:
        """See the class's attributes."""
        return self._filled[: self._count]

    @property
    def steps(self) -> int:
        """See the class's attributes."""
        return int(self.plan.goal.max())

    def _plan(self, schedule: np.ndarray, settings: RowSettings, prompts: np.ndarray) -> engine.Plan:
        """The plan of rows with these token classes [B, T] and prompts [R, P]."""
        variant = self.shapes.variant
        padded = np.pad(schedule, ((0, 0), (0, 2 * variant.window - 1)), constant_values=TokenClass.PAD)
        looked_up = self._prompt_slots if variant.window > 1 and not variant.visual_only else 0
        return engine.Plan(
            forced=forced_ids(padded, self._config.tokens),
            goal=sampled_steps(schedule),
            prompts=prompts[: len(schedule), :looked_up],
            settings=settings,
        )

    # ------------------------------------------------------------------------------------------------ decoding

    def start(self) -> Snapshot:
        """Runs the prompts and takes the first step of each row."""
        slots, tail, variant = self.shapes.first_slots, self._tail, self.shapes.variant
        with use_mesh(self._mesh):
            if tail is None:
                self.state = engine.prefill(
                    self._params, self._prompts, self._start, self.plan,
                    config=self._config, variant=variant, slots=slots,
                )  # fmt: skip
            else:
                self._tail = None  # the program overwrites its cache
                self._start, self._prompt_slots = tail.start, tail.width
                self.state = engine.resume(
                    self._params, tail.roomy(slots), tail.tokens, tail.counts, self.plan,
                    config=self._config, variant=variant,
                )  # fmt: skip
        return self._snapshot()

    def keep(self) -> None:
        """Gives the cache to `kept`, for the next turn. Afterwards this session cannot go on."""
        if self._kept is None:
            return
        state, self.state = self._started(), None
        tokens, step = np.asarray(state.tokens), np.asarray(state.step)
        written = [ids[:count].tolist() for ids, count in zip(tokens, step, strict=True)]
        guided = self.shapes.variant.guided
        prompts = computed_prompts(self._filled, guided)
        ids = [[*prompt, *made] for prompt, made in zip(prompts, written * (1 + guided), strict=True)]
        self._kept.put(state.cache, self._start, self._prompt_slots, ids)

    def advance(self, passes: int | None = None) -> Snapshot | None:
        """Asks the device for more passes, without waiting for them.

        The call ends early after a pass in which a row completes a frame or all of its steps, and when the cache must
        grow, which the next call does once the host knows (see `read`).

        Args:
            passes: largest number of passes. By default `PASSES_PER_CALL` or `WIDE_PASSES_PER_CALL`.

        Returns:
            The result of the call, or None if the host knows that all rows are done.
        """
        state, variant = self._started(), self.shapes.variant
        if self._done.all():
            return None
        if self._order is not None:
            return self._advance_rows(self._order, passes or WIDE_PASSES_PER_CALL)
        if passes is None:
            passes = PASSES_PER_CALL if variant.window == 1 else WIDE_PASSES_PER_CALL
        slots = self.shapes.slots(self.shapes.width + int(self._step[~self._done].max()) - 1 + variant.window)
        with use_mesh(self._mesh):
            if slots > state.cache.slots:
                state = state.replace(cache=state.cache.grow(slots))
            self.state = engine.decode(
                self._params, state, self.plan, np.int32(passes), config=self._config, variant=variant
            )
        return self._snapshot()

    def _advance_rows(self, order: wavefront.Order, passes: int) -> Snapshot | None:
        """`advance` for an order of `zipar`. The passes do not depend on what is computed, so the host knows them."""
        first = self._passes + 1
        passes = min(passes, int(order.passes.max()) - self._passes)
        if passes < 1:
            return None
        self._passes += passes
        state, slots = self._started(), self.shapes.slots(self.shapes.width + int(order.reach[self._passes]))
        with use_mesh(self._mesh):
            if slots > state.cache.slots:
                state = state.replace(cache=state.cache.grow(slots))
            self.state = engine.decode_rows(
                self._params, state, self.plan, order, np.int32(first), np.int32(passes),
                config=self._config, variant=self.shapes.variant,
            )  # fmt: skip
        return self._snapshot()

    def read(self, snapshot: Snapshot) -> Reading:
        """Waits for a call and returns what the rows have after it."""
        tokens, step, passes, ended = map(np.asarray, (snapshot.tokens, snapshot.step, snapshot.passes, snapshot.ended))
        goal = snapshot.goal
        done = ended | (step >= goal)
        # A row that was replaced after the call is not where the old one was.
        same = np.asarray([old is new for old, new in zip(snapshot.rows, self._filled, strict=True)])
        self._step, self._done = np.where(same, step, self._step), np.where(same, done, self._done)
        rows = snapshot.rows[: self._count]
        share = np.where(done, goal, step)[: self._count].sum() / max(goal[: self._count].sum(), 1)
        return Reading(
            tokens=[
                ids[: min(length, len(row.schedule))] for ids, length, row in zip(tokens, step, rows, strict=False)
            ],
            step=step[: self._count],
            passes=passes[: self._count] + 1,
            ended=ended[: self._count],
            taken=int(share * goal.max()),
            done=done[: self._count],
        )

    def results(self, reading: Reading) -> np.ndarray:
        """The ids of all steps, int32 [B, T]: forced ones after the last sampled one, and padded after a row's end."""
        tokens = np.array(self.plan.forced)[: len(self.rows), : max(len(row.schedule) for row in self.rows)]
        for row, ids, ended in zip(tokens, reading.tokens, reading.ended, strict=True):
            if ended:
                row[:] = self._config.tokens.pad
            row[: len(ids)] = ids
        return tokens

    def replace(self, index: int, row: Row, settings: RowSettings, *, width: int | None = None) -> None:
        """Starts a new row in the place of an old one, while the other rows are where they are.

        Args:
            index: index of the old row.
            row: the new row. It must fit the lengths that the session is compiled for.
            settings: sampling settings of the new row, with one entry.
            width: only in a session with `slots`: number of slots for the prompt. Each width has its own program.

        Raises:
            Emu3Error: the row does not fit into the model's positions or into the session.
        """
        state, shapes = self._started(), self.shapes
        if shapes.variant.lockstep or self._order is not None:
            raise RuntimeError("the session is not replaceable")
        longest = max(len(row.prompt), len(row.negative or ()))
        check_positions(self._config, [(longest, len(row.schedule))])
        width = width or shapes.width
        room = shapes.steps if shapes.fixed is None else min(shapes.steps, shapes.fixed - shapes.spare - width)
        if longest > width or len(row.schedule) > room:
            raise Emu3Error(
                f"a prompt of {longest} tokens and {len(row.schedule)} tokens to generate do not fit into a session of "
                f"{width} and {room}"
            )
        if row.negative is not None and not shapes.variant.guided:
            raise Emu3Error("a row with a negative prompt does not fit into a session without guidance")
        # After `resize` to rows without guidance, a row still begins with the program of guided ones.
        variant = dataclasses.replace(shapes.variant, guided=self._guided)
        count = fill_rows(1, self._mesh, variant.guided)
        alike = computed_prompts([row] * count, variant.guided)
        prompts, start = align_right(alike, width, self._config.tokens.pad)
        known = self._prompt_slots  # the end of the prompt, in which guesses are looked up
        looked_up, _ = align_right([ids[-known:] for ids in alike], known, self._config.tokens.pad)
        schedule = stack_schedules([row.schedule], shapes.steps)
        one = self._plan(np.repeat(schedule, count, axis=0), settings.take(np.zeros(count, int)), looked_up)
        with use_mesh(self._mesh):
            new = engine.prefill(
                self._params, prompts, start, one,
                config=self._config, variant=variant, slots=state.cache.slots,
            )  # fmt: skip
            self.state = engine.insert(state, new, np.int32(index))
        # A copy, so that `read` can tell it from the old row, even if the same row starts again.
        self._filled = (*self._filled[:index], dataclasses.replace(row), *self._filled[index + 1 :])

        def changed(old: Any, new: Any) -> np.ndarray:
            old = np.array(old)  # a copy, because a queued call may still read the old array
            old[index] = new[0]
            return old

        self.plan = jax.tree.map(changed, self.plan, one)
        self._step[index], self._done[index] = 1, False

    def resize(self, kept: Sequence[int], count: int, *, guided: bool) -> None:
        """Keeps some rows, in a new order, and gives the session another number of rows. Only with `replaceable`.

        Results of earlier calls must have been read. The other rows of the new session are done, see `replace`.

        Args:
            kept: indices of the rows to keep, at most `count`.
            count: the new number of rows.
            guided: whether rows are computed twice for guidance. Without it, no row that is kept may need it.
        """
        state, shapes = self._started(), self.shapes
        if shapes.variant.lockstep or self._order is not None or self._mesh is not None:
            raise RuntimeError("the session cannot be resized")
        rows = np.asarray([*kept, *[0] * (count - len(kept))], np.int32)
        computed = np.concatenate([rows, rows + (shapes.rows if shapes.variant.guided else 0)] if guided else [rows])
        self.state = engine.rearrange(state, rows, computed)
        self.shapes = dataclasses.replace(
            shapes, rows=count, variant=dataclasses.replace(shapes.variant, guided=guided)
        )
        self._count, self._filled = count, tuple(dataclasses.replace(self._filled[row]) for row in rows)
        plan = jax.tree.map(lambda column: np.asarray(column)[rows], self.plan)
        inherited = np.arange(count) < len(kept)
        self.plan = plan.replace(goal=np.where(inherited, plan.goal, 0))
        self._step, self._done = self._step[rows], np.where(inherited, self._done[rows], True)

    def place(self, step: int) -> None:
        """Pretends that each row has taken `step` steps, without computing the cache. For benchmarks."""
        state = self._started()
        slots = self.shapes.slots(self.shapes.width + step - 1 + self.shapes.variant.window)
        cache = state.cache.grow(slots) if slots > state.cache.slots else state.cache
        cache = cache.replace(length=jnp.full_like(cache.length, self.shapes.width + step - 1))
        self.state = state.replace(cache=cache, step=jnp.full_like(state.step, step))
        self._step = np.full_like(self._step, step)
        self._done = self._step >= self.plan.goal

    def _started(self) -> engine.DecodeState:
        if self.state is None:
            raise RuntimeError("call start first")
        return self.state

    def _snapshot(self) -> Snapshot:
        state = self._started()
        # Copies, because the next call donates the state's memory.
        return Snapshot(
            self._filled,
            np.asarray(self.plan.goal),
            *map(jnp.copy, (state.tokens, state.step, state.passes, state.ended)),
        )

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
        rest = np.zeros_like(self.plan.forced), np.zeros(rows, np.int32), np.zeros(rows, bool)
        tokens, step, ended = self._replicated(rest)
        cache = cache.replace(lockstep=variant.lockstep)
        return engine.DecodeState(cache=cache, tokens=tokens, step=step, passes=step, ended=ended)

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
    on_tokens: Callable[[list[np.ndarray]], None] | None = None,
    mesh: Mesh | None = None,
    narrow_cache: bool = False,
    kernels: str = "auto",
    least_rows: int = 1,
    parallel: int | str = "off",
    zipar: int | None = None,
    settled_per_pass: float | None = None,
    kept: Kept | None = None,
) -> Made:
    """Generates one sequence per row with a `DecodeSession`.

    Args:
        params: parameters of the decoder.
        config: config of the decoder.
        rows: the rows to generate.
        settings: sampling settings of each row.
        on_progress: function that is called with (steps taken, all steps) after each call of the device.
        on_tokens: function that is called with each row's ids so far after each call of the device, while the device
            continues. The last call has all sampled ids, but not the forced ids after them.
        mesh: mesh over which `params` are spread, or None. The callbacks run outside the mesh's context.
        narrow_cache: store keys and values as int8.
        kernels: implementation of attention in decoding, from `attention.KERNELS`.
        least_rows: see `DecodeSession`.
        parallel: see `DecodeSession`.
        zipar: see `DecodeSession`.
        settled_per_pass: see `DecodeSession`.
        kept: see `DecodeSession`. At the end it has the cache of this call.

    Raises:
        Emu3Error: a prompt and its schedule do not fit into the model's positions, or `parallel` or `zipar` is not
            legal.
    """
    session = DecodeSession(
        params, config, rows, settings, mesh=mesh, narrow_cache=narrow_cache, kernels=kernels, least_rows=least_rows,
        parallel=parallel, zipar=zipar, settled_per_pass=settled_per_pass, kept=kept,
    )  # fmt: skip
    latest = session.start()
    while True:
        following = session.advance()  # queued before the host reads the results, so that the device never waits
        reading = session.read(latest)
        if on_progress is not None:
            on_progress(reading.taken, session.steps)
        if on_tokens is not None:
            on_tokens(reading.tokens)
        if following is None or reading.done.all():
            session.keep()
            return Made(session.results(reading), reading.passes)
        latest = following
