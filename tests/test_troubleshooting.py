"""docs/troubleshooting.md explains every line that `emu3-jax doctor` can print, and no line that it cannot.

The lines are collected from the source: what `Finding` and errors are made of, in all functions that `doctor` may
reach. A value that a line holds counts as "...", in the source as on the page.
"""

import ast
import itertools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
GAP = "..."
MAKERS = {"Finding": 1, "Emu3Error": 0, "__init__": 0}  # the argument that is the line
START = ("checkpoints.doctor", "cli.doctor")
# `doctor` reads local directories, and computes nothing: what it imports of these has no line for it.
APART = (
    "storage", "models", "media", "sharding", "compilation", "progress", "errors", "printable", "training",
    "generation",
)  # fmt: skip
TELLERS = {"image_gaps"}  # they return a line
OTHERS = {"encode", "decode"}  # methods of texts, for which the tokenizer has functions of the same names


def source(module: str) -> ast.Module | None:
    path = ROOT / "emu3_jax" / (module.replace(".", "/") + ".py")
    return ast.parse(path.read_text()) if path.is_file() else None


def modules() -> dict[str, ast.Module]:
    """What `doctor` is made of: its own module, and what that imports."""
    found: dict[str, ast.Module] = {}
    waiting = list(START)
    while waiting:
        name = waiting.pop()
        tree = None if name in found or name.split(".")[0] in APART else source(name)
        if tree is None:
            continue
        found[name] = tree
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emu3_jax"):
                package = node.module.removeprefix("emu3_jax").lstrip(".")
                waiting += [package, *(f"{package}.{alias.name}".lstrip(".") for alias in node.names)]
    return found


def reached(trees: dict[str, ast.Module]) -> list[ast.FunctionDef]:
    """The functions whose names `doctor` uses, or a function uses that it reaches."""
    functions: dict[str, list[ast.FunctionDef]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.name != "run" or module == "cli.doctor"):
                if node.name.startswith("__"):
                    continue  # reached by the class's name
                functions.setdefault(node.name, []).append(node)
            if isinstance(node, ast.ClassDef):
                made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name.startswith("__")]
                functions.setdefault(node.name, []).extend(made)
    seen: set[str] = set()
    waiting = ["run", "_find"]  # the second one by its place in a table of operations
    while waiting:
        name = waiting.pop()
        if name in seen | OTHERS or name not in functions:
            continue
        seen.add(name)
        for node in (part for function in functions[name] for part in ast.walk(function)):
            if isinstance(node, ast.Name | ast.Attribute):
                waiting.append(node.id if isinstance(node, ast.Name) else node.attr)
    return [function for name in seen for function in functions[name]]


def texts(node: ast.expr, names: dict[str, list[str]]) -> list[str]:
    """What an expression may be as a text, with a gap for each value."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [texts(part.value if isinstance(part, ast.FormattedValue) else part, names) for part in node.values]
        return ["".join(chosen) for chosen in itertools.product(*parts)]
    if isinstance(node, ast.IfExp):
        return texts(node.body, names) + texts(node.orelse, names)
    return names.get(node.id, [GAP]) if isinstance(node, ast.Name) else [GAP]


def lines(function: ast.FunctionDef) -> Iterator[str]:
    nodes = sorted((node for node in ast.walk(function) if hasattr(node, "lineno")), key=lambda node: node.lineno)
    names: dict[str, list[str]] = {}  # what each variable holds at the line
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = texts(node.value, names)
        if isinstance(node, ast.JoinedStr) and function.name in TELLERS:
            yield from texts(node, names)
        if isinstance(node, ast.Call):
            maker = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if maker in MAKERS and len(node.args) > MAKERS[maker]:
                yield from texts(node.args[MAKERS[maker]], names)


def says_something(line: str) -> bool:
    """False for a line that only passes another one on."""
    return len(re.sub(r"\W", "", line)) > 5


LINES = sorted({line for function in reached(modules()) for line in lines(function) if says_something(line)})
DOCTOR = PAGE.split("\n## Doctor\n", 1)[1]
ENTRIES = re.findall(r"^\| `(.*?)` \|", DOCTOR, re.MULTILINE)


def fits(entry: str, line: str) -> bool:
    """Whether the entry's words stand in the line, in their order."""
    return re.search(".*".join(map(re.escape, entry.split(GAP))), line) is not None


def test_lines_of_doctor_are_explained():
    assert [line for line in LINES if not any(fits(entry, line) for entry in ENTRIES)] == []


def test_explained_lines_exist():
    assert [entry for entry in ENTRIES if not any(fits(entry, line) for line in LINES)] == []


def test_lines_are_found():
    """The collection reaches what is far from `doctor` too."""
    assert len(LINES) > 90
    for words in ("weights hold NaN", "damaged safetensors header", "could run code", "not readable as JSON"):
        assert any(words in line for line in LINES)
