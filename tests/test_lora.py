"""Adapters and quantised frozen weights: exactness, gradients, memory, meshes, and the way back to a plain model."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import tiny
from flax import traverse_util
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

import emu3_jax
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.parts import LazyArray, write_part
from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextOnly
from emu3_jax.errors import Emu3Error
from emu3_jax.models import merging
from emu3_jax.models.adapters import (
    BLOCK,
    MATRICES,
    NF4,
    Adapter,
    dequantise_matrix,
    quantise_matrix,
)
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.stacking import unstack_layers
from emu3_jax.sharding.mesh import AXES, make_mesh
from emu3_jax.sharding.rules import batch_sharding, decoder_shardings, use_mesh
from emu3_jax.training import lora
from emu3_jax.training.config import ModelConfig, TrainConfig
from emu3_jax.training.lora import freeze_stacked, join, split
from emu3_jax.training.losses import chunked_cross_entropy, next_tokens
from emu3_jax.training.step import Trainer

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow]

freeze = jax.jit(lora.freeze, static_argnums=1)
merge = jax.jit(merging.merge, static_argnums=(2, 3))

# Two blocks along F, so that tensor=2 splits them.
CONFIG = dataclasses.replace(tiny.CONFIG, intermediate_size=128)
FULL_SIZE = DecoderConfig()


def adapter_of(base="float32", **fields):
    return Adapter(rank=4, alpha=6.0, base=base, **fields)


@functools.cache
def plain(stacked=True):
    """As initialised, without `tiny`'s gain of 3, under which one rounding of the weights moves outputs by 1e-5."""
    params = jax.tree.map(lambda leaf: leaf / 3 if leaf.ndim > 1 else leaf, tiny.params(CONFIG))
    return tiny.stack_layers(params, CONFIG) if stacked else params


def batch(rows=8, length=16, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="stacked")
def make(config, adapter, key, *, stacked=True):
    """Adapters as a new run has them, whose product is 0."""
    model = Decoder(config, stacked=stacked, adapter=adapter)
    return split(nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))[0]


@functools.cache
def parts(adapter, random_b=True):
    """Trained and frozen parameters; the adapters' product is random, of the size of the weights, or 0."""
    trainable = make(CONFIG, adapter, jax.random.key(1))
    if random_b:
        flat = traverse_util.flatten_dict(trainable)
        rng = np.random.default_rng(2)
        draw = {p: 0.3 * rng.normal(size=x.shape) for p, x in flat.items() if p[-1].endswith("_b")}
        trainable = traverse_util.unflatten_dict({p: jnp.float32(draw.get(p, x)) for p, x in flat.items()})
    return trainable, freeze(plain(), adapter)


@functools.partial(jax.jit, static_argnames=("adapter", "stacked", "config"))
def hidden(params, tokens, adapter=None, stacked=True, config=CONFIG):
    return Decoder(config, stacked=stacked, adapter=adapter).apply({"params": params}, tokens, method="hidden")


def loss(params, tokens, adapter, remat="full"):
    model = Decoder(CONFIG, stacked=True, remat=remat, adapter=adapter)
    states = model.apply({"params": params}, tokens, method="hidden")
    labels, mask = next_tokens(tokens, jnp.ones(tokens.shape, bool))
    special = CONFIG.tokens
    visual = (special.visual_start, special.visual_end)
    total, sums = chunked_cross_entropy(states, params["head"]["kernel"], labels, mask, visual)
    return total / sums.count


@functools.partial(jax.jit, static_argnames=("adapter", "remat"))
def adapter_gradients(trainable, frozen, tokens, adapter, remat="full"):
    return jax.value_and_grad(lambda t: loss(join(t, frozen), tokens, adapter, remat))(trainable)


