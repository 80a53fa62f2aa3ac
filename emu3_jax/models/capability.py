"""What the device that a program is made for can do: kernels, dtypes and precisions are chosen by these functions.

NVIDIA GPUs differ by their compute capability: 7.5 is Turing (T4), 8.0 Ampere (A100), 8.9 Ada (L4), 9.0 Hopper (H100).
"""

import functools
import os
import re

import jax

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

# Makes every choice as on an NVIDIA GPU of this capability, on any other one: for tests, and to try what another card
# would run. The program still runs on the GPU that is there.
SIMULATED = "EMU3_JAX_COMPUTE_CAPABILITY"

# From which capability on: matrix units for bfloat16 and TF32 (what older GPUs compute of bfloat16 goes through
# float32), Triton's and cuDNN's fused attention; conversion of float8 in hardware; cuDNN's attention of segments.
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)


def target_platform() -> str:
    """Where the program being traced will run: a mesh may hold devices that this machine lacks (`plan`).

    Returns:
        "cpu", "gpu" or "tpu".
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = device or jax.config.jax_default_device
    platform = device if isinstance(device, str) else getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of this machine's NVIDIA GPUs, of the least capable one; None where there is none.

    Raises:
        Emu3Error: `EMU3_JAX_COMPUTE_CAPABILITY` is set and is no capability.
    """
    simulated = os.environ.get(SIMULATED)
    if simulated is None:
        return _cuda_capability()
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", simulated):
        raise Emu3Error(f"{SIMULATED} is {shown(simulated)}: it must be a capability like 7.5; correct or unset it")
    major, minor = simulated.split(".")
    return int(major), int(minor)


@functools.cache
def _cuda_capability() -> tuple[int, int] | None:
    try:
        found = [str(device.compute_capability).split(".") for device in jax.local_devices(backend="gpu")]
        return min((int(major), int(minor)) for major, minor in found)
    except (RuntimeError, ValueError):  # no GPU; an AMD one, whose capability is a name
        return None


def cuda_at_least(least: tuple[int, int]) -> bool:
    """Whether this machine has NVIDIA GPUs, all of this capability or a higher one."""
    return (cuda_capability() or (0, 0)) >= least


def takes_tf32() -> bool:
    """Whether the program being traced will run on a GPU whose matrix units take TF32."""
    return target_platform() == "gpu" and cuda_at_least(AMPERE)


def emulates_bfloat16() -> bool:
    """Whether the program will run on an NVIDIA GPU that has no bfloat16: XLA computes such products in float32."""
    return target_platform() == "gpu" and cuda_capability() is not None and not cuda_at_least(AMPERE)


def emulates_float8() -> bool:
    """Whether the program will run on an NVIDIA GPU that widens float8 codes by many instructions each."""
    return target_platform() == "gpu" and cuda_capability() is not None and not cuda_at_least(ADA)


def text(capability: tuple[int, int]) -> str:
    """As NVIDIA writes it: "7.5"."""
    return ".".join(map(str, capability))
