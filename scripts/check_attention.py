"""Checks and times attention on this machine's accelerator. Run `python scripts/check_attention.py` in a checkout.

The script compares the output and the gradients of each available implementation with XLA's in float32, with and
without segments. It prints one JSON line per case. Differences are relative to the largest entry; padding (segment 0)
does not count. Milliseconds and TFLOP/s are the best of five bfloat16 calls; only visible pairs of tokens count as
work. Memory is the compiler's figure for temporaries of forward and backward pass. The exit code is 1 if a difference
is too large for bfloat16.
"""

import argparse
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.models import attention_kernels
from emu3_jax.models.attention import choose, self_attention

LIMIT = 2e-2
HEADS = (8, 4, 128)  # KV heads, query heads per KV head and head width of the 8 B model


def segments(kind: str, length: int) -> np.ndarray | None:
    """Segment ids, int32 [1, S], or None."""
    if kind == "none":
        return None
    if kind == "padded":  # as in the reference: one sequence, then padding that attends to it
        real = length * 3 // 4
        return np.repeat(np.asarray([1, -1], np.int32), [real, length - real])[None]
    if kind == "alone":  # one sequence, then padding that is no part of it
        return (np.arange(length) < length * 3 // 4).astype(np.int32)[None]
    if kind == "parts":  # six parts of a row, each with padding behind it
        part, inside = np.divmod(np.arange(length) * 6, length)
        return np.where(inside < length * 3 // 4, part + 1, 0).astype(np.int32)[None]
    count = {"packed": 4, "many": 40}[kind]  # "many" is more than `CUDNN_RUNS`
    ends = np.sort(np.random.default_rng(length).choice(np.arange(1, length), count, replace=False))
    ids = np.searchsorted(ends, np.arange(length), side="right") + 1
    return np.where(ids > count, 0, ids).astype(np.int32)[None]


def visible_pairs(ids: np.ndarray | None, length: int) -> int:
    if ids is None:
        return length * (length + 1) // 2
    return sum(int(np.cumsum(ids[0] == n)[np.abs(ids[0]) == n].sum()) for n in np.unique(np.abs(ids)))


def inputs(length: int, dtype):
    k, g, h = HEADS
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, length, k, g, h), (1, length, k, h), (1, length, k, h), (1, length, k, g, h)]
    # The float32 inputs are rounded to bfloat16 too, so that only the arithmetic differs.
    return [jax.random.normal(key, shape, jnp.bfloat16).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def compiled(implementation: str, ids, arrays):
    """Compiles two programs of q, k, v, segments and the output's cotangent: forward, and forward with backward."""

    def forward(q, k, v, ids, _):
        return self_attention(q, k, v, ids, implementation)

    def both(q, k, v, ids, cotangent):
        out, back = jax.vjp(lambda *qkv: self_attention(*qkv, ids, implementation), q, k, v)
        return out, *back(cotangent)

    q, k, v, cotangent = arrays
    return [jax.jit(f).lower(q, k, v, ids, cotangent).compile() for f in (forward, both)]


def seconds(program, arrays, ids) -> float:
    call = functools.partial(program, *arrays[:3], ids, arrays[3])
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
    return best


def check(implementation: str, kind: str, length: int, timed: bool) -> dict:
    ids = segments(kind, length)
    real = np.ones((1, length, 1, 1, 1), bool) if ids is None else (ids != 0)[:, :, None, None, None]

    def arguments(dtype):
        *qkv, cotangent = inputs(length, dtype)
        return *qkv, jnp.where(real, cotangent, 0).astype(dtype)

    exact = arguments(jnp.float32)
    expected = compiled("xla", ids, exact)[1](*exact[:3], ids, exact[3])
    arrays = arguments(jnp.bfloat16)
    forward, both = compiled(implementation, ids, arrays)
    found = both(*arrays[:3], ids, arrays[3])

    def difference(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        return float(np.abs(a - b).max() / np.abs(b).max())

    found, expected = ([jnp.where(real, out, 0), *slopes] for out, *slopes in (found, expected))
    pairs = zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    differences = {name: difference(a, b) for name, a, b in pairs}
    line = {"implementation": implementation, "segments": kind, "length": length, **differences}
    line["ok"] = all(value <= LIMIT for value in differences.values())  # NaN counts as too large
    line["temporaries_mib"] = round(both.memory_analysis().temp_size_in_bytes / 2**20, 1)
    if timed:
        work = 4 * visible_pairs(ids, length) * HEADS[0] * HEADS[1] * HEADS[2]
        for name, program, factor in (("forward", forward, 1), ("both", both, 3.5)):
            took = seconds(program, arrays, ids)
            line[f"{name}_ms"], line[f"{name}_tflops"] = round(took * 1e3, 3), round(factor * work / took / 1e12, 1)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1024, 10240], help="numbers of tokens to test")
    parser.add_argument("--runs", type=int, help="largest number of segments per row for cuDNN's packed layout")
    parser.add_argument("--untimed", action="store_true", help="only check, do not time")
    args = parser.parse_args()
    attention_kernels.CUDNN_RUNS = args.runs or attention_kernels.CUDNN_RUNS
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "runs": attention_kernels.CUDNN_RUNS}
    print(json.dumps(machine), flush=True)
    failed = False
    for length in args.lengths:
        for kind in ("none", "alone", "padded", "packed", "parts", "many"):
            for implementation in ("xla", "cudnn", "splash"):
                try:
                    choose(implementation, (1, length, *HEADS), jnp.bfloat16, kind != "none")
                except Emu3Error:
                    continue
                line = check(implementation, kind, length, not args.untimed)
                failed |= not line["ok"]
                print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
