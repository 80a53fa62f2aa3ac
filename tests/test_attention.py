"""Attention of whole sequences: every implementation gives the same, on every mesh, and one function chooses."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conditionals import conditionals

from emu3_jax.errors import Emu3Error
from emu3_jax.models import attention, attention_kernels, capability
from emu3_jax.models.attention import choose, self_attention
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh

pytestmark = [pytest.mark.slow, pytest.mark.compiled_quickly]

SEGMENTS = {
    "none": None,
    "packed": [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 0],
    "padded": [1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1],
    "both": [1, 1, 1, -1, -1, 2, 2, 2, 2, -2, -2, 0],
    "parts": [1, 1, 1, 0, 2, 2, 0, 0, 3, 3, 3, 0],
}


def inputs(rows, length, kv_heads=2, groups=2, width=16, dtype=jnp.float32):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(length)
    q_shape = (rows, length, kv_heads, groups, width)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in (q_shape, *[(*q_shape[:3], width)] * 2, q_shape)]


def segments(kind, rows, length):
    """`SEGMENTS` stretched to `length`; rows but the first are rolled by a part of it."""
    if SEGMENTS[kind] is None:
        return None
    ids = np.asarray(SEGMENTS[kind], np.int32)[np.arange(length) * 12 // length]
    return np.stack([ids, *[np.where(np.arange(length) < 2 * length // 3, 1, 0)] * (rows - 1)]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="implementation")
def with_gradients(q, k, v, cotangent, ids, implementation):
    out, back = jax.vjp(lambda *qkv: self_attention(*qkv, ids, implementation), q, k, v)
    return out, *back(cotangent)


def reference(q, k, v, ids):
    """One softmax over all pairs, token by token in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, s in np.ndindex(q.shape[:2]):
        seen = np.arange(q.shape[1]) <= s
        if ids is not None:
            seen &= ids[b] == abs(ids[b, s])
        if seen.any():
            scores = np.einsum("kgh,tkh->kgt", q[b, s], k[b, seen]) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, s] = np.einsum("kgt,tkh->kgh", weights / weights.sum(-1, keepdims=True), v[b, seen])
    return out


def assert_close(found, wanted, relative):
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=False):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= relative, f"{name}: {worst}"


# ------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("kind", SEGMENTS)
def test_xla_is_the_definition(kind):
    q, k, v, cotangent = inputs(2, 36)
    ids = segments(kind, 2, 36)
    out = with_gradients(q, k, v, cotangent, ids, "xla")[0]
    assert_close([out], [reference(q, k, v, ids)], 1e-6)


@pytest.mark.parametrize(
    ("length", "kind", "dtype", "relative"),
    [
        (100, "none", "float32", 1e-5),
        (128, "both", "float32", 1e-5),
        (290, "both", "float32", 1e-5),
        (290, "packed", "bfloat16", 1.5e-2),
        (700, "padded", "float32", 1e-5),
    ],
)
def test_splash_equals_xla(length, kind, dtype, relative):
    arrays, ids = inputs(2, length, dtype=dtype), segments(kind, 2, length)
    exact = [x.astype(jnp.float32) for x in arrays]
    found = with_gradients(*arrays, ids, "splash-interpreted")
    assert all(x.dtype == dtype for x in found)
    assert_close(found, with_gradients(*exact, ids, "xla"), relative)


@pytest.mark.parametrize("implementation", ["xla", "splash-interpreted"])
def test_a_token_that_sees_nothing_gets_finite_values_and_gradients(implementation):
    arrays = inputs(1, 24)
    ids = jnp.asarray([[-1] * 5 + [1] * 19], jnp.int32)
    assert all(np.isfinite(x).all() for x in with_gradients(*arrays, ids, implementation))
    # ... and what it gets reaches no other token.
    silent = [*arrays[:3], arrays[3].at[:, :5].set(0)]
    alone = [x[:, 5:] for x in arrays]
    found = with_gradients(*silent, ids, implementation)
    assert_close([x[:, 5:] for x in found], with_gradients(*alone, None, "xla"), 1e-5)


