"""The notebooks run from top to bottom in a kernel of their own, and are committed without outputs.

Each is executed with the embedded model in an empty folder. What it computed is read by a cell that a test adds.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from embedded_side import embedded_side
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.checkpoints.embedded import embedded_bundle

pytestmark = pytest.mark.slow  # and needs Jupyter, which the quick tier does without

SIDE = embedded_side()
CLIP = [8, SIDE, SIDE, 3]
ROOT = pathlib.Path(__file__).parents[1]
FIRST_CELL = ROOT / "notebooks" / "first_cell.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPT = ROOT / "scripts" / "notebooks.py"


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
    # `!emu3-jax` finds this environment's command. Whatever happens, pip installs nothing into it.
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIP_DRY_RUN", "1")
    return directory.name


def code_cells(name: str) -> list[str]:
    """The sources of a notebook's cells of code; the package is this checkout."""
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    first, *others = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    return [re.sub(r"(?m)^PACKAGE = .*$", f"PACKAGE = {str(ROOT)!r}", first), *others]


def run_notebook(cells: list[str], folder: pathlib.Path, kernel: str) -> list:
    """The outputs of each cell in a new kernel. An error ends the run; later cells have none."""
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, kernel_name=kernel, timeout=900, resources=resources)
    with contextlib.suppress(nbclient.exceptions.DeadKernelError, nbclient.exceptions.CellExecutionError):
        client.execute()
    return [cell.outputs for cell in notebook.cells]


def run_cells(cells: list[str], folder: pathlib.Path, kernel: str) -> list[str]:
    """What each cell printed, and the message of the error that ended it."""
    shown = run_notebook(cells, folder, kernel)
    return ["".join(o.get("text", o.get("evalue", "")) for o in outputs) for outputs in shown]


class Executed:
    """What a notebook showed and computed.

    Attributes:
        values: the value of the expression that was added as a last cell.
        printed: what cells printed on standard output.
        images: the number of pictures that are shown.

    `replaced` maps code of the notebook, which must occur once, to what runs instead.
    """

    def __init__(
        self, name: str, folder: pathlib.Path, kernel: str, expression: str, replaced: dict[str, str] | None = None
    ):
        file = folder / "values.json"
        last = f"import json, pathlib\npathlib.Path({str(file)!r}).write_text(json.dumps({expression}))"
        folder.joinpath("work").mkdir()
        cells = code_cells(name)
        for old, new in (replaced or {}).items():
            assert sum(cell.count(old) for cell in cells) == 1
            cells = [cell.replace(old, new) for cell in cells]
        outputs = [o for cell in run_notebook([*cells, last], folder / "work", kernel) for o in cell]
        assert not [o for o in outputs if o.output_type == "error"]
        self.values = json.loads(file.read_text())
        self.printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
        shown = [o.data for o in outputs if o.output_type in ("execute_result", "display_data")]
        self.images = sum("image/png" in data or "image/gif" in data for data in shown)


def test_first_cells_are_one_and_outputs_are_stripped():
    """`scripts/notebooks.py` would change nothing. Its errors name the notebook."""
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(NOTEBOOKS) == len(list((ROOT / "notebooks").iterdir())) - 1


