"""Loads the parts of a bundle that data preparation needs: the vision tokenizer, and the identity of its codebook."""

import os

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.data.shards import Codebook
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.models.quantizer import CODEBOOK


def load_encoder(bundle: Bundle) -> Emu3:
    """Loads the bundle's vision tokenizer onto the default device. Does not load the decoder."""
    enable_persistent_cache()
    vision = Vision(bundle.vision_config, bundle.image_config, bundle.load_vision())
    return Emu3(bundle.path.name, vision=vision)


def open_bundle(path: str | os.PathLike[str] | None, *, verify: bool = False) -> Bundle:
    """Opens a bundle that must have a vision tokenizer.

    Args:
        path: the bundle; by default the embedded model.
        verify: compare the bundle's files with their checksums.

    Raises:
        Emu3Error: as `Bundle.open`, or the bundle has no vision tokenizer.
    """
    bundle = Bundle.open(embedded_bundle()) if path is None else Bundle.open(path, verify=verify)
    bundle.require("vision")
    return bundle


def bundle_codebook(bundle: Bundle) -> Codebook:
    """The identity of the codebook of the bundle's vision tokenizer. Reads no other weights."""
    return Codebook.of(bundle.array("vision", CODEBOOK))
