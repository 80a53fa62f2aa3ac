"""Check a bundle or a published checkpoint, and say what is wrong and what to do.

It compares names, shapes, dtypes, the vocabulary, prompt templates and checksums. Exit code 2 means that it found an
error.

examples:
  emu3-jax doctor out/emu3-gen
  emu3-jax doctor run --clean
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=common.path, metavar="BUNDLE_OR_DIR", help="bundle or checkpoint")
    command.add_argument("--json", action="store_true", help="print one JSON object per finding: level, what, remedy")
    command.add_argument(
        "--clean",
        action="store_true",
        help="check nothing: remove the temporary files that killed runs left in this directory and beside it",
    )
    common.add_quiet(command)


def run(options: argparse.Namespace) -> int:
    import dataclasses
    import json

    from emu3_jax.checkpoints.doctor import Finding, doctor
    from emu3_jax.printable import printable

    if options.clean:
        removed = _clean(options.path)
        findings = [Finding("ok", f"removed {path}, a leftover of a killed run") for path in removed]
        findings = findings or [Finding("ok", f"no run that was killed left anything in {options.path} or beside it")]
    else:
        findings = doctor(options.path, common.progress(options))
    for finding in findings:
        if options.json:
            print(json.dumps(dataclasses.asdict(finding)))
        else:
            what, remedy = printable(finding.what), printable(finding.remedy)
            print(f"{finding.level:5} {what}" + (f"\n      -> {remedy}" if remedy else ""))
    return 2 if any(finding.level == "error" for finding in findings) else 0


def _clean(path):
    from emu3_jax import files

    if not (path / "run.json").is_file():
        return files.clean(path)
    from emu3_jax.training.run_directory import clean_unused

    return [*clean_unused(path), *files.clean(path)]
