"""Logits and whole generations against live `transformers` classes with random weights, through `save_pretrained`."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.config import SpecialTokens
from emu3_jax.generation import session
from emu3_jax.generation.schedule import SAMPLED_VISUAL, forced_ids, image_schedule, text_schedule
from emu3_jax.models.cache import KVCache

pytestmark = pytest.mark.oracle

# A vocabulary of 320 ids, the last 64 visual: control ids stand before them in the published order.
TOKENS = SpecialTokens(
    pad=40, bos=251, eos=252, img=253, boi=254, eoi=255, eol=248, eof=249, visual_start=256, visual_count=64
)  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = transformers.Emu3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.5,
        pad_token_id=TOKENS.pad, bos_token_id=TOKENS.bos, eos_token_id=TOKENS.eos,
    )  # fmt: skip
    return transformers.Emu3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ours(peer, tmp_path_factory):
    """(config, params) after `save_pretrained`, `convert` and loading."""
    root = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(root / "torch")
    file = root / "torch" / "config.json"
    # A decoder alone does not say how much of its vocabulary is visual; unless told, it is the published 32,768.
    file.write_text(json.dumps({**json.loads(file.read_text()), "vq_config": {"codebook_size": 64}}))
    convert([root / "torch"], root / "bundle", progress=False)
    bundle = Bundle.open(root / "bundle")
    assert bundle.decoder_config.tokens == TOKENS
    return dataclasses.replace(bundle.decoder_config, dtype="float32"), bundle.load_decoder()


def test_logits_of_plain_and_left_padded_rows(peer, ours):
    config, params = ours
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (3, 21)).astype(np.int32)
    start = np.asarray([0, 5, 17], np.int32)
    mask = np.arange(21)[None] >= start[:, None]
    with torch.no_grad():
        expected = peer(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()).logits.numpy()
    cache = KVCache.create(config, jnp.asarray(start), 24)
    logits, _ = tiny.forward(params, jnp.asarray(tokens), cache, config)
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("height", "width", "guidance"), [(4, 5, 3.0), (3, 8, 1.5)])
def test_greedy_pictures_under_guidance_and_constraint(height, width, guidance, peer, ours):
    config, params = ours
    prompt = [TOKENS.bos, 3, 1, 4, 1, 5, TOKENS.boi, 60, TOKENS.img]
    negative = [TOKENS.bos, 9, 2, TOKENS.boi, 60, TOKENS.img]
    schedule = image_schedule(height, width)
    forced = forced_ids(schedule, TOKENS)
    visual = list(range(TOKENS.visual_start, TOKENS.visual_end))

    def legal(_, ids):
        step = ids.shape[0] - len(prompt)
        return visual if forced[step] == SAMPLED_VISUAL else [int(forced[step])]

    processors = LogitsProcessorList(
        [
            UnbatchedClassifierFreeGuidanceLogitsProcessor(guidance, peer, unconditional_ids=torch.tensor([negative])),
            PrefixConstrainedLogitsProcessor(legal, num_beams=1),
        ]
    )
    options = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=len(schedule), eos_token_id=TOKENS.eos, pad_token_id=TOKENS.pad
    )
    ids = torch.tensor([prompt])
    expected = peer.generate(ids, options, attention_mask=torch.ones_like(ids), logits_processor=processors)
    settings = tiny.settings(1, temperature=0.0, guidance=guidance)
    got = session.run(params, config, [session.Row(prompt, schedule, negative)], settings).ids
    np.testing.assert_array_equal(got[0], expected[0, len(prompt) :].numpy())


def test_greedy_text_of_a_left_padded_batch(peer, ours):
    config, params = ours
    rows = [[TOKENS.bos, 7, 8], [TOKENS.bos, *range(20)], [TOKENS.bos, 30]]
    width = max(map(len, rows))
    ids = torch.tensor([[TOKENS.pad] * (width - len(row)) + row for row in rows])
    options = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=40, eos_token_id=TOKENS.eos, pad_token_id=TOKENS.pad
    )
    expected = peer.generate(ids, options, attention_mask=(ids != TOKENS.pad).long())[:, width:].numpy()
    got = session.run(params, config, tiny.rows(rows, [text_schedule(40)] * 3), tiny.settings(3, temperature=0.0)).ids
    np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 10, 1.0), (0.7, 40, 0.9), (1.3, 320, 0.5), (1.0, 3, 0.99)]
)
def test_filters_keep_what_transformers_keeps(temperature, top_k, top_p):
    from emu3_jax.generation.sampling import keep_top_k, keep_top_p

    scores = torch.from_numpy(np.random.default_rng(3).standard_normal((5, 320)).astype(np.float32) * 3)
    warped = transformers.TemperatureLogitsWarper(temperature)(None, scores)
    warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    warped = transformers.TopPLogitsWarper(top_p)(None, warped).numpy()
    ours = jnp.asarray(scores.numpy()) / temperature
    ours = keep_top_k(ours, jnp.full(5, top_k))
    ours = np.asarray(keep_top_p(ours, jnp.full(5, top_p, jnp.float32)))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(warped))
    np.testing.assert_allclose(ours[np.isfinite(ours)], warped[np.isfinite(warped)], rtol=1e-6)