def test_splash_tiles_cover_the_length():
    assert attention_kernels._splash_tiles(10240) == (1024, 10240)
    assert attention_kernels._splash_tiles(8200) == (512, 8704)
    assert attention_kernels._splash_tiles(100) == (128, 128)
    for length in range(1, 4000, 37):
        block, padded = attention_kernels._splash_tiles(length)
        assert length <= padded < length + 512 and padded % block == 0 and block % 128 == 0


# ------------------------------------------------------------------------------------------------ cuDNN


def test_runs_are_in_the_form_of_the_packed_layout():
    rows = [
        [1, 1, 2, 2, 2, 0], [1, 1, -1, -1, 2, -2], [-3, -3, 1, 2, 2, 2], [1, 0, 0, 2, -2, 0], [0, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6],
    ]  # fmt: skip
    count, (queries, keys, first) = attention_kernels.runs(jnp.asarray(rows, jnp.int32), 4)
    assert count.tolist() == [2, 2, 3, 2, 1, 6]
    nothing = [-1] * 4
    assert queries.tolist()[:5] == [[2, 4, -1, -1], [4, 2, -1, -1], [2, 1, 3, -1], [3, 3, -1, -1], [6, *nothing[1:]]]
    assert keys.tolist()[:5] == [[2, 3, -1, -1], [2, 1, -1, -1], [2, 1, 3, -1], [1, 1, -1, -1], [6, *nothing[1:]]]
    starts = [[0, 2, -1, -1, -1], [0, 4, -1, -1, -1], [0, 2, 3, -1, -1], [0, 3, -1, -1, -1], [0, *nothing]]
    assert first.tolist()[:5] == starts