def assert_close(found, wanted, relative):
    """Each leaf within `relative` of the largest entry of the wanted one."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= relative, f"{jax.tree_util.keystr(path)}: {worst}"

    jax.tree_util.tree_map_with_path(check, found, wanted)


def identical(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)


# ------------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "Adapter field rank is 0: it must be a whole number > 0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": float("nan")}, "alpha is nan: it must be a finite number > 0"),
        ({"targets": ()}, "targets is .*: it must be a tuple of some of qkv, out, gate_up, down"),
        ({"targets": ("qkv", "qkv")}, "targets"),
        ({"targets": ("query",)}, "targets"),
        ({"targets": "qkv"}, "targets"),
        ({"base": "int4"}, "base is 'int4': it must be one of float32, bfloat16, int8, nf4"),
    ],
)
def test_bad_adapters_are_refused(fields, message):
    with pytest.raises(Emu3Error, match=message):
        Adapter(**fields)


def test_an_odd_axis_has_no_4_bit_pairs():
    with pytest.raises(Emu3Error, match="down has size 7 along axis 0, but nf4 needs an even size"):
        quantise_matrix("down", jnp.ones((7, 4)), "nf4")


# ------------------------------------------------------------------------------------------------ the forward pass


def test_new_adapters_change_nothing():
    adapter = adapter_of()
    found = hidden(join(*parts(adapter, random_b=False)), batch(), adapter)
    np.testing.assert_array_equal(found, hidden(plain(), batch()))


def test_adapters_are_initialised_like_weights_and_apart():
    trainable, _ = parts(adapter_of(), random_b=False)
    first, second = trainable["layers"]["mlp"]["down_a"]
    np.testing.assert_allclose(np.std(second), CONFIG.intermediate_size**-0.5, rtol=0.1)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    unrolled = jax.eval_shape(functools.partial(make, CONFIG, adapter_of(), stacked=False), jax.random.key(0))
    layer = jax.tree.map(lambda x: x.shape[1:], trainable["layers"])
    assert jax.tree.map(lambda x: x.shape, unrolled) == {"layers_0": layer, "layers_1": layer}


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("float32", tuple(MATRICES)),
        ("bfloat16", ("out", "gate_up")),
        ("int8", ("qkv", "down")),
        ("nf4", tuple(MATRICES)),
    ],
)
def test_adapters_equal_merged_weights(base, targets):
    adapter = adapter_of(base, targets=targets)
    trainable, frozen = parts(adapter)
    assert {path[-1][:-2] for path in traverse_util.flatten_dict(trainable)} == set(targets)
    found = hidden(join(trainable, frozen), batch(), adapter)
    merged = merge(trainable, frozen, adapter, jnp.float32)
    np.testing.assert_allclose(found, hidden(merged, batch()), atol=1e-5, rtol=0)
    without = hidden(merge({}, frozen, adapter, jnp.float32), batch())
    assert np.abs(found - without).max() > 0.1  # and they do something


@pytest.mark.parametrize("base", ["nf4"])
def test_stacked_equals_unrolled(base):
    adapter = adapter_of(base)
    trainable, frozen = parts(adapter)
    params = join(trainable, frozen)
    unrolled = unstack_layers(params, CONFIG)
    found = hidden(unrolled, batch(), adapter, stacked=False)
    np.testing.assert_allclose(found, hidden(params, batch(), adapter), atol=1e-5, rtol=0)
    assert identical(unstack_layers(merge(trainable, frozen, adapter, jnp.float32), CONFIG),
                     merge(*split(unrolled), adapter, jnp.float32))  # fmt: skip
    layer = jax.tree.map(lambda leaf: leaf[1], (trainable["layers"], frozen["layers"]))
    assert identical(merge(*layer, adapter, jnp.float32), merge(*split(unrolled), adapter, jnp.float32)["layers_1"])


def test_freezing_a_layer_does_not_depend_on_the_others():
    for base in ("bfloat16", "int8", "nf4"):
        adapter = adapter_of(base)
        assert identical(unstack_layers(freeze(plain(), adapter), CONFIG), freeze(plain(stacked=False), adapter))


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_gradients_follow_from_those_of_merged_weights(base):
    adapter = adapter_of(base)
    trainable, frozen = parts(adapter)
    value, found = adapter_gradients(trainable, frozen, batch(), adapter)

    def merged_loss(trainable):
        return loss(merge(trainable, frozen, adapter, jnp.float32), batch(), None)

    expected_value, expected = jax.jit(jax.value_and_grad(merged_loss))(trainable)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_close(found, expected, 1e-4)


def backward_outputs(adapter, remat, trainable, frozen):
    """(shape, primitive) of everything that the program of the gradients of `trainable` computes."""
    model = Decoder(CONFIG, stacked=True, remat=remat, adapter=adapter)

    def total(trainable):
        return model.apply({"params": join(trainable, frozen)}, batch(), method="hidden").sum()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from ((value.aval.shape, equation.primitive.name) for value in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(jax.grad(total))(trainable).jaxpr))


def weight_shaped(outputs):
    """Matrices whose gradient, a product of their shape with input axes made one, is among the outputs."""
    dots = {tuple(sorted(shape)) for shape, primitive in outputs if primitive == "dot_general"}
    matrices = {path[-1]: x for path, x in traverse_util.flatten_dict(plain()["layers"]).items() if x.ndim > 2}
    fused = {name: (-1, *x.shape[1 + MATRICES[name].inputs :]) for name, x in matrices.items()}
    return {name for name, shape in fused.items() if tuple(sorted(matrices[name][0].reshape(shape).shape)) in dots}


@pytest.mark.parametrize("base", ["float32", "nf4"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_backward_pass_has_no_gradient_and_no_wide_copy_of_frozen_matrices(base, remat):
    adapter = adapter_of(base)
    outputs = backward_outputs(adapter, remat, *parts(adapter))
    assert not weight_shaped(outputs)
    # All layers' matrices at once: what a scan would hand from the forward to the backward pass.
    stacked = {x.shape for x in jax.tree.leaves(plain()["layers"]) if x.ndim > 2}
    assert not stacked & {shape for shape, _ in outputs}
    # The check sees gradients where there are some.
    assert weight_shaped(backward_outputs(None, remat, plain(), {})) == set(MATRICES)


def test_steps_of_adam_reduce_the_loss_and_leave_the_frozen_bits():
    adapter = adapter_of("nf4")
    trainable, frozen = parts(adapter, random_b=False)
    before = jax.tree.map(np.asarray, frozen)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trainable)
    count = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * count + 1

    update = jax.jit(optimizer.update)
    losses = []
    for _ in range(12):
        value, gradients = adapter_gradients(trainable, frozen, batch(), adapter)
        updates, state = update(gradients, state)
        trainable = optax.apply_updates(trainable, updates)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert identical(jax.tree.map(np.asarray, frozen), before)


# ------------------------------------------------------------------------------------------------ quantisation


def test_nf4_is_the_papers_code():
    """Appendix E's 16 values against their definition (section 3): quantiles of N(0, 1), 8 below and 9 from 0 up."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    np.testing.assert_allclose(NF4, expected, atol=1e-6)


