"""The kernel for single tokens: interpreted, it equals plain attention, and so do whole runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu3_jax.generation import engine
from emu3_jax.generation.schedule import image_schedule, text_schedule
from emu3_jax.models.attention import attend
from emu3_jax.models.decode_kernels import attend_one
from emu3_jax.models.quantization import narrow_rows, quantise_params

attend_here = functools.partial(attend_one, interpret=True)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("query", "groups"), [(66, 4), (127, 1), (128, 3), (511, 20)])
def test_attention_of_one_query(query, groups, narrow):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 2, groups, 32))
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_the_kernel_lowers_for_cuda(dtype):
    """Of the published shapes; what Triton makes of it only a GPU can tell."""
    array = jax.ShapeDtypeStruct
    cache = array((2, 8, 8704, 128), dtype)
    scales = array((2, 8, 8704), jnp.float32) if dtype == jnp.int8 else None
    where = (array((), jnp.int32), array((2,), jnp.int32))
    traced = jax.jit(attend_one).trace(array((2, 8, 4, 128), jnp.bfloat16), cache, cache, scales, scales, *where)
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