def test_script_strips_outputs_and_renews_the_first_cell(tmp_path):
    for name in ("notebooks", "scripts"):
        (tmp_path / name).mkdir()
    (tmp_path / "notebooks" / "first_cell.py").write_bytes(FIRST_CELL.read_bytes())
    script = tmp_path / "scripts" / "notebooks.py"
    script.write_bytes(SCRIPT.read_bytes())
    notebook = json.loads(NOTEBOOKS[0].read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    own = 'EXTRAS = "video,train"  # mine\nMEMORY = 7\n'
    code[0]["source"] = ["# an old cell\n", *own.splitlines(keepends=True)]
    place = notebook["cells"].index(code[0])
    del notebook["cells"][place - 1]  # a notebook that has no word on its first cell yet
    code[1].update(execution_count=3, outputs=[{"output_type": "stream", "name": "stdout", "text": ["x"]}])
    file = tmp_path / "notebooks" / "01.ipynb"
    file.write_text(json.dumps(notebook))
    for arguments, code_of_exit, said in ((["--check"], 1, "would change"), ([], 0, "written"), (["--check"], 0, "")):
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout, bool(said)) == (code_of_exit, True, bool(done.stdout))
    cells = json.loads(file.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    before = cells[cells.index(code[0]) - 1]
    assert before["cell_type"] == "markdown" and "Set `PACKAGE` to" in "".join(before["source"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    renewed = "".join(code[0]["source"])
    assert own in renewed
    assert re.sub("(?m)^(EXTRAS|MEMORY) = .*\n", "", FIRST_CELL.read_text()) == renewed.replace(own, "") + "\n"


class Runtime:
    """A machine whose installed distributions are what a test says, and the first cell in a kernel on it.

    Attributes:
        installed: version and requirements by name.
        after: what pip makes of them.
        address: that the package was installed from, as pip writes it down.
        commands: that pip was called with.
    """

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.installed = {
            "emu3-jax": (
                "0.1.0",
                ["jax>=0.11.1", "numpy>=2", 'jax[cuda12] ; extra == "cuda12"', 'optax ; extra == "train"'],
            ),
            "jax": ("0.12.0.1", ["jaxlib==0.12.0.1", 'jax-cuda12-plugin==0.12.0.1 ; extra == "cuda12"']),
            "jaxlib": ("0.12.0.1", ["numpy>=2.2"]),
            "numpy": ("2.5.5", []),
            "optax": ("0.2.8", []),
        }
        self.after = dict(self.installed)
        self.address: str | None = "https://github.com/somebody/emu3-jax"
        self.commands: list[str] = []
        self.error = ""
        self.loaded = {"numpy": "2.5.5"}
        self.restarts = 0
        self.free = 20e9

    def find(self, name: str):
        if name not in self.installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.installed[name]

    def distribution(self, name: str):
        self.find(name)
        url, _, revision = (self.address or "").partition("@")
        info = {"vcs": "git"} | ({"requested_revision": revision} if revision else {})
        written = None if self.address is None else json.dumps({"url": url, "vcs_info": info})
        return types.SimpleNamespace(read_text=lambda file: written)

    def pip(self, command, **_):
        assert command[1:4] == ["-m", "pip", "install"]
        self.commands.append(command[-1])
        if not self.error:
            # pip keeps a package of the same version from another place, unless it must not.
            if "emu3-jax" not in self.installed or "--force-reinstall" in command:
                self.address = command[-1].partition(" @ git+")[2]
            self.installed = self.after
        return types.SimpleNamespace(returncode=int(bool(self.error)), stdout="", stderr=self.error)

    def kernel(self):
        def shutdown(restart):
            assert restart
            self.restarts += 1

        return types.SimpleNamespace(kernel=types.SimpleNamespace(do_shutdown=shutdown))

    def run(self, package: str, extras: str = "train", memory: float = 1) -> str:
        """What the cell prints, with the line of the exception that ends it."""
        text = FIRST_CELL.read_text()
        for name, value in (("PACKAGE", package), ("EXTRAS", extras), ("MEMORY", memory)):
            text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
        cell: dict = {}
        with self.monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: self.find(name)[0])
            patch.setattr(importlib.metadata, "requires", lambda name: self.find(name)[1])
            patch.setattr(importlib.metadata, "distribution", self.distribution)
            patch.setattr("shutil.which", lambda name: None)
            patch.setattr("subprocess.run", self.pip)
            patch.setattr("IPython.get_ipython", self.kernel)
            patch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=self.free))
            patch.setattr("pathlib.Path.glob", lambda *_: iter(()))
            patch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
            for module in ("flax", "jax", "jaxlib", "numpy", "optax", "PIL", "ml_dtypes", "emu3_jax"):
                patch.delitem(sys.modules, module, raising=False)
            for module, version in self.loaded.items():
                patch.setitem(sys.modules, module, types.SimpleNamespace(__version__=version))
            line = ""
            try:
                exec(compile(text, FIRST_CELL, "exec"), cell)
            except Exception as error:
                if "Stop" not in cell or not isinstance(error, cell["Stop"]):
                    raise
                (line,) = error._render_traceback_()
                assert "\n" not in line and len(line) <= 300
        return self.capsys.readouterr().out + line


@pytest.fixture
def runtime(monkeypatch, capsys) -> Runtime:
    return Runtime(monkeypatch, capsys)