def packed_layout(q, k, v, lengths):
    """What cuDNN's documentation says of its packed layout: causal attention run by run, counted from its start.

    In NumPy: JAX would compile each operation for each length of a run.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.full(q.shape, np.nan)
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    for row, (queries, keys, first) in enumerate(zip(*map(np.asarray, lengths), strict=True)):
        for number, seen, start in zip(queries, keys, first[:-1], strict=True):
            if number >= 0:
                scores = np.einsum("snh,tnh->nst", q[row, start : start + number], k[row, start : start + seen])
                visible = np.arange(seen)[None] <= np.arange(number)[:, None]
                weights = np.exp(np.where(visible, scores * q.shape[-1] ** -0.5, -np.inf))
                weights /= weights.sum(-1, keepdims=True)
                out[row, start : start + number] = np.einsum("nst,tnh->snh", weights, v[row, start : start + seen])
    return jnp.asarray(out, jnp.float32)


@pytest.mark.parametrize("kind", ["packed", "padded", "both", "parts"])
def test_cudnn_is_given_the_definition(kind, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_cudnn_packed", packed_layout)
    q, k, v, _ = inputs(2, 36)
    ids = segments(kind, 2, 36)

    def never(*_):
        raise AssertionError

    with jax.disable_jit():  # the branch is decided at once
        found = attention_kernels.cudnn(q, k, v, ids, otherwise=never)
    # What padding (0) gets means nothing, but it must be finite.
    assert np.isfinite(found).all()
    real = np.asarray(ids)[:, :, None, None, None] != 0
    assert_close([found * real], [reference(q, k, v, ids) * real], 1e-5)


def kernel(out_of):
    """`out_of(q, k, v, ids)` as a function that keeps its result for the backward pass, as cuDNN does."""

    @jax.custom_vjp
    def attend(*arrays):
        return out_of(*arrays)

    def forward(*arrays):
        out, back = jax.vjp(out_of, *arrays)
        return out, (arrays, out, jnp.sum(out, axis=-1), jnp.zeros(0), back)

    def backward(kept, cotangent):
        return kept[-1](cotangent)

    attend.defvjp(forward, backward)
    return attend


def plain(q, k, v, ids):
    """XLA's attention of queries [B, S, N, H], as cuDNN's kernels take them."""
    groups = q.shape[2] // k.shape[2]
    q_bskgh = q.reshape(*q.shape[:2], -1, groups, q.shape[3])
    return attention._xla_attention(q_bskgh, k, v, q_segments=ids, k_segments=ids, first_query=0).reshape(q.shape)


def branches(monkeypatch, ids):
    """A program of ids and the largest number of runs, with XLA's attention in place of cuDNN's kernels.

    The kernels' results are multiplied by 2 (causal) and 3 (packed), to tell which one was taken.
    """
    *qkv, cotangent = inputs(2, 36)
    # What padding gets means nothing.
    cotangent = jnp.where((ids != 0)[:, :, None, None, None], cotangent, 0)
    monkeypatch.setattr(attention_kernels, "_cudnn_causal", kernel(lambda *qkv: 2 * plain(*qkv, None)))
    packed = kernel(lambda *qkv: 3 * plain(*qkv, ids))
    monkeypatch.setattr(attention_kernels, "_cudnn_packed", lambda *qkv_lengths: packed(*qkv_lengths[:3]))
    otherwise = lambda *arrays: self_attention(*arrays, "xla")  # noqa: E731
    real = (ids != 0)[:, :, None, None, None]

    @functools.partial(jax.jit, static_argnames=("max_runs", "keeps"))
    def run(ids, max_runs, keeps="all"):
        part = functools.partial(attention_kernels.cudnn, segments_bs=ids, otherwise=otherwise, max_runs=max_runs)
        if keeps == "names":
            named = jax.checkpoint_policies.save_only_these_names(attention_kernels.ATTENTION)
            part = jax.checkpoint(part, policy=named)
        out, back = jax.vjp(part, *qkv)
        return out * real, *back(cotangent)

    out, *slopes = with_gradients(*qkv, cotangent, ids, "xla")
    return run, [out * real, *slopes]


@pytest.mark.parametrize("keeps", ["all", "names"])
def test_cudnn_takes_the_kernel_that_serves(keeps, monkeypatch):
    alone = np.ones((2, 36), np.int32)
    alone[1, 30:] = 0  # padding behind a single segment
    run, wanted = branches(monkeypatch, alone)
    assert_close(run(alone, 8, keeps), [2 * x for x in wanted], 1e-5)
    for kind in ("packed", "padded"):
        ids = segments(kind, 2, 36)
        run, wanted = branches(monkeypatch, ids)
        assert_close(run(ids, 3, keeps), [3 * x for x in wanted], 1e-5)
        if kind == "packed":  # three runs, more than two
            assert_close(run(ids, 2, keeps), wanted, 1e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_backward_pass_of_dots_does_not_choose_again(remat, monkeypatch):
    """The decoder's loops hold one choice forward and one backward. "full" runs the forward one once more."""
    monkeypatch.setattr(attention_kernels, "_cudnn_causal", kernel(lambda *qkv: plain(*qkv, None)))
    monkeypatch.setattr(attention_kernels, "_cudnn_packed", kernel(lambda *qkv: plain(*qkv[:3], None)))
    monkeypatch.setattr(attention, "choose", lambda *_, **__: "cudnn")
    tokens, ids = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), jnp.int32)
    model = Decoder(tiny.CONFIG, stacked=True, remat=remat)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])

    def loss(params):
        return model.apply({"params": params}, tokens, None, ids, method="hidden").sum()

    query = (2, 16, tiny.CONFIG.num_heads, tiny.CONFIG.head_dim)
    program = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    loops = [equation.params["jaxpr"].jaxpr for equation in program.eqns if equation.primitive.name == "scan"]
    choices = [[shapes for shapes in conditionals(loop) if query in shapes] for loop in loops]
    assert [len(found) for found in choices] == [1, 2 if remat == "full" else 1]


# ------------------------------------------------------------------------------------------------ choosing

SHAPE = (1, 10240, 8, 4, 128)


