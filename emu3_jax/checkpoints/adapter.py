"""LoRA adapters on disk, in the format of the PEFT library, and merging them into a bundle's weights.

adapter_config.json        PEFT's file: rank, scale and the adapted modules
adapter_model.safetensors  PEFT's file: `lora_A` [R, in] and `lora_B` [out, R] of each module
emu3_adapter.json          our file, which PEFT ignores and does not write: storage of the frozen weights in training,
                           config of the decoder, name of the bundle, step
SHA256SUMS                 our file, as in bundles

PyTorch's modules q, k and v are one matrix here, `qkv`; so are gate and up. An adapter that was trained here has one A
for such a matrix, which is written once per module. When it is read, equal A's become one again. PEFT trains a
different A per module. These A's are concatenated to one matrix, whose rank is the sum of their ranks. B is zero where
the rank of one module meets the outputs of another. No number changes.
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax import storage
from emu3_jax.checkpoints import layouts
from emu3_jax.checkpoints.bundle import ADAPTER_CONFIG, Bundle
from emu3_jax.checkpoints.checksums import compare_checksums, has_checksums, write_checksums
from emu3_jax.checkpoints.layouts import FLOAT_DTYPES, decoder_params
from emu3_jax.checkpoints.tensors import Tensor, read_safetensors_header, write_safetensors
from emu3_jax.config import DecoderConfig, other_field
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_number, is_whole, read_from
from emu3_jax.files import new_directory
from emu3_jax.foreign import AGAIN, read_object
from emu3_jax.models.adapters import BASES, MATRICES, MAX_ALPHA, MAX_RANK, Adapter
from emu3_jax.models.merging import LowRank, merge_array
from emu3_jax.models.stacking import Path as TreePath
from emu3_jax.printable import shown

FORMAT = 1
CONFIG, WEIGHTS, OWN = ADAPTER_CONFIG, "adapter_model.safetensors", "emu3_adapter.json"
_PREFIX = "base_model.model."  # PEFT's, before the names of the model that it wraps
_MERGE = "merge it in PyTorch (merge_and_unload) and convert the model that you save"
_log = logging.getLogger("emu3_jax")

# ------------------------------------------------------------------------------------------------ writing


def write_adapter(
    target: Path,
    adapter: Adapter,
    decoder: DecoderConfig,
    read: Callable[[TreePath], np.ndarray],
    *,
    bundle: Bundle,
    step: int,
) -> None:
    """Writes the directory of an adapter. Memory holds the adapter of one matrix at a time.

    The module names fit the class that loads the bundle's export in transformers' layout:
    Emu3ForConditionalGeneration, or Emu3ForCausalLM if the bundle has no vision tokenizer.

    Args:
        target: path of the new directory. It must not exist.
        adapter: settings of the adapter.
        decoder: config of the trained decoder.
        read: function that returns the float32 arrays `NAME_a` [in..., R] and `NAME_b` [R, out...] by path, with
            separate layers.
        bundle: bundle of the frozen weights.
        step: step of the training, which is noted in the files.

    Raises:
        Emu3Error: `target` exists or cannot be written. No files are left behind.
    """
    layout = layouts.TRANSFORMERS_5 if bundle.has("vision") else layouts.UPSTREAM_DECODER
    params = [param for param in decoder_params(decoder) if param.path[-1] in adapter.targets]
    sides = [param.low_rank(MATRICES[param.path[-1]].inputs, adapter.rank) for param in params]
    dtype, entries = np.dtype(np.float32), []
    for param, (a, b) in zip(params, sides, strict=True):
        for weight, b_weight in zip(param.weights, b.weights, strict=True):
            module = _PREFIX + layout.rename(weight, "decoder").name.removesuffix(".weight")
            entries.append((f"{module}.lora_A.weight", a.weights[0].shape, dtype))
            entries.append((f"{module}.lora_B.weight", b_weight.shape, dtype))

    def tensors() -> Iterator[np.ndarray]:
        for a, b in sides:
            (shared,) = a.unpack(read(a.path))
            for own in b.unpack(read(b.path)):
                yield shared
                yield own

    with new_directory(target, sum(4 * math.prod(shape) for _, shape, _ in entries)) as directory:
        write_safetensors(directory / WEIGHTS, entries, tensors())
        modules = {weight.name.split(".", 3)[3].removesuffix(".weight") for p in params for weight in p.weights}
        _write_json(directory / CONFIG, _peft_config(adapter, sorted(modules), layout.model))
        own = {"base": adapter.base, "decoder": decoder.to_dict(), "bundle": bundle.path.name, "step": step}
        _write_json(directory / OWN, {"format": FORMAT, **own})
        write_checksums(directory)


def _peft_config(adapter: Adapter, modules: list[str], model: str) -> dict[str, Any]:
    """The contents of PEFT's `adapter_config.json`."""
    # A pattern for full names, because the vision tokenizer's attention has a q_proj too.
    names = "|".join(re.escape(module) for module in modules)
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": rf"(.*\.)?{re.escape(model)}layers\.\d+\.({names})",
    }


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ reading


