"""Several processes as one: start-up on TPU slices, Slurm and by hand, waiting for each other, and failing together.

JAX wants `jax.distributed.initialize` before anything touches a device. It is called where the environment says that
this process is one of several; elsewhere nothing is asked of any server, so a laptop does not wait for one.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Mapping

import jax

from emu3_jax.errors import Emu3Error

# By hand, and on Kubernetes with GPUs: JAX itself reads the first, the others are named after its arguments.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_BY_HAND = f"set {COORDINATOR}=HOST:PORT, {COUNT} and {INDEX} for every process, or {COUNT}=1 to run alone"
# A process that is gone is noticed after this long, and the others end. JAX' own 100 s cost a slice more than that.
_HEARTBEAT_SECONDS = 60


def start(patience: int = 300) -> bool:
    """Joins the other processes of this run, if the environment says that there are any; once.

    By hand: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, JAX_PROCESS_ID. Slurm (`srun`), Open MPI, GKE and
    TPU VMs are found out by JAX. JAX_NUM_PROCESSES=1 turns all of it off.

    Args:
        patience: seconds that a process waits at its end for the others to end.

    Returns:
        Whether this process is now one of several.

    Raises:
        Emu3Error: the variables are not legal, or the cluster cannot be found out.

    Where the others do not come within EMU3_START_TIMEOUT seconds (300 by default) the process says so and exits 2.
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
            f"the processes of this run did not meet {place} ({reason}): start all of them, see that they reach "
            f"that host and port, or {_BY_HAND}"
        )

    def give_up() -> None:
        print(f"emu3-jax: error: {unmet(f'waited {seconds} s, see EMU3_START_TIMEOUT')}", file=sys.stderr, flush=True)
        os._exit(2)

    # JAX' own timeout aborts with a stack trace, which cannot be caught: it comes too late to be seen.
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
    except Exception as error:  # JAX and the metadata server's client raise anything
        raise Emu3Error(unmet(str(error).split("\n", 1)[0][:200])) from error
    finally:
        timer.cancel()
    return jax.process_count() > 1


def arguments(environment: Mapping[str, str], tpu_host: bool) -> dict[str, object] | None:
    """What `jax.distributed.initialize` is to be called with; None where this process is alone.

    Args:
        environment: the process'.
        tpu_host: whether this machine has TPU chips that JAX will use.

    Raises:
        Emu3Error: the variables set by hand are incomplete or not legal.
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
            raise Emu3Error(f"{INDEX} is {index}: of {count} processes the last is {count - 1}; {_BY_HAND}")
        return {"coordinator_address": environment[COORDINATOR], "num_processes": count, "process_id": index}
    # `srun` sets SLURM_STEP_NODELIST; a batch script's own shell has the other variables too, and is alone.
    if "SLURM_STEP_NODELIST" in environment and _whole_number(environment, "SLURM_NTASKS", 1, 1) > 1:
        return {"cluster_detection_method": "slurm"}
    if "OMPI_MCA_orte_hnp_uri" in environment and _whole_number(environment, "OMPI_COMM_WORLD_SIZE", 1, 1) > 1:
        return {"cluster_detection_method": "ompi"}
    if tpu_host:
        # GKE names the hosts of a slice. On a TPU VM its metadata server does, unless it is said to have none (Colab).
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        slices = _whole_number(environment, "MEGASCALE_NUM_SLICES", 1, 1)
        if hosts is not None:
            return {"cluster_detection_method": "gketpu"} if slices > 1 or "," in hosts else None
        if "TPU_SKIP_MDS_QUERY" not in environment:
            return {"cluster_detection_method": "gcetpu"}
    # Pods of an indexed Kubernetes Job may be parts of one run or runs of their own: there, by hand.
    return None


def _tpu_host() -> bool:
    """Whether JAX found TPU chips, and may use them."""
    from jax._src import cloud_tpu_init  # as JAX' own detection does; looking at devices would be too late

    platforms = jax.config.jax_platforms
    return bool(getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)) and (not platforms or "tpu" in platforms)


def _whole_number(environment: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:  # `isdigit` is true of `²` too
        raise Emu3Error(f"{name} is {text!r}: it must be a whole number >= {least}")
    return int(text)


def first() -> bool:
    """Whether this process writes what all of them made."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Until every process is here. `what` names the place, the same for all."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"emu3_jax: {what}")


def leave() -> None:
    """Waits for the others at the end, as Python's ordinary end does. For a process that ends in another way."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def end_failed(code: int) -> int:
    """Ends a process of several at once with `code`, or returns it where there is but one.

    Python's ordinary end would wait for the others, who wait for this process. The connections close with it, which
    ends the others.
    """
    if not jax.distributed.is_initialized():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the first process the others abort: let those that failed alike say so before.
    time.sleep(2)
    os._exit(code)
