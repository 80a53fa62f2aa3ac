"""The peer of `bench train`: the train step of transformers' Emu3 on one GPU, as a PyTorch user writes it.

bfloat16 autocast over float32 masters (or LoRA by `peft` over bfloat16 weights), SDPA, gradient checkpointing, fused
AdamW. Its own loss holds all logits at once; where that runs out of memory, a loss in checkpointed chunks stands in.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error

CHUNK = 1024


def in_a_process(config: DecoderConfig, tokens: int, rows: int, rank: int, steps: int) -> Iterator[dict[str, Any]]:
    """`run` in a process that gives all its memory back."""
    arguments = json.dumps([config.to_dict(), tokens, rows, rank, steps])
    process = subprocess.run(
        [sys.executable, "-m", "emu3_jax.benchmarks.train_transformers", arguments], stdout=subprocess.PIPE, text=True
    )
    yield from (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{"))
    if process.returncode:
        raise Emu3Error("the peer's process failed; what it printed is above")


def run(config: DecoderConfig, tokens: int, rows: int, rank: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yields ms per step with the model's own loss, and with a chunked one."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Emu3Error(f"--compare transformers needs {error.name}: pip install 'emu3-jax[test]'") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    published = config.to_published("transformers")
    published.pop("model_type")
    published["attention_dropout"] = 0.0
    peer = transformers.Emu3TextConfig(**published)
    peer._attn_implementation = "sdpa"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if rank else torch.float32)
    try:
        with torch.device(device):
            model = transformers.Emu3ForCausalLM(peer)
    finally:
        torch.set_default_dtype(previous)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its newer name does not exist in older versions
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    if rank:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    ids = torch.randint(0, config.vocab_size, (rows, tokens), device=device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for chunked in (False, True):
        label = {"program": "transformers, SDPA" + (", chunked loss" if chunked else ""), **versions}
        try:
            times = [_step(model, trained, optimizer, ids, chunked, device) for _ in range(2 + steps)]
        except torch.OutOfMemoryError as error:
            yield {**label, "out_of_memory": str(error).split(". ", 1)[0][:120]}
        else:
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            figures = {"ms_per_step": round(statistics.median(times[2:]) * 1e3, 1)}
            yield {**label, **figures, "best_ms": round(min(times[2:]) * 1e3, 1), "peak_gb": round(peak / 1e9, 2)}
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _step(model, trained, optimizer, ids, chunked: bool, device: str) -> float:
    """Seconds of one step."""
    import torch

    began = time.perf_counter()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = _chunked_loss(model, ids) if chunked else model(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 5.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = loss.item()  # waits for the device
    if device == "cuda":
        torch.cuda.synchronize()
    if value != value:
        raise AssertionError("the peer's loss is not a number")
    return time.perf_counter() - began


def _chunked_loss(model, ids):
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


if __name__ == "__main__":
    described, *numbers = json.loads(sys.argv[1])
    for line in run(DecoderConfig.from_dict(described), *numbers):
        print(json.dumps(line), flush=True)
