"""One training step (loss, gradients, update) as one compiled program on a mesh. It touches no files."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.config import DecoderConfig
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.rules import batch_sharding, shardings, spec
from emu3_jax.training import lora
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.objectives import Forward, Groups, objective, row_log_probs
from emu3_jax.training.optimizer import learning_rate, make_optimizer

Batch = dict[str, jax.Array]  # global arrays [B, S] by name, see data.pipeline

# The arrays of a batch and their dtypes.
BATCH_DTYPES = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "loss_mask": jnp.bool_}


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes and a checkpoint stores.

    Attributes:
        step: int32 scalar, number of updates taken. A run with GRPO may take several in a step.
        params: the trained parameters in float32, layers stacked: all of the decoder's, or only the adapters.
        opt_state: state of the optimiser for `params`.
        key: uint32 [2], data of the random key. Each step splits it. Sample pictures take their seeds from it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


class Trainer:
    """The compiled programs of one config on one mesh. Call and lower them within `sharding.rules.use_mesh(mesh)`.

    Attributes:
        decoder: config of the decoder, with the compute dtype.
        model: the Flax module, without dropout.
        state_shardings: shardings of a `TrainState`.
        frozen_shardings: shardings of the frozen parameters; an empty dict if all parameters are trained.
        objective: what a step minimises.
        batch_shardings: shardings of a batch.
        step: jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated. The metrics are float32
            scalars: loss (the minimised objective), the objective's `figures`, gradient_norm (before clipping),
            learning_rate (of this step), tokens (count, without padding), attended (number of attended keys, summed
            over tokens).
        random_state: jitted `() -> state`, the state before the first step with random parameters. It does not
            make the frozen parameters.
        evaluate: jitted `(params, frozen, batch) -> sums` of the objective.
        reference: jitted `(params, frozen, batch) -> (log-probabilities, pairs)`, float32 and int32 [B], on every
            device: the summed log-probability of each row's targets without adapters, and the batch's array `pair`.
        policy: jitted `(params, frozen, batch, adapters) -> log-probabilities`, float32 [B, S], of GRPO's drawn tokens,
            see `objectives.Groups.policy`. Rows that belong together have the same. `adapters` is static, and says
            whether to use them.
    """

    def __init__(self, config: TrainConfig, decoder: DecoderConfig, mesh: Mesh):
        self.decoder = dataclasses.replace(decoder, dtype=config.model.dtype)
        self.model = Decoder(
            self.decoder,
            stacked=True,
            remat=config.model.remat,
            unroll=config.model.unroll,
            attention=config.model.attention,
            adapter=config.adapter,
        )
        self._learner = self.model.clone(dropout=config.model.dropout)
        self.optimizer = make_optimizer(config.optimizer, config.updates)
        self._config, self._mesh = config, mesh
        boxed, boxed_frozen = jax.eval_shape(self._boxed)
        self.state_shardings: TrainState = shardings(boxed, mesh)
        self.frozen_shardings = shardings(boxed_frozen, mesh)
        self._abstract, self._abstract_frozen = jax.eval_shape(lambda: nn.unbox(self._boxed()))
        self.objective = objective(config, self.decoder.tokens)
        tokens, rows = batch_sharding(mesh), NamedSharding(mesh, spec("batch"))
        self.batch_shardings = dict.fromkeys(BATCH_DTYPES, tokens) | {
            name: rows if axes == 1 else tokens for name, (axes, _) in self.objective.arrays.items()
        }
        replicated = NamedSharding(mesh, P())
        self.step: jax.stages.Wrapped = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self.frozen_shardings, self.batch_shardings),
            out_shardings=(self.state_shardings, replicated),
            donate_argnums=0,
        )
        self.random_state: jax.stages.Wrapped = jax.jit(
            lambda: nn.unbox(self._boxed()[0]), out_shardings=self.state_shardings
        )
        self._rest = jax.jit(
            lambda params: dataclasses.replace(self._initial(params), params=None),
            out_shardings=dataclasses.replace(self.state_shardings, params=None),
        )
        self.evaluate: jax.stages.Wrapped = jax.jit(
            lambda *arguments: self._terms(*arguments)[1],
            in_shardings=(self.state_shardings.params, self.frozen_shardings, self.batch_shardings),
            out_shardings=replicated,
        )
        numbered = dict.fromkeys(BATCH_DTYPES, tokens) | {"pair": rows}
        self.reference: jax.stages.Wrapped = jax.jit(
            self._reference,
            in_shardings=(self.state_shardings.params, self.frozen_shardings, numbered),
            out_shardings=replicated,
        )

        self.policy: jax.stages.Wrapped = jax.jit(
            self._policy,
            in_shardings=(self.state_shardings.params, self.frozen_shardings, dict.fromkeys(BATCH_DTYPES, tokens)),
            out_shardings=tokens,
            static_argnums=3,
        )

    # -------------------------------------------------------------------------------------------- states

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        return _placed(self._abstract, self.state_shardings)

    def abstract_frozen(self) -> Any:
        """Shapes, dtypes and shardings of the frozen parameters."""
        return _placed(self._abstract_frozen, self.frozen_shardings)

    def abstract_reference(self) -> Any:
        """Shapes, dtypes and shardings of GRPO's reference where there is no adapter: a copy in the compute dtype."""
        dtype = jnp.dtype(self._config.model.dtype)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), self._abstract.params)
        return _placed(params, self.state_shardings.params)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch."""
        shape = (self._config.batch_size, self._config.data.sequence_length)
        arrays = {name: (2, dtype) for name, dtype in BATCH_DTYPES.items()} | dict(self.objective.arrays)
        return {
            name: jax.ShapeDtypeStruct(shape[:axes], dtype, sharding=self.batch_shardings[name])
            for name, (axes, dtype) in arrays.items()
        }

    def initial_state(self, params: Any = None) -> TrainState:
        """The state before the first step, from `params` (stacked, float32) or random. Adapters always start random."""
        if params is None or self._config.adapter:
            return self.random_state()
        # `params` stay where they are; only the rest of the state is computed.
        return dataclasses.replace(self._rest(params), params=params)

    def _boxed(self) -> tuple[TrainState, Any]:
        """A random state and the frozen parameters, in Flax boxes that name the logical axes."""
        key = jax.random.fold_in(jax.random.key(self._config.seed), 1)
        params: Any = self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        frozen: Any = {}
        if self._config.adapter:
            params, frozen = lora.split(params)
        return self._initial(params), frozen

    def _initial(self, params: Any) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            key=jax.random.key_data(jax.random.key(self._config.seed)),
        )

    # -------------------------------------------------------------------------------------------- programs

    def _terms(
        self, params: Any, frozen: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """The objective's terms and sums. With a `key`, dropout and noise are applied, as in training."""
        return self.objective.terms(self._forward(params, frozen, batch, key), batch)

    def _forward(self, params: Any, frozen: Any, batch: Batch, key: jax.Array | None = None) -> Forward:
        """The decoder with these parameters on this batch, see `objectives.Forward` and `_terms`."""

        def forward(*, adapters: bool = True) -> tuple[jax.Array, jax.Array]:
            trained, tokens, model, keys = params, batch["tokens"], self.model, None
            if not adapters:
                trained = jax.lax.stop_gradient(lora.switched_off(params))
            elif key is not None:
                noise_key, dropout_key = jax.random.split(key)
                model, keys = self._learner, {"dropout": dropout_key}
                tokens = self._noisy(tokens, batch["loss_mask"], noise_key)
            whole = lora.join(trained, frozen) if self._config.adapter else trained
            positions, segments = batch["positions"], batch["segment_ids"]
            hidden: Any = model.apply({"params": whole}, tokens, positions, segments, method="hidden", rngs=keys)
            return hidden, whole["head"]["kernel"]

        return forward

    def _reference(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        forward = self._forward(params, frozen, batch)
        return row_log_probs(*forward(adapters=not self._config.adapter), batch)[0], batch["pair"]

    def _policy(self, params: Any, frozen: Any, batch: Batch, adapters: bool = True) -> jax.Array:
        groups = self.objective
        assert isinstance(groups, Groups)

        def part(rows: Batch) -> jax.Array:
            forward = self._forward(params, frozen, rows)
            log_probs, _, _ = groups.policy(*forward(adapters=adapters), rows)
            return jnp.repeat(log_probs, groups.together, axis=0)

        if self._config.accumulation == 1:
            return part(batch)
        found = jax.lax.map(part, jax.tree.map(self._parts, batch))  # [parts, B / parts, S]
        parts, together = self._config.accumulation, groups.together
        dealt = found.reshape(parts, -1, together, found.shape[-1])
        return jnp.swapaxes(dealt, 0, 1).reshape(-1, found.shape[-1])

    def _noisy(self, tokens_bs: jax.Array, targets_bs: jax.Array, key: jax.Array) -> jax.Array:
        """Replaces a random share of each row's visual tokens by random visual tokens (see `ModelConfig.noise`)."""
        most, special = self._config.model.noise, self.decoder.tokens
        if not most:
            return tokens_bs
        share_key, chance_key, token_key = jax.random.split(key, 3)
        share = most * jnp.square(jax.random.uniform(share_key, (tokens_bs.shape[0], 1)))
        visual = (tokens_bs >= special.visual_start) & (tokens_bs < special.visual_end)
        if self._config.model.noise_in != "all":
            targets = visual & targets_bs.astype(bool)
            of_pictures = targets.any(-1, keepdims=True) | (self._config.model.noise_in == "targets")
            visual = jnp.where(of_pictures, targets, visual)
        chosen = visual & (jax.random.uniform(chance_key, tokens_bs.shape) < share)
        random = jax.random.randint(token_key, tokens_bs.shape, special.visual_start, special.visual_end, jnp.int32)
        return jnp.where(chosen, random, tokens_bs)

    def _step(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        config = self._config
        # Counted over the whole batch, so that every target has the same weight in all accumulated parts.
        totals = self.objective.totals(batch)

        key, now = jax.random.split(jax.random.wrap_key_data(state.key))

        def minimised(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            terms, sums = self._terms(params, frozen, part, key)
            first, *others = (term / total for term, total in zip(terms, totals, strict=True))
            return sum(others, start=first), sums

        gradient = jax.value_and_grad(minimised, has_aux=True)
        if config.accumulation == 1:
            (loss, sums), gradients = gradient(state.params, batch, now)
        else:

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(state.params, *part)), None

            parts = jax.tree.map(self._parts, batch), jax.random.split(now, config.accumulation)
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, state.params, batch, now)
            )
            ((loss, sums), gradients), _ = jax.lax.scan(add, zeros, parts)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            key=jax.random.key_data(key),
        )
        real = batch["segment_ids"] > 0
        return new, {
            "loss": loss,
            **self.objective.figures(sums),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(learning_rate(config.optimizer, config.updates)(state.step), jnp.float32),
            "tokens": real.sum(dtype=jnp.float32),
            "attended": jnp.where(real, batch["positions"] + 1, 0).sum(dtype=jnp.float32),
        }

    def _parts(self, rows: jax.Array) -> jax.Array:
        """Splits [B, ...] into [parts, B / parts, ...]. Each device deals out its own rows, so no row changes device.

        Rows that belong together stay in one part, in their order.
        """
        parts, together = self._config.accumulation, self.objective.together
        dealt = jnp.swapaxes(rows.reshape(-1, parts, together, *rows.shape[1:]), 0, 1)
        return dealt.reshape(parts, -1, *rows.shape[1:])


def _placed(abstract: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, places
    )
