"""The TPU kernel for windows of tokens: interpreted, it equals plain attention; and it compiles for TPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from markers import libtpu

from emu3_jax.models.attention import cached_attention
from emu3_jax.models.quantization import narrow_rows
from emu3_jax.models.window_kernels_tpu import _block_at, attend_window
from emu3_jax.sharding.collectives import collectives
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import tpu_slice
from emu3_jax.sharding.rules import spec, use_mesh

pytestmark = pytest.mark.slow

# Largest difference from exact attention. In bfloat16, weights and results have 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-5}


def reference(q, cache_layer, length, start):
    """Attention in float64, query by query, over copies of the slots that the query sees."""
    keys, values, *scales = (None if x is None else np.asarray(x, np.float64) for x in cache_layer)
    if scales[0] is not None:
        keys, values = (x * scale[..., None] for x, scale in zip((keys, values), scales, strict=True))
    q = np.asarray(q, np.float64)
    out = np.empty(q.shape)
    for b, i in np.ndindex(*q.shape[:2]):
        seen = slice(int(start[b]), int(length[b]) + i + 1)
        scores = np.einsum("kgh,kth->kgt", q[b, i], keys[b, :, seen]) * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, i] = np.einsum("kgt,kth->kgh", weights / weights.sum(-1, keepdims=True), values[b, :, seen])
    return out


def inputs(kind, shape, slots, length, start):
    """Queries [B, W, K, G, H] and a cache layer. Slots that no query of their row sees hold large numbers."""
    b, window, kv_heads, _, width = shape
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    q = 2 * jax.random.normal(keys[0], shape, dtype)
    k, v = (jax.random.normal(key, (b, kv_heads, slots, width), dtype) for key in keys[1:])
    slot = jnp.arange(slots)[None]
    seen = (slot >= start[:, None]) & (slot < length[:, None] + window)
    if kind != "int8":
        return q, (*(jnp.where(seen[:, None, :, None], x, 1e4) for x in (k, v)), None, None)
    (k, k_scales), (v, v_scales) = narrow_rows(k), narrow_rows(v)
    return q, (k, v, *(jnp.where(seen[:, None], x, 1e4) for x in (k_scales, v_scales)))


def rows(*numbers):
    return jnp.asarray(numbers, jnp.int32)


def assert_exact(found, q, layer, length, start, kind):
    assert found.dtype == q.dtype and found.shape == q.shape
    expected = reference(q, layer, length, start)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=TOLERANCE[kind], rtol=0)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize(
    ("window", "kv_heads", "groups", "width", "slots"),
    [(1, 12, 3, 128, 1024), (5, 3, 3, 64, 1088), (16, 8, 4, 128, 1216), (16, 2, 1, 64, 192)],
)
def test_ragged_rows(kind, window, kv_heads, groups, width, slots):
    # A full row, one whose window reaches into the next block of 512 slots, one of few slots, and one at its beginning.
    length = rows(slots - window, 510 if slots > 512 else 64, slots - window - 9, 0)
    start = rows(0, 7, slots - window - 20, 0)
    q, layer = inputs(kind, (4, window, kv_heads, groups, width), slots, length, start)
    assert_exact(attend_window(q, layer, length, start, interpret=True), q, layer, length, start, kind)


def test_blocks_without_slots_of_the_row_are_not_used():
    """They hold NaN, which no mask hides: 0 * NaN is NaN. Blocks have 512 slots."""
    length, start = rows(700, 1530), rows(520, 1024)
    q, (k, v, *_) = inputs("float32", (2, 4, 2, 2, 64), 2048, length, start)
    v = v.at[:, :, :512].set(jnp.nan).at[0, :, 1024:].set(jnp.nan).at[1, :, :1024].set(jnp.nan)
    v = v.at[1, :, 1536:].set(jnp.nan)
    layer = (k, v, None, None)
    assert_exact(attend_window(q, layer, length, start, interpret=True), q, layer, length, start, "float32")


@pytest.mark.parametrize(
    ("length", "start", "fetched"),
    [(0, 0, [0]), (508, 0, [0]), (509, 3, [0, 1]), (1530, 1024, [2]), (1533, 512, [1, 2, 3]), (3000, 2047, [3])],
)
def test_blocks_that_a_row_fetches(length, start, fetched):
    """Of 4 blocks of 512 slots, for windows of 4 tokens."""
    steps = [int(_block_at(step, *rows(length, start), window=4, block=512, blocks=4)) for step in range(4)]
    assert sorted(set(steps)) == fetched and steps == sorted(steps)
    assert all(steps[block] == block for block in fetched)  # the steps that compute


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_in_the_interpreter_of_tpus(kind):
    """It simulates the copies to VMEM. Memory that nothing has written holds NaN there."""
    length, start = rows(300, 700), rows(260, 3)
    q, layer = inputs(kind, (2, 4, 2, 2, 64), 704, length, start)
    found = attend_window(q, layer, length, start, interpret=pltpu.InterpretParams())
    assert_exact(found, q, layer, length, start, kind)


def test_windows_that_end_beyond_the_cache():
    """Queries of slots that do not exist see the slots that do. Rows without any visible slot give finite numbers."""
    length, start = rows(189, 5, 300), rows(100, 150, 200)
    q, layer = inputs("float32", (3, 5, 2, 2, 64), 192, length, start)
    found = attend_window(q, layer, length, start, interpret=True)
    assert_exact(found[:1], q[:1], tuple(x if x is None else x[:1] for x in layer), length, start, "float32")
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_on_a_mesh(kind):
    length, start = rows(180, 5, 64, 130), rows(0, 0, 60, 7)
    q, layer = inputs(kind, (4, 5, 4, 2, 64), 192, length, start)
    expected = attend_window(q, layer, length, start, interpret=True)
    mesh = make_mesh("data=2,tensor=2")

    def placed(x, *axes):
        return None if x is None else jax.device_put(x, NamedSharding(mesh, spec(*axes)))

    with use_mesh(mesh):
        found = attend_window(
            placed(q, "batch", None, "kv_heads"),
            tuple(placed(x, "batch", "kv_heads") for x in layer),
            placed(length, "batch"),
            placed(start, "batch"),
            interpret=True,
        )
    assert found.sharding.shard_shape(found.shape) == (2, 5, 2, 2, 64)
    np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------------ TPUs

SLOTS = 8704


def compiled(attention, topology, axes, window, kind, shape=(8, 4, 128)):
    """Attention of two rows of the 8 B model's shapes, compiled for a TPU slice."""
    kv_heads, groups, width = shape
    mesh = make_mesh(axes, tpu_slice(topology).devices)

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    kept = array((2, kv_heads, SLOTS, width), jnp.int8 if kind == "int8" else jnp.bfloat16, "batch", "kv_heads")
    scales = array(kept.shape[:3], jnp.float32, "batch", "kv_heads") if kind == "int8" else None
    q = array((2, window, kv_heads, groups, width), jnp.bfloat16, "batch", None, "kv_heads")
    row = array((2,), jnp.int32, "batch")
    with use_mesh(mesh):
        return jax.jit(attention).lower(q, (kept, kept, scales, scales), row, row).compile()


