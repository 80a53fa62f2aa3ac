"""The import rule of docs/architecture.md holds, and the functions that the page names exist."""

import ast
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


def module_name(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in sorted(ROOT.glob("emu3_jax/**/*.py"))}


def part(module: str) -> str:
    """The table's name of what `module` belongs to: `generation` of `emu3_jax.generation.plan`."""
    return module.split(".")[1] if "." in module else "__init__"


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def read_table() -> tuple[dict[str, int], dict[str, set[str]]]:
    """From the page's table: each part's layer, and the parts that it may import."""
    layers: dict[str, int] = {}
    allowed: dict[str, set[str]] = {}
    for line in PAGE.read_text().splitlines():
        if row := re.fullmatch(r"\| (\d+) \| (.+?) \| .+ \| ?(.*?) \|", line):
            layer, parts, named = int(row[1]), quoted(row[2]), row[3]
            below = {name for name, other in layers.items() if other < layer}
            for name in parts:
                layers[name] = layer
                allowed[name] = below if named == "all of the above" else set(quoted(named))
    return layers, allowed


LAYERS, ALLOWED = read_table()


def imported(module: str, source: str) -> set[str]:
    """Modules of the package that `source` imports. A name computed at run time counts as its package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=base, names=names, level=0):
                found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in names}
            case ast.ImportFrom():
                raise AssertionError(f"{module}, line {node.lineno}: relative import; write the module's full name")
            case ast.Constant(value=str(text)) if re.fullmatch(r"emu3_jax\.[a-z_.]+", text):
                found.add(text if text in FILES else text.rsplit(".", 1)[0])
    return found & FILES.keys() - {module}


IMPORTS = {name: imported(name, file.read_text()) for name, file in FILES.items()}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that each reach all others of their group by imports (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []

    def visit(name: str):
        order[name] = lowest[name] = len(order)
        open_.append(name)
        for other in sorted(imports[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in open_:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            group = open_[open_.index(name) :]
            del open_[open_.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imports):
        if name not in order:
            visit(name)
    return found


def test_every_part_has_a_layer():
    assert {part(name) for name in FILES} == LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_permissions_point_down(name):
    assert {other for other in ALLOWED[name] if LAYERS[other] >= LAYERS[name]} == set()


@pytest.mark.parametrize("name", LAYERS)
def test_imports_keep_to_the_table(name):
    against = [
        f"{module} imports {other}"
        for module in FILES
        for other in sorted(IMPORTS[module])
        if part(module) == name and part(other) not in ALLOWED[name] | {name}
    ]
    assert against == []


def test_no_circles():
    assert circles(IMPORTS) == []


def test_what_counts_as_an_import():
    source = """
import typing, emu3_jax.files
from emu3_jax.media import clips
from emu3_jax.media.images import read_image
if typing.TYPE_CHECKING:
    import emu3_jax.config as config
def load(name):
    from emu3_jax import loading
    importlib.import_module(f"emu3_jax.cli.{name}")
"""
    modules = {"files", "media.clips", "media.images", "config", "loading", "cli"}
    assert imported("emu3_jax.text.prompts", source) == {f"emu3_jax.{name}" for name in modules}
    with pytest.raises(AssertionError, match="line 1: relative import"):
        imported("emu3_jax.text.prompts", "from . import tokenizer")


def test_no_module_imports_a_test_module():
    """What test modules share lives in the other modules of tests/: a test module changes freely."""
    against = []
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            against += [f"{file.name} imports {name}" for name in names if name.startswith("test_")]
    assert against == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# ------------------------------------------------------------------------------------------------ functions on the page


def names_on_the_page() -> list[str]:
    """What stands in backquotes as a path of names."""
    return [name for name in quoted(PAGE.read_text()) if re.fullmatch(r"\w+(\.\w+)+", name)]


@pytest.mark.parametrize("name", names_on_the_page())
def test_what_the_page_names_exists(name):
    path = ["emu3_jax", *name.split(".")]
    modules = [".".join(path[:end]) for end in range(len(path)) if ".".join(path[:end]) in FILES]
    found = importlib.import_module(modules[-1])
    for attribute in path[modules[-1].count(".") + 1 :]:
        found = getattr(found, attribute)
    assert callable(found)
