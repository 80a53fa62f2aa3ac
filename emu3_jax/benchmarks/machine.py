"""Description of the machine that a benchmark ran on."""

import os
import platform
from typing import Any

from emu3_jax.models.capability import SIMULATED


def describe_machine() -> dict[str, Any]:
    """Accelerator or processor, number of CPU cores, and versions of Python, JAX and Flax."""
    import flax
    import jax
    import jaxlib

    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        **_memory_limit(device),
        **({"choices_of_capability": os.environ[SIMULATED]} if SIMULATED in os.environ else {}),
    }


def _memory_limit(device: Any) -> dict[str, float]:
    """What JAX may take of an accelerator's memory; XLA_PYTHON_CLIENT_MEM_FRACTION sets it on GPUs."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {} if limit is None else {"memory_limit_gb": round(limit / 1e9, 2)}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
