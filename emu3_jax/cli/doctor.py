"""Check a bundle or a published checkpoint: names, shapes, dtypes, vocabulary, templates."""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=common.path, metavar="BUNDLE_OR_DIR")
    command.add_argument("--json", action="store_true", help="one JSON object a line: level, what, remedy")


def run(options: argparse.Namespace) -> int:
    import dataclasses
    import json

    from emu3_jax.checkpoints.doctor import doctor

    findings = doctor(options.path)
    for finding in findings:
        if options.json:
            print(json.dumps(dataclasses.asdict(finding)))
        else:
            print(f"{finding.level:5} {finding.what}" + (f"\n      -> {finding.remedy}" if finding.remedy else ""))
    return 2 if any(finding.level == "error" for finding in findings) else 0
