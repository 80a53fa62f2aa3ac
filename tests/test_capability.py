"""GPUs that lack something: no kernel, dtype or precision is chosen that the device does not have."""

import dataclasses
import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import emu3_jax
from emu3_jax import loading
from emu3_jax.cli.main import main
from emu3_jax.errors import Emu3Error
from emu3_jax.models import attention, capability
from emu3_jax.models.attention import cached_attention, choose, choose_kernels
from emu3_jax.models.quantization import narrow_rows

pytestmark = pytest.mark.compiled_quickly

T4, A100, L4, H100 = "7.5", "8.0", "8.9", "9.0"


@pytest.fixture
def gpu(monkeypatch):
    """Makes every question about the device answer as for a GPU of this capability."""

    def simulate(found: str) -> None:
        monkeypatch.setattr(capability, "target_platform", lambda: "gpu")
        monkeypatch.setenv(capability.SIMULATED, found)

    return simulate


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The lines of our own warnings so far."""
    monkeypatch.setattr(logging.getLogger("emu3_jax"), "propagate", True)
    loading._warn_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == "emu3_jax"]


# ------------------------------------------------------------------------------------------------ choices


@pytest.mark.parametrize(
    ("found", "step", "whole", "packed", "tf32", "bfloat16", "float8"),
    [
        (T4, "xla", "xla", "xla", False, False, False),
        ("7.0", "xla", "xla", "xla", False, False, False),
        (A100, "pallas", "cudnn", "xla", True, True, False),
        (L4, "pallas", "cudnn", "xla", True, True, True),
        (H100, "pallas", "cudnn", "cudnn", True, True, True),
        ("10.0", "pallas", "cudnn", "cudnn", True, True, True),
    ],
)
def test_what_each_card_is_given(found, step, whole, packed, tf32, bfloat16, float8, gpu, monkeypatch):
    gpu(found)
    monkeypatch.setattr(attention, "TRITON_SUPPORTED", True)
    assert choose_kernels("auto", 128, jnp.bfloat16) == step
    for dtype in (jnp.bfloat16, jnp.float16):
        assert choose("auto", (2, 64, 8, 4, 128), dtype, False) == whole
        assert choose("auto", (2, 64, 8, 4, 128), dtype, True) == packed
    assert choose("auto", (2, 64, 8, 4, 128), jnp.float32, False) == "xla"
    assert capability.takes_tf32() == tf32
    assert capability.emulates_bfloat16() != bfloat16 and capability.emulates_float8() != float8


def test_named_attention_says_what_the_card_lacks(gpu):
    gpu(T4)
    with pytest.raises(Emu3Error, match=r"compute capability 8.0 \(Ampere\) or later, and this GPU has 7.5"):
        choose("cudnn", (2, 64, 8, 4, 128), jnp.float16, False)


def test_other_platforms_emulate_nothing(monkeypatch):
    monkeypatch.setenv(capability.SIMULATED, T4)
    assert not capability.emulates_bfloat16() and not capability.emulates_float8() and not capability.takes_tf32()
    monkeypatch.delenv(capability.SIMULATED)
    assert capability.cuda_capability() is None and not capability.cuda_at_least((1, 0))


def test_the_least_capable_gpu_counts(monkeypatch):
    class Device:
        def __init__(self, found):
            self.compute_capability = found

    for devices, expected in ((["9.0", "7.5"], (7, 5)), (["10.0", "9.0"], (9, 0)), (["gfx942"], None)):
        monkeypatch.setattr(jax, "local_devices", lambda backend, devices=devices: [Device(d) for d in devices])
        capability._cuda_capability.cache_clear()
        assert capability.cuda_capability() == expected
    capability._cuda_capability.cache_clear()


@pytest.mark.parametrize("found", ["", "T4", "7", "75", "7.5.0", "-7.5", "7.50"])
def test_what_is_no_capability(found, monkeypatch, capsys):
    monkeypatch.setenv(capability.SIMULATED, found)
    monkeypatch.setattr(capability, "target_platform", lambda: "gpu")
    assert main(["bench", "decode", "--preset", "small", "--steps", "1", "--area", "256"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "EMU3_JAX_COMPUTE_CAPABILITY is" in error and "like 7.5" in error


def test_what_is_no_capability_is_told_without_a_gpu(monkeypatch):
    monkeypatch.setenv(capability.SIMULATED, "75")
    with pytest.raises(Emu3Error, match=r"EMU3_JAX_COMPUTE_CAPABILITY is '75': it must be a capability like 7.5"):
        emu3_jax.load()


# ------------------------------------------------------------------------------------------------ loading


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """The tiny bundle, which says that it computes in bfloat16."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    file = copy / "decoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    return copy


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_float16_takes_the_place_of_bfloat16(bundle, quantize, gpu, warnings):
    gpu(T4)
    for _ in range(2):  # one line, however often
        language = emu3_jax.load(bundle, quantize=quantize).language
    assert language.config.dtype == "float16" and language.params["embed"]["embedding"].dtype == jnp.float16
    assert warnings() == [
        "this GPU (compute capability 7.5) has no bfloat16: the decoder is loaded in float16, which is more exact, "
        "but cuts numbers off at 65,504; if pictures look wrong, compare with --dtype float32"
    ]


