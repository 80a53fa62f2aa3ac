"""Emu3's vision tokenizer, a causal 3D VQ model: pictures and clips to codes of a 32,768-entry codebook, and back.

`make_encoder`, `make_decoder` and `check_codes` serve Emu3.5's tokenizer (`models.ibq`), too.

Axes: B batch, T frames, H W rows and columns of pixels; t frames, h w rows and columns of codes; C channels, N frames
of all clips.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from emu3_jax.config import IbqConfig, VisionConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.capability import target_platform
from emu3_jax.models.ibq import IbqTokenizer
from emu3_jax.models.quantizer import Quantizer
from emu3_jax.models.vision_layers import HIGHEST, GroupNorm, Numerics, SpatialNorm, conv3x3
from emu3_jax.models.vision_stages import Middle, down_stages, over_frames, up_stages
from emu3_jax.models.vision_temporal import (
    PAST,
    CausalConv3d,
    TemporalDownsample,
    TemporalResnetBlock,
    TemporalUpsample,
)

# XLA for TPUs spends most of its time on better schedules. With this effort, the programs of 720x720 pixels compile in
# a fifth of the time, and XLA estimates 20% more cycles for decoding (docs/planning.md).
_COMPILER_OPTIONS = {"tpu": {"exec_time_optimization_effort": -0.5}}


class VisionEncoder(nn.Module):
    """Encodes frames to latents."""

    config: VisionConfig
    numerics: Numerics

    def setup(self) -> None:
        c, numerics = self.config, self.numerics
        self.conv_in = conv3x3(numerics, c.base_channels)
        self.down = down_stages(c, numerics)
        self.mid = Middle(numerics)
        self.norm_out = GroupNorm()
        self.conv_out = conv3x3(numerics, c.latent_channels)
        self.time_conv = [TemporalDownsample(numerics) for _ in range(_doublings(c.temporal_factor))]
        self.time_res_stack = [TemporalResnetBlock(numerics) for _ in range(c.num_res_blocks)]

    def spatial(self, frames: jax.Array) -> jax.Array:
        """Encodes every frame on its own: [N, H, W, in_channels] to [N, h, w, latent_channels]."""
        x = self.conv_in(frames)
        for stage in self.down:
            x = stage(x)
        x = self.mid(x)
        return self.conv_out(nn.silu(self.norm_out(x)))

    def temporal(self, latents: jax.Array, batch_statistics: jax.Array | None = None) -> jax.Array:
        """Convolves causally along time: [B, T, h, w, C] to [B, T / temporal_factor, h, w, C].

        `batch_statistics`: see `BatchNorm`.
        """
        for conv in self.time_conv:
            latents = nn.silu(conv(latents))
        for block in self.time_res_stack:
            latents = block(latents, batch_statistics)
        return latents

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, T, H, W, in_channels], or [B, H, W, in_channels] for stills, to [B, t, h, w, latent_channels]."""
        height, width, channels = pixels.shape[-3:]
        frames = pixels.reshape(-1, height, width, channels)
        latents = over_frames(VisionEncoder.spatial, self, height * width, frames)
        if pixels.ndim == 5:
            return self.temporal(latents.reshape(*pixels.shape[:2], *latents.shape[1:]))
        # A still counts as a clip of equal frames. The spatial network ran only once, because its results are equal.
        return self.temporal(latents[:, None].repeat(self.config.temporal_factor, axis=1))


