"""The environment of a command: settings before JAX is imported, and error lines if JAX cannot start."""

import gc
import glob
import os
import re
import sys
import traceback
from pathlib import Path

from emu3_jax.errors import Emu3Error

_GOOGLE, _NETWORK = "0x1ae0", "0x0042"  # PCI ids: Google as vendor, and Google's network card as device
_ABSENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
_OF_TRAIN = ("array_record", "grain", "optax", "tensorboardX")  # modules of the extra `train`


def quiet_libtpu() -> None:
    """Keeps an installed libtpu from searching for a TPU on a machine without one, and from printing seven lines.

    JAX loads libtpu on every machine. libtpu searches for a TPU unless environment variables describe one. On a machine
    that may have a TPU, or if the user has set such variables, nothing changes.
    """
    told = [name for name in os.environ if name.startswith(("TPU_", "LIBTPU_", "JAX_FORCE_TPU", "MEGASCALE_"))]
    if not told and not _may_have_tpu():
        os.environ.update(_ABSENT)


def _may_have_tpu() -> bool:
    """Whether Google's chips are on the PCI bus (JAX looks there too), or device files of their drivers exist."""
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        try:
            ours = Path(vendor).read_text().strip() == _GOOGLE
            if ours and Path(vendor).with_name("device").read_text().strip() != _NETWORK:
                return True
        except OSError:
            return True
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def start_jax() -> None:
    """Imports JAX, which every command needs.

    Raises:
        Emu3Error: an environment variable that JAX reads has an illegal value.
    """
    first = "jax" not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise Emu3Error(f"JAX cannot start ({error}): correct this environment variable") from error
    finally:
        if first:  # imported objects live until the end: the garbage collector need not examine them again
            gc.freeze()
            gc.enable()


def explained(error: BaseException) -> Emu3Error | None:
    """A one-line error for a failure of the environment: no memory, no backend, a missing extra. Else None."""
    import jax

    if isinstance(error, ModuleNotFoundError) and error.name in _OF_TRAIN:
        return Emu3Error(f"this needs {error.name}, which is not installed: pip install 'emu3-jax[train]'")

    text = str(error).split("\n", 1)[0]
    devices = isinstance(error, jax.errors.JaxRuntimeError) and re.search(
        "RESOURCE_EXHAUSTED|out of memory", text, re.IGNORECASE
    )
    if isinstance(error, MemoryError) or devices:
        remedy = "use a smaller --batch-size or --area; --quantize and --mesh need less memory per device"
        return Emu3Error(f"out of memory ({text or 'of the host'}): {remedy}")
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename.endswith("xla_bridge.py") for frame in frames):
        from emu3_jax.compilation import check_backend

        try:
            check_backend()
        except Emu3Error as reason:
            return reason
    return None