@pytest.mark.parametrize("base", ["int8", "nf4"])
@pytest.mark.parametrize("name", list(MATRICES))
def test_each_weight_takes_the_nearest_value_of_its_block(name, base):
    shape = {"qkv": (6, 2, 4, 128), "out": (2, 2, 128, 6), "gate_up": (6, 2, 192), "down": (192, 6)}[name]
    weights = np.random.default_rng(3).normal(size=(3, *shape)).astype(np.float32)
    axis = weights.ndim + MATRICES[name].block_axis
    weights[(slice(None),) * axis + (slice(0, BLOCK),)] *= 1e-3  # a small block keeps its own precision
    codes, scale = quantise_matrix(name, jnp.asarray(weights), base)
    assert (codes.nbytes * 2 if base == "nf4" else codes.nbytes) == weights.size
    assert scale.size == weights.size // BLOCK and scale.dtype == jnp.float32
    found = dequantise_matrix(name, codes, scale, base)

    values = np.asarray(NF4 if base == "nf4" else np.arange(-127, 128) / 127, np.float32)
    blocks = np.moveaxis(weights, axis, -1).reshape(-1, BLOCK)
    units = blocks / np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(units[..., None] - values).min(axis=-1) * np.abs(blocks).max(axis=1, keepdims=True)
    error = np.abs(np.moveaxis(np.asarray(found), axis, -1).reshape(-1, BLOCK) - blocks)
    np.testing.assert_allclose(error, nearest, atol=1e-6 * np.abs(blocks).max())
    widest = np.diff(values).max() / 2
    assert (error <= (widest + 1e-6) * np.abs(blocks).max(axis=1, keepdims=True)).all()

    again = quantise_matrix(name, found, base)
    assert (again[0] == codes).all() and (again[1] == scale).all()
    assert (dequantise_matrix(name, *again, base) == found).all()


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_zeros_and_extremes_are_exact(base):
    weights = jnp.zeros((128, 2)).at[3, 0].set(-5.0).at[9, 1].set(2.5).at[70, 1].set(1e-30)
    np.testing.assert_array_equal(dequantise_matrix("down", *quantise_matrix("down", weights, base), base), weights)