@dataclasses.dataclass(frozen=True)
class _Module:
    """The adapter of one PyTorch module."""

    a: Tensor
    b: Tensor
    scale: float


class SavedAdapter:
    """An adapter on disk that fits a bundle's decoder. `SavedAdapter.open` makes it. Matrices are read on demand.

    Attributes:
        name: name for results: the directory's name, or PARENT/adapter if the directory is called `adapter`.
        base: storage of the frozen weights in training, from `BASES`. If unknown, "float32", which changes nothing.
        decoder: config of the model with the adapter: the config of the training if known, else the bundle's. Its
            `dtype` is the dtype of the merged weights.
    """

    def __init__(self, path: Path, base: str, decoder: DecoderConfig, modules: Mapping[TreePath, list[_Module | None]]):
        resolved = path if storage.is_remote(path) else path.resolve()
        own = resolved.name != "adapter" or not resolved.parent.name
        self.name = resolved.name if own else f"{resolved.parent.name}/{resolved.name}"
        self.base, self.decoder = base, decoder
        self._modules = modules
        self._params = {param.path: param for param in decoder_params(decoder)}

    @classmethod
    def open(cls, path: str | os.PathLike, bundle: Bundle, *, verify: bool = False) -> "SavedAdapter":
        """Opens an adapter that this package or PEFT wrote.

        Args:
            path: directory of the adapter. A directory in a bucket is copied to a local cache.
            bundle: bundle that the adapter is to be merged into.
            verify: compare the files with their checksums. Adapters that PEFT wrote have none.

        Raises:
            Emu3Error: there is no adapter, it is damaged, it belongs to another model, or it cannot be merged here.
        """
        place = path = storage.place(path)
        if storage.is_remote(path):
            path = storage.fetched(path, lambda name: "/" not in name)
        _check_directory(path)
        if verify:
            _verify(path)
        bundle.require("decoder")
        config = _PeftConfig(path / CONFIG)
        base, decoder = "float32", bundle.decoder_config
        if os.path.lexists(path / OWN):  # `lexists`: a broken link is damage, not an adapter from PEFT
            base, decoder = _read_own(path / OWN, bundle)
        found = _read_modules(path / WEIGHTS, config)
        params = [param for param in decoder_params(decoder) if param.path[-1] in MATRICES]
        modules = {param.path: [found.pop(_place(weight.name), None) for weight in param.weights] for param in params}
        if found:
            layer = max(layer for layer, _ in found)
            raise Emu3Error(
                f"{path} is of another model: it adapts layer {layer}, counted from 0, and {bundle.path} has "
                f"{decoder.num_layers} layers: give the bundle that the adapter was trained on"
            )
        for param in params:
            for weight, module in zip(param.weights, modules[param.path], strict=True):
                if module is not None:
                    _check_shapes(path, module, weight, bundle)
        return cls(place, base, decoder, modules)

    def low_rank(self, path: TreePath) -> LowRank | None:
        """The adapter of the matrix at this path, or None.

        Raises:
            Emu3Error: a file is damaged, or holds numbers that are not finite.
        """
        modules = self._modules.get(path, [])
        blocks: list[tuple[np.ndarray, float]] = []  # the different A's with their scales
        block: dict[int, int] = {}  # index in `blocks` by module
        for number, module in enumerate(modules):
            if module is None:
                continue
            a = _values(module.a)
            same = [i for i, (other, scale) in enumerate(blocks) if scale == module.scale and _identical(a, other)]
            block[number] = same[0] if same else len(blocks)
            if not same:
                blocks.append((a, module.scale))
        if not blocks:
            return None
        one_scale = len({scale for _, scale in blocks}) == 1
        ends = np.cumsum([len(a) for a, _ in blocks])
        a_param, b_param = self._params[path].low_rank(MATRICES[path[-1]].inputs, int(ends[-1]))
        b_arrays = [np.zeros(weight.shape, np.float32) for weight in b_param.weights]
        for number, module in enumerate(modules):
            if module is not None:
                b, end = _values(module.b), ends[block[number]]
                own = b_arrays[number][:, end - b.shape[1] : end]
                own[:] = b if one_scale else b * np.float32(module.scale)
        a = a_param.pack([np.concatenate([a for a, _ in blocks])])
        return LowRank(a, b_param.pack(b_arrays), blocks[0][1] if one_scale else 1.0)

    def merged(self, path: TreePath, array: np.ndarray, dtype: np.dtype) -> Any:
        """An array of the bundle's decoder with the adapter merged, see `models.merging.merge_array`."""
        return merge_array(path, array, self.low_rank(path), self.base, dtype)


