"""`load`: loads a bundle from disk as an `Emu3` in memory."""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping

from jax.sharding import Mesh

from emu3_jax.checkpoints.adapter import SavedAdapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.checkpoints.merged import load_merged
from emu3_jax.compilation import check_backend, enable_persistent_cache
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.language import Language
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.models import capability
from emu3_jax.models.quantization import check_kind
from emu3_jax.printable import shown
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings, use_mesh, vision_shardings
from emu3_jax.text.prompts import prompt_templates

_log = logging.getLogger("emu3_jax")


def load(
    model: str | os.PathLike | None = None,
    *,
    adapter: str | os.PathLike | None = None,
    vision: "Emu3 | str | os.PathLike | None" = None,
    dtype: str | None = None,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    quantize: str | None = None,
    fast_pixels: bool = False,
    verify: bool = False,
) -> Emu3:
    """Loads a bundle to the default device, or spreads it over a mesh of devices.

    Args:
        model: directory of a bundle (`emu3-jax convert` makes one), or None for the embedded model, a small model that
            generates and describes emoji, drawings and coloured shapes.
        adapter: directory of a LoRA adapter, from `emu3-jax train --adapter-only` or PEFT. It is merged into the
            decoder's weights in float32, one array at a time, and needs no memory afterwards.
        vision: source of the vision tokenizer, if not `model`: another bundle, or a loaded model, which then shares its
            vision tokenizer.
        dtype: "bfloat16", "float16" or "float32": the decoder's weights and compute dtype. By default the bundle's;
            with an adapter that was trained here, that of its training; and float16 in place of bfloat16 on NVIDIA
            GPUs before Ampere, such as a T4, which lack bfloat16.
        mesh: "tensor=4", a mapping of axes to sizes, or a mesh from `sharding.mesh.make_mesh`: the decoder's weights
            are restored straight to their parts, and generation runs on all its devices. In float32 tokens do not
            change; in narrower dtypes sums round in another order.
        quantize: "int8" keeps the decoder's matrices and the KV cache as int8, "int8-weights" the matrices alone, "fp8"
            the matrices as float8 (e4m3) and the cache as int8: half the memory, and other results. By default as the
            bundle is stored: a full bundle is not quantised, and a quantised one stays as it is (with an adapter, the
            merged weights are not quantised).
        fast_pixels: decode codes at the device's default precision (TF32 on GPUs, bfloat16 on TPUs). This is faster and
            changes pixels slightly. Encoding is always exact.
        verify: first check all files of the bundles and the adapter against their checksums, as `emu3-jax doctor`
            does. The files of the embedded model are always checked.

    Returns:
        The model.

    Raises:
        Emu3Error: if a bundle or the adapter is absent or damaged, the adapter or the vision tokenizer is of another
            model, `verify` finds no
            checksums or other ones, the mesh does not fit the devices or the model, or `quantize` is none of these, or
            another kind than that of a quantised bundle.
    """
    paths = {"model": model, "adapter": adapter, "vision": None if isinstance(vision, Emu3) else vision}
    for argument, path in paths.items():
        _check_is_path(argument, path)
    check_kind(quantize)
    capability.simulated_capability()  # a wrong value is told on every device
    enable_persistent_cache()
    bundle = Bundle.open(embedded_bundle()) if model is None else Bundle.open(model, verify=verify)
    if mesh is not None and not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    language, name = None, bundle.path.name
    saved = None
    if adapter is not None:
        bundle = full_bundle(bundle, "the adapted model")
        saved = SavedAdapter.open(adapter, bundle, verify=verify)
    if bundle.has("decoder"):
        config = bundle.decoder_config if saved is None else saved.decoder
        with use_mesh(mesh):
            dtype = decoder_dtype(dtype, config.dtype, bundle.quantize or quantize)
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        shardings = None if mesh is None else decoder_shardings(config, mesh)
        if saved is None:
            params = bundle.load_decoder(shardings, dtype, quantize)
        else:
            params, name = load_merged(bundle, saved, shardings, dtype, quantize), f"{name} + {saved.name}"
        templates = prompt_templates(bundle.template, config.clip_layout)
        language = Language(config, params, bundle.tokenizer(), templates, mesh, bundle.quantize or quantize)
    tokenizer = _load_vision(bundle, vision, mesh, fast_pixels, verify)
    if language is not None and tokenizer is not None:
        ids, codes = language.config.tokens.visual_count, tokenizer.config.codebook_size
        if ids != codes:
            raise Emu3Error(
                f"{bundle.path}: the decoder has {ids} visual ids, but the vision tokenizer has {codes} codes: use the "
                "parts of one and the same model"
            )
    return Emu3(name, language, tokenizer)


def _check_is_path(argument: str, value: object) -> None:
    """Raises an `Emu3Error` that names the argument, unless `value` is a path or None."""
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, os.PathLike) or not isinstance(os.fspath(value), str):
        also = ", a loaded model" if argument == "vision" else ""
        raise Emu3Error(
            f"{argument} is {shown(value)}: it must be the path of a directory (a text or a Path){also}, or None"
        )


def decoder_dtype(wanted: str | None, own: str, quantize: str | None = None) -> str | None:
    """The dtype to load a decoder in, and one warning line where the GPU lacks what is asked for.

    Args:
        wanted: what the caller asks for, or None.
        own: of the bundle.
        quantize: of `models.quantization.KINDS`, or None.

    Returns:
        `wanted`, or "float16" where nothing is asked for, the bundle says bfloat16, and the GPU has no bfloat16.
    """
    check_backend()
    if quantize == "fp8" and capability.emulates_float8():
        _warn_once(
            f"{_gpu()} has no float8: its codes are widened by many instructions; --quantize int8 takes as little "
            "memory and is nearer to the full weights"
        )
    if (wanted or own) != "bfloat16" or not capability.emulates_bfloat16():
        return wanted
    if wanted is not None:
        _warn_once(f"{_gpu()} has no bfloat16, and computes it in float32, slowly; --dtype float16 is what it has")
        return wanted
    _warn_once(
        f"{_gpu()} has no bfloat16: the decoder is loaded in float16, which is more exact, but cuts numbers off at "
        "65,504; if pictures look wrong, compare with --dtype float32"
    )
    return "float16"


def _gpu() -> str:
    found = capability.cuda_capability()
    assert found is not None  # else nothing is emulated
    return f"this GPU (compute capability {capability.text(found)})"


@functools.cache
def _warn_once(line: str) -> None:
    _log.warning(line)


def _load_vision(
    bundle: Bundle, vision: "Emu3 | str | os.PathLike | None", mesh: Mesh | None, fast: bool, verify: bool
) -> Vision | None:
    if isinstance(vision, Emu3):
        shared = vision.vision
        return shared if shared.fast == fast else dataclasses.replace(shared, fast=fast)
    source = bundle if vision is None else Bundle.open(vision, verify=verify)
    if vision is not None:
        source.require("vision")
    if not source.has("vision"):
        return None
    config = source.vision_config
    params = source.load_vision(None if mesh is None else vision_shardings(config, mesh))
    return Vision(config, source.image_config, params, fast)
