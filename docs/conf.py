"""The documentation site, by Sphinx: `sphinx-build -W docs out/site` makes it of these pages and the docstrings.

The pages are written for GitHub. Sphinx gets them with three changes: the front page is the README with the list of
`index.md`, links to files outside this folder lead to the repository, and pages have the order of `index.md`.
"""

import os
import pathlib
import re
import tomllib

import emu3_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_FILES = _PROJECT["urls"]["Repository"] + "/blob/main/"

project = "emu3-jax"
author = "the authors of emu3-jax"
release = version = emu3_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "code"  # what docstrings have in single backquotes
smartquotes = False  # a -- is the beginning of an option
html_theme = "furo"
html_title = f"emu3-jax {version}"

myst_heading_anchors = 4  # links to headings, as GitHub makes them
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" beside the fields of a dataclass, which autodoc lists too

_LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def _links(text: str, folder: pathlib.Path) -> str:
    """A page of `folder` with its links as the site has them."""

    def changed(link: re.Match) -> str:
        path = (folder / link[2]).resolve()
        if path == ROOT / "README.md":
            return f"{link[1]}index.md{link[3]}"
        if path.is_relative_to(ROOT / "docs"):
            return f"{link[1]}{path.relative_to(ROOT / 'docs')}{link[3]}"
        return f"{link[1]}{_FILES}{path.relative_to(ROOT)}{link[3]}"

    return _LINK.sub(changed, text)


def _front_page(index: str) -> str:
    pages = re.findall(r"^- \[.*?\]\((\w+)\.\w+\)", index, re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    start, end = readme.split("[All pages](docs/index.md). ")
    listed = index.split("\n\n", 2)[2]
    tree = "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"])
    return (
        f"{_links(start, ROOT)}## All pages\n\n{_links(listed, ROOT / 'docs')}\n{_links(end.strip(), ROOT)}\n\n{tree}\n"
    )


def _read(app, docname: str, content: list[str]) -> None:
    if docname == "index":
        content[0] = _front_page(content[0])
    elif os.fspath(app.env.doc2path(docname)).endswith(".md"):
        content[0] = _links(content[0], ROOT / "docs")


def setup(app) -> None:
    app.connect("source-read", _read)