def _check_directory(path: Path) -> None:
    """Raises an `Emu3Error` that says what `path` is, if it is not an adapter."""
    if not path.is_dir():
        raise Emu3Error(f"{path} is not a directory: give an adapter's, as `emu3-jax train --adapter-only` writes it")
    if not (path / CONFIG).exists():
        if (path / "run.json").exists():
            reason = f"it is a training run: give {path / 'adapter'}, or run `emu3-jax convert {path} --adapter-only`"
        elif (path / "decoder").exists():
            reason = "it is a bundle: give it as --model"
        else:
            reason = "give a directory that `emu3-jax train --adapter-only` or PEFT's save_pretrained wrote"
        raise Emu3Error(f"{path} has no {CONFIG}, so it is no adapter: {reason}")
    if not (path / WEIGHTS).exists():
        if (path / "adapter_model.bin").exists():
            raise Emu3Error(
                f"{path} has its weights as a pickle, adapter_model.bin, which is not read: load it in PyTorch and "
                "save it again (save_pretrained with safe_serialization=True)"
            )
        raise Emu3Error(f"{path} has no {WEIGHTS}: {AGAIN}")


def _verify(path: Path) -> None:
    if not has_checksums(path):
        _log.warning("%s has no SHA256SUMS, so its files cannot be verified: adapters that PEFT wrote have none", path)
        return
    _, different = compare_checksums(path, whole=True)
    for difference in different[:1]:
        raise Emu3Error(f"a file of the adapter {difference.what}: {path / difference.name}; copy the adapter again")


