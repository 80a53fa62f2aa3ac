"""`bench train`: times the training step with random weights and random tokens, one sequence per row."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.benchmarks import peer
from emu3_jax.benchmarks.kernels import gpu_kernels
from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.benchmarks.random_weights import normal
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import Preference, TextOnly
from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import Adapter
from emu3_jax.sharding.mesh import make_mesh, parse
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training.config import ModelConfig, TrainConfig
from emu3_jax.training.flops import peak_flops, step_flops
from emu3_jax.training.host_rows import HostRows
from emu3_jax.training.preference_config import PreferenceConfig
from emu3_jax.training.step import Trainer

PRESETS = {
    "8b": DecoderConfig(),
    "small": DecoderConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2),
}


PROFILED = 2  # number of steps to profile


def run(
    preset: str = "8b",
    *,
    layers: int | None = None,
    tokens: int = 10240,
    rows: int = 1,
    remat: str = "full",
    unroll: int = 1,
    attention: str = "auto",
    adapter: int = 0,
    base: str = "bfloat16",
    preference: str | None = None,
    mesh: str = "fsdp=-1",
    steps: int = 5,
    compare: str | None = None,
    compiled: bool = False,
    profile: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times training steps.

    Two steps warm up, then `steps` steps are timed. `losses` are the losses of the first and of the last step. MFU
    divides model FLOPs (`training.flops`) by the chip's peak; recomputation does not count, on either side.

    Args:
        preset: name of the decoder shapes in `PRESETS`.
        layers: number of layers, or None for the preset's.
        tokens: length of a row.
        rows: rows per step.
        remat: what the backward pass recomputes, see `ModelConfig`.
        unroll: layers that one iteration of the loop over layers computes, see `ModelConfig`.
        attention: implementation of attention, see `models.attention`.
        adapter: rank of the adapters, or 0 to train all weights.
        base: dtype or quantisation of the frozen weights beside adapters, see `Adapter`.
        preference: None for next-token cross-entropy. Else the loss is DPO's, two rows are a pair, and this says where
            the reference's log-probabilities come from, see `PreferenceConfig`. The forward pass that "adapters_off"
            adds does not count as model FLOPs.
        mesh: mesh axes and their sizes.
        steps: number of steps to time.
        compare: "transformers" to first run this peer, or None. If the mesh names several devices, the peer uses as
            many, by PyTorch's FSDP2. `speedup` divides the time of its fastest variant by ours.
        compiled: whether the peer also runs with its layers under `torch.compile`.
        profile: whether to profile `PROFILED` further steps and list the GPU's kernels.

    Yields:
        The peer's figures if `compare` is given; then the machine; then the figures of our step; then its kernels.

    Raises:
        Emu3Error: the peer's packages are missing, or preference pairs or the peer need other options. If the peer
            fails, this is raised at the end, after our figures.
    """
    enable_persistent_cache()
    if preference and rows % 2:
        raise Emu3Error(f"rows is {rows}: preference pairs have two rows each, so give an even number")
    if preference and compare:
        raise Emu3Error("compare is of next-token cross-entropy: leave it out beside preference pairs")
    decoder = PRESETS[preset]
    decoder = dataclasses.replace(decoder, num_layers=layers or decoder.num_layers)
    flops = step_flops(decoder, rows * tokens, rows * tokens * (tokens + 1) / 2, frozen=adapter > 0)
    failure, fastest = None, math.inf
    if compare:
        peer.require(*(("peft",) if adapter else ()))
        # Not the size of an axis -1: only JAX could count its devices, and would reserve their memory.
        devices = math.prod(size for size in parse(mesh).values() if size > 0)
        if devices > 1 and adapter:
            raise Emu3Error(f"mesh {mesh}: compare trains adapters on one device only, so set fsdp=1")
        if devices > 1 and rows % devices:
            raise Emu3Error(f"rows is {rows}: compare needs a multiple of the {devices} devices of mesh {mesh}")
        # The peer runs first, because JAX reserves most of the GPU's memory once it has used the device.
        try:
            options = {"tokens": tokens, "rows": rows, "steps": steps, "compiled": compiled}
            if devices > 1:
                running = peer.in_a_process("train_transformers_fsdp", decoder, devices=devices, **options)
            else:
                running = peer.in_a_process("train_transformers", decoder, rank=adapter, **options)
            for figures in running:
                if "ms_per_step" in figures:
                    peak = devices * peak_flops(figures["device"])
                    figures |= rates(figures["ms_per_step"], rows * tokens, flops, peak)
                    fastest = min(fastest, figures["ms_per_step"])
                yield figures
        except Emu3Error as error:
            failure = error
    yield {"bench": "train", "preset": preset, "layers": decoder.num_layers, "tokens": tokens, **describe_machine()}
    peak = peak_flops(jax.devices()[0].device_kind)
    config = TrainConfig(
        directory="",
        model=ModelConfig(
            "", decoder, random=adapter == 0 and not preference, remat=remat, unroll=unroll, attention=attention
        ),
        data=DataConfig(
            (Source("", Preference() if preference else TextOnly()),), tokens, packing=0 if preference else 8
        ),
        batch_size=rows,
        steps=1000,
        adapter=Adapter(rank=adapter, base=base) if adapter else None,
        preference=PreferenceConfig(cross_entropy=0.1, reference=preference) if preference else None,
        mesh=mesh,
    )
    labels = {
        "program": "emu3-jax",
        "remat": remat,
        "unroll": unroll,
        "attention": attention,
        "rows": rows,
        **({"rank": adapter, "base": base} if adapter else {}),
        **({"preference": preference} if preference else {}),
    }
    try:
        figures = _measure(config, decoder, steps, profile)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        yield {**labels, "out_of_memory": str(error).split("\n", 1)[0][:200]}
    else:
        devices, kernels = figures.pop("devices"), figures.pop("kernels", None)
        ratio = {} if math.isinf(fastest) else {"speedup": round(fastest / figures["ms_per_step"], 2)}
        yield {**labels, **figures, **rates(figures["ms_per_step"], rows * tokens, flops, peak * devices), **ratio}
        if kernels:
            yield kernels
    if failure:
        raise failure


