"""Converts published PyTorch checkpoints to a bundle. Each byte is read once; memory holds one array at a time."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu3_jax import storage
from emu3_jax.checkpoints.bundle import TEMPLATES, VOCABULARY, Bundle, decoder_dict
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.hub import fetch
from emu3_jax.checkpoints.layouts import FLOAT_DTYPES, Param, decoder_params, vision_counters, vision_params
from emu3_jax.checkpoints.parts import LazyArray, write_config, write_part
from emu3_jax.checkpoints.published import Published
from emu3_jax.checkpoints.quantized import quantised_arrays
from emu3_jax.checkpoints.tensors import Tensor
from emu3_jax.config import DecoderConfig, IbqConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_directory, require_outside
from emu3_jax.models.quantization import check_kind, is_quantised
from emu3_jax.printable import shown
from emu3_jax.progress import Progress
from emu3_jax.text.tokenizer import Tokenizer

_LOG = logging.getLogger("emu3_jax")
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in FLOAT_DTYPES}


@dataclasses.dataclass
class _Plan:
    """The contents of the new bundle. All errors in the sources are found while this plan is made."""

    decoder: DecoderConfig | None = None
    vision: VisionTokenizerConfig | None = None
    vision_extras: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    template: str = "chat"
    arrays: dict[str, list[LazyArray]] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of all arrays."""
        return sum(array.nbytes for arrays in self.arrays.values() for array in arrays)


def convert(
    sources: Sequence[str | Path],
    output: str | Path,
    dtype: str | None = None,
    template: str | None = None,
    progress: bool | None = None,
    quantize: str | None = None,
) -> Bundle:
    """Converts checkpoints to a new bundle.

    Args:
      sources: directories or Hugging Face hub ids, in any published layout. Together they may hold at most one decoder
        and one vision tokenizer.
      output: directory of the new bundle. It must not exist.
      dtype: dtype of the decoder's weights ("bfloat16", "float16", "float32"), or None to keep the stored dtype. The
        vision tokenizer keeps its dtype. Quantisation always uses the stored weights.
      template: prompt template, "chat" or "stage1"; by default "stage1" if a source's name contains it, else "chat".
      progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.
      quantize: store the decoder's matrices as codes and scales: "int8", "int8-weights" or "fp8", see `load`.

    Returns:
      The new bundle, opened.

    Raises:
      Emu3Error: bad arguments, damaged files, or weights that do not fit their config. No files are left behind.
    """
    if not sources:
        raise Emu3Error("no SRC given: name at least one checkpoint directory or hub id")
    if dtype is not None and dtype not in _DTYPES:
        raise Emu3Error(f"dtype is {shown(dtype)}: it must be {', '.join(FLOAT_DTYPES)}")
    if template is not None and template not in TEMPLATES:
        raise Emu3Error(f"template is {shown(template)}: it must be {' or '.join(TEMPLATES)}")
    check_kind(quantize)
    output = storage.place(output)
    if storage.exists(output):
        raise Emu3Error(f"{output} exists already: choose another name or delete it first")
    names = [str(source) for source in sources]
    require_outside(output, *names)
    plan = _plan([Published.open(fetch(name, progress)) for name in names], dtype, quantize)
    plan.template = template or ("stage1" if any("stage1" in Path(n).name.lower() for n in names) else "chat")
    with (
        new_directory(output, plan.nbytes + (plan.tokenizer.nbytes if plan.tokenizer else 0)) as directory,
        Progress(progress, plan.nbytes, "bytes", name="convert") as bar,
    ):
        if plan.decoder is not None:
            config = decoder_dict(plan.decoder, quantize)
            write_part(directory / "decoder", config, plan.arrays["decoder"], bar.update)
        if plan.vision is not None:
            config = {"vision": plan.vision.to_dict(), **plan.vision_extras}
            write_part(directory / "vision", config, plan.arrays["vision"], bar.update)
        if plan.tokenizer is not None:
            write_config(directory / "tokenizer", {"template": plan.template})
            plan.tokenizer.to_file(directory / "tokenizer" / VOCABULARY)
        write_checksums(directory)
    return Bundle.open(output)