@pytest.mark.parametrize(
    ("platform", "dtype", "shape", "packed", "found", "expected"),
    [
        ("cpu", "bfloat16", SHAPE, True, None, "xla"),
        ("tpu", "bfloat16", SHAPE, True, None, "splash"),
        ("tpu", "float32", SHAPE, True, None, "xla"),
        ("tpu", "bfloat16", (1, 10240, 8, 4, 80), True, None, "xla"),
        ("tpu", "bfloat16", (1, 1, 8, 4, 128), False, None, "xla"),
        ("gpu", "bfloat16", SHAPE, True, (9, 0), "cudnn"),
        ("gpu", "bfloat16", SHAPE, True, (8, 0), "xla"),
        ("gpu", "bfloat16", SHAPE, False, (8, 0), "cudnn"),
        ("gpu", "float16", SHAPE, False, (7, 5), "xla"),
        ("gpu", "bfloat16", SHAPE, True, (7, 5), "xla"),
        ("gpu", "float32", SHAPE, False, (9, 0), "xla"),
        ("gpu", "bfloat16", (1, 10240, 8, 4, 192), False, (8, 0), "xla"),
        ("gpu", "bfloat16", (1, 10240, 8, 4, 192), False, (9, 0), "cudnn"),
        ("gpu", "bfloat16", SHAPE, False, None, "xla"),
        ("gpu", "bfloat16", (64, 10240, 8, 4, 128), True, (9, 0), "xla"),
    ],
)
def test_auto_takes_the_kernel_that_can_serve(platform, dtype, shape, packed, found, expected, monkeypatch):
    monkeypatch.setattr(capability, "cuda_capability", lambda: found)
    assert choose("auto", shape, jnp.dtype(dtype), packed, platform=platform) == expected


@pytest.mark.parametrize(
    ("implementation", "platform", "dtype", "shape", "packed", "message"),
    [
        ("flash", "gpu", "bfloat16", SHAPE, False, "attention 'flash' is unknown: choose one of auto, xla, cudnn"),
        ("cudnn", "cpu", "bfloat16", SHAPE, False, "it needs a GPU, and the program will run on a CPU"),
        ("splash", "gpu", "bfloat16", SHAPE, False, "it needs a TPU, and the program will run on a GPU"),
        ("splash", "tpu", "float32", SHAPE, False, "the decoder's dtype is float32; choose \"auto\" or \"xla\""),
        ("splash", "tpu", "bfloat16", (1, 64, 2, 2, 48), False, "a multiple of 64, and the decoder's is 48"),
        ("cudnn", "gpu", "float32", SHAPE, False, "bfloat16 or float16, and the decoder's dtype is float32"),
        ("cudnn", "gpu", "bfloat16", (1, 64, 2, 2, 136), False, "a multiple of 8 up to 128, and the decoder's is 136"),
        ("cudnn", "gpu", "bfloat16", SHAPE, True, "compute capability 9.0 (Hopper) or later, and this GPU has 8.6"),
    ],
)  # fmt: skip
def test_a_named_kernel_that_cannot_serve_says_why(
    implementation, platform, dtype, shape, packed, message, monkeypatch
):
    monkeypatch.setattr(capability, "cuda_capability", lambda: (8, 6))
    with pytest.raises(Emu3Error) as error:
        choose(implementation, shape, jnp.dtype(dtype), packed, platform=platform)
    assert message in str(error.value)


def test_the_mesh_says_where_the_program_will_run():
    assert capability.target_platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)):
        assert capability.target_platform() == "tpu"
    with use_mesh(make_mesh("data=2")):
        assert capability.target_platform() == "cpu"


# ------------------------------------------------------------------------------------------------ meshes


@pytest.mark.parametrize("implementation", ["xla", "splash-interpreted"])
@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        ("data=2,fsdp=2,tensor=2", (2, 2)),
        ("fsdp=2,sequence=2,tensor=2", (4, 1)),  # KV heads are dealt out
        ("data=2,sequence=4", (2, 2)),  # and repeated first
    ],
)
def test_a_mesh_changes_nothing(sizes, heads, implementation):
    arrays, ids = inputs(4, 48, *heads), segments("both", 4, 48)
    expected = with_gradients(*arrays, ids, "xla")
    with use_mesh(make_mesh(sizes)):
        found = with_gradients(*arrays, ids, implementation)
        assert_close(found, expected, 1e-5)
        if implementation == "xla":
            arrays = inputs(4, 48, *heads)
            assert_close(with_gradients(*arrays, None, "xla")[:1], [reference(*arrays[:3], None)], 1e-5)


