"""`scripts/check_published.py` on small checkpoints in the published layouts, with live transformers as its oracle."""

import argparse
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import checkpoint_cases as cases
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.export import export
from emu3_jax.checkpoints.published_config import image_to_published
from emu3_jax.config import ImageConfig

pytestmark = pytest.mark.oracle

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
AREA = 32 * 32  # pixels of a picture: 16 rows of 16 codes


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Directories `gen`, `chat` and `vision` in upstream's layout, and `port`, transformers' of the latter two."""
    root = tmp_path_factory.mktemp("published")
    port = cases.transformers_5(root / "port")
    image = image_to_published(ImageConfig(min_pixels=AREA // 4, max_pixels=AREA), "transformers", spatial_factor=2)
    (port / "preprocessor_config.json").write_text(json.dumps(image))
    bundle = convert([port], root / "bundle", progress=False)
    export(bundle, root / "back", "transformers", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "back" / name, port / name)
    export(bundle, root / "parts", "upstream", progress=False)
    (root / "parts" / "vision_tokenizer").rename(root / "vision")
    state = {name: tensor.numpy() for name, tensor in cases.model().state_dict().items()}
    tokens = cases.TOKENS
    ids = {f"{name}_token_id": getattr(tokens, name) for name in ("img", "boi", "eoi", "eol", "eof")}
    config = {"model_type": "Emu3", "rope_theta": 1e6, "rms_norm_eps": 1e-5, "image_area": AREA, **cases.TEXT, **ids}
    for name, factor in (("gen", 1.25), ("chat", 1.0)):
        (root / name).mkdir()
        weights = {}
        for key, array in state.items():
            if key.startswith(("model.text_model.", "lm_head.")):
                weights[key.replace("model.text_model.", "model.")] = array * np.float32(factor)
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(config))
        cases.write_vocabulary(root / name / "emu3.tiktoken")
        shutil.copy(root / "parts" / "language_model" / "emu3_vision_tokens.txt", root / name)
    return root


@pytest.fixture
def script(monkeypatch):
    """The script as a module whose steps run in this process; `.launched` lists the functions that ran."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import check_published

    launched = []

    def launch(file, environment):
        launched.append(json.loads(file.read_text())["function"])
        check_published.run_job(file)
        return 0, 123_000_000

    monkeypatch.setattr(check_published, "launch", launch)
    monkeypatch.setattr(check_published, "launched", launched, raising=False)
    return check_published


def arguments(root, out, *more):
    return [str(out), *(f"--{name}={root / name}" for name in ("gen", "chat", "vision")), *more]


def verdicts(report: pathlib.Path, section: str) -> dict[str, str]:
    """First and second column of a table of the report."""
    lines = report.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1].strip() for row in rows[2:]}


