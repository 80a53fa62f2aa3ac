"""GPU time by kernel: reads the kernels of a JAX profile and sums them by name and by kind."""

import collections
import contextlib
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.profiler import ProfileData

# Patterns for kernel names. The first pattern that matches decides the kind.
_KINDS = (
    ("attention", re.compile(r"cudnn|flash|fmha|attention|attend")),
    ("matrix products", re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|copy|dynamic-slice|dynamic_slice|dynamic-update|dynamic_update|slice_")),
    ("collectives", re.compile(r"nccl|all-reduce|all_gather")),
)


@contextlib.contextmanager
def gpu_kernels(steps: int, most: int = 40) -> Iterator[dict[str, Any]]:
    """Profiles the code of a `with` block. The yielded dict is filled after the block; without a GPU it stays empty.

    The dict holds milliseconds per step of all kernels and of each kind, and the `most` most expensive kernels with
    their calls per step.

    Args:
        steps: number of steps that the block runs. All must be finished when the block ends.
        most: number of kernels to list.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            yield figures
        figures |= _kernel_figures(pathlib.Path(directory), steps, most)


def _kernel_figures(directory: pathlib.Path, steps: int, most: int) -> dict[str, Any]:
    spent: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for file in sorted(directory.rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    entry = spent[event.name]
                    entry[0] += event.duration_ns / 1e6 / steps
                    entry[1] += 1
    if not spent:
        return {}
    kinds: dict[str, float] = collections.defaultdict(float)
    for name, (ms, _) in spent.items():
        kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "fused elementwise and reductions")
        kinds[kind] += ms
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:most]
    return {
        "busy_ms": round(sum(kinds.values()), 3),
        "launches": round(sum(calls for _, calls in spent.values()) / steps, 1),
        "kinds_ms": {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [{"name": n[:120], "ms": round(ms, 3), "calls": round(calls / steps, 1)} for n, (ms, calls) in top],
    }
