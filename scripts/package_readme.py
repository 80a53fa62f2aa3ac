"""The README for PyPI, whose pages have no files beside them: relative links lead to the project's address.

hatchling runs this file when it builds the package (`tool.hatch.metadata.hooks` in `pyproject.toml`). The address is
`Repository` of `[project.urls]`, which `scripts/set_address.py` writes.
"""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def absolute(text: str, address: str) -> str:
    """`text` with absolute links. Links to a place on the same page stay as they are."""
    # HEAD is the newest commit of the default branch. GitHub leads from `blob` to the page of a folder by itself.
    return _LINK.sub(lambda link: f"{link[1]}{link[2]}({address}/{'raw' if link[1] else 'blob'}/HEAD/{link[3]})", text)


class Readme(MetadataHookInterface):
    """Sets the field `readme`, which `pyproject.toml` calls dynamic."""

    def update(self, metadata: dict) -> None:
        text = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
