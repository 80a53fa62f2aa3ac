"""How many shards each host of a training opens in an epoch: computed from the order of records, nothing is read.

    python scripts/shards_per_host.py [--shards 1000] [--records 1024] [--hosts 64] [--rows 512] [--runs 2]
                                      [--shuffle-shards 16]

It is of one source, with one record a row. `--runs` says in how many stretches of neighbouring rows a host's rows of a
batch lie: on a TPU slice whose hosts are squares of chips, in two or more. Prints the fewest, the mean and the most
shards of all hosts: in the first epoch, and in each stretch of 100 batches. `all records shuffled together` is the
order of a source that has no more than `--shuffle-shards` shards, and of version 0.1.0.
"""

import argparse

import numpy as np

from emu3_jax.data.epochs import Epochs
from emu3_jax.data.order import BlockOrder

_STRETCH = 100  # batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000, help="shards of the source (default: %(default)s)")
    parser.add_argument("--records", type=int, default=1024, help="records in a shard (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=64, help="hosts that train (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="rows of all hosts in a batch (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="stretches of rows of a host (default: %(default)s)")
    parser.add_argument(
        "--shuffle-shards", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N",
        help="values of DataConfig.shuffle_shards (default: 1 4 16 64)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.rows % (options.hosts * options.runs):
        parser.error(f"--rows {options.rows} is not a multiple of --hosts {options.hosts} times --runs {options.runs}")
    total = options.shards * options.records
    print(f"{options.shards} shards of {options.records} records, {options.hosts} hosts, {options.rows} rows a batch")
    for block in options.shuffle_shards:
        order = BlockOrder([options.records] * options.shards, (0, 0), options.rows, block, options.rows)
        report(f"shuffle_shards={block}", [order.at(place)[1] for place in range(total)], options)
    report("all records shuffled together", Epochs(total, (0, 0)).order(0), options)


def report(name: str, records: "list[int] | np.ndarray", options: argparse.Namespace) -> None:
    """Prints a line about an epoch's records in their order."""
    shards = np.asarray(records) // options.records
    runs = np.arange(len(shards)) % options.rows // (options.rows // (options.hosts * options.runs))
    hosts = runs % options.hosts
    steps = np.arange(len(shards)) // options.rows

    def counts(of: np.ndarray) -> str:
        pairs = np.unique(np.stack([hosts[of], shards[of]]), axis=1)[0]
        found = np.bincount(pairs, minlength=options.hosts)
        return f"{found.min()} / {found.mean():.1f} / {found.max()}"

    short = [counts(steps // _STRETCH == part) for part in range(max(1, len(shards) // options.rows // _STRETCH))]
    most = max(short, key=lambda text: float(text.split()[2]))
    print(f"{name}: {counts(np.ones(len(shards), bool))} shards a host in an epoch, {most} in {_STRETCH} batches")


if __name__ == "__main__":
    main()
