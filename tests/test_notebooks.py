"""The notebooks run from top to bottom in a kernel of their own, and are committed without outputs."""

import ast
import json
import pathlib
import sys

import pytest

pytestmark = pytest.mark.slow  # and needs Jupyter, which the quick tier does without

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PARAMETERS = "MODEL = None\nAREA = None\nREPOSITORY = {repository!r}"


def read(path: pathlib.Path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """The name of a kernel of the running interpreter; it and all that Jupyter writes vanish with `tmp_path`."""
    directory = tmp_path / "jupyter" / "kernels" / "this-python"
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (directory / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return directory.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_quickstart_runs(tmp_path, kernel):
    import nbclient

    (path,) = (path for path in NOTEBOOKS if path.stem == "01_quickstart")
    notebook = read(path)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = PARAMETERS.format(repository=str(path.parents[1]))
    client = nbclient.NotebookClient(
        notebook, kernel_name=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    results = [output.data for output in outputs if output.output_type == "execute_result"]
    assert len([data for data in results if "image/png" in data]) == 3  # two drawn pictures, and the photograph twice
    info, answers = (data["text/plain"] for data in results if "image/png" not in data)
    assert "'prompt': 'noto emoji of hamburger'" in info and "'seed': '1'" in info
    assert len(ast.literal_eval(answers)) == 2
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "(13, 19) int32" in printed
