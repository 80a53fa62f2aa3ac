"""`--host` and `--hosts`, of commands whose work several hosts share. Not in `common`: doctor runs on one host."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu3_jax.generation.pipeline import Emu3

# Hosts finish at different times. A finished host waits for the others, because its exit would end them.
_PATIENCE = 7 * 24 * 3600


def add_hosts(command: argparse._ActionsContainer) -> None:
    """`--host` and `--hosts`, for work that hosts share."""
    command.add_argument("--host", type=int, metavar="I", help="number of this host, from 0 (default: detected)")
    command.add_argument(
        "--hosts", type=int, metavar="N", help="number of hosts that share the work (default: detected)"
    )


def host_of(options: argparse.Namespace) -> tuple[int, int]:
    """The number of this host and the number of hosts, of the options of `add_hosts` or as JAX detects them."""
    import jax

    from emu3_jax import distributed

    if options.host is None and options.hosts is None:
        distributed.start(_PATIENCE)
        return jax.process_index(), jax.process_count()
    return options.host or 0, 1 if options.hosts is None else options.hosts


def load_on_host(options: argparse.Namespace) -> "Emu3":
    """The model that the options of `common.add_model` and `common.add_adapter` name, on this process' own devices.

    The processes do not wait for each other, so a mesh must not have devices of others.
    """
    import jax

    import emu3_jax
    from emu3_jax.sharding.mesh import make_mesh

    return emu3_jax.load(
        options.model,
        adapter=options.adapter,
        vision=options.vision,
        dtype=options.dtype,
        mesh=None if options.mesh is None else make_mesh(options.mesh, jax.local_devices()),
        quantize=options.quantize,
        verify=options.verify,
    )