GIT = "git+https://github.com/somebody/emu3-jax"


def test_colab_with_older_modules_in_use(runtime):
    """As Colab's GPU runtime: JAX with its plugin and NumPy are older, the kernel imported NumPy already."""
    runtime.installed = {
        "jax": ("0.7.2", []),
        "jaxlib": ("0.7.2", []),
        "jax-cuda12-plugin": ("0.7.2", []),
        "numpy": ("2.1.3", []),
    }
    runtime.after["jax-cuda12-plugin"] = ("0.12.0.1", [])
    runtime.loaded = {"numpy": "2.1.3", "jax": "0.7.2"}
    said = runtime.run(GIT)
    # The old plugin beside the new JAX would leave the GPU unused.
    assert runtime.commands == [f"emu3-jax[train,cuda12] @ {GIT}"]
    assert "The kernel must restart: it imported jax 0.7.2 (now 0.12.0.1), numpy 2.1.3 (now 2.5.5) before" in said
    assert runtime.restarts == 1 and "Stopped: the kernel restarts" in said
    # If the kernel did not restart, the cell says it again, and does not install again.
    assert "The kernel must restart" in runtime.run(GIT)
    runtime.loaded = {"numpy": "2.5.5"}
    assert runtime.run(GIT) == "emu3-jax 0.1.0 with JAX 0.12.0.1, extras: train,cuda12\n"
    assert (len(runtime.commands), runtime.restarts) == (1, 2)


@pytest.mark.parametrize(
    ("change", "extras"),
    [
        (lambda installed: installed.update({"jax-cuda12-plugin": ("0.7.2", [])}), "train,cuda12"),  # of another JAX
        (lambda installed: installed.pop("optax"), "train"),
        (lambda installed: installed.update({"numpy": ("2.0.2", [])}), "train"),  # that a requirement requires newer
    ],
)
def test_installs_what_is_missing_or_too_old(runtime, change, extras):
    runtime.after["jax-cuda12-plugin"] = ("0.12.0.1", [])
    runtime.loaded = {}
    change(runtime.installed)
    assert "extras" in runtime.run(GIT)
    assert runtime.commands == [f"emu3-jax[{extras}] @ {GIT}"]


def test_another_source_is_installed_and_its_module_replaced(runtime):
    runtime.loaded = {"emu3_jax": "0.1.0"}
    other = "https://github.com/else/emu3-jax@branch"
    assert "it imported emu3_jax before" in runtime.run(other)
    assert runtime.commands == [f"emu3-jax[train] @ git+{other}"] * 2 and runtime.restarts == 1
    runtime.loaded = {}
    assert "installing" not in runtime.run(other)
    runtime.address = None  # from an index: nothing says that it is another one
    assert runtime.run("emu3-jax==0.1.0") == "emu3-jax 0.1.0 with JAX 0.12.0.1, extras: train\n"
    assert len(runtime.commands) == 2


def test_stops_in_one_line(runtime, tmp_path):
    del runtime.installed["optax"]
    assert "Stopped: PACKAGE is a placeholder" in runtime.run("git+https://github.com/OWNER/emu3-jax")
    assert f"Stopped: PACKAGE names {tmp_path}/a.whl, which does not exist" in runtime.run(f"{tmp_path}/a.whl")
    runtime.free = 1.5e9
    assert "this notebook needs 3.22 GB of main memory, and this runtime has 1.5 GB free" in runtime.run(GIT, memory=3)
    assert runtime.commands == []
    runtime.free, runtime.error = 9e9, "ERROR: no route to host"
    said = runtime.run(GIT)
    assert "ERROR: no route to host\nStopped: pip could not install" in said
    runtime.error = ""
    assert "Lacking: ['optax']" in (runtime.after.pop("optax") and runtime.run(GIT))


def test_room_is_checked_before_work(runtime, monkeypatch):
    cell: dict = {}
    text = FIRST_CELL.read_text().removesuffix("install()\n")
    exec(compile(text, FIRST_CELL, "exec"), cell)
    import jax
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8e9))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=20e9))
    cell["check_room"]("this", memory=8, disk=20, device=8)
    with pytest.raises(cell["Stop"], match=r"^this needs 45\.3 GB of disk, and this runtime has 20 GB free: choose"):
        cell["check_room"]("this", memory=8, disk=45.3)
    with pytest.raises(cell["Stop"], match=r"^this needs 12 GB of device memory, and this runtime has 8 GB free"):
        cell["check_room"]("this", device=12)
    gpu = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 15e9})
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    cell["check_room"]("this", device=12)
    with pytest.raises(cell["Stop"], match="needs 16 GB of device memory, and this runtime has 15 GB free"):
        cell["check_room"]("this", device=16)