def _read_own(file: Path, bundle: Bundle) -> tuple[str, DecoderConfig]:
    """Reads the storage of the frozen weights and the decoder's config. Raises `Emu3Error` for another model."""
    data = read_object(file)
    remedy = "it was changed; copy the adapter again"
    if data.get("format") != FORMAT:
        raise Emu3Error(f"{file}: format is {shown(data.get('format'))}, this version reads {FORMAT}: write it again")
    base = data.get("base")
    if not isinstance(base, str) or base not in BASES:
        raise Emu3Error(f"{file}: base is {shown(base)}: it must be one of {', '.join(BASES)}; {remedy}")
    if not isinstance(data.get("decoder"), dict):
        raise Emu3Error(f"{file}: decoder is {shown(data.get('decoder'))}: it must be an object; {remedy}")
    with read_from(file):
        decoder = DecoderConfig.from_dict(data["decoder"])
    if field := other_field(decoder, bundle.decoder_config):
        theirs, ours = getattr(decoder, field), getattr(bundle.decoder_config, field)
        raise Emu3Error(
            f"{file.parent} is of another model: its decoder has {field} {shown(theirs)}, that of "
            f"{bundle.path} {shown(ours)}: give the bundle that it was trained on ({shown(data.get('bundle'))})"
        )
    return base, decoder


class _PeftConfig:
    """Ranks and scales of PEFT's `adapter_config.json`.

    Raises:
        Emu3Error: a value is illegal, or asks for what is no plain LoRA.
    """

    # Fields of a LoraConfig that make something else of it than A and B beside a matrix.
    _UNSUPPORTED = (
        "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
        "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
        "use_dora", "use_qalora", "velora_config",
    )  # fmt: skip
    # These ways to begin leave the frozen weights as they were; others (PiSSA, OLoRA, LoftQ, CorDA) change them.
    _BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "mica")

    def __init__(self, file: Path):
        config = read_object(file)
        self._file = file
        kind = config.get("peft_type")
        if kind != "LORA":
            raise Emu3Error(f"{file}: peft_type is {shown(kind)}: only LORA is merged here; {_MERGE}")
        for field in self._UNSUPPORTED:
            if config.get(field):
                raise Emu3Error(f"{file}: {field} is {shown(config[field])}, which is not supported; {_MERGE}")
        if config.get("bias", "none") != "none":
            raise Emu3Error(f"{file}: bias is {shown(config['bias'])}: the decoder has no biases; {_MERGE}")
        beginning = config.get("init_lora_weights", True)
        if not isinstance(beginning, bool | str) or beginning not in self._BEGINNINGS:
            raise Emu3Error(
                f"{file}: init_lora_weights is {shown(beginning)}, which changes the frozen weights: save the adapter "
                f"with path_initial_model_for_weight_conversion, or {_MERGE}"
            )
        self._rslora = config.get("use_rslora", False)
        if not isinstance(self._rslora, bool):
            raise Emu3Error(f"{file}: use_rslora is {shown(self._rslora)}: it must be true or false; {AGAIN}")
        self._rank = self._checked("r", config.get("r"), "rank")
        self._alpha = self._checked("lora_alpha", config.get("lora_alpha"), "alpha")
        self._ranks = self._pattern(config, "rank_pattern", "rank")
        self._alphas = self._pattern(config, "alpha_pattern", "alpha")

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module, whose tensors have this rank."""
        wanted = _by_ending(self._ranks, module, self._rank)
        if rank != wanted:
            raise Emu3Error(
                f"{self._file.parent / WEIGHTS}: {shown(module)} has rank {rank}, {CONFIG} says {wanted}: the files "
                "are of two adapters; copy it again"
            )
        return _by_ending(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._rslora else rank)

    def _checked(self, field: str, value: Any, kind: str) -> Any:
        if kind == "rank":
            ok, legal = is_whole(value, 1) and value <= MAX_RANK, f"a whole number from 1 to {MAX_RANK}"
        else:
            ok, legal = is_number(value) and abs(value) <= MAX_ALPHA, f"a number from -{MAX_ALPHA} to {MAX_ALPHA}"
        if not ok:
            raise Emu3Error(f"{self._file}: {field} is {shown(value)}: it must be {legal}; {AGAIN}")
        return value

    def _pattern(self, config: Mapping[str, Any], field: str, kind: str) -> dict[str, Any]:
        """Values by the ends of module names. PEFT allows regular expressions; here keys must be plain names."""
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            raise Emu3Error(f"{self._file}: {field} is {shown(pattern)}: it must be an object; {AGAIN}")
        for name, value in pattern.items():
            if not re.fullmatch(r"[A-Za-z0-9_.]{1,1000}", name):
                raise Emu3Error(f"{self._file}: {field} has {shown(name)}, which is no module's plain name; {_MERGE}")
            self._checked(f"{field} of {shown(name)}", value, kind)
        return pattern


def _by_ending(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """What is given for the first name that `module` ends in, as PEFT looks it up."""
    return next((v for name, v in values.items() if module == name or module.endswith(f".{name}")), default)


# A layer's projection in any model that holds the decoder, and the side.
_TENSOR = re.compile(
    r"(?P<module>(?:.+\.)?layers\.(?P<layer>[0-9]{1,6})\."
    r"(?P<name>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))\.lora_(?P<side>[AB])\.weight"
)
_Place = tuple[int, str]  # a layer, and the name of a projection in it


def _place(weight: str) -> _Place:
    """Of upstream's `model.layers.0.self_attn.q_proj.weight`."""
    _, _, layer, name = weight.removesuffix(".weight").split(".", 3)
    return int(layer), name


