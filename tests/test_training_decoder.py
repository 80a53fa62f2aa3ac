"""The decoder's training form: stacked, rematerialised, packed, over meshes; and its gradients."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gradient_cases import assert_close, mean_loss

from emu3_jax.models.decoder import Decoder
from emu3_jax.models.stacking import unstack_layers
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import batch_sharding, decoder_shardings, use_mesh

pytestmark = [pytest.mark.slow, pytest.mark.compiled_quickly]

CONFIG = tiny.CONFIG


def batch(rows=2, length=24, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "stacked", "remat"))
def hidden(params, tokens, positions=None, segments=None, config=CONFIG, stacked=False, remat="none"):
    model = Decoder(config, stacked=stacked, remat=remat)
    return model.apply({"params": params}, tokens, positions, segments, method="hidden")


@functools.cache
def compiled_gradients(model, mesh=""):
    """The jitted loss and gradients: tests of the same model on the same mesh, or on none, compile them once."""

    def loss(params, tokens):
        return mean_loss(params, tokens, jnp.ones(tokens.shape, bool), model)

    return jax.jit(jax.value_and_grad(loss))


def gradients(params, tokens, model, mesh=""):
    return compiled_gradients(model, mesh)(params, tokens)


# ------------------------------------------------------------------------------------------------ forms


def test_stacking_is_exact_and_declares_the_same_weights():
    params = tiny.params()
    stacked = tiny.stack_layers(params, CONFIG)
    back = unstack_layers(stacked, CONFIG)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), back, params))
    abstract = jax.eval_shape(Decoder(CONFIG, stacked=True).init, jax.random.key(0), batch())["params"]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nn.unbox(abstract))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), stacked)
    assert abstract["layers"]["mlp"]["down"].names == ("layers", "mlp", "embed")


def test_stacked_layers_are_initialised_apart():
    params = nn.unbox(jax.jit(Decoder(CONFIG, stacked=True).init)(jax.random.key(0), batch()))["params"]
    first, second = params["layers"]["mlp"]["down"]
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    np.testing.assert_allclose(np.std(second), CONFIG.intermediate_size**-0.5, rtol=0.1)


def test_stacked_equals_unrolled():
    params, tokens = tiny.params(), batch()
    expected = hidden(params, tokens)
    np.testing.assert_allclose(
        hidden(tiny.stack_layers(params, CONFIG), tokens, stacked=True), expected, atol=1e-5, rtol=0
    )
    logits, _ = tiny.forward(params, tokens)
    table = params["head"]["kernel"]
    np.testing.assert_allclose(
        jnp.einsum("bsd,vd->bsv", expected, table, precision="highest"), logits, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat, stacked):
    params = tiny.stack_layers(tiny.params(), CONFIG) if stacked else tiny.params()
    plain = gradients(params, batch(), Decoder(CONFIG, stacked=stacked))
    again = gradients(params, batch(), Decoder(CONFIG, stacked=stacked, remat=remat))
    assert_close(again, plain, 1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("unroll", [2, 3, 99])
def test_unrolling_the_scan_changes_no_gradient(unroll, remat):
    config = dataclasses.replace(CONFIG, num_layers=3)
    params = tiny.stack_layers(tiny.params(config), config)
    scanned = Decoder(config, stacked=True, dropout=0.1, remat=remat)
    assert_close(gradients(params, batch(), scanned.clone(unroll=unroll)), gradients(params, batch(), scanned), 1e-5)


@pytest.mark.parametrize("unroll", [1, 2])
def test_xla_may_not_merge_the_recomputation_of_unrolled_layers(unroll):
    """It would merge some of it, for TPUs at least. Then "full" saves less memory."""
    model = Decoder(CONFIG, stacked=True, remat="full", unroll=unroll)
    loss = functools.partial(mean_loss, target=jnp.ones((2, 24), bool), model=model)
    program = str(jax.make_jaxpr(jax.grad(loss))(tiny.stack_layers(tiny.params(), CONFIG), batch()))
    assert ("prevent_cse=False" in program) is (unroll < CONFIG.num_layers)


# ------------------------------------------------------------------------------------------------ segments


@pytest.mark.parametrize("stacked", [False, True])
def test_packed_segments_equal_rows_alone(stacked):
    params = tiny.params()
    pieces = [batch(1, length, seed=length) for length in (5, 11, 7)]
    tokens = np.concatenate([*pieces, np.full((1, 3), CONFIG.tokens.pad)], axis=1).astype(np.int32)
    segments = np.repeat(np.asarray([1, 2, 3, 0], np.int32), [5, 11, 7, 3])[None]
    positions = np.concatenate([np.arange(n) for n in (5, 11, 7, 3)])[None].astype(np.int32)
    arranged = tiny.stack_layers(params, CONFIG) if stacked else params
    packed = hidden(arranged, tokens, positions, segments, stacked=stacked)
    start = 0
    for piece in pieces:
        end = start + piece.shape[1]
        np.testing.assert_allclose(packed[:, start:end], hidden(params, piece), atol=1e-5, rtol=0)
        start = end


def test_a_segment_moves_no_gradient_into_another():
    embedding = tiny.params()["embed"]["embedding"]
    tokens = jnp.arange(12, dtype=jnp.int32)[None]  # each id once, so row i of the gradient belongs to position i
    segments = jnp.asarray([[1] * 5 + [2] * 7], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7)]], jnp.int32)

    def output(table):
        return hidden({**tiny.params(), "embed": {"embedding": table}}, tokens, positions, segments)[0, 8].sum()

    influence = np.abs(jax.grad(output)(embedding)).sum(axis=1)[:12]
    assert (influence[5:9] > 0).all() and (influence[:5] == 0).all() and (influence[9:] == 0).all()


# ------------------------------------------------------------------------------------------------ meshes


@pytest.mark.parametrize("unroll", [1, CONFIG.num_layers])
@pytest.mark.parametrize(
    "sizes", ["data=8", "fsdp=4", "data=2,fsdp=2,tensor=2", "data=2,sequence=4", "fsdp=2,sequence=2,tensor=2"]
)
def test_loss_and_gradients_over_a_mesh(sizes, unroll):
    model = Decoder(CONFIG, stacked=True, remat="full")
    # Weights as they are initialised: three times as large, they amplify the rounding of other orders twentyfold.
    params = jax.tree.map(lambda leaf: leaf / 3 if leaf.ndim > 1 else leaf, tiny.params())
    params, tokens = tiny.stack_layers(params, CONFIG), batch(8, 16)
    expected = gradients(params, tokens, model)
    mesh = make_mesh(sizes)
    places = decoder_shardings(CONFIG, mesh, stacked=True)
    with use_mesh(mesh):
        arguments = jax.device_put(params, places), jax.device_put(tokens, batch_sharding(mesh))
        found = gradients(*arguments, model.clone(unroll=unroll), sizes)
    assert_close(found, expected, 1e-5)
