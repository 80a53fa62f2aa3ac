"""Runs on several processes: start-up on TPU slices, on Slurm and by hand; barriers; and a common end after a failure.

JAX requires `jax.distributed.initialize` before the first use of a device. `start` calls it only if the environment
says that this process is one of several. A single process contacts no server, so it never waits for one.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np

from emu3_jax.errors import Emu3Error

# For a start by hand, and on Kubernetes with GPUs. JAX itself reads the first variable. The other two are ours, and
# take the names of arguments of `jax.distributed.initialize`.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_BY_HAND = f"set {COORDINATOR}=HOST:PORT, {COUNT} and {INDEX} for every process, or {COUNT}=1 to run alone"
# When a process dies, the others end after this time. JAX's default of 100 s would keep a slice waiting longer.
_HEARTBEAT_SECONDS = 60


def start(patience: int = 300) -> bool:
    """Connects this process with the other processes of the run, if the environment names any.

    JAX detects Slurm (`srun`), Open MPI, GKE and TPU VMs. To start by hand, set JAX_COORDINATOR_ADDRESS=HOST:PORT,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. JAX_NUM_PROCESSES=1 turns detection off. A second call changes nothing.

    If the other processes do not connect within EMU3_START_TIMEOUT seconds (300 by default), this process prints an
    error line and exits with code 2.

    Args:
        patience: seconds that a process waits at its end until the other processes end.

    Returns:
        Whether this process is one of several.

    Raises:
        Emu3Error: a variable is not legal, or the connection failed.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    found = arguments(os.environ, _tpu_host())
    if found is None:
        return False
    seconds = _whole_number(os.environ, "EMU3_START_TIMEOUT", 1, 300)
    place = f"at {found['coordinator_address']}" if "coordinator_address" in found else "at the first host"

    def unmet(reason: str) -> str:
        return (
            f"the processes of this run did not meet {place} ({reason}): start all of them, check that they can reach "
            f"that host and port, or {_BY_HAND}"
        )

    def give_up() -> None:
        print(f"emu3-jax: error: {unmet(f'waited {seconds} s, see EMU3_START_TIMEOUT')}", file=sys.stderr, flush=True)
        os._exit(2)

    # JAX's own timeout aborts with a stack trace that cannot be caught. It is set to 60 s later than this timer.
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=patience,
        )
    except Exception as error:  # JAX and the client of the metadata server raise errors of many kinds
        raise Emu3Error(unmet(str(error).split("\n", 1)[0][:200])) from error
    finally:
        timer.cancel()
    return jax.process_count() > 1


def arguments(environment: Mapping[str, str], tpu_host: bool) -> dict[str, object] | None:
    """Chooses the arguments for `jax.distributed.initialize` from the environment.

    Args:
        environment: environment variables.
        tpu_host: whether this machine has TPU chips that JAX will use.

    Returns:
        Keyword arguments; None if this process is the only one.

    Raises:
        Emu3Error: the variables for a start by hand are incomplete or not legal.
    """
    by_hand = [name for name in (COORDINATOR, COUNT, INDEX) if environment.get(name)]
    if COUNT in by_hand and _whole_number(environment, COUNT, 1) == 1:
        return None
    if COUNT in by_hand or INDEX in by_hand:
        missing = [name for name in (COORDINATOR, COUNT, INDEX) if name not in by_hand]
        if missing:
            raise Emu3Error(f"{' and '.join(by_hand)} is set, {' and '.join(missing)} is not: {_BY_HAND}")
        count, index = _whole_number(environment, COUNT, 1), _whole_number(environment, INDEX, 0)
        host, _, port = environment[COORDINATOR].rpartition(":")
        if not (host and re.fullmatch("[0-9]{1,5}", port)):
            raise Emu3Error(f"{COORDINATOR} is {environment[COORDINATOR]!r}: it must be HOST:PORT; {_BY_HAND}")
        if index >= count:
            raise Emu3Error(f"{INDEX} is {index}: with {count} processes, the highest is {count - 1}; {_BY_HAND}")
        return {"coordinator_address": environment[COORDINATOR], "num_processes": count, "process_id": index}
    # Only `srun` sets SLURM_STEP_NODELIST. The shell of a batch script has SLURM_NTASKS too, but is a single process.
    if "SLURM_STEP_NODELIST" in environment and _whole_number(environment, "SLURM_NTASKS", 1, 1) > 1:
        return {"cluster_detection_method": "slurm"}
    if "OMPI_MCA_orte_hnp_uri" in environment and _whole_number(environment, "OMPI_COMM_WORLD_SIZE", 1, 1) > 1:
        return {"cluster_detection_method": "ompi"}
    if tpu_host:
        # On GKE, variables name the hosts of a slice. On a TPU VM the metadata server does, unless TPU_SKIP_MDS_QUERY
        # says that there is no such server, as on Colab.
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        slices = _whole_number(environment, "MEGASCALE_NUM_SLICES", 1, 1)
        if hosts is not None:
            return {"cluster_detection_method": "gketpu"} if slices > 1 or "," in hosts else None
        if "TPU_SKIP_MDS_QUERY" not in environment:
            return {"cluster_detection_method": "gcetpu"}
    # Nothing tells whether the pods of an indexed Kubernetes Job form one run. Users start such runs by hand.
    return None


def _tpu_host() -> bool:
    """Whether JAX found TPU chips, and `jax_platforms` allows them."""
    # JAX's own detection reads this flag. Looking at devices would start the backend before `initialize`.
    from jax._src import cloud_tpu_init

    platforms = jax.config.jax_platforms
    return bool(getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)) and (not platforms or "tpu" in platforms)


def _whole_number(environment: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:  # `isdigit` is true of `²` too
        raise Emu3Error(f"{name} is {text!r}: it must be a whole number >= {least}")
    return int(text)


def first() -> bool:
    """Whether this is the first process. Only the first process writes results that belong to the whole run."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Blocks until every process has called this function with the same `what`, the name of the barrier."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"emu3_jax: {what}")


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, [processes, ...], on each of them. All must give the same shape and dtype."""
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def leave() -> None:
    """Waits for the other processes and disconnects. Needed before `os._exit`; a normal exit of Python does it too."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def end_failed(code: int) -> int:
    """Ends this process at once with exit code `code`. In a single process, returns `code` instead.

    A normal exit of Python would wait for the other processes, and they would wait for this one. When this process
    ends, its connections close, and that ends the other processes.
    """
    if not jax.distributed.is_initialized():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    # When the first process ends, the others abort. Give processes with the same failure time to print their error.
    time.sleep(2)
    os._exit(code)