def _read_modules(file: Path, config: _PeftConfig) -> dict[_Place, _Module]:
    """The modules of a safetensors file, by their places; nothing but its header is read."""
    sides: dict[_Place, dict[str, Tensor]] = {}
    names: dict[_Place, str] = {}
    for tensor in read_safetensors_header(file):
        match = _TENSOR.fullmatch(tensor.name) if len(tensor.name) < 1000 else None
        if match is None:
            raise Emu3Error(
                f"{file}: {shown(tensor.name)} is no LoRA of a projection in the decoder's layers, and only these can "
                f"be merged; {_MERGE}"
            )
        if tensor.dtype.name not in FLOAT_DTYPES or len(tensor.shape) != 2 or 0 in tensor.shape:
            raise Emu3Error(
                f"{file}: {shown(tensor.name)} is {tensor.dtype.name} {shown(list(tensor.shape))}: it must be a matrix "
                f"of {', '.join(FLOAT_DTYPES)}; {AGAIN}"
            )
        module, place = match["module"].removeprefix(_PREFIX), (int(match["layer"]), match["name"])
        if names.setdefault(place, module) != module or match["side"] in sides.get(place, ()):
            raise Emu3Error(
                f"{file} has two adapters of {place[1]} in layer {place[0]}, the second is {shown(module)}; {AGAIN}"
            )
        sides.setdefault(place, {})[match["side"]] = tensor
    modules = {}
    for place, pair in sides.items():
        if len(pair) == 1:
            (side,) = pair
            raise Emu3Error(f"{file}: {shown(names[place])} has lora_{side} and not the other side; {AGAIN}")
        a, b = pair["A"], pair["B"]
        if a.shape[0] != b.shape[1]:
            raise Emu3Error(
                f"{file}: {shown(names[place])} has lora_A of rank {a.shape[0]}, lora_B of rank {b.shape[1]}; {AGAIN}"
            )
        modules[place] = _Module(a, b, config.scale(names[place], a.shape[0]))
    if not modules:
        raise Emu3Error(f"{file} holds no adapter; {AGAIN}")
    return modules


def _check_shapes(path: Path, module: _Module, weight: layouts.Weight, bundle: Bundle) -> None:
    outputs, inputs = weight.shape
    found = module.a.shape[1], module.b.shape[0]
    if found != (inputs, outputs):
        raise Emu3Error(
            f"{path} is of another model: its {weight.name.removesuffix('.weight')} has {found[0]} inputs and "
            f"{found[1]} outputs, that of {bundle.path} {inputs} and {outputs}: give the bundle that it was trained on"
        )


def _values(tensor: Tensor) -> np.ndarray:
    """Reads a tensor as float32."""
    array = tensor.read().astype(np.float32)
    if not np.isfinite(array).all():
        raise Emu3Error(f"{tensor.file}: {shown(tensor.name)} has numbers that are not finite; {AGAIN}")
    return array


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())
