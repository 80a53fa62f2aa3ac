"""Name tables: every array of a bundle, the PyTorch weights that it consists of, and their names in each layout.

Letters: D width, F MLP width, N query heads, K KV heads, G = N / K, h head width, V vocabulary; O I output and input
channels, T H W kernel extents. Each `Param` is declared once, with upstream's PyTorch names; a `Layout` renames them.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from emu3_jax.checkpoints.tensors import Tensor
from emu3_jax.config import DecoderConfig, VisionConfig, VisionTokenizerConfig
from emu3_jax.models.stacking import layer_name
from emu3_jax.printable import one_line

Shape = tuple[int, ...]
Arrays = tuple[np.ndarray, ...]
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of a PyTorch state dict."""

    name: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Param:
    """An array of a bundle, at `path` in its tree. Packs PyTorch weights into the array, and unpacks it again."""

    path: tuple[str, ...]
    shape: Shape
    weights: tuple[Weight, ...]
    _pack: Callable[[Arrays], np.ndarray]
    _unpack: Callable[[np.ndarray], Arrays]

    @property
    def name(self) -> str:
        return "/".join(self.path)

    def pack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The bundle's array from this param's weights, which share one dtype. No value changes."""
        dtype = arrays[0].dtype
        packed = self._pack(tuple(_bits(a).reshape(w.shape) for a, w in zip(arrays, self.weights, strict=True)))
        return np.ascontiguousarray(packed).view(dtype).reshape(self.shape)

    def unpack(self, array: np.ndarray) -> Arrays:
        """Splits the bundle's array into weights, in the order of `weights`, with upstream's shapes."""
        parts = self._unpack(_bits(array))
        return tuple(
            np.ascontiguousarray(p).view(array.dtype).reshape(w.shape) for p, w in zip(parts, self.weights, strict=True)
        )

    def low_rank(self, inputs: int, rank: int) -> tuple["Param", "Param"]:
        """The two matrices of a LoRA adapter of this param, A [in..., R] and B [R, out...], as params.

        A consists of a single weight [R, I], and B of one weight [O, R] for each weight of this param. A takes the name
        of this param's first weight, and B takes all names.

        Args:
            inputs: the number of leading axes that are inputs.
            rank: R.
        """
        *parent, name = self.path
        fan_in = math.prod(self.shape[:inputs])
        first, *_ = self.weights
        a_weight = Weight(first.name, (rank, fan_in))
        b_weights = tuple(Weight(weight.name, (weight.shape[0], rank)) for weight in self.weights)
        a_shape, b_shape = (*self.shape[:inputs], rank), (rank, *self.shape[inputs:])
        a = Param((*parent, f"{name}_a"), a_shape, (a_weight,), _transpose, lambda p: (p.reshape(fan_in, rank).T,))
        return a, Param((*parent, f"{name}_b"), b_shape, b_weights, self._pack, self._unpack)


def _bits(array: np.ndarray) -> np.ndarray:
    """The array as unsigned integers. NumPy copies integers at memory speed, but bfloat16 element by element."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


# ------------------------------------------------------------------------------------------------ decoder


