"""The report of `check_published.py`: one Markdown page without private paths, tokens or environment variables."""

import dataclasses
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from published_steps import NOT_COMPARED, VERDICTS

from emu3_jax import progress

_ADDRESS_QUERY = re.compile(r"(https?://[^\s?#]+)[?#]\S+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
# An absolute path of two parts or more. Paths in web addresses and after ~ do not match.
_ABSOLUTE = re.compile(r"(?<![\w.~:/\-])/(?:[^\s/:;,'\"`|()]+/)+([^\s/:;,'\"`|()]*)")


@dataclasses.dataclass(frozen=True)
class Public:
    """Replaces private parts of a text. `names` maps directories and files to their names on the page."""

    names: Mapping[str, str]

    def __call__(self, text: str) -> str:
        for path in sorted(self.names, key=len, reverse=True):
            text = text.replace(path, self.names[path])
        text = _TOKEN.sub("hf_...", _ADDRESS_QUERY.sub(r"\1", text))
        return _ABSOLUTE.sub(r".../\1", text)


def public_names(known: Mapping[str, str]) -> Public:
    """`known` and the home directory, also with symbolic links resolved."""
    names = {}
    for path, name in {**known, os.path.expanduser("~"): "~"}.items():
        for form in {path, os.path.abspath(path), os.path.realpath(path)}:
            if len(form) > 1:
                names.setdefault(form, name)
    return Public(names)


def source_name(source: str) -> str:
    """The name of a source on the page: a hub id as it is, or the last part of a directory's path."""
    return pathlib.Path(source).name or "directory" if os.path.isdir(source) else source


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *cells)]


def report(
    facts: Mapping[str, str], results: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, str]], public: Public
) -> str:
    """Returns the page.

    Args:
        facts: the list at the head of the page: what was checked, on which machine.
        results: results of the steps in order, see `check_published.Runner`.
        checks: all comparisons, including those that were not made.
        public: removes private parts from foreign text.
    """
    count = Counter(check["verdict"] for check in checks)
    said = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict]) or "none"
    lines = ["# emu3-jax and the published weights", "", f"**{len(checks)} comparisons: {said}.**", ""]
    lines += [f"- {key}: {public(value)}" for key, value in facts.items()]
    lines += ["", "## Comparisons", ""]
    lines += table(
        ("what", "verdict", "detail"), [[public(c["what"]), c["verdict"], public(c["detail"])] for c in checks]
    )
    if count[NOT_COMPARED]:
        lines += ["", '"not compared" does not mean passed: these comparisons were not made.']
    lines += ["", "## Steps", ""]
    lines += table(
        ("step", "verdict", "seconds", "peak memory", "peak accelerator memory", "files left on disk"),
        [_row(result) for result in results],
    )
    kept = [result["step"] for result in results if result.get("kept")]
    if kept:
        lines += ["", f"Reused from an earlier run, with its times: {', '.join(kept)}."]
    for result in results:
        notes = [*result["notes"], *([f"error: {result['error']}"] if result.get("error") else [])]
        if notes:
            lines += ["", f"### {result['step']}", "", *(f"- {public(note)}" for note in notes)]
    lines += _files(results, public)
    return "\n".join(lines) + "\n"


def _row(result: Mapping[str, Any]) -> list[str]:
    def size(key: str) -> str:
        return progress.size(result[key]) if result.get(key) else ""

    seconds = f"{result['seconds']:.1f}" if result.get("seconds") is not None else ""
    return [
        result["step"],
        result["verdict"],
        seconds,
        size("peak_bytes"),
        size("device_peak_bytes"),
        size("new_bytes"),
    ]


def _files(results: Sequence[Mapping[str, Any]], public: Public) -> list[str]:
    """The lines with the checkpoints' files and hashes, in a section that is folded."""
    hashed = [result for result in results if result["data"].get("files")]
    if not hashed:
        return []
    lines = ["", "## Files", "", "<details><summary>SHA-256 of all files</summary>"]
    for result in hashed:
        rows = [
            [public(file["name"]), f"{file['bytes']:,}", file["sha256"], file["hub"]]
            for file in result["data"]["files"]
        ]
        lines += ["", f"{result['step'].removeprefix('hash ')}:", ""]
        lines += table(("file", "bytes", "SHA-256", "compared with the hub"), rows)
    return [*lines, "", "</details>"]
