"""`scripts/set_address.py` writes one address wherever the project's address stands."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = pathlib.Path("scripts", "set_address.py")
PLACEHOLDER = "https://github.com/OWNER/emu3-jax"


def run(root: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, root / SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """What of this checkout may name the address, in a folder of its own, with the placeholder for an address."""
    root = tmp_path / "checkout"
    hidden = shutil.ignore_patterns(".*", "assets", "tests", "out", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, root, ignore=hidden)
    assert run(root, PLACEHOLDER).returncode == 0
    return root


def named(root: pathlib.Path, text: str) -> set[str]:
    """Files that hold a text, without the script itself."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != SCRIPT.name]
    return {str(path.relative_to(root)) for path in files if text.encode() in path.read_bytes()}


def test_this_checkout_has_one_address():
    done = run(ROOT, "--check")
    assert done.returncode == 0, done.stdout


def test_fills_all_places(copy):
    before = named(copy, "github.com/OWNER/") | named(copy, "github/OWNER/")
    assert {"pyproject.toml", "CONTRIBUTING.md"} <= before
    held = {name: (copy / name).read_bytes() for name in before}
    done = run(copy, "https://github.com/some-one/emu3-tools/")
    assert done.returncode == 0, done.stderr
    assert {*done.stdout.splitlines()[:-1]} == before
    assert named(copy, "OWNER/emu3-jax") == set()
    assert before <= named(copy, "some-one/emu3-tools")
    assert run(copy, "--check").returncode == 0
    # A second run moves it again.
    assert run(copy, PLACEHOLDER).returncode == 0
    assert {name: (copy / name).read_bytes() for name in before} == held


def test_check_names_places_of_another_address(copy):
    badge = "https://colab.research.google.com/github/somebody/emu3-jax/blob/main/notebooks/x.ipynb"
    (copy / "docs" / "page.md").write_text(f"text\n\n[a]({badge}) https://github.com/baaivision/Emu3 and emu3-jaxes\n")
    done = run(copy, "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "docs/page.md:3: colab.research.google.com/github/somebody/emu3-jax",
        f"1 places differ from {PLACEHOLDER}",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["ftp://github.com/a/b"],
        ["https://github.com/a"],
        ["https://github.com/a/.."],
        ["https://github.com/a/b.git.git"],
        ["https://example.com/a/b"],
        [],
        ["a", "--check"],
    ],
)
def test_other_arguments_are_refused(copy, arguments):
    before = (copy / "pyproject.toml").read_bytes()
    done = run(copy, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()[-1]) <= 300
    assert (copy / "pyproject.toml").read_bytes() == before