def decoder_params(config: DecoderConfig) -> list[Param]:
    """All arrays of a bundle's decoder, in the order of writing."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    g = n // k

    def pack_qkv(qkv: Arrays) -> np.ndarray:
        return np.concatenate([w.reshape(k, -1, h, w.shape[1]) for w in qkv], axis=1).transpose(3, 0, 1, 2)

    def unpack_qkv(param: np.ndarray) -> Arrays:
        return tuple(np.split(param.transpose(1, 2, 3, 0), (g, g + 1), axis=1))

    params = [_same(("embed", "embedding"), "model.embed_tokens.weight", (v, d))]
    for i in range(config.num_layers):
        path, torch = layer_name(i), f"model.layers.{i}"
        q, kv = Weight(f"{torch}.self_attn.q_proj.weight", (n * h, d)), (k * h, d)
        qkv = (q, Weight(f"{torch}.self_attn.k_proj.weight", kv), Weight(f"{torch}.self_attn.v_proj.weight", kv))
        out = Weight(f"{torch}.self_attn.o_proj.weight", (d, n * h))
        gate_up = tuple(Weight(f"{torch}.mlp.{name}_proj.weight", (f, d)) for name in ("gate", "up"))
        down = Weight(f"{torch}.mlp.down_proj.weight", (d, f))
        params += [
            _same((path, "attention_norm", "scale"), f"{torch}.input_layernorm.weight", (d,)),
            Param((path, "attention", "qkv"), (d, k, g + 2, h), qkv, pack_qkv, unpack_qkv),
            *(
                _same((path, "attention", name, "scale"), f"{torch}.self_attn.{name}.weight", (h,))
                for name in (("q_norm", "k_norm") if config.qk_norm else ())
            ),
            Param((path, "attention", "out"), (k, g, h, d), (out,), _transpose, lambda p: (p.reshape(-1, d).T,)),
            _same((path, "mlp_norm", "scale"), f"{torch}.post_attention_layernorm.weight", (d,)),
            Param((path, "mlp", "gate_up"), (d, 2, f), gate_up, _pack_gate_up, lambda p: (p[:, 0].T, p[:, 1].T)),
            Param((path, "mlp", "down"), (f, d), (down,), _transpose, lambda p: (p.T,)),
        ]
    return [
        *params,
        _same(("norm", "scale"), "model.norm.weight", (d,)),
        _same(("head", "kernel"), "lm_head.weight", (v, d)),
    ]


def _same(path: tuple[str, ...], name: str, shape: Shape) -> Param:
    return Param(path, shape, (Weight(name, shape),), lambda arrays: arrays[0], lambda param: (param,))


def _transpose(arrays: Arrays) -> np.ndarray:
    return arrays[0].T


def _pack_gate_up(arrays: Arrays) -> np.ndarray:
    return np.stack([a.T for a in arrays], axis=1)


# ------------------------------------------------------------------------------------------------ vision


def vision_params(config: VisionTokenizerConfig) -> list[Param]:
    """All arrays of a bundle's vision tokenizer. The tree has PyTorch's names, but `down.0` becomes `down_0`."""
    return [_vision_param(w) for w in _vision_weights(config) if not _is_counter(w)]


def vision_counters(config: VisionTokenizerConfig) -> list[Weight]:
    """The `num_batches_tracked` of batch norms. A PyTorch state dict has these counters, a bundle does not."""
    return [w for w in _vision_weights(config) if _is_counter(w)]


def _is_counter(weight: Weight) -> bool:
    return weight.name.endswith("num_batches_tracked")


def _vision_param(weight: Weight) -> Param:
    name, rank = weight.name, len(weight.shape)
    module, _, leaf = re.sub(r"\.(\d+)", r"_\1", name).rpartition(".")
    if name == "quantize.embedding.weight":
        return _same(("quantize", "embedding"), name, weight.shape)
    if rank == 1:
        leaf = {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        return _same((*module.split("."), leaf), name, weight.shape)
    path = (*module.split("."), "kernel")
    if _ATTENTION_PROJECTION.search(
        name
    ):  # a 1x1 convolution, or a linear layer in transformers: [O, I, 1, 1] -> [I, O]
        o, i = weight.shape[:2]
        return Param(path, (i, o), (weight,), lambda a: a[0].reshape(o, i).T, lambda p: (p.T,))
    kernel_last = (*range(2, rank), 1, 0)  # OIHW -> HWIO, OITHW -> THWIO
    shape = tuple(weight.shape[axis] for axis in kernel_last)
    kernel_first = (rank - 1, rank - 2, *range(rank - 2))
    return Param(path, shape, (weight,), lambda a: a[0].transpose(kernel_last), lambda p: (p.transpose(kernel_first),))


def _vision_weights(config: VisionTokenizerConfig) -> Iterable[Weight]:
    """The weights of upstream's state dict, in the order of its modules.

    Emu3.5's tokenizer is Emu3's without the time stacks, and its decoder has plain group norms.
    """
    causal_3d = isinstance(config, VisionConfig)
    latent, codes, base = config.latent_channels, config.embed_dim, config.base_channels
    widths = [base * m for m in config.channel_multipliers]
    stages, blocks, time_convs = len(widths), config.num_res_blocks, config.temporal_factor.bit_length() - 1

    def attention(name: str, channels: int, spatial: bool) -> Iterable[Weight]:
        yield from _norm(f"{name}.norm", channels, codes if spatial else None)
        for projection in ("q", "k", "v", "proj_out"):
            yield from _conv(f"{name}.{projection}", channels, channels, (1, 1))

    def block(name: str, channels: int, width: int, spatial: bool) -> Iterable[Weight]:
        yield from _norm(f"{name}.norm1", channels, codes if spatial else None)
        yield from _conv(f"{name}.conv1", channels, width, (3, 3))
        yield from _norm(f"{name}.norm2", width, codes if spatial else None)
        yield from _conv(f"{name}.conv2", width, width, (3, 3))
        if channels != width:
            yield from _conv(f"{name}.nin_shortcut", channels, width, (1, 1))

    def middle(name: str, channels: int, spatial: bool) -> Iterable[Weight]:
        yield from block(f"{name}.block_1", channels, channels, spatial)
        yield from attention(f"{name}.attn_1", channels, spatial)
        yield from block(f"{name}.block_2", channels, channels, spatial)

    def time_stack(name: str) -> Iterable[Weight]:
        for i in range(blocks if causal_3d else 0):
            for j in (1, 2):
                yield from _batch_norm(f"{name}.time_res_stack.{i}.norm{j}", latent)
                yield from _conv(f"{name}.time_res_stack.{i}.conv{j}.conv", latent, latent, (3, 3, 3))

    yield from _conv("encoder.conv_in", config.in_channels, base, (3, 3))
    channels = base
    for stage, width in enumerate(widths):
        for i in range(blocks):
            yield from block(f"encoder.down.{stage}.block.{i}", channels, width, False)
            channels = width
            if stage in config.attention_stages:
                yield from attention(f"encoder.down.{stage}.attn.{i}", width, False)
        if stage < stages - 1:
            yield from _conv(f"encoder.down.{stage}.downsample.conv", width, width, (3, 3))
    yield from middle("encoder.mid", channels, False)
    yield from _norm("encoder.norm_out", channels, None)
    yield from _conv("encoder.conv_out", channels, latent, (3, 3))
    for i in range(time_convs):
        yield from _conv(f"encoder.time_conv.{i}.conv.conv", latent, latent, (4, 3, 3))
    yield from time_stack("encoder")

    yield from time_stack("decoder")
    for i in range(time_convs):
        yield from _conv(f"decoder.time_conv.{i}.conv.conv", latent, latent, (3, 3, 3))
    yield from _conv("decoder.conv_in", latent, channels, (3, 3))
    yield from middle("decoder.mid", channels, causal_3d)
    for stage in reversed(range(stages)):
        width = widths[stage]
        for i in range(blocks + 1):
            yield from block(f"decoder.up.{stage}.block.{i}", channels, width, causal_3d)
            channels = width
            if stage in config.attention_stages:
                yield from attention(f"decoder.up.{stage}.attn.{i}", width, causal_3d)
        if stage > 0:
            yield from _conv(f"decoder.up.{stage}.upsample.conv", width, width, (3, 3))
    yield from _norm("decoder.norm_out", channels, codes if causal_3d else None)
    yield from _conv("decoder.conv_out", channels, config.out_channels, (3, 3))

    yield Weight("quantize.embedding.weight", (config.codebook_size, codes))
    inner, kernel = (".conv", (3, 1, 1)) if causal_3d else ("", (1, 1))
    yield from _conv(f"quant_conv{inner}", latent, codes, kernel)
    yield from _conv(f"post_quant_conv{inner}", codes, latent, kernel)


def _conv(name: str, inputs: int, outputs: int, kernel: Shape) -> Iterable[Weight]:
    yield Weight(f"{name}.weight", (outputs, inputs, *kernel))
    yield Weight(f"{name}.bias", (outputs,))


def _norm(name: str, channels: int, codes: int | None) -> Iterable[Weight]:
    """A group norm, or in the decoder a spatial norm: a group norm scaled and shifted by the codebook vectors."""
    inner = name if codes is None else f"{name}.norm_layer"
    yield Weight(f"{inner}.weight", (channels,))
    yield Weight(f"{inner}.bias", (channels,))
    if codes is not None:
        yield from _conv(f"{name}.conv_y", codes, channels, (1, 1))
        yield from _conv(f"{name}.conv_b", codes, channels, (1, 1))


def _batch_norm(name: str, channels: int) -> Iterable[Weight]:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield Weight(f"{name}.{leaf}", (channels,))
    yield Weight(f"{name}.num_batches_tracked", ())


# ------------------------------------------------------------------------------------------------ layouts

_ATTENTION_PROJECTION = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$")
_TRANSFORMERS_VISION = (  # upstream's names -> transformers', applied in order
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"\.mid\.", ".middle_block."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.attn_1\.norm\.", ".attn_norm."),
    (r"(\.attn\.\d+|\.attn_1)\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn\.\d+|\.attn_1)\.proj_out\.", r"\1.out_proj."),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one kind of published checkpoint. `parts` are the parts that such a directory must hold."""

    title: str
    parts: tuple[str, ...]
    model: str = "model."
    head: str = "lm_head."
    vision: str = ""
    transformers_vision: bool = False

    def rename(self, weight: Weight, part: str) -> Weight:
        """Upstream's `weight` with the name and shape of this layout. `part` is "decoder" or "vision"."""
        name, shape = weight.name, weight.shape
        if part == "decoder":
            upstream, ours = ("lm_head.", self.head) if name.startswith("lm_head.") else ("model.", self.model)
            return Weight(ours + name.removeprefix(upstream), shape)
        if self.transformers_vision:
            if _ATTENTION_PROJECTION.search(name):
                shape = shape[:2]
            for pattern, replacement in _TRANSFORMERS_VISION:
                name = re.sub(pattern, replacement, name)
        return Weight(self.vision + name, shape)