def test_what_is_asked_for_is_obeyed(bundle, tiny_bundle, gpu, warnings):
    gpu(T4)
    for dtype in ("float32", "float16"):
        assert emu3_jax.load(bundle, dtype=dtype).language.config.dtype == dtype
    assert emu3_jax.load(tiny_bundle).language.config.dtype == "float32" and warnings() == []
    assert emu3_jax.load(bundle, dtype="bfloat16").language.config.dtype == "bfloat16"
    line = "this GPU (compute capability 7.5) has no bfloat16, and computes it in float32, slowly; --dtype float16 is"
    assert len(warnings()) == 1 and warnings()[0].startswith(line)


@pytest.mark.parametrize(("found", "lines"), [(T4, 1), (A100, 1), (L4, 0), (H100, 0)])
def test_float8_is_widened_with_a_warning(tiny_bundle, found, lines, gpu, warnings):
    gpu(found)
    assert emu3_jax.load(tiny_bundle, quantize="fp8").language.quantize == "fp8"
    assert len(warnings()) == lines and all("has no float8" in line for line in warnings())


@pytest.mark.parametrize("found", [A100, H100])
def test_newer_cards_keep_bfloat16(bundle, found, gpu, warnings):
    gpu(found)
    assert emu3_jax.load(bundle).language.config.dtype == "bfloat16" and warnings() == []


# ------------------------------------------------------------------------------------------------ float16


@pytest.mark.parametrize("size", [0.02, 1.0, 50.0])
def test_a_narrow_cache_in_float16(size):
    """4,096 keys of values of any size: as near to float32 as float16 is. Without care small values are 3% off."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 1, 2, 2, 32))
    k, v = (jax.random.normal(key, (1, 2, 4096, 32)) for key in keys[1:])
    (k, k_scales), (v, v_scales) = narrow_rows(k), narrow_rows(size * (v + 0.5))
    attend = functools.partial(cached_attention, first_query=jnp.asarray([4095]), start=jnp.asarray([0]))
    exact, half = (
        np.asarray(attend(q.astype(dtype), k, v, k_scales, v_scales), np.float32) for dtype in ("float32", "float16")
    )
    assert np.sqrt(np.mean((half - exact) ** 2) / np.mean(exact**2)) < 1e-3


def test_numbers_that_float16_lacks_make_no_nan():
    """The residual stream and the MLP's product beyond 65,504, as some models have them in few channels."""
    config = dataclasses.replace(tiny.CONFIG, dtype="float16")
    params = jax.tree.map(lambda leaf: leaf, tiny.params())
    params["embed"]["embedding"] = params["embed"]["embedding"].at[:, 0].set(60_000.0)
    params["layers_0"]["mlp"]["gate_up"] = 500 * params["layers_0"]["mlp"]["gate_up"]
    logits = np.asarray(tiny.forward(params, jnp.asarray([[17, 1, 2, 3]]), None, config)[0])
    assert np.isfinite(logits).all() and logits.std() > 0
