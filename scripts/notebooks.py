"""Gives every notebook the first cell of notebooks/first_cell.py, and takes out outputs and counts of executions.

A Markdown cell before the first cell says what to do with it.

python scripts/notebooks.py             # writes the notebooks
python scripts/notebooks.py --check     # exit code 1 if one would change, writes nothing

Two lines of the first cell are the notebook's own and stay: those that set EXTRAS and MEMORY.
"""

import argparse
import json
import pathlib
import re
import sys

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
FIRST_CELL = NOTEBOOKS / "first_cell.py"
INSTALL = """## Install

Set `PACKAGE` to a git address, a wheel or the folder of a checkout. Run the cell. You need not read its code. If the
cell restarts the kernel, run it again."""
_OWN = re.compile(r"^(?:EXTRAS|MEMORY) = .*$", re.MULTILINE)


def first_cell(held: str) -> str:
    """The first cell with the lines that are a notebook's own, which `held` has."""
    own = {line.partition(" ")[0]: line for line in _OWN.findall(held)}
    return _OWN.sub(lambda match: own.get(match[0].partition(" ")[0], match[0]), FIRST_CELL.read_text()).rstrip("\n")


def renewed(text: str) -> str:
    """A notebook with its first cell renewed, without outputs."""
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        cell.update(execution_count=None, outputs=[])
    code[0]["source"] = first_cell("".join(code[0]["source"])).splitlines(keepends=True)
    code[0]["metadata"] = {"cellView": "form"}  # Colab shows PACKAGE as a field, and the code on a click
    place = notebook["cells"].index(code[0])
    if "".join(notebook["cells"][place - 1]["source"]).partition("\n")[0] == INSTALL.partition("\n")[0]:
        place -= 1
        del notebook["cells"][place]
    said = {"cell_type": "markdown", "id": "", "metadata": {}, "source": INSTALL.splitlines(keepends=True)}
    notebook["cells"].insert(place, said)
    for index, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{index:02d}"
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a notebook would change")
    options = parser.parse_args()
    differ = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = path.read_text()
        if (new := renewed(text)) != text:
            differ.append(path)
            if not options.check:
                path.write_text(new)
    for path in differ:
        print(f"{path.name}: {'would change' if options.check else 'written'}")
    return int(options.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