def arrays_of_slots(text):
    """Shapes of all arrays in a compiled program that have an axis of `SLOTS`."""
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    return {shape for shape in shapes if SLOTS in shape}


@libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [1, 16, 32])
def test_scores_stay_out_of_memory(topology, kind, window):
    """Scores would take 2 MiB per token of the window, and a copy of the keys 17 or 34 MiB."""
    program = compiled(attend_window, topology, "data=1", window, kind)
    text = program.as_text()
    assert text.count("tpu_custom_call") == 1
    assert arrays_of_slots(text) == {(2, 8, SLOTS, 128)} | ({(2, 8, SLOTS)} if kind == "int8" else set())
    assert program.memory_analysis().temp_size_in_bytes <= 2**20


@libtpu
def test_xla_writes_the_scores():
    """The checks of `test_scores_stay_out_of_memory` find the scores that plain attention writes."""

    def plain(q, layer, length, start):
        return cached_attention(q, *layer, first_query=length, start=start)

    program = compiled(plain, "v5p:1x1x1", "data=1", 16, "bfloat16")
    assert (2, 8, 4, 16, SLOTS) in arrays_of_slots(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes >= 2 * 8 * 4 * 16 * SLOTS * 4


@libtpu
def test_each_chip_computes_its_rows_and_heads():
    program = compiled(attend_window, "v5e:2x2", "data=2,tensor=2", 16, "int8")
    text = program.as_text()
    assert text.count("tpu_custom_call") == 1
    assert arrays_of_slots(text) == {(1, 4, SLOTS, 128), (1, 4, SLOTS)}
    assert collectives(text)[0] == []


@libtpu
@pytest.mark.parametrize(
    ("window", "shape"), [(5, (3, 3, 64)), (256, (8, 4, 128)), (64, (1, 20, 96)), (128, (32, 1, 256))]
)
def test_other_shapes_fit_into_vmem(window, shape):
    compiled(attend_window, "v5e:1x1", "data=1", window, "int8", shape)
