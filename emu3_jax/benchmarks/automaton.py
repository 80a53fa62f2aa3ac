"""The cost of the grammar in decoding: the loop of `interleave` within pictures, and its automaton alone."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emu3_jax.config import DecoderConfig
from emu3_jax.generation import grammar as rules
from emu3_jax.generation import interleaving
from emu3_jax.generation.defaults import GUIDANCE, TOP_K
from emu3_jax.generation.grammar import Grammar, GrammarState
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.shapes import bucket, fill_rows

LOOPED = 64  # passes of the automaton alone


class Interleaved:
    """Rows within guided pictures in the loop of `interleaving`, at any place of the picture.

    Attributes:
        window: tokens W of a pass per row.
    """

    def __init__(
        self,
        params: Any,
        config: DecoderConfig,
        pictures: int,
        side: int,
        *,
        prompt: int,
        slots: int,
        window: int = 1,
        mesh: Mesh | None = None,
        narrow_cache: bool = False,
        kernels: str = "xla",
    ):
        """Runs the prompts.

        Args:
            params: parameters of the decoder.
            config: config of the decoder.
            pictures: number of pictures at once.
            side: rows, and columns, of visual tokens of each picture.
            prompt: number of tokens of the prompts.
            slots: number of slots of the cache.
            window: tokens W of a pass per row.
            mesh: mesh over which `params` are spread, or None.
            narrow_cache: store keys and values as int8.
            kernels: implementation of attention, from `attention.KERNELS`, but not "auto".
        """
        # Which ids the digits have makes no difference to the time.
        grammar = Grammar.of(config, range(1, 11), 11)
        count = fill_rows(pictures, mesh, guided=True)
        settings = Sampling(top_k=TOP_K, guidance=GUIDANCE).settings(count)
        use_top_k = config.tokens.visual_count > TOP_K
        goal = grammar.picture_length(side, side)  # then rows are done, so all passes are within pictures
        self.window, self._config, self._params, self._side, self._count = window, config, params, side, count
        self._prompt, self._head = prompt, len(f"{side}*{side}") + 2
        self._plan = interleaving.Plan(
            np.full(count, goal, np.int32), settings, settings, np.ones(count, np.float32), np.int32(prompt)
        )
        self._options = interleaving.Options(
            grammar, 2, use_top_k, False, kernels, narrow_cache=narrow_cache, window=window
        )
        self._state = interleaving.prefill(
            params, np.ones((2 * count, prompt), np.int32), np.zeros(2 * count, np.int32), self._plan,
            GrammarState.of([(side, side)] * count),
            config=config, options=self._options, slots=slots, steps=bucket(goal),
        )  # fmt: skip

    def timed(self, step: int, passes: int) -> float:
        """Seconds per pass, of up to `passes` passes from step `step` on, fewer if the pictures end before.

        The cache's content is not computed.
        """
        state = self._state
        step = max(step, self._head)
        self._state = state.replace(
            cache=state.cache.replace(length=jnp.full_like(state.cache.length, self._prompt + step - 1)),
            step=jnp.full_like(state.step, step),
            passes=jnp.zeros_like(state.passes),
            ended=jnp.zeros_like(state.ended),
            inside=jnp.ones_like(state.inside),
            grammar=self._within(step - self._head),
        )
        jax.block_until_ready(self._state)
        began = time.perf_counter()
        self._state = interleaving.decode(
            self._params, self._state, self._plan, np.int32(passes), config=self._config, options=self._options
        )
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / int(self._state.passes.max())

    def automaton(self) -> float:
        """Seconds that the automaton takes per pass, in a loop of `LOOPED` passes without a model."""
        grammar, window = self._options.grammar, self.window

        @jax.jit
        def loop(first: GrammarState) -> tuple[GrammarState, jax.Array]:
            def take(_: jax.Array, carry: tuple[GrammarState, jax.Array]) -> tuple[GrammarState, jax.Array]:
                state, total = carry
                following, answers = rules.one_pass(state, grammar, window)
                return following, total + answers.sum(axis=1)

            return jax.lax.fori_loop(0, LOOPED, take, (first, jnp.zeros(self._count, jnp.int32)))

        first = self._within(0)
        best = math.inf
        for _ in range(4):  # the first compiles
            began = time.perf_counter()
            jax.block_until_ready(loop(first))
            best = min(best, time.perf_counter() - began)
        return best / LOOPED

    def _within(self, at: int) -> GrammarState:
        """Rows within a picture, `at` tokens after its IMG."""
        sides = GrammarState.of([(self._side, self._side)] * self._count)
        place = np.full(self._count, at, np.int32)
        return sides.replace(
            mode=np.full_like(place, rules.PICTURE), at=place, rows=sides.known_rows, columns=sides.known_columns
        )
