"""The kernel for single tokens: interpreted, it equals plain attention, and so do whole runs."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import session
from emu3_jax.generation.schedule import image_schedule, text_schedule
from emu3_jax.models import attention, capability
from emu3_jax.models.attention import cached_attention, choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decode_kernels import attend_one, check_width
from emu3_jax.models.decoder import rope, rotations
from emu3_jax.models.quantization import quantise_params
from emu3_jax.sharding.mesh import make_mesh

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("length", "groups", "heads"), [(67, 4, 2), (127, 1, 12), (128, 3, 2), (511, 20, 2)])
def test_attention_of_one_token(length, groups, heads, narrow):
    width, rows = 32, jnp.asarray([0, 5, 66], jnp.int32)
    config = dataclasses.replace(
        tiny.CONFIG, hidden_size=heads * groups * width, num_heads=heads * groups, num_kv_heads=heads, num_layers=1
    )
    cache = KVCache.create(config, rows, 512, narrow)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (3, heads, 512, width)) for key in keys[:2])
    k, v = (x.at[:, :, length:].set(1e4) for x in (k, v))  # from the token on: must not be seen
    cache = cache.write(0, k, v).replace(length=jnp.full(3, length))
    qkv = jax.random.normal(keys[2], (3, 1, heads, groups + 2, width))
    rotated = rotations(cache.positions(1), width, 1e4)
    queries_keys = rope(qkv[:, :, :, : groups + 1], rotated)
    new = (queries_keys[:, :, :, groups], qkv[:, :, :, groups + 1])
    written = cache.write(0, *(jnp.swapaxes(x, 1, 2) for x in new))
    queries, where = queries_keys[:, :, :, :groups], {"first_query": cache.length, "start": cache.start}
    expected = cached_attention(queries, *written.layer(0), **where)[:, 0]
    rotated = tuple(part[:, 0] for part in rotated)
    found, kept = attend_one(qkv[:, 0], rotated, cache.layer(0), cache.length, rows, interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for array, other in zip(kept, written.layer(0), strict=True):
        if other is not None:
            np.testing.assert_allclose(array, other, atol=1e-6)


def test_a_narrow_cache_in_float16():
    """As near to float32 as float16 is, for values as small as 0.01 too."""
    config = dataclasses.replace(tiny.CONFIG, hidden_size=128, num_layers=1, num_kv_heads=2)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (size * jax.random.normal(key, (1, 2, 512, 32)) for key, size in zip(keys, (1.0, 0.01), strict=False))
    cache = KVCache.create(config, jnp.zeros(1, jnp.int32), 512, True).write(0, k, v).replace(length=jnp.full(1, 500))
    qkv = jax.random.normal(keys[2], (1, 2, 4, 32)).at[:, :, 3].multiply(0.01)
    rotated = tuple(part[:, 0] for part in rotations(cache.positions(1), 32, 1e4))
    exact, half = (
        np.asarray(
            attend_one(qkv.astype(dtype), rotated, cache.layer(0), cache.length, cache.start, interpret=True)[0],
            np.float32,
        )
        for dtype in ("float32", "float16")
    )
    assert np.sqrt(np.mean((half - exact) ** 2) / np.mean(exact**2)) < 2e-3


def test_heads_of_other_widths_are_refused():
    with pytest.raises(Emu3Error, match="power of two, not 24"):
        check_width(24)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_runs_are_equal_token_by_token(kind, temperature):
    params = tiny.params() if kind is None else quantise_params(tiny.params(), kind)
    settings = tiny.settings(3, temperature=temperature, guidance=2.0, top_k=6)
    arguments = tiny.rows([[17, 1, 2], [17], [17, 5, 6, 7]], [image_schedule(6, 6)] * 3, [[17]] * 3), settings

    def run(kernels):
        return session.run(params, tiny.CONFIG, *arguments, narrow_cache=kind is not None, kernels=kernels).ids

    np.testing.assert_array_equal(run("pallas-interpreted"), run("xla"))


@pytest.mark.parametrize("kind", [None, "int8"])
def test_runs_on_a_mesh_are_equal_too(kind):
    params = tiny.params() if kind is None else quantise_params(tiny.params(), kind)
    settings = tiny.settings(4, temperature=[0.0, 1.0, 1.0, 0.0], top_k=6)
    arguments = tiny.rows([[17, 1, 2], [17], [17, 5, 6, 7], [17, 3]], [image_schedule(4, 4)] * 4), settings
    expected = session.run(params, tiny.CONFIG, *arguments, narrow_cache=kind is not None).ids
    mesh = make_mesh("data=2,tensor=2")
    found = session.run(
        params, tiny.CONFIG, *arguments, mesh=mesh, narrow_cache=kind is not None, kernels="pallas-interpreted"
    ).ids
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("kernels", "width", "platform", "expected"),
    [
        ("xla", 128, "gpu", "xla"), ("pallas", 128, "cpu", "pallas"), ("auto", 128, "cpu", "xla"),
        ("auto", 128, "tpu", "xla"), ("auto", 128, "gpu", "pallas"), ("auto", 96, "gpu", "xla"),
        ("auto", 16, "gpu", "xla"),
    ],
)  # fmt: skip
def test_the_choice_of_kernels(kernels, width, platform, expected, monkeypatch):
    monkeypatch.setattr(attention, "TRITON_SUPPORTED", True)
    monkeypatch.setattr(capability, "cuda_capability", lambda: (9, 0))
    assert choose_kernels(kernels, width, jnp.float32, platform) == expected
    monkeypatch.setattr(capability, "cuda_capability", lambda: (7, 5))
    assert choose_kernels("auto", width, jnp.float32, platform) == "xla"


def test_a_named_kernel_that_the_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(capability, "cuda_capability", lambda: (7, 5))
    with pytest.raises(Emu3Error, match=r'"pallas" need compute capability 8.0 \(Ampere\) or later, .* has 7.5'):
        choose_kernels("pallas", 128, jnp.float32, "gpu")


@pytest.mark.parametrize("kernels", ["auto", "pallas"])
def test_without_triton_the_kernel_is_taken_on_request_alone(kernels, monkeypatch):
    monkeypatch.setattr(attention, "TRITON_SUPPORTED", False)
    monkeypatch.setattr(capability, "cuda_capability", lambda: (9, 0))
    assert choose_kernels(kernels, 128, jnp.float32, "gpu") == {"auto": "xla", "pallas": "pallas"}[kernels]


def test_unknown_kernels_are_refused():
    with pytest.raises(Emu3Error, match="kernels 'triton' are unknown: choose one of auto, xla, pallas"):
        choose_kernels("triton", 128, jnp.float32)


def test_runs_of_text_are_equal_too():
    settings = tiny.settings(2, temperature=[1.0, 0.0])
    arguments = tiny.rows([[17, 1, 2], [17]], [text_schedule(30)] * 2), settings
    found, expected = (
        session.run(tiny.params(), tiny.CONFIG, *arguments, kernels=kernels).ids
        for kernels in ("pallas-interpreted", "xla")
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_the_kernel_lowers_for_cuda(dtype, rows):
    """Of the published shapes; what Triton makes of it only a GPU can tell."""
    array = jax.ShapeDtypeStruct
    kept = array((rows, 8, 8704, 128), dtype)
    scales = array((rows, 8, 8704), jnp.float32) if dtype == jnp.int8 else None
    arguments = (
        array((rows, 8, 6, 128), jnp.bfloat16),
        (array((rows, 64), jnp.float32),) * 2,
        (kept, kept, scales, scales),
        array((rows,), jnp.int32),
        array((rows,), jnp.int32),
    )
    with contextlib.ExitStack() as stack:
        if jax.__version_info__ >= (0, 11):
            # They ask for which GPU, and say that this backend is deprecated; see `attention.TRITON_SUPPORTED`.
            h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
            stack.enter_context(use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)))
            stack.enter_context(pytest.warns(DeprecationWarning, match="Pallas Triton backend is deprecated"))
        lowered = jax.jit(attend_one).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()
