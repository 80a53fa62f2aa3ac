"""`load`: from a bundle on disk to an `Emu3` in memory."""

import dataclasses
import os

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.pipeline import Emu3, Language, Vision
from emu3_jax.text.prompts import PRESETS


def load(
    model: str | os.PathLike | None = None,
    *,
    vision: "Emu3 | str | os.PathLike | None" = None,
    dtype: str | None = None,
) -> Emu3:
    """Loads a bundle onto the default device.

    Args:
        model: the bundle's directory (`emu3-jax convert` makes one).
        vision: where the vision tokenizer comes from, if not from `model`: another bundle, or a loaded model, whose
            vision tokenizer is then shared in memory.
        dtype: "bfloat16", "float16" or "float32": the decoder's weights and compute dtype. By default the bundle's.

    Raises:
        Emu3Error: if a bundle is absent or damaged.
    """
    if model is None:
        raise Emu3Error("no model was given: pass --model BUNDLE (emu3-jax convert makes one)")
    enable_persistent_cache()
    bundle = Bundle.open(model)
    language = None
    if bundle.has("decoder"):
        config = bundle.decoder_config
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        params = bundle.load_decoder(dtype=dtype)
        language = Language(config, params, bundle.tokenizer(), PRESETS[bundle.template])
    return Emu3(bundle.path.name, language, _load_vision(bundle, vision))


def _load_vision(bundle: Bundle, vision: "Emu3 | str | os.PathLike | None") -> Vision | None:
    if isinstance(vision, Emu3):
        return vision.vision
    source = bundle if vision is None else Bundle.open(vision)
    if vision is not None:
        source.require("vision")
    if not source.has("vision"):
        return None
    return Vision(source.vision_config, source.image_config, source.load_vision())
