"""Exports a bundle to the published PyTorch layouts, as safetensors. The tensors equal the converted ones bit for bit.

Memory holds one array at a time.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.checkpoints import layouts
from emu3_jax.checkpoints.bundle import VOCABULARY, Bundle
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.checkpoints.layouts import Layout
from emu3_jax.checkpoints.published_config import (
    decoder_to_published,
    ibq_to_published,
    image_to_published,
    vision_to_published,
)
from emu3_jax.checkpoints.tensors import write_safetensors
from emu3_jax.checkpoints.transformers_tokenizer import special_ids, write_tokenizer
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_directory, require_outside
from emu3_jax.printable import shown
from emu3_jax.progress import Progress
from emu3_jax.text.tokenizer import VISION_TOKENS_FILE

LAYOUTS = ("upstream", "transformers")
SHARD_BYTES = 5 * 10**9
UPSTREAM_DIRECTORIES = {"decoder": "language_model", "vision": "vision_tokenizer"}

# Name, shape and dtype of a tensor to write.
_Entry = tuple[str, tuple[int, ...], np.dtype]


def export(
    bundle: Bundle | str | Path,
    output: str | Path,
    layout: str,
    progress: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a bundle's weights, configs and tokenizer as a PyTorch checkpoint.

    Args:
      bundle: a bundle or its path. It must have a decoder, a vision tokenizer or both.
      output: new directory. It must not exist. With layout "upstream" and both parts, it gets the directories
        `language_model/` and `vision_tokenizer/`. Otherwise it gets the files directly.
      layout: "upstream" (names of the published checkpoints, for the reference's code) or "transformers" (names of
        transformers 5).
      progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.
      shard_bytes: largest size of a safetensors file, in bytes.

    Raises:
      Emu3Error: bad arguments, or a damaged bundle. No files are left behind.
    """
    if layout not in LAYOUTS:
        raise Emu3Error(f"layout is {shown(layout)}: it must be {' or '.join(LAYOUTS)}")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    require_outside(output, bundle.path)
    parts = [part for part in ("decoder", "vision") if bundle.has(part)]
    if not parts:
        raise Emu3Error(f"{bundle.path} has neither a decoder nor a vision part: there are no weights to export")
    if "decoder" in parts:
        bundle = full_bundle(bundle, "the exported checkpoint")
    if layout == "transformers" and "vision" in parts:
        _emu3_vision(bundle)
    total = sum(a.size * a.dtype.itemsize for part in parts for a in bundle.stored(part).values())
    with (
        new_directory(output, total) as directory,
        Progress(progress, total, "bytes", name="export") as bar,
    ):
        writer = functools.partial(_write_weights, bundle, shard_bytes=shard_bytes, bar=bar)
        if layout == "transformers":
            _write_transformers(bundle, parts, directory, writer)
        else:
            for part in parts:
                target = directory / UPSTREAM_DIRECTORIES[part] if len(parts) > 1 else directory
                target.mkdir(exist_ok=True)
                _write_upstream(bundle, part, target, writer)


def _write_upstream(bundle: Bundle, part: str, directory: Path, write_weights: Any) -> None:
    if part == "decoder":
        config = decoder_to_published(bundle.decoder_config, "upstream")
        _write_json(directory / "config.json", {**config, **_dtype(bundle)})
        write_weights([(part, layouts.UPSTREAM_DECODER)], directory)
        if bundle.has("tokenizer"):
            tokenizer = bundle.tokenizer()
            tokenizer.to_file(directory / VOCABULARY)
            (directory / VISION_TOKENS_FILE).write_text(tokenizer.vision_tokens_text())
    elif isinstance(bundle.vision_config, VisionConfig):
        _write_json(directory / "config.json", vision_to_published(bundle.vision_config, "upstream"))
        _write_json(directory / "preprocessor_config.json", _image(bundle, "upstream"))
        write_weights([(part, layouts.UPSTREAM_VISION)], directory)
    else:
        _write_json(directory / "config.json", ibq_to_published(bundle.vision_config))
        write_weights([(part, layouts.IBQ_VISION)], directory)