# ------------------------------------------------------------------------------------------------ memory and meshes


@functools.cache
def full_size(base):
    model = Decoder(FULL_SIZE, stacked=True, adapter=Adapter(base=base))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return split(nn.unbox(boxed))


@pytest.mark.parametrize(("base", "gigabytes"), [("bfloat16", 17.0), ("int8", 10.5), ("nf4", 7.0)])
def test_memory_at_full_size(base, gigabytes):
    """The two tables take 3.0 GB; the layers' 7.0 billion weights 2, 1 1/16 or 9/16 bytes each."""
    trainable, frozen = full_size(base)
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    assert gigabytes - 0.2 < nbytes / 1e9 < gigabytes
    assert sum(x.size for x in jax.tree.leaves(trainable)) == 32 * 16 * (
        (4096 + 6144) + (4096 + 4096) + (4096 + 2 * 14336) + (14336 + 4096)
    )


def test_making_adapters_makes_no_frozen_weights():
    config = TrainConfig(
        "", ModelConfig(""), DataConfig((Source("", TextOnly()),), 16), 1, 100, adapter=Adapter(base="nf4")
    )
    trainer = Trainer(config, FULL_SIZE, make_mesh("fsdp=1"))
    memory = trainer.random_state.lower().compile().memory_analysis()
    adapters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.abstract_state().params))
    assert memory.temp_size_in_bytes < 2 * adapters < memory.output_size_in_bytes


@pytest.mark.parametrize("sizes", ["fsdp=8", "fsdp=4,sequence=2", "tensor=8", "fsdp=2,tensor=4"])
@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_the_full_size_splits(sizes, base):
    _, frozen = full_size(base)
    _, places = split(decoder_shardings(FULL_SIZE, make_mesh(sizes), stacked=True, adapter=Adapter(base=base)))
    nbytes = jax.tree.map(lambda x: x.size * x.dtype.itemsize, frozen)
    local = jax.tree.map(lambda x, s: np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, frozen, places)
    norms = 65 * 4096 * 2  # whole on every device
    assert sum(jax.tree.leaves(local)) == (sum(jax.tree.leaves(nbytes)) - norms) / 8 + norms