UPSTREAM_DECODER = Layout("upstream decoder", ("decoder",))  # also transformers' stand-alone Emu3ForCausalLM
UPSTREAM_VISION = Layout("upstream vision tokenizer", ("vision",))
IBQ_VISION = Layout("Emu3.5 vision tokenizer", ("vision",))
TRANSFORMERS_VISION = Layout("transformers Emu3VQVAE", ("vision",), transformers_vision=True)
TRANSFORMERS_4 = Layout(
    "transformers 4", ("decoder", "vision"), "text_model.model.", "text_model.lm_head.", "vqmodel.", True
)
TRANSFORMERS_5 = Layout(
    "transformers 5", ("decoder", "vision"), "model.text_model.", "lm_head.", "model.vqmodel.", True
)


def detect_layout(names: Iterable[str]) -> Layout | None:
    """The layout to which these tensor names belong, or None if they belong to no Emu3 checkpoint."""
    names = set(names)
    for marks, layout in (
        (("model.text_model.", "model.vqmodel."), TRANSFORMERS_5),
        (("text_model.", "vqmodel."), TRANSFORMERS_4),
        (("model.layers.", "model.embed_tokens.", "lm_head."), UPSTREAM_DECODER),
        (("encoder.down_block.", "decoder.up_block."), TRANSFORMERS_VISION),
        (("quant_conv.weight", "post_quant_conv.weight"), IBQ_VISION),  # Emu3's have quant_conv.conv.weight
        (("encoder.down.", "decoder.up.", "quantize."), UPSTREAM_VISION),
    ):
        if any(name.startswith(marks) for name in names):
            return layout
    return None


