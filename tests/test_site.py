"""The documentation site is built of the pages and the docstrings without a warning, and has every public name."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

import emu3_jax

ROOT = pathlib.Path(__file__).parents[1]


def build(docs: pathlib.Path, output: pathlib.Path) -> subprocess.CompletedProcess:
    if importlib.util.find_spec("sphinx") is None and os.environ.get("CI") != "true":
        pytest.skip("sphinx is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", docs, output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_site_is_built_without_warnings(tmp_path):
    done = build(ROOT / "docs", tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"api"}
    assert pages <= {page.stem for page in tmp_path.glob("*.html")}
    front = (tmp_path / "index.html").read_text()
    assert 'id="what-fits-your-hardware"' in front and 'src="_images/demo.png"' in front
    api = (tmp_path / "api.html").read_text()
    for name in ("load", "Emu3.generate", "TrainConfig", "Adapter"):
        assert f'id="emu3_jax.{name}"' in api
    # Links out of the folder lead to the repository's files.
    assert re.search(r'href="https://github\.com/[^"]+/blob/main/CONTRIBUTING\.md"', front)


@pytest.mark.slow
@pytest.mark.parametrize("link", ["usage.md#no-such-heading", "no_such_page.md"])
def test_link_that_leads_nowhere_is_an_error(tmp_path, link):
    (tmp_path / "docs").mkdir()
    conf = (ROOT / "docs" / "conf.py").read_text()
    conf = conf.replace("pathlib.Path(__file__).resolve().parents[1]", f"pathlib.Path({str(ROOT)!r})")
    conf = conf.replace('app.connect("source-read", _read)', "pass")
    (tmp_path / "docs" / "conf.py").write_text(conf)
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n[link]({link})\n\n```{{toctree}}\nusage\n```\n")
    (tmp_path / "docs" / "usage.md").write_text("# Usage\n")
    done = build(tmp_path / "docs", tmp_path / "out")
    assert done.returncode != 0 and link.split("#")[-1].removesuffix(".md") in done.stderr


def test_api_has_every_public_name():
    listed = re.findall(r"^\.\. auto\w+:: emu3_jax\.(\w+)", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(emu3_jax.__all__)
