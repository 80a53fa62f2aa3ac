"""The decoder's training form compiled as for users: gradients as torch's, and the memory that `remat` saves."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gradient_cases import assert_close, mean_loss

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.models.decoder import Decoder

pytestmark = pytest.mark.slow


def test_remat_saves_memory_in_the_order_it_promises():
    # Wide and deep enough that what is kept of the layers outweighs what one layer needs for itself.
    config = dataclasses.replace(tiny.CONFIG, num_layers=16, hidden_size=128, intermediate_size=512)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def peak(remat):
        model = Decoder(config, stacked=True, remat=remat)
        abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
        loss = functools.partial(mean_loss, target=jnp.ones(tokens.shape, bool), model=model)
        return jax.jit(jax.grad(loss)).lower(abstract, tokens).compile().memory_analysis().temp_size_in_bytes

    assert peak("full") < 0.7 * peak("dots") and peak("dots") < 0.8 * peak("none")


@pytest.mark.oracle
def test_loss_and_gradients_are_torchs(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    peer = transformers.Emu3ForCausalLM(
        transformers.Emu3TextConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            initializer_range=0.1,
            pad_token_id=40,
            bos_token_id=251,
            eos_token_id=252,
            attention_dropout=0.0,
        )
    )

    def converted(name):
        """The peer's weights as ours."""
        peer.save_pretrained(tmp_path / name / "torch")
        file = tmp_path / name / "torch" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "vq_config": {"codebook_size": 64}}))
        convert([tmp_path / name / "torch"], tmp_path / name / "bundle", progress=False)
        bundle = Bundle.open(tmp_path / name / "bundle")
        return dataclasses.replace(bundle.decoder_config, dtype="float32"), bundle.load_decoder()

    config, params = converted("weights")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, (3, 40)).astype(np.int32)
    target = rng.random((3, 40)) < 0.8
    labels = torch.from_numpy(np.where(target, tokens, -100)).long()
    peer.train()
    loss = peer(torch.from_numpy(tokens).long(), labels=labels).loss
    loss.backward()
    with torch.no_grad():  # gradients take the way of weights: names and layouts are converted by the same table
        for parameter in peer.parameters():
            parameter.copy_(parameter.grad)
    _, expected = converted("gradients")

    model = Decoder(config, stacked=True, remat="full")
    value, found = jax.jit(jax.value_and_grad(functools.partial(mean_loss, target=target, model=model)))(
        tiny.stack_layers(params, config), tokens
    )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    assert_close(found, tiny.stack_layers(expected, config), 1e-4)
