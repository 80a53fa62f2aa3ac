"""The peer of `bench decode`: transformers decodes Emu3 with guidance, in two ways, on the same GPU."""

import gc
import time
from collections.abc import Iterator
from typing import Any

from emu3_jax.benchmarks import peer
from emu3_jax.checkpoints.published_config import decoder_to_published
from emu3_jax.config import DecoderConfig
from emu3_jax.generation.defaults import GUIDANCE, TOP_K

PROMPT_TOKENS = 64


def run(config: DecoderConfig, area: int) -> Iterator[dict[str, Any]]:
    """Yields milliseconds per image token, at two cache lengths, of two ways to decode.

    The first is `generate()` as the README of Emu3 calls it. The second is a compiled step with a static cache.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    published = decoder_to_published(config, "transformers")
    published.pop("model_type")
    text_config = transformers.Emu3TextConfig(**published)
    text_config._attn_implementation = "sdpa"
    dtype = getattr(torch, config.dtype)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.Emu3ForCausalLM(text_config).eval()
    finally:
        torch.set_default_dtype(previous)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    length = round(area / 64)
    for context in (PROMPT_TOKENS, length // 2):
        seconds = _generate(model, config, context, device)
        yield {
            "peer": "transformers generate()",
            "cache_length": context,
            "ms_per_token": round(seconds * 1e3, 2),
            **versions,
        }
    for context in (PROMPT_TOKENS, length // 2):
        seconds = _compiled(model, config, context, slots=PROMPT_TOKENS + length + 512, device=device)
        yield {
            "peer": "transformers, static cache, torch.compile, doubled batch",
            "cache_length": context,
            "ms_per_token": round(seconds * 1e3, 2),
            **versions,
        }
    del model
    gc.collect()


def _generate(model, config: DecoderConfig, context: int, device: str) -> float:
    """Seconds per token of `generate()` with top-k, visual tokens only, and guidance as a second forward pass."""
    import torch
    from transformers import GenerationConfig

    special = config.tokens
    visual = list(range(special.visual_start, special.visual_end))
    ids = torch.randint(special.visual_start, special.visual_end, (1, context), device=device)
    negative = torch.randint(0, special.pad, (1, PROMPT_TOKENS), device=device)

    def timed(count: int) -> float:
        options = GenerationConfig(
            do_sample=True, top_k=TOP_K, max_new_tokens=count, min_new_tokens=count, eos_token_id=special.eos,
            pad_token_id=special.pad, guidance_scale=GUIDANCE,
        )  # fmt: skip
        _synchronize(device)
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
            prefix_allowed_tokens_fn=lambda *_: visual,
        )
        _synchronize(device)
        return time.perf_counter() - began

    few, many = 4, 36
    timed(few)
    return (timed(many) - timed(few)) / (many - few)


def _compiled(model, config: DecoderConfig, context: int, *, slots: int, device: str, steps: int = 100) -> float:
    """Seconds per token of a hand-written PyTorch loop: guidance as a doubled batch, static cache, compiled step."""
    import torch
    from transformers import StaticCache

    special = config.tokens
    cache = StaticCache(config=model.config, max_cache_len=slots)
    ids = torch.randint(special.visual_start, special.visual_end, (2, context), device=device)

    @torch.no_grad()
    def step(token, position):
        logits = model(token, past_key_values=cache, use_cache=True, position_ids=position[None].expand(2, -1)).logits
        c, u = torch.log_softmax(logits[:, -1].float(), -1).split(1)
        guided = (u + GUIDANCE * (c - u))[:, special.visual_start : special.visual_end]
        values, indices = torch.topk(guided, TOP_K)
        chosen = indices.gather(1, torch.multinomial(torch.softmax(values, -1), 1)) + special.visual_start
        return chosen.expand(2, 1).clone()

    with torch.no_grad():
        positions = torch.arange(context, device=device)[None].expand(2, -1)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, position_ids=positions)
    compiled = torch.compile(step, mode="reduce-overhead") if device == "cuda" else step
    token, position = ids[:, -1:].clone(), torch.tensor([context], device=device)
    for index in range(8 + steps):
        if index == 8:
            _synchronize(device)
            began = time.perf_counter()
        token = compiled(token, position).clone()
        position = position + 1
    _synchronize(device)
    return (time.perf_counter() - began) / steps


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    peer.main(run)