def _write_transformers(bundle: Bundle, parts: list[str], directory: Path, write_weights: Any) -> None:
    tokenizer = bundle.tokenizer() if bundle.has("tokenizer") else None
    text = decoder_to_published(bundle.decoder_config, "transformers") if "decoder" in parts else {}
    vision = vision_to_published(_emu3_vision(bundle)[0], "transformers") if "vision" in parts else {}
    if len(parts) > 1:
        tokens = bundle.decoder_config.tokens
        visual = {f"<|visual token {code:06d}|>": tokens.visual_start + code for code in range(tokens.visual_count)}
        config = {
            "model_type": "emu3",
            "architectures": ["Emu3ForConditionalGeneration"],
            "text_config": text,
            "vq_config": vision,
            # What transformers turns codes into ids with.
            "vocabulary_map": special_ids(tokenizer) if tokenizer else {"<|extra_200|>": tokens.eol, **visual},
            "tie_word_embeddings": False,
            **_dtype(bundle),
        }
        names = [("decoder", layouts.TRANSFORMERS_5), ("vision", layouts.TRANSFORMERS_5)]
    elif text:
        config = {**text, "architectures": ["Emu3ForCausalLM"], **_dtype(bundle)}
        names = [("decoder", layouts.UPSTREAM_DECODER)]
    else:
        config = {**vision, "architectures": ["Emu3VQVAE"]}
        names = [("vision", layouts.TRANSFORMERS_VISION)]
    _write_json(directory / "config.json", config)
    if text:
        ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(directory / "generation_config.json", ids)
    if vision:
        image = _image(bundle, "transformers")
        _write_json(directory / "preprocessor_config.json", {**image, "processor_class": "Emu3Processor"})
    if tokenizer:
        write_tokenizer(directory, bundle.files / "tokenizer" / VOCABULARY, tokenizer, bundle.template)
    write_weights(names, directory)


def _write_weights(
    bundle: Bundle, parts: list[tuple[str, Layout]], directory: Path, *, shard_bytes: int, bar: Progress
) -> None:
    """Writes the parts' tensors as one safetensors file, or as shards and their index."""
    entries = [entry for part, layout in parts for entry in _entries(bundle, part, layout)]
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = _nbytes(entry)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    tensors = _tensors(bundle, [part for part, _ in parts], bar)
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", entries, tensors)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard, itertools.islice(tensors, len(shard)))
        weight_map |= {entry[0]: name for entry in shard}
    index = {"metadata": {"total_size": sum(map(_nbytes, entries))}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _entries(bundle: Bundle, part: str, layout: Layout) -> Iterator[_Entry]:
    """The tensors of a part in the order in which `_tensors` yields them."""
    stored = bundle.stored(part)
    for param in bundle.params(part):
        for weight in param.weights:
            named = layout.rename(weight, part)
            yield named.name, named.shape, np.dtype(stored[param.path].dtype)
    for counter in _counters(bundle, part):
        yield layout.rename(counter, part).name, (), np.dtype(np.int64)


def _tensors(bundle: Bundle, parts: list[str], bar: Progress) -> Iterator[np.ndarray]:
    for part in parts:
        for param, array in bundle.arrays(part):
            yield from param.unpack(array)
            bar.update(array.nbytes)
        for counter in _counters(bundle, part):
            yield np.asarray(bundle.num_batches_tracked[counter.name], np.int64)


def _counters(bundle: Bundle, part: str) -> list[layouts.Weight]:
    if part != "vision":
        return []
    return [c for c in layouts.vision_counters(bundle.vision_config) if c.name in bundle.num_batches_tracked]


def _nbytes(entry: _Entry) -> int:
    return int(np.prod(entry[1], dtype=np.int64)) * entry[2].itemsize


def _emu3_vision(bundle: Bundle) -> tuple[VisionConfig, ImageConfig]:
    """The configs of the vision tokenizer. Raises `Emu3Error` if it is Emu3.5's."""
    config, image = bundle.vision_config, bundle.image_config
    if not isinstance(config, VisionConfig) or not isinstance(image, ImageConfig):
        raise Emu3Error(
            f"{bundle.path}: transformers has no class for Emu3.5's vision tokenizer: export it with --layout upstream"
        )
    return config, image


def _image(bundle: Bundle, layout: str) -> dict[str, Any]:
    config, image = _emu3_vision(bundle)
    return image_to_published(image, layout, config.spatial_factor)


def _dtype(bundle: Bundle) -> dict[str, str]:
    """The dtype under both the old and the new name that transformers reads it by."""
    return {"torch_dtype": bundle.decoder_config.dtype, "dtype": bundle.decoder_config.dtype}


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")
