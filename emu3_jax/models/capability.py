"""Capabilities of the device that a program is made for. They decide on kernels, dtypes and precisions.

NVIDIA GPUs differ by their compute capability: 7.5 is Turing (T4), 8.0 Ampere (A100), 8.9 Ada (L4), 9.0 Hopper (H100).
"""

import functools
import os
import re

import jax

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

# This environment variable makes all choices as on an NVIDIA GPU of its capability. It is for tests, and to try what
# another card would run. The program still runs on the present GPU.
SIMULATED = "EMU3_JAX_COMPUTE_CAPABILITY"

# AMPERE and later have matrix units for bfloat16 and TF32 (older GPUs compute bfloat16 products in float32), and run
# Triton's and cuDNN's fused attention. ADA and later convert float8 in hardware. HOPPER and later run cuDNN's attention
# with segments.
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)


def target_platform() -> str:
    """The platform that the program being traced will run on. With `plan`, this machine may not have it.

    Returns:
        "cpu", "gpu" or "tpu".
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = device or jax.config.jax_default_device
    platform = device if isinstance(device, str) else getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def cuda_capability() -> tuple[int, int] | None:
    """The lowest compute capability of this machine's NVIDIA GPUs, such as (9, 0). None without an NVIDIA GPU.

    Raises:
        Emu3Error: `EMU3_JAX_COMPUTE_CAPABILITY` is set, but is not a capability.
    """
    simulated = simulated_capability()
    return _cuda_capability() if simulated is None else simulated


def simulated_capability() -> tuple[int, int] | None:
    """What `EMU3_JAX_COMPUTE_CAPABILITY` says, such as (7, 5). None where it is not set.

    Raises:
        Emu3Error: it is set, but is not a capability.
    """
    simulated = os.environ.get(SIMULATED)
    if simulated is None:
        return None
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", simulated):
        raise Emu3Error(f"{SIMULATED} is {shown(simulated)}: it must be a capability like 7.5; correct or unset it")
    major, minor = simulated.split(".")
    return int(major), int(minor)


@functools.cache
def _cuda_capability() -> tuple[int, int] | None:
    try:
        found = [str(device.compute_capability).split(".") for device in jax.local_devices(backend="gpu")]
        return min((int(major), int(minor)) for major, minor in found)
    except (RuntimeError, ValueError):  # no GPU, or an AMD GPU, whose capability is a name
        return None


def cuda_at_least(least: tuple[int, int]) -> bool:
    """Whether this machine has NVIDIA GPUs, and all have at least this compute capability."""
    return (cuda_capability() or (0, 0)) >= least


def takes_tf32() -> bool:
    """Whether the program being traced will run on a GPU with TF32."""
    return target_platform() == "gpu" and cuda_at_least(AMPERE)


def emulates_bfloat16() -> bool:
    """Whether the program will run on an NVIDIA GPU without bfloat16, where XLA computes such products in float32."""
    return target_platform() == "gpu" and cuda_capability() is not None and not cuda_at_least(AMPERE)


def emulates_float8() -> bool:
    """Whether the program will run on an NVIDIA GPU that needs many instructions to convert a float8 number."""
    return target_platform() == "gpu" and cuda_capability() is not None and not cuda_at_least(ADA)


def text(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it, for example "7.5"."""
    return ".".join(map(str, capability))