# ------------------------------------------------------------------------------------------------ matching


def misfits(expected: Iterable[Weight], counters: Iterable[Weight], tensors: Sequence[Tensor]) -> list[str]:
    """The differences between `tensors` and the `expected` weights. Batch-norm `counters` may be present or absent.

    Each kind of fault gives one line for the whole checkpoint, with the count and the first names. The kinds are
    missing, unmapped, twice stored and misshapen weights, and wrong dtypes.
    """
    required = {w.name: w.shape for w in expected}
    known = required | {w.name: w.shape for w in counters}
    found = {t.name: t for t in tensors}
    faults = {
        "missing": [name for name in required if name not in found],
        # Old versions of transformers saved this buffer. The config determines its values.
        "unmapped": [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")],
        "stored twice": [name for name, count in Counter(t.name for t in tensors).items() if count > 1],
        "misshapen": [
            f"{t.name} (found {list(t.shape)}, expected {list(known[t.name])})"
            for t in found.values()
            if t.name in known and t.shape != known[t.name]
        ],
        f"not {', '.join(FLOAT_DTYPES)}": [
            f"{t.name} ({t.dtype})" for t in found.values() if t.name in required and t.dtype.name not in FLOAT_DTYPES
        ],
        "not int64": [
            f"{t.name} ({t.dtype})"
            for t in found.values()
            if t.name in known.keys() - required.keys() and t.dtype.name != "int64"
        ],
    }
    return [_report(kind, culprits) for kind, culprits in faults.items() if culprits]


def _report(kind: str, culprits: Sequence[str], named: int = 3) -> str:
    rest = f" and {len(culprits) - named} more" if len(culprits) > named else ""
    return f"{len(culprits)} {kind}: {', '.join(map(one_line, culprits[:named]))}{rest}"
