"""One step of training: loss, gradients, update, as one program over a mesh; nothing here touches files or the host."""

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
from emu3_jax.sharding.rules import batch_sharding, shardings
from emu3_jax.training import lora
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.losses import LossSums, chunked_cross_entropy, next_tokens
from emu3_jax.training.optimizer import learning_rate, make_optimizer

Batch = dict[str, jax.Array]  # see data.pipeline; rows of all processes

# What a batch holds beside its rows' tokens, as dtypes.
BATCH_DTYPES = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "loss_mask": jnp.bool_}


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and a checkpoint keeps.

    Attributes:
        step: int32 scalar, the steps taken.
        params: what is trained, float32, layers stacked: the decoder's parameters, or adapters beside them.
        opt_state: the optimiser's, of `params`.
        key: uint32 [2], data of the key that a step splits; pictures while training take their seeds from it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


class Trainer:
    """The programs of one config on one mesh. Call and lower them within `sharding.rules.use_mesh(mesh)`.

    Attributes:
        decoder: the decoder's config, in the compute dtype.
        model: the module, without dropout.
        state_shardings: where a `TrainState` lies.
        frozen_shardings: where the frozen parameters lie; an empty dict where there are none.
        batch_shardings: where a batch lies.
        step: jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated. The metrics are float32
            scalars: loss (what is minimised), loss_text and loss_vision (means; 0 without targets), gradient_norm
            (before clipping), learning_rate (of this step), targets, tokens (without padding), attended (keys seen,
            over all tokens).
        random_state: jitted `() -> state` before the first step, of random parameters; frozen ones are never made.
        evaluate: jitted `(params, frozen, batch) -> LossSums`.
    """

    def __init__(self, config: TrainConfig, decoder: DecoderConfig, mesh: Mesh):
        self.decoder = dataclasses.replace(decoder, dtype=config.model.dtype)
        self.model = Decoder(
            self.decoder,
            stacked=True,
            remat=config.model.remat,
            attention=config.model.attention,
            adapter=config.adapter,
        )
        self._learner = self.model.clone(dropout=config.model.dropout)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self._config, self._mesh = config, mesh
        boxed, boxed_frozen = jax.eval_shape(self._boxed)
        self.state_shardings: TrainState = shardings(boxed, mesh)
        self.frozen_shardings = shardings(boxed_frozen, mesh)
        self._abstract, self._abstract_frozen = jax.eval_shape(lambda: nn.unbox(self._boxed()))
        self.batch_shardings = dict.fromkeys(BATCH_DTYPES, batch_sharding(mesh))
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
        self.evaluate: jax.stages.Wrapped = jax.jit(
            lambda *arguments: self._sums(*arguments)[1],
            in_shardings=(self.state_shardings.params, self.frozen_shardings, self.batch_shardings),
            out_shardings=replicated,
        )

    # -------------------------------------------------------------------------------------------- states

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        return _placed(self._abstract, self.state_shardings)

    def abstract_frozen(self) -> Any:
        """Likewise of the frozen parameters."""
        return _placed(self._abstract_frozen, self.frozen_shardings)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Likewise of a batch."""
        shape = (self._config.batch_size, self._config.data.sequence_length)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_shardings[name])
            for name, dtype in BATCH_DTYPES.items()
        }

    def initial_state(self, params: Any = None) -> TrainState:
        """Before the first step: of `params` (stacked, float32), or of random ones; adapters always are random."""
        if params is None or self._config.adapter:
            return self.random_state()
        # The parameters are there already: only the rest is computed.
        places = dataclasses.replace(self.state_shardings, params=None)
        rest = jax.jit(lambda p: dataclasses.replace(self._initial(p), params=None), out_shardings=places)(params)
        return dataclasses.replace(rest, params=params)

    def _boxed(self) -> tuple[TrainState, Any]:
        """A state with random parameters, and the frozen ones, in boxes that name their axes."""
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

    def _sums(self, params: Any, frozen: Any, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, LossSums]:
        """What is minimised, not yet divided by the targets, and the sums by kind.

        A key makes it training, with dropout and noise.
        """
        if self._config.adapter:
            params = lora.join(params, frozen)
        labels, mask = next_tokens(batch["tokens"], batch["loss_mask"])
        tokens, positions, segments = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        model = self.model if key is None else self._learner
        keys = None
        if key is not None:
            noise_key, dropout_key = jax.random.split(key)
            tokens, keys = self._noisy(tokens, noise_key), {"dropout": dropout_key}
        hidden: Any = model.apply({"params": params}, tokens, positions, segments, method="hidden", rngs=keys)
        special = self.decoder.tokens
        visual = (special.visual_start, special.visual_end)
        head, weight = params["head"]["kernel"], self._config.vision_weight
        return chunked_cross_entropy(hidden, head, labels, mask, visual, vision_weight=weight)

    def _noisy(self, tokens_bs: jax.Array, key: jax.Array) -> jax.Array:
        """Visual tokens replaced by random ones, of each row another share."""
        most, special = self._config.model.noise, self.decoder.tokens
        if not most:
            return tokens_bs
        share_key, chance_key, token_key = jax.random.split(key, 3)
        share = most * jnp.square(jax.random.uniform(share_key, (tokens_bs.shape[0], 1)))
        visual = (tokens_bs >= special.visual_start) & (tokens_bs < special.visual_end)
        chosen = visual & (jax.random.uniform(chance_key, tokens_bs.shape) < share)
        random = jax.random.randint(token_key, tokens_bs.shape, special.visual_start, special.visual_end, jnp.int32)
        return jnp.where(chosen, random, tokens_bs)

    def _step(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        config = self._config
        # Known beforehand, so that the parts of an accumulated step weigh their targets alike.
        targets = jnp.maximum(next_tokens(batch["tokens"], batch["loss_mask"])[1].sum(dtype=jnp.float32), 1.0)

        key, now = jax.random.split(jax.random.wrap_key_data(state.key))

        def objective(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, LossSums]:
            loss, sums = self._sums(params, frozen, part, key)
            return loss / targets, sums

        gradient = jax.value_and_grad(objective, has_aux=True)
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
            "loss_text": sums.text / jnp.maximum(sums.text_count, 1.0),
            "loss_vision": sums.vision / jnp.maximum(sums.vision_count, 1.0),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(learning_rate(config.optimizer, config.steps)(state.step), jnp.float32),
            "targets": sums.count,
            "tokens": real.sum(dtype=jnp.float32),
            "attended": jnp.where(real, batch["positions"] + 1, 0).sum(dtype=jnp.float32),
        }

    def _parts(self, rows: jax.Array) -> jax.Array:
        """[B, S] as [parts, B / parts, S], each device's rows dealt out evenly, so that none moves to another."""
        parts = self._config.accumulation
        return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)


def _placed(abstract: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, places
    )