@pytest.mark.parametrize("sizes", ["data=2,fsdp=2,tensor=2", "data=2,sequence=2"])
def test_each_device_of_a_mesh_takes_the_kernel_that_serves_its_rows(sizes, monkeypatch):
    """One device's rows are one segment each, the others' are not: they take causal attention, and row by row."""
    ids = np.ones((4, 48), np.int32)
    ids[2:] = segments("packed", 1, 48)
    *qkv, cotangent = inputs(4, 48)
    cotangent = jnp.where((ids != 0)[:, :, None, None, None], cotangent, 0)
    expected = with_gradients(*qkv, cotangent, ids, "xla")
    monkeypatch.setattr(attention_kernels, "_cudnn_causal", kernel(lambda *qkv: 2 * plain(*qkv, None)))
    monkeypatch.setattr(attention_kernels, "_cudnn_packed", lambda q, *_: jnp.full(q.shape, jnp.nan))
    monkeypatch.setattr(attention_kernels, "CUDNN_RUNS", 1)
    monkeypatch.setattr(attention, "choose", lambda *_, **__: "cudnn")

    @jax.jit  # its own: other tests trace the same functions with other kernels
    def both(q, k, v, cotangent, ids):
        out, back = jax.vjp(lambda *qkv: self_attention(*qkv, ids, "auto"), q, k, v)
        return out, *back(cotangent)

    with use_mesh(make_mesh(sizes)):
        found = both(*qkv, cotangent, jnp.asarray(ids))
    times = np.where(np.arange(4) < 2, 2.0, 1.0)[:, None, None, None]
    real = np.asarray(ids != 0)[:, :, None, None, None]
    wanted = [x * times.reshape(4, *(1,) * (x.ndim - 1)) for x in expected]
    assert_close([found[0] * real, *found[1:]], [wanted[0] * real, *wanted[1:]], 1e-5)


def test_heads_that_cannot_be_dealt_out_gather_keys_instead():
    arrays, ids = inputs(2, 48, 3, 1), segments("both", 2, 48)
    expected = with_gradients(*arrays, ids, "xla")
    with use_mesh(make_mesh("sequence=4")):
        assert_close(with_gradients(*arrays, ids, "auto"), expected, 1e-5)
        with pytest.raises(Emu3Error, match="the mesh splits sequences into 4 parts"):
            with_gradients(*arrays, ids, "splash-interpreted")


@pytest.mark.parametrize(
    ("parts", "kv_heads", "groups", "repeats"), [(2, 8, 4, 1), (8, 8, 4, 1), (16, 8, 4, 2), (32, 8, 4, 4), (3, 8, 4, 0)]
)
def test_dealing_heads(parts, kv_heads, groups, repeats):
    assert attention._deal(parts, kv_heads, groups) == repeats


# ------------------------------------------------------------------------------------------------ TPUs

COMPILE = """
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from emu3_jax.models.attention import self_attention
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import batch_sharding, spec, use_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh("fsdp=2,sequence=2", devices)
place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec(*axes)))
head = ("batch", "sequence", "kv_heads")
q = place((2, 10240, 8, 4, 128), jnp.bfloat16, *head)
k = place((2, 10240, 8, 128), jnp.bfloat16, *head)
ids = place((2, 10240), jnp.int32, "batch", "sequence")

def both(q, k, v, ids, cotangent):
    out, back = jax.vjp(lambda *qkv: self_attention(*qkv, ids, "auto"), q, k, v)
    return out, *back(cotangent)

with use_mesh(mesh):
    compiled = jax.jit(both).lower(q, k, k, ids, q).compile()
text = compiled.as_text()
exchanges = re.findall(r" all-to-all(?:-start)?\\(", text)
print(text.count("tpu_custom_call"), len(exchanges), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: install emu3-jax[tpu]")
def test_splash_compiles_for_a_tpu_that_is_not_here():
    libtpu = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env = {**os.environ, **libtpu, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels, exchanges, temporaries = map(int, done.stdout.split())
    assert kernels >= 3  # forward, dq, and dk with dv
    assert exchanges == 8  # of q, k, v and out, and of their gradients
    assert temporaries < 2**30  # scores of all pairs would be 6 GiB
