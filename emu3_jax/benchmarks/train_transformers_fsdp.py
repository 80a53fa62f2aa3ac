"""The peer of `bench train` on several devices: transformers' Emu3, fully sharded by PyTorch's FSDP2.

One process per device: NCCL joins GPUs, Gloo joins processes on CPUs. Parameters, gradients and the optimiser's state
are float32 and sharded. Layers compute in bfloat16 with SDPA and gradient checkpointing, and AdamW is fused. The loss
is computed in checkpointed chunks, and in one variant by transformers itself, which needs more memory.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from emu3_jax.benchmarks import peer
from emu3_jax.benchmarks.train_transformers import (
    adamw,
    build_model,
    chunked_loss,
    first_sentence,
    timed,
    versions,
)
from emu3_jax.config import DecoderConfig


def run(
    config: DecoderConfig, *, devices: int, tokens: int, rows: int, steps: int, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields the first process's figures of each variant of the step, after all of them have run.

    The variants are: a chunked loss; the chunked loss with FlashAttention 2, if it is installed; the model's own loss;
    the chunked loss with compiled layers, if `compiled`. If a device runs out of memory, no further variant runs.

    Args:
        config: config of the decoder.
        devices: number of devices.
        tokens: length of a row.
        rows: rows per step on all devices, a multiple of `devices`.
        steps: number of steps to time, after two that warm up.
        compiled: whether to add the variant with compiled layers.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

    with tempfile.TemporaryDirectory() as directory:
        found = pathlib.Path(directory, "figures")
        options = {"tokens": tokens, "rows": rows // devices, "steps": steps, "compiled": compiled}
        failure = None
        try:
            spawn(_process, (devices, directory, found, config, options), devices)
        except (ProcessExitedException, ProcessRaisedException) as error:
            failure = error
        figures = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    yield from figures
    if failure and not (figures and "out_of_memory" in figures[-1]):
        raise failure


def _process(rank: int, devices: int, directory: str, found: pathlib.Path, config: DecoderConfig, options) -> None:
    """Process `rank`. It appends its figures to the file `found`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)  # the processes share the cores
    torch.manual_seed(rank)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", f"file://{directory}/store", rank=rank, world_size=devices
    )
    label = {"program": "transformers, FSDP2", "devices": devices, **versions()}
    try:
        for way, figures in _variants(config, device, devices, **options):
            label["program"] = f"transformers, FSDP2, {way}"
            if rank == 0:
                with found.open("a") as file:
                    print(json.dumps(label | figures), file=file)
    except torch.OutOfMemoryError as error:
        # The other processes wait for this one. They end when it fails.
        with found.open("a") as file:
            print(json.dumps(label | {"out_of_memory": first_sentence(error)}), file=file)
        raise
    torch.distributed.destroy_process_group()


def _variants(config: DecoderConfig, device: str, devices: int, *, tokens: int, rows: int, steps: int, compiled: bool):
    """Yields the name and the figures of each variant."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    whole = _sharded_model(config, device, devices)
    model = whole.model
    trained = list(whole.parameters())
    optimizer = adamw(trained)
    ids = torch.randint(0, config.vocab_size, (rows, tokens), device=device)
    ways = ["SDPA, chunked loss"]
    ways += ["FlashAttention 2, chunked loss"] if device == "cuda" and is_flash_attn_2_available() else []
    ways += ["SDPA"]
    ways += ["SDPA, chunked loss, compiled layers"] if compiled else []
    for way in ways:
        model.set_attn_implementation("flash_attention_2" if way.startswith("Flash") else "sdpa")
        if "compiled" in way:
            for layer in model.model.layers:  # without the hooks that gather the layer's parameters
                layer.forward = torch.compile(layer.forward)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield way, timed(functools.partial(whole, ids, chunked="chunked" in way), trained, optimizer, steps, device)


def _sharded_model(config: DecoderConfig, device: str, devices: int):
    """A module that computes the loss of ids, with random weights. Each process makes only its own part of them."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Loss(torch.nn.Module):
        """Inside this module, the parameters of the head are gathered when the loss needs them."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, chunked):
            return chunked_loss(self.model, ids) if chunked else self.model(ids, labels=ids).loss

    whole = Loss(build_model(config, 0, "meta"))
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (devices,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }
    decoder = whole.model.model
    for layer in decoder.layers:
        fully_shard(layer, **options)
    fully_shard(whole, **options)
    whole.to_empty(device=device)
    for parameter in whole.parameters():
        local = parameter.detach().to_local()
        if parameter.ndim == 1:
            local.fill_(1.0)
        else:
            local.normal_(std=0.02)
    # Its frequencies are computed when it is made, not read from weights.
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=whole.model.config)
    return whole


if __name__ == "__main__":
    peer.main(run)
