"""Prepare training data: captioned pictures and clips to sharded codes and texts, with an index.

Run again after an interruption, it keeps finished shards. On a TPU slice or under Slurm, start it on every host with
the same arguments: the hosts share the work. Elsewhere give each its own --host; the last to finish writes the index.
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "manifest", nargs="?", type=common.path, metavar="MANIFEST.jsonl",
        help="lines of {image or clip, text, conversation, name}; paths relative to the manifest",
    )  # fmt: skip
    source.add_argument(
        "--features", type=common.path, metavar="LIST.json",
        help="import what the reference's prepare_data.py wrote; its codes must be of this model's tokenizer",
    )  # fmt: skip
    command.add_argument(
        "--model", type=common.path_text, metavar="BUNDLE", help="bundle whose vision tokenizer encodes"
    )
    common.add_verify(command)
    command.add_argument("-o", "--output", type=common.path, required=True, metavar="DIR")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--area", type=int, default=720 * 720, metavar="N",
        help="pixels that pictures are resized to, keeping their shape, as the reference does (default: %(default)s)",
    )  # fmt: skip
    size.add_argument("--keep-size", action="store_true", help="leave the size to the bundle's image processor alone")
    command.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="a bad line (default: stop)")
    command.add_argument("--shards", type=int, metavar="N", help="files to write (default: one per 1,024 lines)")
    command.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read (default: %(default)s)")
    command.add_argument("--host", type=int, metavar="I", help="number of this host, from 0")
    command.add_argument("--hosts", type=int, metavar="N", help="hosts that share the work (default: as started)")
    common.add_quiet(command)


# Hosts finish their shares at different times; one that is done waits for the others, who would else be ended.
_PATIENCE = 7 * 24 * 3600


def run(options: argparse.Namespace) -> None:
    import jax

    from emu3_jax import distributed
    from emu3_jax.data.encoder import bundle_codebook, load_encoder, open_bundle
    from emu3_jax.data.features import FeatureRecords
    from emu3_jax.data.manifest import Manifest, ManifestRecords
    from emu3_jax.data.prepare import prepare
    from emu3_jax.printable import printable

    if options.host is None and options.hosts is None:
        distributed.start(_PATIENCE)
        host, hosts = jax.process_index(), jax.process_count()
    else:
        host, hosts = options.host or 0, options.hosts or 1
    bundle = open_bundle(options.model, verify=options.verify)
    codebook = bundle_codebook(bundle)
    if options.features is not None:
        entries = FeatureRecords(options.features, codebook.size)
    else:
        manifest = Manifest(options.manifest)
        tokenizer = bundle.tokenizer() if bundle.has("tokenizer") else None
        area = None if options.keep_size else options.area
        entries = ManifestRecords(manifest, load_encoder(bundle), area, tokenizer)
    outcome = prepare(
        entries,
        options.output,
        codebook,
        shards=options.shards,
        workers=options.workers,
        on_error=options.on_error,
        host=host,
        hosts=hosts,
        progress=common.progress(options),
    )
    where = printable(str(options.output))
    if outcome.index is None:
        print(f"{where}: {outcome.missing} shards of other hosts are missing yet")
        return
    index = outcome.index
    for reason in index.skipped:
        print(printable(f"skipped: {reason}"))
    print(f"{where}: {index.records} records in {len(index.shards)} shards, {len(index.skipped)} skipped")
