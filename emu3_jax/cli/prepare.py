"""Prepare training data: captioned pictures and clips become files of codes and captions.

SOURCE may be a folder of pictures with captions in .txt files of the same names; the repository's docs/data.md lists
all kinds. Run the same command again after an interruption: it keeps the files that are complete.

On a TPU slice or under Slurm, start the command on every host with the same arguments: the hosts share the work.
Elsewhere give each host --host and --hosts. On a common disk, the last one to finish checks all shards and writes the
index. Without one, --join makes one directory of those that the hosts wrote.

examples:
  emu3-jax prepare photos --validation 0.05 -o data
  emu3-jax prepare hf:NAME --text-column caption -o data
  emu3-jax prepare --join part0 part1 part2 -o data
"""

import argparse
import pathlib
from typing import TYPE_CHECKING

from emu3_jax.cli import common
from emu3_jax.cli.hosts import add_hosts, host_of

if TYPE_CHECKING:
    from emu3_jax.data.shard_directory import Outcome


def add_arguments(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "source", nargs="*", default=[], type=common.path_text, metavar="SOURCE",
        help="a folder of captioned pictures, tar or Parquet files, hf:NAME, a CSV or JSON lines of file names and "
        "captions, LLaVA's JSON, or a manifest; see the repository's docs/data.md",
    )  # fmt: skip
    source.add_argument(
        "--features", type=common.path, metavar="LIST.json",
        help="import the codes that the reference's prepare_data.py wrote; they must be of --model's vision tokenizer",
    )  # fmt: skip
    source.add_argument(
        "--join", nargs="+", type=common.path, metavar="PART",
        help="check the directories that hosts without a common disk wrote, and make one of them, with its index",
    )  # fmt: skip
    command.add_argument(
        "--model",
        type=common.place_text,
        metavar="BUNDLE",
        help="bundle whose vision tokenizer encodes the pictures (default: the small embedded model)",
    )
    common.add_verify(command)
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write to"
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--area", type=int, default=720 * 720, metavar="N",
        help="resize pictures to N pixels, keeping their shape, as the reference does (default: %(default)s)",
    )  # fmt: skip
    size.add_argument(
        "--keep-size", action="store_true", help="resize pictures only as the bundle's image processor does"
    )
    command.add_argument(
        "--image-column",
        metavar="NAME",
        help="column of a table that has the pictures, or their file names (default: by its name)",
    )
    command.add_argument(
        "--text-column", metavar="NAME", help="column of a table that has the captions (default: by its name)"
    )
    command.add_argument(
        "--images",
        type=common.path,
        metavar="DIR",
        help="folder that the paths in LLaVA's JSON start from (default: its own)",
    )
    command.add_argument(
        "--validation", type=float, metavar="SHARE",
        help="put this share of the records, such as 0.05, into DIR/validation; the same picture always goes to the "
        "same part",
    )  # fmt: skip
    command.add_argument(
        "--on-error", choices=("stop", "skip"),
        help="what to do with unusable records: stop (default for manifests and --features), or skip and list them "
        "(default for the others)",
    )  # fmt: skip
    command.add_argument(
        "--shards", type=int, metavar="N", help="number of files to write (default: one per 1,024 records)"
    )
    command.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read (default: %(default)s)")
    add_hosts(command)
    common.add_quiet(command)


_SHOWN = 10  # most skipped entries that are printed; the file beside the data lists all


def run(options: argparse.Namespace) -> None:
    if options.join is not None:
        join_parts(options)
        return

    from emu3_jax.data.encoder import bundle_codebook, load_encoder, open_bundle
    from emu3_jax.data.features import FeatureRecords
    from emu3_jax.data.prepare import prepare
    from emu3_jax.data.sources.opening import ManifestSource, open_source
    from emu3_jax.data.sources.records import SourceRecords
    from emu3_jax.data.sources.tables import Columns
    from emu3_jax.data.sources.validation import DIRECTORY as VALIDATION
    from emu3_jax.data.sources.validation import divide

    host, hosts = host_of(options)
    bundle = open_bundle(options.model, verify=options.verify)
    codebook = bundle_codebook(bundle)
    if options.features is not None:
        entries, strict = FeatureRecords(options.features, codebook.size), True
    else:
        columns = Columns(options.image_column, options.text_column)
        source = open_source(options.source, columns, images=options.images, output=options.output)
        strict = isinstance(source, ManifestSource)
        tokenizer = bundle.tokenizer() if bundle.has("tokenizer") else None
        area = None if options.keep_size else options.area
        entries = SourceRecords(source, load_encoder(bundle), area, tokenizer)
    parts = [(entries, options.output)]
    progress = common.progress(options)
    if options.validation is not None:
        train, held_out = divide(entries, options.validation, workers=options.workers, progress=progress)
        parts = [(train, options.output), (held_out, options.output / VALIDATION)]
    for part, output in parts:
        outcome = prepare(
            part,
            output,
            codebook,
            shards=options.shards if part is parts[0][0] else None,
            workers=options.workers,
            on_error=options.on_error or ("stop" if strict else "skip"),
            host=host,
            hosts=hosts,
            progress=progress,
        )
        report(outcome, output)


def join_parts(options: argparse.Namespace) -> None:
    """Does the work of --join."""
    from emu3_jax.data.joining import join
    from emu3_jax.data.sources.validation import DIRECTORY as VALIDATION
    from emu3_jax.errors import Emu3Error

    given = {"--model": options.model, "--validation": options.validation, "--shards": options.shards}
    given |= {"--host": options.host, "--hosts": options.hosts, "--on-error": options.on_error}
    for name, value in given.items():
        if value is not None:
            raise Emu3Error(f"{name} has no effect with --join, which encodes nothing: leave it out")
    for name, outcome in join(options.join, options.output, inside=("", VALIDATION)).items():
        report(outcome, options.output / name)


def report(outcome: "Outcome", output: pathlib.Path) -> None:
    """Prints what was written."""
    from emu3_jax.data.shard_directory import SKIPPED
    from emu3_jax.errors import Emu3Error
    from emu3_jax.printable import counted, printable

    where = printable(str(output))
    if outcome.index is None:
        missing = counted(outcome.missing, "shard")
        print(f"{where}: {missing} of other hosts {'is' if outcome.missing == 1 else 'are'} not written yet")
        return
    index = outcome.index
    if not index.records:
        raise Emu3Error(
            f"{output}: none of {len(index.skipped)} records can be used, see {SKIPPED} there; the first: "
            f"{index.skipped[0]}"
        )
    for reason in index.skipped[:_SHOWN]:
        print(printable(f"skipped: {reason}"))
    if len(index.skipped) > _SHOWN:
        print(f"... and {len(index.skipped) - _SHOWN} more")
    listed = f", listed in {printable(str(output / SKIPPED))}" if index.skipped else ""
    print(
        f"{where}: {counted(index.records, 'record')} in {counted(len(index.shards), 'shard')}, {len(index.skipped)} "
        f"skipped{listed}"
    )
