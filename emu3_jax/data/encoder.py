"""What data needs of a bundle: its vision tokenizer without the decoder, and the identity of its codebook."""

import os

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.data.shards import Codebook
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.models.quantizer import CODEBOOK


def load_encoder(bundle: Bundle) -> Emu3:
    """The bundle's vision tokenizer on the default device. The decoder stays on disk."""
    enable_persistent_cache()
    vision = Vision(bundle.vision_config, bundle.image_config, bundle.load_vision())
    return Emu3(bundle.path.name, vision=vision)


def open_bundle(path: str | os.PathLike[str] | None, *, verify: bool = False) -> Bundle:
    """The bundle at `path`, by default the embedded model; with `verify`, its files are compared with their checksums.

    Raises:
        Emu3Error: as `Bundle.open`, or the bundle has no vision tokenizer.
    """
    bundle = Bundle.open(embedded_bundle()) if path is None else Bundle.open(path, verify=verify)
    bundle.require("vision")
    return bundle


def bundle_codebook(bundle: Bundle) -> Codebook:
    """The codebook of the bundle's vision tokenizer; no other weights are read."""
    return Codebook.of(bundle.array("vision", CODEBOOK))
