"""The peer of `bench train`: a training step of transformers' Emu3 on one GPU, as a PyTorch user would write it.

It uses bfloat16 autocast over float32 weights (or LoRA by `peft` over bfloat16 weights), SDPA, gradient checkpointing
and fused AdamW. transformers' own loss holds all logits at once and may run out of memory. A second variant computes
the loss in checkpointed chunks.
"""

import functools
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from emu3_jax.benchmarks import peer
from emu3_jax.checkpoints.published_config import decoder_to_published
from emu3_jax.config import DecoderConfig

CHUNK = 1024


def run(
    config: DecoderConfig, *, tokens: int, rows: int, rank: int, steps: int, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields figures of each variant of the step.

    The variants are: the model's own loss; a chunked loss; the chunked loss with FlashAttention 2, if it is installed;
    the chunked loss with compiled layers, if `compiled`.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    device = "cuda" if torch.cuda.is_available() else "cpu"
    described = versions()
    try:
        model = build_model(config, rank, device)
    except torch.OutOfMemoryError as error:
        yield {"program": "transformers", **described, "out_of_memory": first_sentence(error)}
        return
    base = model.get_base_model() if rank else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trained)
    ids = torch.randint(0, config.vocab_size, (rows, tokens), device=device)
    ways = ["SDPA", "SDPA, chunked loss"]
    ways += ["FlashAttention 2, chunked loss"] if device == "cuda" and is_flash_attn_2_available() else []
    ways += ["SDPA, chunked loss, compiled layers"] if compiled else []
    for way in ways:
        base.set_attn_implementation("flash_attention_2" if way.startswith("Flash") else "sdpa")
        if "compiled" in way:
            for layer in base.model.layers:
                layer.compile()
        label = {"program": f"transformers, {way}", **described}
        try:
            loss = functools.partial(_loss, model, ids, chunked="chunked" in way, device=device)
            yield {**label, **timed(loss, trained, optimizer, steps, device)}
        except torch.OutOfMemoryError as error:
            yield {**label, "out_of_memory": first_sentence(error)}
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def versions() -> dict[str, str]:
    """The device and the versions of the peer's packages."""
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def adamw(trained: list[Any]) -> Any:
    """Fused AdamW for these parameters."""
    import torch

    return torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True)


def timed(loss: Callable[[], Any], trained: list[Any], optimizer: Any, steps: int, device: str) -> dict[str, Any]:
    """Figures of a variant: two steps warm up, then `steps` steps are timed. `loss` runs the forward pass."""
    import torch

    taken = [_step(loss, trained, optimizer, device) for _ in range(2 + steps)]
    times, losses = zip(*taken, strict=True)
    return {
        "ms_per_step": round(statistics.median(times[2:]) * 1e3, 1),
        "best_ms": round(min(times[2:]) * 1e3, 1),
        **({"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if device == "cuda" else {}),
        "first_step_s": round(times[0], 1),
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
    }


def build_model(config: DecoderConfig, rank: int, device: str) -> Any:
    """The model with random weights, ready to train: float32 weights or, with `rank`, LoRA over bfloat16 weights."""
    import torch
    import transformers

    published = decoder_to_published(config, "transformers")
    published.pop("model_type")
    published["attention_dropout"] = 0.0
    text_config = transformers.Emu3TextConfig(**published)
    text_config._attn_implementation = "sdpa"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if rank else torch.float32)
    try:
        with torch.device(device):
            model = transformers.Emu3ForCausalLM(text_config)
    finally:
        torch.set_default_dtype(previous)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but older versions of transformers lack its replacement
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    if rank:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    return model.train()


def _loss(model, ids, *, chunked: bool, device: str):
    import torch

    with torch.autocast(device, dtype=torch.bfloat16):
        return chunked_loss(model, ids) if chunked else model(ids, labels=ids).loss


def _step(forward: Callable[[], Any], trained, optimizer, device: str) -> tuple[float, float]:
    """Seconds and loss of one step."""
    import torch

    began = time.perf_counter()
    loss = forward()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 5.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = loss.item()
    if device == "cuda":
        torch.cuda.synchronize()
    if not math.isfinite(value):
        raise AssertionError(f"the peer's loss is {value}")
    return time.perf_counter() - began, value


def chunked_loss(model, ids):
    """The next-token loss. Each chunk of logits is computed again in the backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = whole.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()

    def part(states, targets):
        return torch.nn.functional.cross_entropy(whole.lm_head(states).float(), targets, reduction="sum")

    sums = [
        checkpoint(part, states, targets, use_reentrant=False)
        for states, targets in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    return torch.stack(sums).sum() / len(labels)


def first_sentence(error: Exception) -> str:
    """What an error says first."""
    return str(error).split(". ", 1)[0][:120]


if __name__ == "__main__":
    peer.main(run)
