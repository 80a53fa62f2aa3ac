"""Emu3.5's vision tokenizer, a 2D VQGAN: pictures to codes of a 131,072-entry codebook, and back.

The network is that of taming-transformers and Stable Diffusion 1. Axes: B batch, H W rows and columns of pixels, h w
rows and columns of codes, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from emu3_jax.config import IbqConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.quantizer import DotProductQuantizer
from emu3_jax.models.vision_layers import GroupNorm, Numerics, conv1x1, conv3x3
from emu3_jax.models.vision_stages import Middle, down_stages, over_frames, up_stages


class IbqEncoder(nn.Module):
    """Encodes pictures [B, H, W, in_channels] to latents [B, h, w, latent_channels]."""

    config: IbqConfig
    numerics: Numerics

    def setup(self) -> None:
        c, numerics = self.config, self.numerics
        self.conv_in = conv3x3(numerics, c.base_channels)
        self.down = down_stages(c, numerics)
        self.mid = Middle(numerics)
        self.norm_out = GroupNorm()
        self.conv_out = conv3x3(numerics, c.latent_channels)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.conv_in(pixels)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(nn.silu(self.norm_out(self.mid(x))))


class IbqDecoder(nn.Module):
    """Decodes latents [B, h, w, latent_channels] to pictures [B, H, W, out_channels]. No norm sees the codes."""

    config: IbqConfig
    numerics: Numerics

    def setup(self) -> None:
        c, numerics = self.config, self.numerics
        self.conv_in = conv3x3(numerics, c.base_channels * c.channel_multipliers[-1])
        self.mid = Middle(numerics)
        self.up = up_stages(c, numerics)
        self.norm_out = GroupNorm()
        self.conv_out = conv3x3(numerics, c.out_channels)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(latents))
        for stage in reversed(self.up):
            x = stage(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class IbqTokenizer(nn.Module):
    """The whole vision tokenizer (upstream `IBQ`). Call `encode`, `latents` or `decode` through `apply`.

    Large batches are processed in groups of pictures, one group after the other.

    Attributes:
        config: shapes.
        numerics: dtypes and precision; by default exact float32.
    """

    config: IbqConfig
    numerics: Numerics = Numerics()

    def setup(self) -> None:
        c, numerics = self.config, self.numerics
        self.encoder = IbqEncoder(c, numerics)
        self.decoder = IbqDecoder(c, numerics)
        self.quantize = DotProductQuantizer(c.codebook_size, c.embed_dim)
        self.quant_conv = conv1x1(numerics, c.embed_dim)
        self.post_quant_conv = conv1x1(numerics, c.latent_channels)

    def latents(self, pixels: jax.Array) -> jax.Array:
        """The latents before quantisation.

        Args:
            pixels: float in -1..1, [B, H, W, in_channels]. H and W must be multiples of `spatial_factor`.

        Returns:
            float32 [B, h, w, embed_dim].

        Raises:
            Emu3Error: `pixels` has an illegal shape.
        """
        c, shape = self.config, pixels.shape
        if len(shape) != 4 or shape[-1] != c.in_channels:
            raise Emu3Error(f"pixels have shape {shape}: they must be [B, H, W, {c.in_channels}]; Emu3.5 has no clips")
        if shape[1] % c.spatial_factor or shape[2] % c.spatial_factor or 0 in shape:
            raise Emu3Error(
                f"pixels have shape {shape}: H ({shape[1]}) and W ({shape[2]}) must be multiples of "
                f"{c.spatial_factor}, and no axis may be 0; resize the picture"
            )
        x = over_frames(IbqEncoder.__call__, self.encoder, shape[1] * shape[2], pixels.astype(jnp.float32))
        return self.quant_conv(x).astype(jnp.float32)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Encodes pictures to codes, int32 [B, h, w]. Arguments and errors are those of `latents`."""
        return self.quantize(self.latents(pixels))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Decodes codes to pictures.

        Args:
            codes: integers [B, h, w]. All must be in the codebook: `check_codes` checks this, `decode` does not.

        Returns:
            float32 pixels [B, H, W, out_channels], nominally in -1..1 but not clipped.

        Raises:
            Emu3Error: `codes` has another rank.
        """
        if codes.ndim != 3:
            raise Emu3Error(f"codes have shape {codes.shape}: they must be [B, h, w]; Emu3.5 has no clips")
        latents = self.post_quant_conv(self.quantize.lookup(codes))
        pixels = codes.shape[1] * codes.shape[2] * self.config.spatial_factor**2
        return over_frames(IbqDecoder.__call__, self.decoder, pixels, latents)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes and decodes `pixels`. This uses every parameter, as `init` needs."""
        return self.decode(self.encode(pixels))
