"""One step of training the vision tokenizer, jitted over a mesh whose `data` axis splits the pictures.

B stills or frames, b clips, T frames, H W rows and columns, P latents of all of them, K codes, C embedding width.
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

_LAST_LAYER = ("decoder", "conv_out", "kernel")  # where the adaptive weight compares gradients
_SCORES = 2**28  # distances of latents to codes that exist at once: 1 GiB


@flax.struct.dataclass
class VisionState:
    """Everything that a step changes, and a checkpoint keeps.

    Attributes:
        step: int32 scalar, the steps taken.
        params: the tokenizer's, codebook and stored statistics of batch norms among them.
        average: their moving average, which is evaluated and exported.
        opt_state: the optimiser's.
        used: float32 [K], moving average of how many latents of a step are nearest to each code.
        sums: float32 [K, C], likewise of the sums of these latents.
        discriminator: its parameters and optimiser state; None without an adversarial loss.
        key: uint32 [2], data of the key that a step splits.
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
    """The programs of one config on one mesh.

    Attributes:
        step: jitted `(state, batch) -> (state, metrics)`; the state is donated. The metrics are float32 scalars: loss
            (what is minimised), absolute, squared, structure, commitment, psnr (of the training crops, in dB),
            codes_used (share of the codes that occur in the step), perplexity, codes_revived, gradient_norm,
            learning_rate, and with an adversarial loss, adversarial, discriminator and adaptive_weight.
        state_sharding: where all of a `VisionState` lies: whole on every device.
        batch_sharding: where a batch lies.
    """

    def __init__(self, config: VisionTrainConfig, mesh: Mesh):
        """Raises `Emu3Error` if the mesh does not split the pictures and clips of a step evenly."""
        parts = mesh.shape["data"]
        for field in ("stills", "clips"):
            ok = getattr(config.pixels, field) % parts == 0
            check_field(config.pixels, field, ok, f"a multiple of {parts}, the parts that the mesh splits it into")
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
        """Before the first step: of `params`, or of random ones."""
        return jax.jit(self._initial, out_shardings=self.state_sharding)(params)

    def abstract_state(self) -> VisionState:
        """Shapes, dtypes and shardings of a state."""
        abstract = jax.eval_shape(lambda: self._initial(None))
        place = self.state_sharding
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Likewise of a batch."""
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
        # A run that starts from a trained tokenizer keeps its codes until the moving averages have seen data.
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
        # At the start the average follows at once, or random weights would stay in it for long.
        decay = jnp.minimum(config.average, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
        average = _flat(average)
        average[CODEBOOK] = codes  # an average of codes is no code; these are averages already
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
        """The loss without the discriminator's part and the reconstructed pixels; and what else came of it.

        `batch_statistics`: how far batch norms use the batch's statistics; see `models.vision_layers.BatchNorm`.
        """
        weights = self.config.loss
        flat = _flat(params)
        codebook = jax.lax.stop_gradient(flat[CODEBOOK])
        # Stored statistics are no weights: they are replaced, not descended on.
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
        """The discriminator's weighted slope at the reconstructed pixels, the discriminator trained, and metrics.

        See VQGAN, arXiv 2012.09841, 3.1.
        """
        weights, (params, opt_state) = self.config.loss, state.discriminator
        true = _frames(pixels)
        on = (state.step >= weights.adversarial_from).astype(jnp.float32)

        def scores(params: Any, pixels: jax.Array) -> Any:
            return self._discriminator.apply({"params": params}, pixels)

        def judge(out: jax.Array) -> jax.Array:
            return -scores(params, out).mean()

        def last_layer(*cotangents: jax.Array) -> jax.Array:
            # XLA drops what lies behind that layer: nothing asks for it.
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
        # Before its time the discriminator stays as it was, its optimiser too.
        kept = jax.tree.map(
            lambda new, old: jnp.where(on > 0, new, old),
            (optax.apply_updates(params, updates), opt_state),
            state.discriminator,
        )
        return adaptive * slope, kept, {"adversarial": value, "discriminator": loss, "adaptive_weight": adaptive}

    def _codes(
        self, state: VisionState, latents: jax.Array, codes: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """The codebook after the step: codes follow their latents, and dead ones become latents of the batch.

        Returns:
            The codebook, `used` and `sums` of the state, the share of the codes that occur, and how many were revived.
        """
        config, count = self.config, len(state.used)
        decay = config.code_decay
        hits = jnp.zeros(count, jnp.float32).at[codes].add(1.0)
        sums = jnp.zeros_like(state.sums).at[codes].add(latents)
        # Until a code has been used, its moving averages weigh nothing: the first data replace what was random.
        used = decay * state.used + (1 - decay) * hits
        sums = decay * state.sums + (1 - decay) * sums
        followed = jnp.where(
            used[:, None] > 1e-6, sums / jnp.maximum(used, 1e-6)[:, None], _flat(state.params)[CODEBOOK]
        )
        dead = used < config.dead_below
        # The worse a latent is coded, the likelier it becomes a code, as in k-means++: most are plain background.
        errors = jnp.sum((latents - _flat(state.params)[CODEBOOK][codes]) ** 2, axis=-1)
        fresh = latents[jax.random.choice(key, len(latents), (count,), p=errors / jnp.maximum(errors.sum(), 1e-30))]
        embedding = jnp.where(dead[:, None], fresh, followed)
        # A revived code has some time to find latents before it counts as dead again.
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
    """The nearest code of each latent [..., C], int32 [...], by one product: for training, where ties do not matter."""
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
    """uint8 [N, (T,) H, W, 3] as float32 in -1..1, some zoomed, mirrored and recoloured; a clip's frames alike."""
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
        # The window that the zoom shows lies anywhere within the picture.
        room = jnp.asarray([height, width]) * (zoom - 1)
        values = jax.image.scale_and_translate(
            values, values.shape, (values.ndim - 3, values.ndim - 2), jnp.full(2, zoom), -place * room, "cubic"
        )
        return jnp.clip(values @ mixing + jnp.broadcast_to(shift, values.shape), -1, 1)

    changed = jax.vmap(change)(values, zoom=zoom, place=place, mirrored=mirrored, mixing=mixing, shift=shift)
    return jnp.where(chosen.reshape(-1, *(1,) * (values.ndim - 1)), changed, values)


def _frames(pixels: Mapping[str, jax.Array]) -> jax.Array:
    """Stills, then the frames of clips, [N, H, W, 3]."""
    return jnp.concatenate([pixels[k].reshape(-1, *pixels[k].shape[-3:]) for k in ("stills", "clips") if k in pixels])


def _stored_statistics(params: dict, sown: Any, momentum: float) -> dict:
    """The batch norms' new `mean` and `var`, by path: a share of what all their calls in the step saw together."""
    flat = _flat(sown)
    new = {}
    for path in sorted({path[:-1] for path in flat}):  # in one order, or each process compiles its own program
        means, variances, counts = (flat[*path, name] for name in ("mean", "var", "count"))
        total = sum(counts)
        mean = sum(m * n for m, n in zip(means, counts, strict=True)) / total
        var = sum((v + (m - mean) ** 2) * n for v, m, n in zip(variances, means, counts, strict=True)) / total
        for name, value in (("mean", mean), ("var", var)):
            new[*path, name] = (1 - momentum) * params[*path, name] + momentum * value
    return new


def _flat(tree: Any) -> dict[tuple[str, ...], jax.Array]:
    return dict(traverse_util.flatten_dict(tree))