def times(out: pathlib.Path) -> dict[str, int]:
    """When each result, array and weight was written."""
    files = [*out.glob("results/*"), *out.glob("*.npz"), *out.glob("bundles/*/*/config.json"), out / "photo.png"]
    return {str(file): file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
def test_the_whole_check_and_once_more(script, stand_ins, tmp_path, capsys):
    out, report = tmp_path / "out", tmp_path / "out" / "report.md"
    command = arguments(stand_ins, out, f"--reference={stand_ins / 'port'}")
    assert script.main(command) == 0, report.read_text()
    checks = verdicts(report, "Comparisons")
    hubs = {f"files of {name} and the hub's hashes" for name in ("gen", "chat", "vision", "reference")}
    assert {what for what, verdict in checks.items() if verdict == "not compared"} == {
        *hubs, "ids of the text of the picture's prompt"
    }  # fmt: skip
    assert set(checks.values()) <= {"equal", "agrees", "not compared"}
    for what in (
        "codes of the photograph", "pixels of the photograph", "first 64 greedy tokens of the picture",
        "first 64 greedy tokens of the answer", "ids of the text of the question about the photograph",
        "weights of the decoder in reference and in chat", "weights of the vision in reference and in vision",
        "weights of the vision in vision and in its export",
        "weights of the decoder in gen and in its export", "tensors of reference and its config.json",
    ):  # fmt: skip
        assert checks[what] == "equal", what
    for what in ("the picture's prompt", "the question about the photograph"):
        assert checks[f"logits after {what}"] in ("equal", "agrees"), what
    text = report.read_text()
    for private in (str(tmp_path), str(stand_ins), str(pathlib.Path.home()), str(SCRIPTS.parent)):
        assert private not in text
    assert "123 MB" in text and "float32 on cpu" in text
    assert (out / "photo.png").stat().st_size > 100 and not list((out / "bundles").glob("export-*"))

    before = times(out)
    script.launched.clear()
    assert script.main(command) == 0
    assert times(out) == before and len(before) > 20
    assert set(script.launched) == {"published_steps:machine", "published_reference:machine"}
    assert verdicts(report, "Comparisons") == checks and "Reused from an earlier run" in report.read_text()

    # Another number of tokens changes what is made of it; what was lost comes again, and is what it was.
    (out / "photo.png").unlink()
    script.launched.clear()
    assert script.main([*command, "--tokens=8", "--only=picture", "--only=codes"]) == 0
    assert [name for name in script.launched if not name.endswith(":machine")] == [
        "published_model:codes", "published_model:picture", "published_reference:picture"
    ]  # fmt: skip
    assert verdicts(report, "Comparisons")["first 8 greedy tokens of the picture"] == "equal"
    assert "answer" not in verdicts(report, "Steps")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_upstreams_files_under_the_classes_of_transformers(script, stand_ins, tmp_path):
    """--reference source: there is nothing else to download. In bfloat16 logits agree within their limit."""
    report = tmp_path / "report.md"
    command = arguments(stand_ins, tmp_path / "out", "--reference=source", "--dtype=bfloat16", "--tokens=4")
    script.main([*command, f"--report={report}", "--only=codes", "--only=answer"])
    checks = verdicts(report, "Comparisons")
    assert checks["codes of the photograph"] == "equal"
    assert checks["logits after the question about the photograph"] == "agrees"
    assert "under the names of this package's table" in report.read_text()
    assert "bfloat16 on cpu" in report.read_text() and "download reference" not in verdicts(report, "Steps")


def test_without_transformers_nothing_is_called_equal_to_it(script, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "has_transformers", lambda: False)
    report = tmp_path / "out" / "report.md"
    chat = cases.transformers_4(tmp_path / "chat")
    # The reference cannot be downloaded here, and is not asked for.
    assert script.main(arguments(stand_ins, tmp_path / "out", f"--chat={chat}", "--tokens=4")) == 0, report.read_text()
    checks, steps = verdicts(report, "Comparisons"), verdicts(report, "Steps")
    for what in (
        "codes of the photograph", "logits after the picture's prompt", "first 4 greedy tokens of the picture",
        "logits after the question about the photograph", "first 4 greedy tokens of the answer",
    ):  # fmt: skip
        assert checks[what] == "not compared", what
    assert steps["codes"] == steps["picture"] == steps["answer"] == "done"
    assert checks["weights of the decoder in chat and in its export"] == "equal"
    assert "layout: transformers 4;" in report.read_text()
    assert steps["answer by transformers"] == "not compared" and "download reference" not in steps
    assert not any(name.startswith("published_reference") for name in script.launched)


def test_damage_is_a_failed_step(script, stand_ins, tmp_path):
    root = tmp_path / "copies"
    for name in ("gen", "chat", "vision"):
        shutil.copytree(stand_ins / name, root / name)
    whole = (root / "chat" / "model.safetensors").read_bytes()
    (root / "chat" / "model.safetensors").write_bytes(whole[:-1])
    weights = load_file(root / "vision" / "model.safetensors")
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"][:, ::-1].copy()
    save_file(weights, root / "vision" / "model.safetensors")
    out, report = tmp_path / "out", tmp_path / "out" / "report.md"
    command = arguments(root, out, f"--reference={stand_ins / 'port'}", "--tokens=4")
    assert script.main([*command, "--only=codes", "--only=answer"]) == 1
    steps, checks = verdicts(report, "Steps"), verdicts(report, "Comparisons")
    assert steps["shapes chat"] == "failed" and steps["hash chat"] == "not compared"
    assert steps["convert chat"] == steps["answer"] == steps["answer by transformers"] == "not run"
    assert checks["first 4 greedy tokens of the answer"] == "not run"
    assert "chat/model.safetensors: truncated" in report.read_text() and str(tmp_path) not in report.read_text()
    assert checks["codes of the photograph"] == "differs" and steps["codes by transformers"] == "differs"
    assert not (out / "bundles" / "chat").exists()

    # Once the file is repaired, the same command goes on.
    (root / "chat" / "model.safetensors").write_bytes(whole)
    script.launched.clear()
    assert script.main([*command, "--only=answer"]) == 0
    assert verdicts(report, "Steps")["answer by transformers"] == "agrees"
    assert "published_model:codes" not in script.launched


def test_weights_that_are_not_finite_fail_the_conversion(script, stand_ins, tmp_path):
    shutil.copytree(stand_ins / "vision", tmp_path / "vision")
    weights = load_file(tmp_path / "vision" / "model.safetensors")
    weights["encoder.conv_in.bias"][0] = np.nan
    save_file(weights, tmp_path / "vision" / "model.safetensors")
    out = tmp_path / "out"
    command = arguments(stand_ins, out, "--reference=none", "--only=codes", f"--vision={tmp_path / 'vision'}")
    assert script.main(command) == 1
    steps = verdicts(out / "report.md", "Steps")
    assert (steps["convert vision"], steps["codes"]) == ("failed", "not run")
    assert "1 weights hold NaN or infinity" in (out / "report.md").read_text()


def test_a_hub_out_of_reach_is_a_failed_step(script, stand_ins, tmp_path):
    out = tmp_path / "out"
    command = [str(out), f"--gen={stand_ins / 'gen'}", "--reference=none", "--only=shapes"]
    assert script.main(command) == 1
    steps = verdicts(out / "report.md", "Steps")
    assert steps["download chat"] == "failed" and steps["shapes chat"] == "not run" and steps["shapes gen"] == "equal"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Stands in for the hub: the requests of a download, and of one for the hashes of a repository's files."""

    def do_GET(self):
        repos, (path, query) = self.server.repos, self.path.partition("?")[::2]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/[^/]+", path):
            siblings = [self.described(name, data) for name, data in repos[found[1]].items()]
            if "blobs" not in query:
                siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
            return self.answer(json.dumps({"id": found[1], "sha": COMMIT, "siblings": siblings}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            entries = [self.described(name, data) for name, data in repos[found[1]].items()]
            tree = [{"type": "file", "path": e["rfilename"], "oid": e["blobId"], "size": e["size"]} for e in entries]
            return self.answer(json.dumps(tree).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.answer(repos[found[1]][found[2]])
        return self.send_error(404)

    do_HEAD = do_GET

    def described(self, name, data):
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"rfilename": name, "size": len(data), "blobId": git}
        if name.endswith(".safetensors"):
            told = self.server.wrong or hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": told, "size": len(data), "pointerSize": 134}
        return entry

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_download_and_the_hubs_hashes(stand_ins, tmp_path):
    """A hub id goes through the hub's library, in a process of its own, and is compared with what the hub tells."""
    files = {file.name: file.read_bytes() for file in (stand_ins / "gen").iterdir()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos, server.wrong = {"org/Emu3-Gen": {**files, "modeling.py": b"import os"}}, None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = tmp_path / "hub"
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
        }

        def check(out):
            command = arguments(stand_ins, tmp_path / out, "--reference=none", "--only=hash", "--gen=org/Emu3-Gen")
            command = [sys.executable, SCRIPTS / "check_published.py", *command]
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
            return done.returncode, (tmp_path / out / "report.md").read_text()

        code, text = check("right")
        assert code == 0, text
        assert "| files of gen and the hub's hashes | equal | 4 of 4 files equal |" in text
        assert "- gen: org/Emu3-Gen\n" in text and f"- commit {COMMIT}" in text and str(tmp_path) not in text
        assert not list(home.rglob("modeling.py")), "code is not downloaded"
        server.wrong = "0" * 64
        code, text = check("wrong")
        assert code == 1 and "| differs | 3 of 4 files equal, other: model.safetensors |" in text
        server.shutdown()


def test_steps_in_processes_of_their_own(stand_ins, tmp_path):
    """As users run it: the peak memory is each process's own, and a process that is killed is a failed step."""
    command = arguments(stand_ins, tmp_path / "out", "--reference=none", "--only=hash")
    script = SCRIPTS / "check_published.py"
    done = subprocess.run([sys.executable, script, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((tmp_path / "out" / "results" / "hash-gen.json").read_text())
    assert 10**7 < result["peak_bytes"] < 10**9 and result["seconds"] > 0
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.md'}"


def test_a_process_that_is_killed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import check_published

    (tmp_path / "dies.py").write_text("import os\ndef now(job):\n    os.kill(os.getpid(), 9)\n")
    runner = check_published.Runner(tmp_path, {"": {"PYTHONPATH": f"{tmp_path}:{SCRIPTS.parent}"}})
    (tmp_path / "results").mkdir()
    step = check_published.Step("killed", "codes", "dies:now", checks=("codes",))
    result = runner.run(step)
    assert result["verdict"] == "failed" and "signal 9, perhaps out of memory" in result["error"]
    assert [check["verdict"] for check in result["checks"]] == ["failed"]
    assert runner.run(step).get("kept") is None, "what failed is tried again"


def test_ctrl_c_leaves_a_report_of_what_was_done(script, stand_ins, tmp_path, monkeypatch, capsys):
    launch = script.launch

    def interrupted(file, environment):
        if len(script.launched) == 3:
            raise KeyboardInterrupt
        return launch(file, environment)

    monkeypatch.setattr(script, "launch", interrupted)
    out = tmp_path / "out"
    command = arguments(stand_ins, out, "--reference=none", "--only=shapes")
    assert script.main(command) == 130
    assert capsys.readouterr().err == "check_published.py: interrupted; run the same command again to continue\n"
    steps = verdicts(out / "report.md", "Steps")
    assert (steps["shapes vision"], steps["download gen"], steps["shapes chat"]) == ("equal", "not run", "not run")
    assert sorted(os.listdir(out)) == ["bundles", "check_published.json", "report.md", "results"]
    monkeypatch.setattr(script, "launch", launch)
    assert script.main(command) == 0 and len(script.launched) == 9


def test_bad_input(script, stand_ins, tmp_path, capsys):
    (tmp_path / "file").write_text("not a picture")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    out = tmp_path / "out"
    for more, words in (
        ([str(out), "--gen=nowhere/at/all"], "--gen: nowhere/at/all: no such directory; give a checkpoint directory"),
        ([str(out), "--vision=gs://bucket/vq"], "--vision: 'gs://bucket/vq'"),
        ([str(out), "--tokens=0"], "--tokens is 0: it must be a whole number from 1 to 4096"),
        ([str(out), f"--photo={tmp_path / 'file'}"], "file"),
        ([str(out), f"--photo={tmp_path / 'absent.png'}"], "absent.png"),
        ([str(out), f"--report={tmp_path / 'no' / 'report.md'}"], "an existing directory; correct it"),
        ([str(out), f"--report={tmp_path}"], "it must be a file in an existing directory"),
        ([str(tmp_path / "file")], "file is a file: choose a directory"),
        ([str(full)], "full holds other files: choose a new directory"),
    ):
        assert script.main(more) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("check_published.py: ") and words in captured.err
        assert len(captured.err) <= 330
    with pytest.raises(SystemExit) as stop:
        script.main([str(out), "--only=everything"])
    assert stop.value.code == 2
    assert sorted(os.listdir(tmp_path)) == ["file", "full"] and os.listdir(full) == ["thesis.tex"]


def test_how_logits_and_tokens_are_compared(script):
    from published_reference import compare_logits, compare_tokens

    ours = np.asarray([1.0, -4.0, 2.0], np.float32)
    assert compare_logits(ours, ours, 1e-3)[0] == "equal"
    assert compare_logits(ours + np.float32(1e-3), ours, 1e-3) == (
        "agrees", "largest difference 0.001, relative to the largest logit 0.00025 (limit 0.001), same likeliest token"
    )  # fmt: skip
    assert compare_logits(ours + np.float32(1e-2), ours, 1e-3)[0] == "differs"
    assert compare_logits(ours, ours[[2, 1, 0]], 1.0)[1].endswith("likeliest tokens 2 and 0")
    assert compare_logits(ours, ours[:2], 1.0)[0] == "differs"
    ids = np.asarray([5, 6, 0, 0])
    assert compare_tokens(ids, ids[:2], [{}, {}], pad=0) == ("equal", "4 of 4 equal; the answer ends after 2")
    verdict, detail = compare_tokens(ids, np.asarray([5, 7, 8, 9]), [{}, {7: 1.5, 6: 1.25}], pad=0)
    assert verdict == "differs" and detail == (
        "first difference at token 1: 6 here, 7 by transformers, whose score of its own token is larger by 0.25"
    )
    assert compare_tokens(ids, np.asarray([4, 6]), [{4: 1.0}], pad=0)[1].endswith("among its 8 likeliest")


def test_the_report_is_fit_for_a_public_page(script):
    from published_report import public_names

    public = public_names({"/data/alice/out": "OUT"})
    home = str(pathlib.Path.home())
    assert public("/data/alice/out/bundles/gen: wrong") == "OUT/bundles/gen: wrong"
    assert public(f"{home}/secret/config.json") == "~/secret/config.json"
    assert public("cannot read /mnt/alice/x/config.json; again") == "cannot read .../config.json; again"
    assert public("https://huggingface.co/BAAI/Emu3-Gen/x?sig=abc&key=1 failed") == (
        "https://huggingface.co/BAAI/Emu3-Gen/x failed"
    )
    assert public("401 for hf_abcdefghijklmnop") == "401 for hf_..."
    assert public("2 of 3 and 5/6, BAAI/Emu3-Gen") == "2 of 3 and 5/6, BAAI/Emu3-Gen"


def test_the_dtype_follows_the_memory(script):
    assert script.choose_dtype("auto", 10**9, [6 * 10**9, 8 * 10**9]) == "float32"
    assert script.choose_dtype("auto", 10**9, [6 * 10**9, 5 * 10**9]) == "bfloat16"
    assert script.choose_dtype("float32", 10**9, [1]) == "float32"
    defaults = script.parser(None).parse_args(["out"])
    assert isinstance(defaults, argparse.Namespace) and script.sources(defaults) == {
        "vision": "BAAI/Emu3-VisionTokenizer", "gen": "BAAI/Emu3-Gen", "chat": "BAAI/Emu3-Chat",
        "reference": "BAAI/Emu3-Chat-hf",
    }  # fmt: skip
