"""The report of `check_published.py`: one Markdown page that holds no private path, no token and no variable."""

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
# A path that begins at the root and has two parts or more; in an address and after ~ it does not begin.
_ABSOLUTE = re.compile(r"(?<![\w.~:/\-])/(?:[^\s/:;,'\"`|()]+/)+([^\s/:;,'\"`|()]*)")


@dataclasses.dataclass(frozen=True)
class Public:
    """Makes text fit for a public page. `names` are directories and files, and what the page calls them."""

    names: Mapping[str, str]

    def __call__(self, text: str) -> str:
        for path in sorted(self.names, key=len, reverse=True):
            text = text.replace(path, self.names[path])
        text = _TOKEN.sub("hf_...", _ADDRESS_QUERY.sub(r"\1", text))
        return _ABSOLUTE.sub(r".../\1", text)


def public_names(known: Mapping[str, str]) -> Public:
    """`known` and the home directory; each with links followed, too."""
    names = {}
    for path, name in {**known, os.path.expanduser("~"): "~"}.items():
        for form in {path, os.path.abspath(path), os.path.realpath(path)}:
            if len(form) > 1:
                names.setdefault(form, name)
    return Public(names)


def source_name(source: str) -> str:
    """What the page calls a source: a hub id as it is, of a directory its name alone."""
    return pathlib.Path(source).name or "directory" if os.path.isdir(source) else source


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *cells)]


def report(
    facts: Mapping[str, str], results: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, str]], public: Public
) -> str:
    """The page.

    Args:
        facts: what was run, on what: a list at the head.
        results: of the steps, in their order: see `check_published.Runner`.
        checks: comparisons, with those that were not made.
        public: what makes foreign text fit for the page.
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
        lines += ["", "What was not compared has not passed: nothing is known about it."]
    lines += ["", "## Steps", ""]
    lines += table(
        ("step", "verdict", "seconds", "peak memory", "accelerator's peak", "left on the disk"),
        [_row(result) for result in results],
    )
    kept = [result["step"] for result in results if result.get("kept")]
    if kept:
        lines += ["", f"Kept from an earlier run, with its times: {', '.join(kept)}."]
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
    """The checkpoints' files and their hashes, folded."""
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
        lines += table(("file", "bytes", "SHA-256", "and the hub's hash"), rows)
    return [*lines, "", "</details>"]
