"""Where a GPU's time goes: the kernels of a profile, by name and by kind."""

import collections
import contextlib
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.profiler import ProfileData

# By the beginning or a part of a kernel's name; the first that matches counts.
_KINDS = (
    ("attention", re.compile(r"cudnn|flash|fmha|attention|attend")),
    ("matrix products", re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|copy|dynamic-slice|dynamic_slice|dynamic-update|dynamic_update|slice_")),
    ("collectives", re.compile(r"nccl|all-reduce|all_gather")),
)


@contextlib.contextmanager
def gpu_kernels(steps: int, most: int = 40) -> Iterator[dict[str, Any]]:
    """Profiles what runs within; the dict it gives is filled afterwards, and stays empty without a GPU.

    It holds the milliseconds a step of all kernels and of each kind, and the `most` costliest with their calls a step.

    Args:
        steps: taken within, all finished at its end.
        most: kernels listed.
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