def test_blocks_split_over_64_devices():
    """Of `fsdp` the rows of a matrix, 4,096 / 64; of `tensor` its blocks, 224 / 8."""
    mesh = jax.sharding.AbstractMesh((1, 64, 1, 8), AXES, axis_types=(AxisType.Auto,) * 4)
    places = decoder_shardings(FULL_SIZE, mesh, stacked=True, adapter=Adapter(base="nf4"))
    shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), full_size("nf4")[1], split(places)[1])
    assert shards["layers"]["mlp"] == {
        "gate_up_q": (32, 64, 2, 7168 // 8), "gate_up_scale": (32, 64, 2, 28),
        "down_q": (32, 7168 // 8, 64), "down_scale": (32, 28, 64),
    }  # fmt: skip
    assert shards["layers"]["attention"] == {
        "qkv_q": (32, 64, 1, 6, 64), "qkv_scale": (32, 64, 1, 6, 2),
        "out_q": (32, 1, 4, 64, 64), "out_scale": (32, 1, 4, 2, 64),
    }  # fmt: skip


def test_blocks_that_do_not_split_are_an_error():
    config = dataclasses.replace(CONFIG, intermediate_size=64)
    with pytest.raises(Emu3Error, match="mlp/down_scale has size 1 along its axis 'mlp', which mesh tensor=2 does not"):
        decoder_shardings(config, make_mesh("tensor=2"), adapter=adapter_of("nf4"))


@pytest.mark.parametrize(
    ("sizes", "base"),
    [("fsdp=4", "nf4"), ("data=2,fsdp=2,tensor=2", "float32"), ("fsdp=2,sequence=2,tensor=2", "nf4")],
)
def test_gradients_over_a_mesh(sizes, base):
    adapter = adapter_of(base)
    trainable, frozen = parts(adapter)
    tokens = batch()
    expected = adapter_gradients(trainable, frozen, tokens, adapter)
    mesh = make_mesh(sizes)
    places = split(decoder_shardings(CONFIG, mesh, stacked=True, adapter=adapter))
    assert places[0]["layers"]["mlp"]["down_a"].spec == jax.P(None, "tensor", None)
    assert places[0]["layers"]["mlp"]["down_b"].spec == jax.P(None, None, ("fsdp", "sequence"))
    with use_mesh(mesh):
        arguments = jax.device_put((trainable, frozen), places)
        found = adapter_gradients(*arguments, jax.device_put(tokens, batch_sharding(mesh)), adapter)
        merged = merge(*arguments, adapter, jnp.float32)
    assert_close(found, expected, 1e-5)
    assert_close(merged, merge(trainable, frozen, adapter, jnp.float32), 1e-6)


# ------------------------------------------------------------------------------------------------ from and to bundles


def arrays(params):
    return [(path, np.asarray(x)) for path, x in traverse_util.flatten_dict(params).items()]


@pytest.mark.parametrize(("base", "sizes"), [("bfloat16", ""), ("int8", "fsdp=4"), ("nf4", "fsdp=2,tensor=2")])
def test_freezing_array_by_array_is_freezing_all(base, sizes):
    adapter = adapter_of(base)
    places = split(decoder_shardings(CONFIG, make_mesh(sizes), stacked=True, adapter=adapter))[1]
    given = arrays(plain(stacked=False))
    found = freeze_stacked(reversed(given), CONFIG, adapter, places)
    assert identical(jax.device_get(found), jax.device_get(freeze(plain(), adapter)))
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), found, places))
    missing = [item for item in given if item[0] != ("layers_1", "mlp", "down")]
    with pytest.raises(Emu3Error, match=r"frozen weight layers/mlp/down.*: the bundle gave 1 arrays, 2 are needed"):
        freeze_stacked(missing, CONFIG, adapter, places)


def test_a_merged_model_is_a_bundle_that_generates(golden_bundle, tmp_path):
    source = Bundle.open(golden_bundle)
    config = source.decoder_config
    adapter = Adapter(rank=2, base="int8")
    mesh = make_mesh("fsdp=1")
    places = split(decoder_shardings(config, mesh, stacked=True, adapter=adapter))
    frozen = freeze_stacked(((p.path, x) for p, x in source.arrays("decoder")), config, adapter, places[1])
    trainable = make(config, adapter, jax.random.key(0))
    trainable = jax.tree.map(lambda x: x + 0.01, trainable)
    merged = merge(trainable, frozen, adapter, jnp.float32)
    lazy = [LazyArray(path, x.shape, x.dtype, lambda x=x: x) for path, x in arrays(unstack_layers(merged, config))]
    bundle = tmp_path / "merged"
    bundle.mkdir()
    write_part(bundle / "decoder", config.to_dict(), lazy)
    for part in ("vision", "tokenizer"):
        (bundle / part).symlink_to(golden_bundle / part)
    model = emu3_jax.load(bundle, dtype="float32")
    (image,) = model.generate("a", area=32 * 32, progress=False)
    assert image.size == (32, 32)
    # The bundle has the merged weights: its logits are those of adapters beside quantised weights.
    tokens, float32 = np.arange(24, dtype=np.int32)[None], dataclasses.replace(config, dtype="float32")
    found = hidden(Bundle.open(bundle).load_decoder(), tokens, stacked=False, config=float32)
    wanted = hidden(join(trainable, frozen), tokens, adapter, config=float32)
    assert_close(found, wanted, 1e-4)
