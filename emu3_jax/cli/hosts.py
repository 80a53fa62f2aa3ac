"""`--host` and `--hosts`, of commands whose work several hosts share. Not in `common`: doctor runs on one host."""

import argparse

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
