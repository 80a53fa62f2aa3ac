"""What pip reads of the package: pairs of jax and flax, types, and the public names that type checkers see."""

import ast
import importlib
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
import tomllib

import flax
import jax
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import emu3_jax
from emu3_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]


def allowed(python: str, **versions: str) -> bool:
    """Whether the dependencies permit these versions on that Python."""
    return all(
        requirement.specifier.contains(versions[requirement.name])
        for requirement in DEPENDENCIES
        if requirement.name in versions
        and (requirement.marker is None or requirement.marker.evaluate({"python_version": python}))
    )


@pytest.mark.parametrize(
    ("python", "jax", "flax"),
    [
        ("3.11", "0.10.2", "0.12.8"),
        ("3.12", "0.11.1", "0.12.10"),
        ("3.12", "0.11.2", "0.12.10"),
        ("3.12", "0.12.0.1", "0.12.12"),
        ("3.13", "0.12.0.1", "0.12.12"),
    ],
)
def test_pairs_that_import_are_allowed(python, jax, flax):
    assert allowed(python, jax=jax, flax=flax)


@pytest.mark.parametrize("python", ["3.12", "3.13"])
@pytest.mark.parametrize(
    ("jax", "flax"), [("0.11.1", "0.12.8"), ("0.11.2", "0.12.9"), ("0.12.0.1", "0.12.8"), ("0.12.0.1", "0.12.9")]
)
def test_pairs_that_cannot_import_are_not(python, jax, flax):
    assert not allowed(python, jax=jax, flax=flax)


def test_this_pair_is_allowed():
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert allowed(python, jax=jax.__version__, flax=flax.__version__)


def test_type_checkers_see_the_public_names():
    tree = ast.parse(inspect.getsource(emu3_jax))
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname
    }
    assert seen == emu3_jax._PUBLIC
    assert (ROOT / "emu3_jax" / "py.typed").is_file()
    # The wheel has all files of the package: `test_release.py` builds it.
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["emu3_jax"]}


def test_the_version_is_the_package_s():
    assert PROJECT["project"]["dynamic"] == ["version", "readme"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "emu3_jax/__init__.py"}
    # hatchling, which does not run the file, finds it only where it is a plain text.
    tree = ast.parse(inspect.getsource(emu3_jax))
    (value,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    assert value == emu3_jax.__version__ and str(Version(value)) == value


def test_public_names_are_those_of_their_modules_and_cost_nothing_before_they_are_used():
    for name, module in emu3_jax._PUBLIC.items():
        assert getattr(emu3_jax, name) is getattr(importlib.import_module(module), name)
    assert {"TrainConfig", "Adapter", "train", "__version__"} <= {*dir(emu3_jax)} == {*emu3_jax.__all__}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = emu3_jax.nonsense
    script = "import emu3_jax, sys; emu3_jax.__version__; print(sorted({'jax', 'numpy', 'optax'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["optax", "grain", "array_record", "tensorboardX"])
def test_training_names_the_extra_that_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        emu3_jax.Emu3Error, match=f"needs {name}, which is not installed: pip install 'emu3-jax.train.'"
    ):
        emu3_jax.train(None)


def test_a_command_without_the_extra_says_so_in_one_line(monkeypatch, capsys):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")

    monkeypatch.setattr("emu3_jax.training.config.load_config", missing)
    assert main(["plan", "x.py", "--topology", "v5e:1x1"]) == 2
    assert capsys.readouterr().err == (
        "emu3-jax: error: this needs optax, which is not installed: pip install 'emu3-jax[train]'\n"
    )


def test_train_takes_configs_alone():
    with pytest.raises(emu3_jax.Emu3Error, match=r"config is 'config\.py': give a TrainConfig or VisionTrainConfig"):
        emu3_jax.train("config.py")


CALLS = [
    *(getattr(emu3_jax.Emu3, name) for name in vars(emu3_jax.Emu3) if not name.startswith("_")),
    *(emu3_jax.load, emu3_jax.convert, emu3_jax.export, emu3_jax.train),
]


@pytest.mark.parametrize("call", [call for call in CALLS if callable(call)], ids=lambda call: call.__name__)
def test_help_shows_every_argument(call):
    """Each by its name in the signature, and in the docstring with what it means."""
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    described = re.findall(r"^ {2,4}(\w+): \S", inspect.getdoc(call).split("\nRaises:")[0], re.MULTILINE)
    assert described == [p.name for p in parameters]
    shown = pydoc.plain(pydoc.render_doc(call))
    for p in parameters:
        assert p.default is p.empty or (f"{p.name}: " in shown and f" = {p.default!r}" in shown)


def test_commits_are_checked_by_the_same_ruff():
    (ruff,) = (line for line in PROJECT["project"]["optional-dependencies"]["test-quick"] if line.startswith("ruff"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert hooks.count(f'additional_dependencies: ["{ruff}"]') == hooks.count("- id: ruff") == 2


def test_no_python_file_is_longer_than_500_lines():
    """A longer one is two modules, or two files of tests."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lengths = {name: len((ROOT / name).read_bytes().splitlines()) for name in files.stdout.splitlines()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