def rates(ms: float, tokens: int, flops: float, peak: float) -> dict[str, float]:
    """Tokens and TFLOPs per second of a step of `ms` milliseconds, and its MFU if `peak` is not NaN."""
    seconds = ms / 1e3
    known = {} if math.isnan(peak) else {"mfu": round(flops / seconds / peak, 4)}
    return {"tokens_per_second": round(tokens / seconds), "model_tflops": round(flops / seconds / 1e12, 1), **known}


def device_memory() -> dict[str, float]:
    """Peak device memory so far in GB. Empty if the backend does not report it."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats["peak_bytes_in_use"] / 1e9, 2)} if "peak_bytes_in_use" in stats else {}


def _measure(config: TrainConfig, decoder: DecoderConfig, steps: int, profile: bool) -> dict[str, Any]:
    mesh = make_mesh(config.mesh)
    trainer = Trainer(config, decoder, mesh)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.sequence_length)
    batch = {
        "tokens": rng.integers(0, decoder.vocab_size, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, bool),
    }
    batch |= {name: np.zeros(shape[:axes], dtype) for name, (axes, dtype) in trainer.objective.arrays.items()}
    with use_mesh(mesh):
        state = trainer.initial_state()
        frozen = random_frozen(trainer)
        batch = HostRows(mesh, config.batch_size).spread(batch)
        began = time.perf_counter()
        compiled = trainer.step.lower(state, frozen, batch).compile()
        compile_s = time.perf_counter() - began
        times, losses = [], []
        for _ in range(2 + steps):
            began = time.perf_counter()
            state, metrics = compiled(state, frozen, batch)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            times.append(time.perf_counter() - began)
        kernels = None
        if profile:
            with gpu_kernels(PROFILED) as kernels:
                for _ in range(PROFILED):
                    state, metrics = compiled(state, frozen, batch)
                jax.block_until_ready(state)
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f"losses are {losses}")
    memory = compiled.memory_analysis()
    return {
        "ms_per_step": round(statistics.median(times[2:]) * 1e3, 1),
        "best_ms": round(min(times[2:]) * 1e3, 1),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        **device_memory(),
        "compile_s": round(compile_s, 1),
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
        "devices": mesh.size,
        "kernels": kernels,
    }


def random_frozen(trainer: Trainer) -> Any:
    """Random frozen parameters in their own dtypes, with standard deviation of about 0.02; norm scales are 1.

    Constant or regular weights would give wrong times: a GPU needs less power for them, and so runs faster.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(trainer.abstract_frozen())
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))

    def make(path, leaf, key):
        random = functools.partial(_random_leaf, path[-1].key, leaf.shape, leaf.dtype)
        return jax.jit(random, out_shardings=leaf.sharding)(key)

    return jax.tree.unflatten(tree, [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=False)])


def _random_leaf(name: str, shape: tuple[int, ...], dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    def random(key, shape):
        if name == "scale":
            return jnp.ones(shape, dtype)
        if name.endswith("_scale"):
            return jax.random.uniform(key, shape, dtype, 0.02, 0.05)
        if name.endswith("_q"):
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
        return normal(key, shape, 0.02, dtype)

    if len(shape) < 3:
        return random(key, shape)
    # One layer at a time, because the random bits of all layers would need too much memory.
    return jax.lax.map(lambda key: random(key, shape[1:]), jax.random.split(key, shape[0]))