def _plan(sources: Sequence[Published], dtype: str | None, quantize: str | None) -> _Plan:
    owners: dict[str, Published] = {}
    for source in sources:
        for part in source.layout.parts:
            if part in owners:
                what = "vision tokenizer" if part == "vision" else part
                raise Emu3Error(
                    f"{source.path} and {owners[part].path} both hold a {what}: convert them to two bundles, one "
                    f"{what} each"
                )
            owners[part] = source
    vision = owners["vision"].vision_config() if "vision" in owners else None
    if quantize is not None and "decoder" not in owners:
        raise Emu3Error("--quantize needs a decoder, but no SRC holds one: leave it out, or add a decoder as a SRC")
    decoder = _decoder_config(owners, vision) if "decoder" in owners else None
    _check_weights(sources, owners, decoder, vision)
    plan = _Plan()
    if decoder is not None:
        _plan_decoder(plan, owners["decoder"], decoder, None if dtype is None else _DTYPES[dtype], quantize)
    if vision is not None:
        _plan_vision(plan, owners["vision"], vision)
    return plan


def _decoder_config(owners: Mapping[str, Published], vision: VisionTokenizerConfig | None) -> DecoderConfig:
    source = owners["decoder"]
    try:
        return source.decoder_config(vision.codebook_size if vision else None)
    except Emu3Error as error:
        if isinstance(vision, IbqConfig) and source.family == "emu3":
            raise Emu3Error(
                f"{source.path} is a decoder of Emu3, but {owners['vision'].path} is the vision tokenizer of Emu3.5: "
                "give the two of one model"
            ) from error
        raise


def _check_weights(
    sources: Sequence[Published],
    owners: Mapping[str, Published],
    decoder: DecoderConfig | None,
    vision: VisionTokenizerConfig | None,
) -> None:
    """Raises one `Emu3Error` that names all sources whose weights do not fit their configs."""
    faults = []
    for source in sources:
        found = source.misfits(
            decoder if owners.get("decoder") is source else None, vision if owners.get("vision") is source else None
        )
        if found:
            faults.append(f"{source.path}: {'; '.join(found)}")
    if faults:
        names = " and ".join(sorted({source.config_file.name for source in sources}))
        raise Emu3Error(
            f"the weights do not fit {names}: {' | '.join(faults)}; "
            f"check that {names} belongs to these weights, and that no file is missing"
        )


def _plan_decoder(
    plan: _Plan, source: Published, config: DecoderConfig, dtype: np.dtype | None, quantize: str | None
) -> None:
    params = decoder_params(config)
    arrays = _lazy_arrays(source, "decoder", params, dtype)
    # The compute dtype is the dtype of the weights, as in PyTorch.
    plan.decoder = dataclasses.replace(config, dtype=_main_dtype(arrays))
    if quantize is not None:
        rest = [array for array in arrays if not is_quantised(array.path)]
        matrices = [param for param in params if is_quantised(param.path)]
        arrays = rest + quantised_arrays(_lazy_arrays(source, "decoder", matrices, dtype, cast_equal=False), quantize)
    plan.arrays["decoder"] = arrays
    plan.tokenizer = source.tokenizer(config.tokens)


def _plan_vision(plan: _Plan, source: Published, config: VisionTokenizerConfig) -> None:
    plan.vision = config
    plan.arrays["vision"] = _lazy_arrays(source, "vision", vision_params(config), None)
    counters = {
        weight.name: int(tensor.read())
        for weight in vision_counters(config)
        for tensor in source.tensors_of([weight], "vision")
    }
    gaps, sentence = source.image_gaps()
    if gaps:
        _LOG.warning(sentence)
    plan.vision_extras = {"image": source.image_config().to_dict(), "num_batches_tracked": counters}


def _lazy_arrays(
    source: Published, part: str, params: Sequence[Param], dtype: np.dtype | None, *, cast_equal: bool = True
) -> list[LazyArray]:
    """The arrays of a part, cast to `dtype`. Without `cast_equal`, cast only arrays of several dtypes."""
    arrays = []
    for param in params:
        tensors = source.tensors_of(param.weights, part)
        stored = {tensor.dtype for tensor in tensors}
        if dtype is None and len(stored) > 1:
            raise Emu3Error(
                f"{source.path}: {' and '.join(t.name for t in tensors)} become one array, but have different dtypes "
                f"({', '.join(sorted(str(d) for d in stored))}): choose one with --dtype"
            )
        target = tensors[0].dtype if dtype is None or (len(stored) == 1 and not cast_equal) else dtype
        load = functools.partial(_load, param, tensors, target)
        arrays.append(LazyArray(param.path, param.shape, target, load))
    return arrays


def _load(param: Param, tensors: Sequence[Tensor], dtype: np.dtype) -> np.ndarray:
    return param.pack([tensor.read().astype(dtype, copy=False) for tensor in tensors])


def _main_dtype(arrays: Sequence[LazyArray]) -> str:
    """The dtype with the largest number of bytes."""
    sizes: dict[str, int] = {}
    for array in arrays:
        sizes[array.dtype.name] = sizes.get(array.dtype.name, 0) + array.nbytes
    return max(sizes, key=sizes.__getitem__)