class VisionDecoder(nn.Module):
    """Decodes latents to frames. Every norm of the spatial network also takes the codebook vectors."""

    config: VisionConfig
    numerics: Numerics

    def setup(self) -> None:
        c, numerics = self.config, self.numerics
        self.time_res_stack = [TemporalResnetBlock(numerics) for _ in range(c.num_res_blocks)]
        self.time_conv = [TemporalUpsample(numerics) for _ in range(_doublings(c.temporal_factor))]
        self.conv_in = conv3x3(numerics, c.base_channels * c.channel_multipliers[-1])
        self.mid = Middle(numerics)
        self.up = up_stages(c, numerics)
        self.norm_out = SpatialNorm(numerics)
        self.conv_out = conv3x3(numerics, c.out_channels)

    def temporal(self, latents: jax.Array, batch_statistics: jax.Array | None = None) -> jax.Array:
        """Convolves causally along time: [B, t, h, w, C] to [B, t * temporal_factor, h, w, C].

        `batch_statistics`: see `BatchNorm`.
        """
        for block in self.time_res_stack:
            latents = block(latents, batch_statistics)
        for conv in self.time_conv:
            latents = nn.silu(conv(latents))
        return latents

    def spatial(self, z: jax.Array, zq: jax.Array) -> jax.Array:
        """Decodes every frame on its own: latents and codebook vectors [N, h, w, C] to [N, H, W, out_channels]."""
        x = self.mid(self.conv_in(z), zq)
        for stage in reversed(self.up):
            x = stage(x, zq)
        return self.conv_out(nn.silu(self.norm_out(x, zq)))

    def __call__(self, z: jax.Array, zq: jax.Array, still: bool) -> jax.Array:
        """Decodes latents and codebook vectors, both [B, t, h, w, C], to frames [B, T, H, W, out_channels].

        The picture of a still is the first frame of its latent. Only this frame is decoded, so T is 1.
        """
        both = self.temporal(jnp.concatenate([z, zq]))
        if still:
            both = both[:, :1]
        b, frames, height, width, channels = both.shape
        z, zq = both.reshape(2, -1, height, width, channels)
        pixels = over_frames(VisionDecoder.spatial, self, height * width * self.config.spatial_factor**2, z, zq)
        return pixels.reshape(b // 2, frames, *pixels.shape[1:])


class VisionTokenizer(nn.Module):
    """The whole vision tokenizer (upstream `Emu3VisionVQModel`). Call `encode`, `latents` or `decode` through `apply`.

    The spatial network processes groups of frames in a loop. To shard a batch over devices, wrap `apply` in
    `jax.shard_map`, so that each device loops over its own rows.

    Attributes:
        config: shapes.
        numerics: dtypes and precision; by default exact float32.
    """

    config: VisionConfig
    numerics: Numerics = Numerics()

    def setup(self) -> None:
        c, numerics = self.config, self.numerics
        self.encoder = VisionEncoder(c, numerics)
        self.decoder = VisionDecoder(c, numerics)
        self.quantize = Quantizer(c.codebook_size, c.embed_dim)
        self.quant_conv = CausalConv3d(numerics, c.embed_dim)
        self.post_quant_conv = CausalConv3d(numerics, c.latent_channels)

    def latents(self, pixels: jax.Array) -> jax.Array:
        """The latents before quantisation.

        Args:
            pixels: float in -1..1, stills [B, H, W, in_channels] or clips [B, T, H, W, in_channels]. H and W must be
                multiples of `spatial_factor`, T of `temporal_factor`.

        Returns:
            float32 [B, t, h, w, embed_dim]; t is 1 for stills.

        Raises:
            Emu3Error: `pixels` has an illegal shape.
        """
        self._check_pixels(pixels)
        return self.quant_conv(self.encoder(pixels.astype(jnp.float32))).astype(jnp.float32)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Encodes pictures or clips to codes.

        Args:
            pixels: as for `latents`.

        Returns:
            int32 [B, h, w] for stills, [B, t, h, w] for clips.

        Raises:
            Emu3Error: `pixels` has an illegal shape.
        """
        codes = self.quantize(self.latents(pixels))
        return codes[:, 0] if pixels.ndim == 4 else codes

    def decode(self, codes: jax.Array) -> jax.Array:
        """Decodes codes to pictures or clips.

        Args:
            codes: integers [B, h, w] for stills, [B, t, h, w] for clips. All must be in the codebook: `check_codes`
                checks this, `decode` does not.

        Returns:
            float32 pixels, nominally in -1..1 but not clipped: [B, H, W, out_channels], or for clips
            [B, t * temporal_factor, H, W, out_channels].

        Raises:
            Emu3Error: `codes` has another rank.
        """
        if codes.ndim not in (3, 4):
            raise Emu3Error(
                f"codes have shape {codes.shape}: they must be [B, h, w] for stills, or [B, t, h, w] for clips"
            )
        still = codes.ndim == 3
        return self.decode_vectors(self.quantize.lookup(codes[:, None] if still else codes), still)

    def decode_vectors(self, zq: jax.Array, still: bool) -> jax.Array:
        """Decodes codebook vectors [B, t, h, w, embed_dim] (t is 1 for stills). Returns the same as `decode`."""
        pixels = self.decoder(self.post_quant_conv(zq), zq, still)
        return pixels[:, 0] if still else pixels

    def reconstruct(
        self,
        stills: jax.Array | None,
        clips: jax.Array | None,
        quantise: Callable[[jax.Array], jax.Array],
        batch_statistics: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes, quantises and decodes pictures and clips, for training.

        The results equal those of `latents` and `decode_vectors`. Frames of pictures and clips pass the spatial
        networks together, which makes fewer and larger operations.

        Args:
            stills: float in -1..1, [B, H, W, in_channels], or None.
            clips: float in -1..1, [B, T, H, W, in_channels], with the same H and W, or None.
            quantise: function from all latents [P, embed_dim], stills first, to codebook vectors [P, embed_dim]. It
                defines the gradient of quantisation.
            batch_statistics: see `BatchNorm`.

        Returns:
            The latents [P, embed_dim]; and the pixels [N, H, W, out_channels], stills first, then frames of clips.
        """
        inputs = [x for x in (stills, clips) if x is not None]
        size = inputs[0].shape[-3:]
        frames = jnp.concatenate([x.reshape(-1, *size) for x in inputs])
        spatial = self.encoder.spatial(frames)
        split = 0 if stills is None else len(stills)
        sequences = []
        if stills is not None:
            sequences.append(spatial[:split, None].repeat(self.config.temporal_factor, axis=1))
        if clips is not None:
            sequences.append(spatial[split:].reshape(*clips.shape[:2], *spatial.shape[1:]))
        latents = [self.quant_conv(self.encoder.temporal(x, batch_statistics)).astype(jnp.float32) for x in sequences]
        flat = jnp.concatenate([z.reshape(-1, self.config.embed_dim) for z in latents])
        vectors = jnp.split(quantise(flat), [latents[0].size // self.config.embed_dim])
        vectors = [v.reshape(z.shape) for v, z in zip(vectors, latents, strict=False)]
        z_frames, zq_frames = [], []
        for index, zq in enumerate(vectors):
            both = jnp.concatenate([self.post_quant_conv(zq).astype(zq.dtype), zq])
            both = self.decoder.temporal(both, batch_statistics)
            if index == 0 and stills is not None:
                both = both[:, :1]
            z, zq = jnp.split(both.reshape(-1, *both.shape[2:]), 2)
            z_frames.append(z)
            zq_frames.append(zq)
        return flat, self.decoder.spatial(jnp.concatenate(z_frames), jnp.concatenate(zq_frames))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes and decodes `pixels`. This uses every parameter, as `init` needs."""
        return self.decode(self.encode(pixels))

    def _check_pixels(self, pixels: jax.Array) -> None:
        c, shape = self.config, pixels.shape
        if len(shape) not in (4, 5) or shape[-1] != c.in_channels:
            raise Emu3Error(
                f"pixels have shape {shape}: they must be [B, H, W, {c.in_channels}] for stills, or "
                f"[B, T, H, W, {c.in_channels}] for clips"
            )
        height, width = shape[-3:-1]
        if height % c.spatial_factor or width % c.spatial_factor or 0 in shape:
            raise Emu3Error(
                f"pixels have shape {shape}: H ({height}) and W ({width}) must be multiples of "
                f"{c.spatial_factor}, and no axis may be 0; resize the picture"
            )
        if len(shape) == 5 and shape[1] % c.temporal_factor:
            missing = -shape[1] % c.temporal_factor
            raise Emu3Error(
                f"the clip has {shape[1]} frames: it must be a multiple of {c.temporal_factor}; repeat the last "
                f"frame {missing} times, or drop {c.temporal_factor - missing}"
            )


def vision_module(config: VisionTokenizerConfig, numerics: Numerics | None = None) -> VisionTokenizer | IbqTokenizer:
    """The module of a vision tokenizer. Both have `latents`, `encode` and `decode`, which take stills.

    `numerics` None means exact float32.
    """
    kind = IbqTokenizer if isinstance(config, IbqConfig) else VisionTokenizer
    return kind(config, Numerics() if numerics is None else numerics)


def check_codes(codes: np.ndarray, config: VisionTokenizerConfig) -> None:
    """Checks on the host that codes can be decoded. A device would silently clamp codes outside the codebook.

    Args:
        codes: integers [..., h, w].
        config: config of the vision tokenizer that will decode them.

    Raises:
        Emu3Error: the array is empty, does not hold whole numbers, or has a code outside the codebook.
    """
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise Emu3Error(f"codes have dtype {codes.dtype}: they must be whole numbers; pass what `tokenize` returned")
    if codes.ndim < 2 or codes.size == 0:
        raise Emu3Error(f"codes have shape {codes.shape}: they must be [..., rows, columns] with at least one code")
    outside = (codes < 0) | (codes >= config.codebook_size)
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise Emu3Error(
            f"code {codes[place]} at {list(place)} is outside the codebook: codes must be from 0 to "
            f"{config.codebook_size - 1}; if these are token ids, subtract the first visual id"
        )


def make_encoder(config: VisionTokenizerConfig) -> jax.stages.Wrapped:
    """Returns the tokenizer's `encode` as a jitted `(params, pixels) -> codes`. It compiles once per shape.

    The function is for the current platform, see `capability.target_platform`. It cannot be called inside `jax.jit`.
    """
    return _jitted(config, "encode", False, target_platform())


def make_decoder(
    config: VisionTokenizerConfig, fast: bool = False, place: NamedSharding | None = None
) -> jax.stages.Wrapped:
    """Returns the tokenizer's `decode` as a jitted `(params, codes) -> pixels`, as `make_encoder` does.

    `fast` computes float32 products at the device's default precision: TF32 on recent GPUs, bfloat16 on TPUs; on CPUs
    nothing changes. Encoding has no such option, because codes could change.

    `place` is how a mesh splits the batch: each device decodes its own rows, and has all weights. Without it, XLA
    gathers a split batch, because the spatial network loops over its pictures.
    """
    return _jitted(config, "decode", fast, target_platform(), place)


@functools.cache
def _jitted(
    config: VisionTokenizerConfig, method: str, fast: bool, platform: str, place: NamedSharding | None = None
) -> jax.stages.Wrapped:
    model = vision_module(config, _inference(fast))

    def run(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params}, x, method=method)

    run.__name__ = method  # for profiles
    if place is not None:
        run = jax.shard_map(
            run, mesh=place.mesh, in_specs=(PartitionSpec(), place.spec), out_specs=place.spec, check_vma=False
        )
    return jax.jit(run, compiler_options=_COMPILER_OPTIONS.get(platform))


def _inference(fast: bool) -> Numerics:
    return Numerics(precision=jax.lax.Precision.DEFAULT if fast else HIGHEST)


class Stream:
    """Encodes or decodes a clip part by part. The results equal those of the whole clip at once.

    Between parts, each causal convolution keeps the last two frames of its input, at the resolution of the codes. So
    memory does not grow with the length of the clip. Parts of equal size share a compiled program.
    """

    def __init__(
        self, config: VisionConfig, params: Any, method: str, fast: bool = False, place: NamedSharding | None = None
    ):
        """Starts a stream. `method` is "encode" or "decode"; for `fast` and `place` see `make_decoder`."""
        self._step = _make_step(config, method, fast, target_platform(), place)
        self._params, self._place = params, place
        self._past = None

    def __call__(self, part: jax.Array | np.ndarray) -> jax.Array:
        """Processes the next part: pixels [B, T, H, W, in_channels] to codes, or codes [B, t, h, w] to pixels.

        Raises:
            Emu3Error: the part has an illegal shape, see `VisionTokenizer`.
        """
        if self._past is None:
            # Placed elsewhere, the second step would compile again, and on a mesh of several processes the first step
            # would fail.
            shapes = self._abstract_past(part)
            self._past = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
        result, self._past = self._step(self._params, self._past, part)
        return result

    def lower(self, part: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """Lowers the program of a part. The weights may be abstract, with shardings."""
        return self._step.lower(self._params, self._abstract_past(part), part)

    def _abstract_past(self, part: Any) -> Any:
        """The state between parts. It is placed like the batch or else the weights, because a step returns it there."""
        place = self._place or getattr(jax.tree.leaves(self._params)[0], "sharding", None)
        shapes = jax.eval_shape(self._step, self._params, {}, part)[1]
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


@functools.cache
def _make_step(
    config: VisionConfig, method: str, fast: bool, platform: str, place: NamedSharding | None = None
) -> jax.stages.Wrapped:
    """The jitted step `(params, past, part) -> (result, past)` of a stream."""
    model = VisionTokenizer(config, _inference(fast))

    def step(params: Any, past: Any, part: jax.Array) -> tuple[jax.Array, Any]:
        result, changed = model.apply({"params": params, PAST: past}, part, method=method, mutable=[PAST])
        return result, changed[PAST]

    if place is not None:
        rows = place.spec
        step = jax.shard_map(
            step, mesh=place.mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=(rows, rows), check_vma=False
        )
    return jax.jit(step, donate_argnums=1, compiler_options=_COMPILER_OPTIONS.get(platform))


def _doublings(factor: int) -> int:
    """The base-2 logarithm of a power of two."""
    return factor.bit_length() - 1
