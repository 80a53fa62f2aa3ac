"""The kernels for single tokens: interpreted, they equal the plain products and attention, and so do whole runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu3_jax.generation import engine
from emu3_jax.generation.schedule import image_schedule, text_schedule
from emu3_jax.models.attention import attend
from emu3_jax.models.decode_kernels import attend_one, multiply
from emu3_jax.models.quantization import narrow_rows, quantise_params

multiply_here = functools.partial(multiply, interpret=True)
attend_here = functools.partial(attend_one, interpret=True)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 384), (96, 16), (1024, 128)])
def test_products(rows, inputs, outputs):
    keys = jax.random.split(jax.random.key(rows), 2)
    x, w = jax.random.normal(keys[0], (rows, inputs)), jax.random.normal(keys[1], (inputs, outputs))
    np.testing.assert_allclose(multiply_here(x, w), x @ w, atol=1e-3)
    np.testing.assert_allclose(multiply_here(x, w.T, outputs_first=True), x @ w, atol=1e-3)
    codes = jnp.round(20 * w).astype(jnp.int8)
    np.testing.assert_allclose(multiply_here(x, codes), x @ codes.astype(jnp.float32), atol=2e-2)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("query", [66, 127, 128, 511])
def test_attention_of_one_query(query, narrow):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 2, 4, 32))
    k, v = (jax.random.normal(key, (3, 2, 512, 32)) for key in keys[1:])
    k, v = (x.at[:, :, query + 1 :].set(1e4) for x in (k, v))  # beyond the query: must not be seen
    k_scales = v_scales = None
    if narrow:
        (k, k_scales), (v, v_scales) = narrow_rows(k), narrow_rows(v)
    where = (jnp.int32(query), jnp.asarray([0, 5, 66], jnp.int32))
    expected = attend(q[:, None], k, v, k_scales, v_scales, *where)[:, 0]
    np.testing.assert_allclose(attend_here(q, k, v, k_scales, v_scales, *where), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_runs_are_equal_token_by_token(kind, temperature):
    params = tiny.params() if kind is None else quantise_params(tiny.params(), kind)
    settings = tiny.settings(3, temperature=temperature, guidance=2.0, top_k=6)
    arguments = ([[17, 1, 2], [17], [17, 5, 6, 7]], [image_schedule(6, 6)] * 3, settings, [[17]] * 3)

    def run(kernels):
        return engine.run(params, tiny.CONFIG, *arguments, narrow_cache=kind is not None, kernels=kernels)

    np.testing.assert_array_equal(run("pallas-interpreted"), run("xla"))


def test_runs_of_text_are_equal_too():
    settings = tiny.settings(2, temperature=[1.0, 0.0])
    arguments = ([[17, 1, 2], [17]], [text_schedule(30)] * 2, settings)
    found, expected = (
        engine.run(tiny.params(), tiny.CONFIG, *arguments, kernels=kernels) for kernels in ("pallas-interpreted", "xla")
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_kernels_lower_for_cuda(dtype):
    """Of the published shapes; what Triton makes of them only a GPU can tell."""
    array = jax.ShapeDtypeStruct

    def lowered(function, *arguments):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    x = array((2, 4096), jnp.bfloat16)
    assert "triton" in lowered(multiply, x, array((4096, 28672), dtype))
    assert "triton" in lowered(functools.partial(multiply, outputs_first=True), x, array((32768, 4096), dtype))
    if dtype != jnp.float8_e4m3fn:
        cache, scales = array((2, 8, 8704, 128), dtype), array((2, 8, 8704), jnp.float32)
        scales = scales if dtype == jnp.int8 else None
        where = (array((), jnp.int32), array((2,), jnp.int32))
        assert "triton" in lowered(
            attend_one, array((2, 8, 4, 128), jnp.bfloat16), cache, cache, scales, scales, *where
        )
