"""One training step of the vision tokenizer, jitted on a mesh whose `data` axis splits the pictures.

B stills or frames, b clips, T frames, H W rows and columns, P latents of a batch, K codes, C embedding width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.fields import check_field
from emu3_jax.models.quantizer import CODEBOOK
from emu3_jax.models.vision import VisionTokenizer
from emu3_jax.models.vision_layers import Numerics
from emu3_jax.training.optimizer import learning_rate, make_optimizer
from emu3_jax.training.vision_config import PixelConfig, VisionTrainConfig
from emu3_jax.training.vision_losses import Discriminator, hinge, structural_similarity

Batch = Mapping[str, jax.Array]  # uint8 `stills` [B, H, W, 3], `clips` [b, T, H, W, 3]; see data.pixels

_LAST_LAYER = ("decoder", "conv_out", "kernel")  # VQGAN's adaptive weight compares gradients of this kernel
_SCORES = 2**28  # largest number of latent-to-code distances in memory at once: 1 GiB in float32


@flax.struct.dataclass
class VisionState:
    """Everything that a step changes and a checkpoint stores.

    Attributes:
        step: int32 scalar, number of steps taken.
        params: parameters of the tokenizer, including the codebook and the stored statistics of batch norms.
        average: moving average of `params`, which is evaluated and exported.
        opt_state: state of the optimiser for `params`.
        used: float32 [K], moving average of the number of latents per step that are nearest to each code.
        sums: float32 [K, C], moving average of the sum of these latents per step.
        discriminator: parameters and optimiser state of the discriminator, or None without an adversarial loss.
        key: uint32 [2], data of the random key. Each step splits it.
    """

    step: jax.Array
    params: Any
    average: Any
    opt_state: Any
    used: jax.Array
    sums: jax.Array
    discriminator: Any
    key: jax.Array


class VisionTrainer:
    """The compiled programs of one config on one mesh.

    Attributes:
        step: jitted `(state, batch) -> (state, metrics)`; the state is donated. The metrics are float32 scalars: loss
            (without the adversarial term), absolute, squared, structure (only with a weight), commitment, psnr (of the
            training crops, in dB), codes_used (share of codes that occur in the step), perplexity (of the codes'
            moving average use), codes_revived (number of dead codes replaced), gradient_norm (before clipping),
            learning_rate; with an adversarial loss also adversarial, discriminator and adaptive_weight.
        state_sharding: sharding of every array of a `VisionState`: replicated.
        batch_sharding: sharding of a batch: split over `data`.
    """

    def __init__(self, config: VisionTrainConfig, mesh: Mesh):
        """Raises `Emu3Error` if the mesh does not divide the pictures and the clips of a step."""
        parts = mesh.shape["data"]
        for field in ("stills", "clips"):
            ok = getattr(config.pixels, field) % parts == 0
            check_field(config.pixels, field, ok, f"a multiple of {parts}, the size of mesh axis data")
        self.config, self.mesh = config, mesh
        numerics = Numerics(
            dtype=jnp.dtype(config.dtype),
            precision=jax.lax.Precision.HIGHEST if config.precision == "highest" else jax.lax.Precision.DEFAULT,
            tf32_pairs=False,
            differentiated=True,
            remat=config.remat,
        )
        self.model = VisionTokenizer(config.vision, numerics)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.state_sharding = NamedSharding(mesh, P())
        self.batch_sharding = NamedSharding(mesh, P("data"))
        self._discriminator = Discriminator(numerics)
        self.step: jax.stages.Wrapped = jax.jit(
            self._step,
            in_shardings=(self.state_sharding, self.batch_sharding),
            out_shardings=(self.state_sharding, self.state_sharding),
            donate_argnums=0,
        )

    def initial_state(self, params: Any = None) -> VisionState:
        """The state before the first step, from `params` (as a bundle holds them) or from random parameters."""
        return jax.jit(self._initial, out_shardings=self.state_sharding)(params)

    def abstract_state(self) -> VisionState:
        """Shapes, dtypes and shardings of a state."""
        abstract = jax.eval_shape(lambda: self._initial(None))
        place = self.state_sharding
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch."""
        p = self.config.pixels
        shapes = {"stills": (p.stills, p.size, p.size, 3), "clips": (p.clips, p.frames, p.size, p.size, 3)}
        return {
            kind: jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=self.batch_sharding)
            for kind, shape in shapes.items()
            if shape[0]
        }

    def _initial(self, params: Any) -> VisionState:
        config = self.config
        key = jax.random.key(config.seed)
        if params is None:
            size = config.pixels.size
            params = nn.unbox(self.model.init(jax.random.fold_in(key, 1), jnp.zeros((1, size, size, 3))))["params"]
        # `used` is 1 for the codes of a trained tokenizer, so that its codes move slowly. For random codes it is 0, so
        # that the first data replace them.
        codes = _flat(params)[CODEBOOK]
        used = jnp.full(len(codes), 0.0 if not config.bundle else 1.0, jnp.float32)
        discriminator = None
        if config.loss.adversarial:
            size = config.pixels.size
            found = nn.unbox(self._discriminator.init(jax.random.fold_in(key, 2), jnp.zeros((1, size, size, 3))))
            discriminator = (found["params"], self.optimizer.init(found["params"]))
        return VisionState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            average=jax.tree.map(jnp.copy, params),
            opt_state=self.optimizer.init(params),
            used=used,
            sums=codes * used[:, None],
            discriminator=discriminator,
            key=jax.random.key_data(key),
        )

    # -------------------------------------------------------------------------------------------- the step

    def _step(self, state: VisionState, batch: Batch) -> tuple[VisionState, dict[str, jax.Array]]:
        config = self.config
        key, augment_key, code_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
        pixels = {
            kind: augmented(values, jax.random.fold_in(augment_key, len(kind)), config.pixels)
            for kind, values in batch.items()
        }
        batch_statistics = (state.step < config.batch_statistics_until * config.steps).astype(jnp.float32)
        (loss, decoded), pull_back, found = jax.vjp(
            lambda p: self._loss(p, pixels, batch_statistics), state.params, has_aux=True
        )
        metrics, discriminator = {"loss": loss, **found["metrics"]}, state.discriminator
        slope = jnp.zeros_like(decoded)
        if discriminator is not None:
            slope, discriminator, judged = self._adversarial(state, pixels, loss, decoded, pull_back)
            metrics |= judged
        (gradients,) = pull_back((jnp.ones_like(loss), slope))
        gradient_norm = optax.tree.norm(gradients)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = _flat(optax.apply_updates(state.params, updates))
        params |= _stored_statistics(_flat(state.params), found["statistics"], config.norm_momentum)
        codes, used, sums, occurring, revived = self._codes(state, found["latents"], found["codes"], code_key)
        params[CODEBOOK] = codes
        params = traverse_util.unflatten_dict(params)
        # A small decay at the start makes the average forget the random initial weights quickly.
        decay = jnp.minimum(config.average, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
        average = _flat(average)
        average[CODEBOOK] = codes  # codes are moving averages already, and averaging across a revival would be wrong
        average = traverse_util.unflatten_dict(average)
        share = used / jnp.maximum(used.sum(), 1e-9)
        metrics |= {
            "codes_used": occurring,
            "perplexity": jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)))),
            "codes_revived": revived,
            "gradient_norm": gradient_norm,
            "learning_rate": jnp.asarray(learning_rate(config.optimizer, config.steps)(state.step), jnp.float32),
        }
        new = VisionState(
            state.step + 1, params, average, opt_state, used, sums, discriminator, jax.random.key_data(key)
        )
        return new, metrics

    def _loss(
        self, params: Any, pixels: Mapping[str, jax.Array], batch_statistics: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
        """The loss without the adversarial term.

        Args:
            params: parameters of the tokenizer.
            pixels: float32 `stills` [B, H, W, 3] and `clips` [b, T, H, W, 3] in -1..1.
            batch_statistics: float32 scalar, 1 if batch norms use the batch's statistics, 0 if they use the stored
                ones. See `models.vision_temporal.BatchNorm`.

        Returns:
            (loss, reconstructed pixels [N, H, W, 3]), and a dict with metrics, batch statistics, latents and codes.
        """
        weights = self.config.loss
        flat = _flat(params)
        codebook = jax.lax.stop_gradient(flat[CODEBOOK])
        # Stored statistics are not trained by gradients: each step replaces them.
        params = traverse_util.unflatten_dict(
            {k: jax.lax.stop_gradient(v) if k[-1] in ("mean", "var") or k == CODEBOOK else v for k, v in flat.items()}
        )
        found: dict[str, jax.Array] = {}

        def quantise(z: jax.Array) -> jax.Array:
            found["codes"] = nearest(jax.lax.stop_gradient(z), codebook)
            zq = codebook[found["codes"]]
            found["commitment"] = jnp.mean((z - zq) ** 2)
            return z + jax.lax.stop_gradient(zq - z)

        stills, clips = pixels.get("stills"), pixels.get("clips")
        (latents, decoded), sown = self.model.apply(
            {"params": params},
            stills,
            clips,
            quantise,
            batch_statistics,
            method="reconstruct",
            mutable=["statistics"],
        )
        decoded, true = decoded.astype(jnp.float32), _frames(pixels)
        metrics = {
            "absolute": jnp.mean(jnp.abs(decoded - true)),
            "squared": jnp.mean((decoded - true) ** 2),
            "commitment": found["commitment"],
        }
        errors = jnp.mean((jnp.clip(decoded, -1, 1) - true) ** 2, axis=(1, 2, 3))
        psnr = jnp.mean(10 * jnp.log10(4 / jnp.maximum(errors, 1e-7)))
        loss = sum(getattr(weights, name) * metrics[name] for name in metrics)
        if weights.structure:
            metrics["structure"] = 1 - structural_similarity(decoded, true)
            loss += weights.structure * metrics["structure"]
        return (loss, decoded), {
            "metrics": {**metrics, "psnr": psnr},
            "statistics": jax.lax.stop_gradient(sown.get("statistics", {})),
            "latents": jax.lax.stop_gradient(latents),
            "codes": found["codes"],
        }

    def _adversarial(
        self,
        state: VisionState,
        pixels: Mapping[str, jax.Array],
        loss: jax.Array,
        decoded: jax.Array,
        pull_back: Callable[[Any], tuple[Any]],
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """The adversarial term and one training step of the discriminator, as in VQGAN (arXiv 2012.09841, 3.1).

        Returns:
            The weighted gradient of the adversarial term with respect to the reconstructed pixels; the new
            discriminator; metrics.
        """
        weights, (params, opt_state) = self.config.loss, state.discriminator
        true = _frames(pixels)
        on = (state.step >= weights.adversarial_from).astype(jnp.float32)

        def scores(params: Any, pixels: jax.Array) -> Any:
            return self._discriminator.apply({"params": params}, pixels)

        def judge(out: jax.Array) -> jax.Array:
            return -scores(params, out).mean()

        def last_layer(*cotangents: jax.Array) -> jax.Array:
            # Only this layer's gradient is used, so XLA does not compute the gradients of earlier layers.
            return jnp.linalg.norm(_flat(pull_back(cotangents)[0])[_LAST_LAYER])

        value, slope = jax.value_and_grad(judge)(decoded)
        none = jnp.zeros_like(decoded)
        ratio = last_layer(jnp.ones_like(loss), none) / (last_layer(jnp.zeros_like(loss), slope) + 1e-4)
        adaptive = on * weights.adversarial * jnp.clip(ratio, 0, 1e4)

        def judged(discriminator_params: Any) -> jax.Array:
            real, fake = jnp.split(scores(discriminator_params, jnp.concatenate([true, decoded])), 2)
            return on * hinge(real, fake)

        decoded = jax.lax.stop_gradient(decoded)
        loss, gradients = jax.value_and_grad(judged)(params)
        updates, opt_state = self.optimizer.update(gradients, opt_state, params)
        # Before step `adversarial_from`, the discriminator and its optimiser state do not change.
        kept = jax.tree.map(
            lambda new, old: jnp.where(on > 0, new, old),
            (optax.apply_updates(params, updates), opt_state),
            state.discriminator,
        )
        return adaptive * slope, kept, {"adversarial": value, "discriminator": loss, "adaptive_weight": adaptive}

    def _codes(
        self, state: VisionState, latents: jax.Array, codes: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Updates the codebook: codes move to the mean of their latents, and latents of the batch replace dead codes.

        Returns:
            The codebook [K, C], the new `used` [K] and `sums` [K, C] of the state, the share of codes that occur in
            this step, and the number of replaced codes.
        """
        config, count = self.config, len(state.used)
        decay = config.code_decay
        hits = jnp.zeros(count, jnp.float32).at[codes].add(1.0)
        sums = jnp.zeros_like(state.sums).at[codes].add(latents)
        # A random code starts with `used` 0, so its first latents replace it completely.
        used = decay * state.used + (1 - decay) * hits
        sums = decay * state.sums + (1 - decay) * sums
        followed = jnp.where(
            used[:, None] > 1e-6, sums / jnp.maximum(used, 1e-6)[:, None], _flat(state.params)[CODEBOOK]
        )
        dead = used < config.dead_below
        # Sampled in proportion to the squared error, as in k-means++. Uniform sampling would mostly pick plain
        # background.
        errors = jnp.sum((latents - _flat(state.params)[CODEBOOK][codes]) ** 2, axis=-1)
        fresh = latents[jax.random.choice(key, len(latents), (count,), p=errors / jnp.maximum(errors.sum(), 1e-30))]
        embedding = jnp.where(dead[:, None], fresh, followed)
        # A replaced code starts with twice the threshold, so that it has some steps to find latents.
        grace = 2 * config.dead_below
        return (
            embedding,
            jnp.where(dead, grace, used),
            jnp.where(dead[:, None], fresh * grace, sums),
            jnp.mean(hits > 0),
            jnp.sum(dead, dtype=jnp.float32),
        )


# ------------------------------------------------------------------------------------------------ parts


def nearest(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """The nearest code of each latent: int32 [...] from [..., C] and the codebook [K, C].

    The search uses one matrix product, so near ties may be decided differently than by `models.quantizer`. Training
    does not mind.
    """
    flat = latents.reshape(-1, latents.shape[-1])
    norms = jnp.sum(codebook**2, axis=-1)

    def search(some: jax.Array) -> jax.Array:
        return jnp.argmin(norms[None] - 2 * jnp.dot(some, codebook.T, precision=jax.lax.Precision.HIGHEST), axis=-1)

    blocks = -(-len(flat) * len(codebook) // _SCORES)
    if blocks > 1:
        size = -(-len(flat) // blocks)
        padded = jnp.pad(flat, ((0, blocks * size - len(flat)), (0, 0))).reshape(blocks, size, -1)
        found = jax.lax.map(search, padded).reshape(-1)[: len(flat)]
    else:
        found = search(flat)
    return found.astype(jnp.int32).reshape(latents.shape[:-1])


def augmented(pixels: jax.Array, key: jax.Array, config: PixelConfig) -> jax.Array:
    """Converts uint8 [N, (T,) H, W, 3] to float32 in -1..1 and augments a share of the pictures and clips.

    All frames of a clip are zoomed, mirrored and recoloured in the same way.
    """
    values = pixels.astype(jnp.float32) / 127.5 - 1
    if not config.augment:
        return values
    count, (height, width) = len(values), values.shape[-3:-1]
    keys = jax.random.split(key, 6)
    chosen = jax.random.uniform(keys[0], (count,)) < config.augment
    zoom = jnp.where(chosen, jax.random.uniform(keys[1], (count,), minval=1.0, maxval=config.zoom), 1.0)
    place = jax.random.uniform(keys[2], (count, 2))
    mirrored = chosen & jax.random.bernoulli(keys[3], 0.5, (count,))
    mixing = jnp.eye(3)[None] + config.recolour * chosen[:, None, None] * jax.random.normal(keys[4], (count, 3, 3))
    shift = config.recolour * chosen[:, None] * jax.random.normal(keys[5], (count, 3))

    def change(
        values: jax.Array,
        *,
        zoom: jax.Array,
        place: jax.Array,
        mirrored: jax.Array,
        mixing: jax.Array,
        shift: jax.Array,
    ) -> jax.Array:
        values = jnp.where(mirrored, jnp.flip(values, axis=-2), values)
        # The zoomed window is placed at random within the picture.
        room = jnp.asarray([height, width]) * (zoom - 1)
        values = jax.image.scale_and_translate(
            values, values.shape, (values.ndim - 3, values.ndim - 2), jnp.full(2, zoom), -place * room, "cubic"
        )
        return jnp.clip(values @ mixing + jnp.broadcast_to(shift, values.shape), -1, 1)

    changed = jax.vmap(change)(values, zoom=zoom, place=place, mirrored=mirrored, mixing=mixing, shift=shift)
    return jnp.where(chosen.reshape(-1, *(1,) * (values.ndim - 1)), changed, values)


def _frames(pixels: Mapping[str, jax.Array]) -> jax.Array:
    """Concatenates stills and the frames of clips to [N, H, W, 3]."""
    return jnp.concatenate([pixels[k].reshape(-1, *pixels[k].shape[-3:]) for k in ("stills", "clips") if k in pixels])


def _stored_statistics(params: dict, sown: Any, momentum: float) -> dict:
    """New stored `mean` and `var` of batch norms, by path. The statistics of all calls in a step are pooled first."""
    flat = _flat(sown)
    new = {}
    for path in sorted({path[:-1] for path in flat}):  # sorted: all processes must compile the same program
        means, variances, counts = (flat[*path, name] for name in ("mean", "var", "count"))
        total = sum(counts)
        mean = sum(m * n for m, n in zip(means, counts, strict=True)) / total
        var = sum((v + (m - mean) ** 2) * n for v, m, n in zip(variances, means, counts, strict=True)) / total
        for name, value in (("mean", mean), ("var", var)):
            new[*path, name] = (1 - momentum) * params[*path, name] + momentum * value
    return new


def _flat(tree: Any) -> dict[tuple[str, ...], jax.Array]:
    return dict(traverse_util.flatten_dict(tree))
