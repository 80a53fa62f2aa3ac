"""A published checkpoint directory of upstream or transformers: reads its configs, tensor headers and vocabulary."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu3_jax.checkpoints import layouts
from emu3_jax.checkpoints.bundle import ADAPTER_CONFIG, PARTS
from emu3_jax.checkpoints.layouts import Layout, Weight
from emu3_jax.checkpoints.published_config import (
    EMU35_CODES,
    decoder_from_published,
    family_of,
    ibq_from_published,
    image_from_published,
    image_gaps,
    object_field,
    vision_from_published,
)
from emu3_jax.checkpoints.tensors import Tensor, read_safetensors_header
from emu3_jax.checkpoints.torch_pickle import read_torch_file
from emu3_jax.checkpoints.yaml_config import read_yaml_object
from emu3_jax.config import AreaConfig, DecoderConfig, PictureConfig, SpecialTokens, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import read_from
from emu3_jax.foreign import file_name, read_object
from emu3_jax.printable import shown
from emu3_jax.text.tokenizer import Tokenizer
from emu3_jax.text.vocabulary import tokens_of_vocabulary

UPSTREAM_VOCABULARY = "emu3.tiktoken"
FLASHAR = ("horizontal_head", "vertical_block", "vertical_norm", "vertical_head", "hv_gate_")  # begin its own names
_IBQ_WEIGHTS = "model.ckpt"  # of Emu3.5's vision tokenizer, a second copy of its model.safetensors


@dataclasses.dataclass(frozen=True)
class Published:
    """An open checkpoint directory. The config and the tensor headers are in memory, the weights are still on disk."""

    path: Path
    config: dict[str, Any]
    layout: Layout
    tensors: Sequence[Tensor]

    @classmethod
    def open(cls, path: Path) -> "Published":
        """Reads `config.json` (or `config.yaml`, of Emu3.5's vision tokenizer) and the headers of the weight files.

        Raises:
          Emu3Error: a file is missing or damaged, or the tensors do not belong to an Emu3 checkpoint.
        """
        if (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists():
            raise Emu3Error(f"{path} is a LoRA adapter: merge it with `emu3-jax merge BUNDLE --adapter {path} -o NEW`")
        if not (path / "config.json").exists() and any((path / part / "config.json").exists() for part in PARTS):
            raise Emu3Error(
                f"{path} is a bundle already, so it needs no conversion; to quantise it, run `emu3-jax quantize {path} "
                "-o NEW`"
            )
        config = _read_config(path)
        tensors = _read_directory(path)
        other = next((t.name for t in tensors if any(mark in t.name for mark in FLASHAR)), None)
        if other is not None:
            raise Emu3Error(
                f"{path}: holds {shown(other)}, so it is a FlashAR checkpoint, which decodes in another way and is not "
                "supported: use the model that it was made from"
            )
        layout = layouts.detect_layout(t.name for t in tensors)
        if layout is None:
            example = tensors[0].name if tensors else "no tensors"
            raise Emu3Error(
                f"{path}: not an Emu3 checkpoint (its weights are named like {shown(example)}): give a directory of "
                "BAAI/Emu3-*, or one that transformers saved from an Emu3 model"
            )
        return cls(path, config, layout, tensors)

    @property
    def config_file(self) -> Path:
        return _config_file(self.path)

    def vision_config(self) -> VisionTokenizerConfig:
        with read_from(self.config_file):
            if self.layout is layouts.IBQ_VISION:
                return ibq_from_published(self.config)
            return vision_from_published(self._section("vq_config"))

    def decoder_config(self, codebook_size: int | None = None) -> DecoderConfig:
        """Give the `codebook_size` of the vision tokenizer for upstream's decoder directory, which does not hold it."""
        family = self.family
        if family == "emu3.5":
            if codebook_size not in (None, EMU35_CODES):
                raise Emu3Error(
                    f"{self.path} is a decoder of Emu3.5, which has {EMU35_CODES} visual ids, but the vision tokenizer "
                    f"has {codebook_size} codes: give the two of one model"
                )
            codebook_size = EMU35_CODES
        told = None
        if self._vocabulary is not None:
            told = tokens_of_vocabulary(self._vocabulary, codebook_size)
        with read_from(self.path / "config.json"):
            return decoder_from_published(self.config, codebook_size, told, family)

    @property
    def family(self) -> str:
        """The family of the decoder, "emu3" or "emu3.5"."""
        with read_from(self.path / "config.json"):
            return family_of(self.config, any(t.name.endswith(".self_attn.q_norm.weight") for t in self.tensors))

    @property
    def _vocabulary(self) -> Path | None:
        """The first existing file of `emu3.tiktoken`, `tokenizer.json` and `vocab.json`, or None."""
        files = (self.path / name for name in (UPSTREAM_VOCABULARY, "tokenizer.json", "vocab.json"))
        return next((file for file in files if file.is_file()), None)

    def _section(self, name: str) -> dict[str, Any]:
        if "vision" in self.layout.parts and "decoder" not in self.layout.parts:
            return self.config
        section = self.config.get(name)
        if not isinstance(section, dict):
            raise Emu3Error(f"has no {name}, which the {self.layout.title} layout needs: use the file of these weights")
        return section

    def image_config(self) -> PictureConfig:
        """The config of the picture preprocessing. Fields that the directory lacks get the published values.

        Emu3.5 publishes none: its code resizes pictures to the area that a task asks for.
        """
        if self.layout is layouts.IBQ_VISION:
            return AreaConfig()
        factor = self.vision_config().spatial_factor
        file, data = self._image_file()
        with read_from(file):
            return image_from_published(data, factor)

    def image_gaps(self) -> tuple[list[str], str]:
        """The fields that the picture preprocessing lacks, and a sentence about them. Both are empty without a file."""
        if self.layout is layouts.IBQ_VISION:
            return [], ""
        file, data = self._image_file()
        gaps = image_gaps(data) if file.is_file() else []
        return gaps, f"{file} has no {', '.join(gaps)}: the published values are assumed" if gaps else ""

    def _image_file(self) -> tuple[Path, Mapping[str, Any]]:
        """The file of the picture preprocessing, and its fields. Nested fields have priority, as in transformers."""
        nested, flat = (self.path / name for name in ("processor_config.json", "preprocessor_config.json"))
        whole = read_object(nested) if nested.is_file() else {}
        with read_from(nested):
            inner = object_field(whole, "image_processor")
        if inner or not flat.is_file():
            return nested if nested.is_file() else flat, inner or whole
        data = read_object(flat)
        with read_from(flat):
            return flat, object_field(data, "image_processor") or data

    def tokenizer(self, special: SpecialTokens) -> Tokenizer | None:
        """The tokenizer of the first existing file of `emu3.tiktoken`, `tokenizer.json` and `vocab.json`, or None."""
        file = self._vocabulary
        if file is None:
            return None
        read = Tokenizer.from_files if file.name == UPSTREAM_VOCABULARY else Tokenizer.from_transformers
        return read(file, special)

    def misfits(self, decoder: DecoderConfig | None, vision: VisionTokenizerConfig | None) -> list[str]:
        """The differences between the tensors and the weights that these configs need; see `layouts.misfits`."""
        expected: list[Weight] = []
        counters: list[Weight] = []
        if decoder is not None:
            weights = (w for p in layouts.decoder_params(decoder) for w in p.weights)
            expected += [self.layout.rename(w, "decoder") for w in weights]
        if vision is not None:
            weights = (w for p in layouts.vision_params(vision) for w in p.weights)
            expected += [self.layout.rename(w, "vision") for w in weights]
            counters += [self.layout.rename(w, "vision") for w in layouts.vision_counters(vision)]
        return layouts.misfits(expected, counters, self.tensors)

    def tensors_of(self, weights: Sequence[Weight], part: str) -> list[Tensor]:
        """The tensors that hold upstream's `weights`. Absent ones are left out."""
        found = {t.name: t for t in self.tensors}
        names = (self.layout.rename(w, part).name for w in weights)
        return [found[name] for name in names if name in found]


def _config_file(directory: Path) -> Path:
    """`config.json`, or `config.yaml` where that alone exists."""
    plain, other = directory / "config.json", directory / "config.yaml"
    return other if other.is_file() and not plain.exists() else plain


def _read_config(directory: Path) -> dict[str, Any]:
    file = _config_file(directory)
    return read_yaml_object(file) if file.suffix == ".yaml" else read_object(file)


def _read_directory(directory: Path) -> list[Tensor]:
    """Lists a directory's tensors from the headers of its weight files. Prefers files in the order of transformers."""
    for stem, suffix, reader in (
        ("model", "safetensors", read_safetensors_header),
        ("pytorch_model", "bin", read_torch_file),
    ):
        single, index = directory / f"{stem}.{suffix}", directory / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return reader(single)
        if index.is_file():
            return [tensor for shard in _shards(index) for tensor in reader(shard)]
    if (directory / _IBQ_WEIGHTS).is_file():
        return read_torch_file(directory / _IBQ_WEIGHTS)
    raise Emu3Error(
        f"{directory}: no weights found; expected model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json or model.ckpt"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise Emu3Error(f"{index}: has no weight_map of tensor names to shard files; download or copy it again")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not _is_beside(index, name)]
    if absent:
        raise Emu3Error(
            f"{index}: {len(absent)} of its shards are not beside it, first {shown(absent[0])}: download them"
        )
    return [index.parent / name for name in names]


def _is_beside(index: Path, name: str) -> bool:
    try:
        return (index.parent / file_name(name, str(index))).is_file()
    except Emu3Error:
        return False