def test_kernel_restarts_and_the_cell_passes(tmp_path, kernel):
    """A real kernel that imported another version: the cell says so and ends it; in the next kernel it passes."""
    cell, *_ = code_cells("01_generate_and_chat")
    before = "import numpy\nnumpy.__version__ = '1.0'"
    _, first, following = run_cells([before, cell, "print('next')"], tmp_path, kernel)
    assert "The kernel must restart: it imported numpy 1.0 (now " in first and "the kernel restarts" in first
    assert following == ""
    _, first, following = run_cells(["import numpy", cell, "print('next')"], tmp_path, kernel)
    assert re.fullmatch(r"emu3-jax \S+ with JAX \S+, extras: \S+\n", first) and following == "next\n"


def test_generate_and_chat(tmp_path, kernel):
    expression = "[prompts, answers, [p.info['guidance'] for p in guided], [list(p.getdata())[:9] for p in guided]]"
    # In bfloat16 a CPU that multiplies bfloat16 draws other pictures than one that does not.
    exact = {"model = emu3_jax.load()": 'model = emu3_jax.load(dtype="float32")'}
    done = Executed("01_generate_and_chat", tmp_path, kernel, expression, exact)
    prompts, answers, guidance, pixels = done.values
    assert answers[3] == prompts[3] and "hamburger" in answers[1] and "tiger" in answers[2]
    assert guidance == ["1", "2", "3", "5"] and len({str(row) for row in pixels}) > 1
    seen = "from left to right: a blue circle, a red square and a green circle on a white background"
    assert f"Describe the image. -> {seen}" in done.printed and "How many shapes are there? -> three" in done.printed
    assert done.images == 3


def test_large_weights_are_converted_once(tmp_path, kernel):
    """The section that is off by default. Checkpoints on the disk stand in for those of the hub."""
    checkpoint = tmp_path / "checkpoint"
    emu3_jax.export(embedded_bundle(), checkpoint, layout="upstream", progress=False)
    weights = (checkpoint / "language_model").rename(tmp_path / "Emu3-Gen")
    first_cell, *_, section = code_cells("01_generate_and_chat")
    section = section.replace("BAAI/Emu3-VisionTokenizer", str(checkpoint / "vision_tokenizer"))
    section = re.sub(r"^WEIGHTS = None.*", f"WEIGHTS = {str(weights)!r}", section)
    # A TPU needs more than a GPU, whose figure is below.
    little = "import types, jax\npsutil.virtual_memory = lambda: types.SimpleNamespace(available=16e9)"
    little += "\njax.default_backend = lambda: 'tpu'"
    *_, refused = run_cells([first_cell, little, section], tmp_path, kernel)
    assert "Emu3-Gen in int8 needs 16.3 GB of device memory, and this runtime has 16 GB free: choose" in refused
    assert not (tmp_path / "weights").exists() and "\n" not in refused
    ample = "import emu3_jax\ncheck_room = lambda what, **needs: print(needs)"
    wrong = section.replace(str(weights), str(tmp_path / "Emu3-Gen-absent"))
    *_, failed = run_cells([first_cell, ample, wrong], tmp_path, kernel)
    assert "emu3-jax: error: " in failed and "emu3-jax convert failed: its message is above" in failed
    *_, first, second = run_cells([first_cell, ample, section, section], tmp_path, kernel)
    assert "{'memory': 8.5, 'device': 14.7}" in first and "'disk': 45.6}" in first and "convert" in first
    assert "{'memory': 8.5, 'device': 14.7}" in second and "convert" not in second
    assert Bundle.open(tmp_path / "weights" / "emu3-gen-int8").has("vision")
    with Image.open(tmp_path / "shiba.png") as drawn:
        assert drawn.size == (SIDE, SIDE)


