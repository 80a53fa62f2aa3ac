"""The Hopper kernel for products with int8 codes: interpreted, it equals float64 arithmetic; and it lowers for CUDA."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from emu3_jax.config import DecoderConfig
from emu3_jax.models import capability
from emu3_jax.models import int8_products_hopper as hopper
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.products import choose_products, multiply
from emu3_jax.models.quantization import quantise_params
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow]

RACES = InterpretGPUParams(detect_races=True)


def operands(tokens, outputs, inputs):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, inputs), jnp.bfloat16)
    codes = jax.random.randint(keys[1], (outputs, inputs), -127, 128, jnp.int8)
    return x, codes, jax.random.uniform(keys[2], (outputs,), minval=1e-3, maxval=2e-3)


def lowered(function, *arguments):
    with contextlib.ExitStack() as stack:
        if jax.__version_info__ >= (0, 11):
            h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
            stack.enter_context(use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)))
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "sizes"),
    [
        (32, 256, 640, {"groups": 2, "parts": 2, "stages": 2}),  # parts of 3 and 2 blocks
        (40, 128, 256, {"groups": 2, "parts": 1}),  # tokens are padded, and there are more stages than blocks
        (16, 128, 1152, {"groups": 1, "splits": 2, "parts": 2, "stages": 4}),
        (32, 128, 384, {"parts": 3}),
    ],
)
def test_products(tokens, outputs, inputs, sizes, capsys):
    x, codes, scales = operands(tokens, outputs, inputs)
    found = hopper.products(x, codes, scales, sizes=hopper.Sizes(**sizes), interpret=RACES)
    wide = [np.asarray(array.astype(jnp.float32), np.float64) for array in (x, codes, scales)]
    expected = wide[0] @ wide[1].T * wide[2]
    # Codes and tokens are exact, so what is left is the order of a sum in float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=np.abs(expected).max() * inputs * 2**-24)
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(6144, 4096), (28672, 4096), (4096, 14336), (51200, 5120), (5120, 25600)])
def test_sizes_fit_published_shapes(shape):
    for tokens in (32, 64, 96, 128):
        sizes = hopper.Sizes().resolve(tokens, *shape)
        rows = sizes.groups * 64
        assert shape[0] % rows == 0 and shape[1] % sizes.block == 0
        assert 1 <= sizes.parts <= shape[1] // sizes.block
        assert sizes.stages >= 2 and sizes.stages * sizes.block * (rows + 2 * tokens) <= 227 * 1024


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(32, 6144, 4096), (64, 4096, 14336), (128, 28672, 4096)])
def test_the_kernel_lowers_for_cuda(tokens, outputs, inputs):
    array = jax.ShapeDtypeStruct
    arguments = (
        array((tokens, inputs), jnp.bfloat16), array((outputs, inputs), jnp.int8), array((outputs,), jnp.float32),
    )  # fmt: skip
    assert lowered(hopper.products, *arguments).count("mosaic_gpu_v2") == 1


CHOICES = {"kernels": "auto", "rows": 2, "window": 32, "inputs": 4096, "outputs": 6144, "x": "bfloat16", "w": "int8"}


@pytest.mark.parametrize(
    ("changed", "found", "expected"),
    [
        ({}, (9, 0), "pallas-hopper"),
        ({"kernels": "pallas-hopper"}, (9, 0), "pallas-hopper"),
        ({"kernels": "xla"}, (9, 0), "xla"),
        ({"window": 1, "rows": 32}, (9, 0), "xla"),
        ({"window": 4}, (9, 0), "xla"),
        ({"window": 65}, (9, 0), "xla"),
        ({"x": "float32"}, (9, 0), "xla"),
        ({"w": "float8_e4m3fn"}, (9, 0), "xla"),
        ({"inputs": 64}, (9, 0), "xla"),
        ({"outputs": 192}, (9, 0), "xla"),
        ({}, (8, 0), "xla"),
        ({}, (10, 0), "xla"),
        ({}, None, "xla"),
    ],
)
def test_the_choice_of_the_kernel(changed, found, expected, monkeypatch):
    monkeypatch.setattr(capability, "cuda_capability", lambda: found)
    monkeypatch.setattr(capability, "target_platform", lambda: "gpu")
    assert choose_products(**{**CHOICES, **changed}) == expected
    with use_mesh(make_mesh("tensor=2")):
        assert choose_products(**{**CHOICES, **changed}) == "xla"


def test_products_of_rows_of_tokens():
    x, codes, scales = operands(32, 256, 256)
    arguments = x.reshape(2, 16, 256), codes.reshape(2, 128, 256), scales.reshape(2, 128)
    found = multiply(*arguments, kernels="pallas-hopper-interpreted")
    assert found.shape == (2, 16, 2, 128) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, multiply(*arguments), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kernels", "calls"), [("auto", 5), ("xla", 0)])
def test_the_decoder_multiplies_with_this_kernel(kernels, calls, monkeypatch):
    """All four matrices of a layer, and the head."""
    monkeypatch.setattr(capability, "cuda_capability", lambda: capability.HOPPER)
    monkeypatch.setattr(capability, "target_platform", lambda: "gpu")
    config = DecoderConfig(
        hidden_size=256, intermediate_size=128, num_layers=1, num_heads=2, num_kv_heads=1, dtype="bfloat16"
    )
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    decoder = Decoder(config, visual_head=True, attention="xla", kernels=kernels)

    def step(tokens):
        params = decoder.init(jax.random.key(0), tokens)["params"]
        params = jax.tree.map(lambda x: getattr(x, "value", x), params, is_leaf=lambda x: hasattr(x, "value"))
        cache = KVCache.create(config, jnp.zeros((2,), jnp.int32), 64)
        return decoder.apply({"params": quantise_params(params, "int8")}, tokens, cache)[0]

    assert lowered(step, tokens).count("call @partial_products") == calls
