"""The chunked loss: value and gradients as the plain one's, also over meshes; its memory; the reference's losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import golden_npz
from jax.sharding import NamedSharding
from loss_cases import case

from emu3_jax.data.sequences import TokenSequence, padded_row
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import spec, use_mesh
from emu3_jax.training.losses import LossSums, chunked_cross_entropy, next_tokens

VISUAL = (20, 37)


def plain(hidden, head, labels, mask, visual=VISUAL):
    """(text, vision) sums with all logits at once."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, head.astype(hidden.dtype), precision="highest")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0] * mask
    is_visual = (labels >= visual[0]) & (labels < visual[1])
    return jnp.where(is_visual, 0, loss).sum(), jnp.where(is_visual, loss, 0).sum()


def plain_objective(hidden, head, labels, mask):
    text, vision = plain(hidden, head, labels, mask)
    return 0.5 * text + 2 * vision


def objective(hidden, head, labels, mask, chunk=10):
    """Weighs the kinds differently, so that a gradient that mixes them up shows."""
    return 0.5 * chunked_cross_entropy(hidden, head, labels, mask, VISUAL, vision_weight=4.0, chunk=chunk)[0]


@pytest.mark.parametrize("chunk", [1, 10, 96, 512])
def test_value_and_gradients_equal_the_plain_ones(chunk):
    arguments = case()
    expected, expected_gradients = jax.value_and_grad(plain_objective, (0, 1))(*arguments)
    value, gradients = jax.jit(jax.value_and_grad(objective, (0, 1)), static_argnums=4)(*arguments, chunk)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", ["fsdp=4", "tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2,tensor=2"])
def test_value_and_gradients_over_a_mesh(sizes):
    """37 rows of the head do not split over `tensor`; nor do the 184,622 of Emu3."""
    mesh = make_mesh(sizes)
    expected, expected_gradients = jax.value_and_grad(plain_objective, (0, 1))(*case())
    hidden, head, labels, mask = case()
    hidden = jax.device_put(hidden, NamedSharding(mesh, spec("batch", "sequence", "width")))
    head = jax.device_put(head, NamedSharding(mesh, spec("vocab", "table_width")))
    with use_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(objective, (0, 1)))(hidden, head, labels, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for found, wanted, argument in zip(gradients, expected_gradients, (hidden, head), strict=True):
        assert found.sharding.is_equivalent_to(argument.sharding, found.ndim)
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


def test_sums_by_kind_and_their_mean():
    hidden, head, labels, mask = case()
    total, sums = chunked_cross_entropy(hidden, head, labels, mask, VISUAL, vision_weight=0.25)
    text, vision = plain(hidden, head, labels, mask)
    np.testing.assert_allclose((sums.text, sums.vision), (text, vision), rtol=1e-6)
    np.testing.assert_allclose(total, text + 0.25 * vision, rtol=1e-6)
    assert (int(sums.text_count), int(sums.vision_count)) == (
        (mask & (labels < 20)).sum(),
        (mask & (labels >= 20)).sum(),
    )
    np.testing.assert_allclose(tiny.mean_loss(sums), (text + vision) / mask.sum(), rtol=1e-6)
    _, nothing = chunked_cross_entropy(hidden, head, labels, np.zeros_like(mask), VISUAL)
    assert nothing.text == nothing.vision == nothing.count == 0
    twice = jax.tree.map(jnp.add, sums, nothing)
    assert isinstance(twice, LossSums) and tiny.mean_loss(twice) == tiny.mean_loss(sums)


def test_bfloat16_products_accumulate_the_heads_gradient_in_float32():
    hidden, head, labels, mask = case("bfloat16")
    exact = jax.grad(plain_objective, 1)(hidden.astype(jnp.float32), head.astype(jnp.bfloat16), labels, mask)
    found = jax.grad(objective, 1)(hidden, head, labels, mask, 1)
    assert found.dtype == jnp.float32
    assert float(jnp.abs(found - exact).max() / jnp.abs(exact).max()) < 2**-8  # 96 sums in bfloat16 would lose more


def test_next_tokens_shift_ids_and_targets():
    tokens = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    labels, mask = next_tokens(tokens, jnp.asarray([[True, False, True, True]]))
    assert labels[0, :3].tolist() == [6, 7, 8]
    assert mask.tolist() == [[False, True, True, False]]


def test_peak_memory_is_at_most_an_eighth_of_the_plain_loss():
    """At 10,240 tokens and the full vocabulary; compiled, not run."""
    shapes = [((1, 10240, 64), jnp.bfloat16), ((184622, 64), jnp.float32), ((1, 10240), jnp.int32), ((1, 10240), bool)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def chunked(*arguments):
        loss, sums = chunked_cross_entropy(*arguments, visual=(151854, 184622))
        return loss / sums.count

    def naive(hidden, head, labels, mask):
        return sum(plain(hidden, head, labels, mask)) / mask.sum()

    peaks = [
        jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for loss in (chunked, naive)
    ]
    assert peaks[0] * 8 <= peaks[1]


@pytest.mark.parametrize("vision_only", [True, False])
def test_golden_losses(vision_only, golden_model):
    """Everything in `vision_only=False` means everything: the reference counts padding, and lets it see the text."""
    golden = {
        k.split("/")[1]: v for k, v in golden_npz("train.npz").items() if k.startswith(f"vision_only={vision_only}")
    }
    language = golden_model.language
    special = language.config.tokens
    size, labelled = int(golden["attention_mask"].sum()), golden["labels"] != -100
    sequence = TokenSequence(golden["input_ids"][:size].astype(np.int32), labelled[:size])
    row = padded_row(sequence, len(labelled), special.pad, loss_on_padding=not vision_only)
    np.testing.assert_array_equal(row["tokens"], golden["input_ids"])
    np.testing.assert_array_equal(row["loss_mask"], labelled)
    batch = {name: jnp.asarray(array[None]) for name, array in row.items()}
    is_visual = (golden["input_ids"] >= special.visual_start) & (golden["input_ids"] < special.visual_end)
    np.testing.assert_array_equal(golden["labels"], np.where(is_visual | (not vision_only), golden["input_ids"], -100))

    @jax.jit
    def loss(params):
        labels, mask = next_tokens(batch["tokens"], batch["loss_mask"])
        arrays = (batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden = Decoder(language.config).apply({"params": params}, *arrays, method="hidden")
        return chunked_cross_entropy(
            hidden, params["head"]["kernel"], labels, mask, (special.visual_start, special.visual_end), chunk=32
        )[1]

    sums = loss(language.params)
    np.testing.assert_allclose(tiny.mean_loss(sums), golden["loss"], rtol=1e-4)
    assert int(sums.vision_count) == is_visual.sum()
    assert int(sums.text_count) == (0 if vision_only else len(golden["labels"]) - 1 - is_visual.sum())