def test_tokenizer(tmp_path, kernel):
    expression = "[codes.shape, clip_codes.shape, clip.frames.shape, loss, codes.tolist(), edited.tolist()]"
    done = Executed("02_tokenizer", tmp_path, kernel, expression)
    shape, clip_shape, frames, loss, codes, edited = done.values
    assert (shape, clip_shape, frames) == ([16, 16], [2, 16, 16], CLIP)
    assert 27 < loss < 31
    assert all(row[8:] == old[:8] and row[:8] == old[:8] for row, old in zip(edited, codes, strict=True))
    assert edited != codes
    assert "the file holds ['house'] and the same codes: True" in done.printed
    assert done.images == 3


def test_convert_and_export(tmp_path, kernel):
    done = Executed("04_convert_and_export", tmp_path, kernel, "[equal, len(original), bool(np.array_equal(*tokens))]")
    equal, arrays, tokens = done.values
    assert equal == {"from_upstream": True, "from_transformers": True} and tokens
    assert arrays > 200
    (size,) = re.findall(r"([0-9.]+) MB  transformers/model\.safetensors", done.printed)
    opened = full_bundle(Bundle.open(embedded_bundle()), "this")
    weights = sum(
        array.size * array.dtype.itemsize for part in ("decoder", "vision") for _, array in opened.arrays(part)
    )
    assert float(size) == pytest.approx(weights / 1e6, rel=0.01)
    assert "ok    all weights are finite and none is zero throughout" in done.printed


def test_video(tmp_path, kernel):
    from emu3_jax.evaluation.procedural import Motion

    begins = "(extended.frames[:4] == clip.frames[:4]).all().item()"
    expression = f"[arrived, clip.frames.shape, extended.frames.shape, {begins}]"
    done = Executed("06_video", tmp_path, kernel, expression)
    arrived, frames, extended, begins = done.values
    assert arrived == [[0, 0, 4], [0, 4, 4]]
    assert frames == extended == CLIP and begins
    caption = Motion("yellow", "heart", "large", "black", "moves right").caption
    assert (
        f"Describe the clip. -> {caption}" in done.printed and "What does the shape do? -> moves right" in done.printed
    )
    assert done.printed.splitlines()[-1].endswith(caption)  # what the command said of the MP4
    assert f"clip.mp4 (8, {4 * SIDE}, {4 * SIDE}, 3) 8 frames a second" in done.printed
    assert done.images == 2


def test_finetune(tmp_path, kernel):
    expression = "[losses, distance(before), distance(after), size, list(shown.values())]"
    done = Executed("03_finetune", tmp_path, kernel, expression)
    losses, before, after, size, captions = done.values
    assert len(losses) == 20 and losses[0] > 3 and losses[-1] < 1
    assert before > 60 and after < 15  # of 255 levels: emoji before, the flags after
    assert 1e6 < size < 10e6
    assert f"before {before:.1f}, after {after:.1f}" in done.printed
    assert "data: 4 records in 1 shard, 0 skipped" in done.printed and len(captions) == 4
    # The merged model draws what the model with the adapter draws.
    with Image.open(tmp_path / "work" / "drawn" / "000.png") as drawn:
        assert drawn.text["prompt"] == captions[0]
        red, white, blue = (drawn.convert("RGB").getpixel((SIDE // 2, row * SIDE // 8)) for row in (1, 4, 7))
    assert red[0] > 150 > max(red[1:]) and min(white) > 200 and blue[2] > 120 > max(blue[:2])
    assert done.images == 2


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_sharding_and_plan(tmp_path, kernel):
    expression = "[len(jax.devices()), bool(np.array_equal(alone.ids, spread.ids)), weights]"
    done = Executed("05_sharding_and_plan", tmp_path, kernel, expression)
    devices, equal, weights = done.values
    assert devices == 8 and equal
    whole = 8_492_011_520 * 2 / 2**30
    assert weights["tensor=1"] == pytest.approx(whole)
    assert weights["tensor=8"] == pytest.approx(whole / 8, rel=1e-3)  # norms are whole on every chip
    assert "8.49 billion weights" in done.printed
    plan = done.printed[done.printed.index("v5e:2x2: 4 chips") :]
    assert "training step of 8 rows of 384 tokens" in plan and plan.splitlines()[-1] == "fits"
    assert done.images == 1
