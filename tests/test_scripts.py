"""The demo does what it promises, and the shell scripts and the Dockerfile are sound."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from embedded_side import embedded_side
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints import embedded
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.procedural import Motion, rasterise_clip
from emu3_jax.media.clips import load_clip
from emu3_jax.text.tokenizer import special_tokens

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
SHELL_SCRIPTS = sorted([*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch"), ROOT / ".ci" / "run"])
ANNOUNCED = "installing packages in .venv; this takes a few minutes the first time\n"


@pytest.fixture
def scripts(monkeypatch):
    """Lets tests import the scripts as Python finds them when it runs one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.slow
def test_demo(scripts, tmp_path, capsys):
    import demo

    demo.run(tmp_path)
    for index, prompt in enumerate(demo.PROMPTS):
        with Image.open(tmp_path / "pictures" / f"{index:03d}.png") as image:
            assert image.text["prompt"] == prompt
    for file in ("clips/000.webp", "clips/001.webp", "extended/000.webp"):
        assert load_clip(tmp_path / file).frames.shape[0] == 8
    given = load_clip(demo.ASSETS / demo.HALF).frames
    np.testing.assert_array_equal(load_clip(tmp_path / "extended" / "000.webp").frames[:4], given)
    whole = rasterise_clip(Motion("purple", "star", "large", "white", "moves down"), embedded_side())
    np.testing.assert_array_equal(given, whole[:4])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 4 * 136 + 8
        # Four rows of four pictures, then three clips.
        first, clip = sheet.crop((8, 8, 136, 136)), sheet.crop((8, 696, 536, 762))
        assert sheet.height > 696 + 3 * 66
        assert np.asarray(first).std() > 1 and np.asarray(clip).std() > 1
    told = capsys.readouterr().out
    commands = [line.split()[2] for line in told.splitlines() if line.startswith("$ emu3-jax ")]
    assert commands == ["generate", "chat", "interleave", "interleave", "video", "video", "chat"]
    shown = [tmp_path / "edit" / "000_0.png", *(tmp_path / "story" / f"000_{index}.png" for index in range(3))]
    assert all(file.exists() for file in shown)
    assert "\nmoves down\n" in told
    assert "\n#   scripts/assets/emoji/koala-3d.webp: 3d emoji of koala\n" in told
    assert sum(line.startswith("scripts/assets/emoji/koala-3d.webp: ") for line in told.splitlines()) == 2


def test_demo_stops_at_the_first_command_that_fails(scripts, tmp_path, capsys):
    import demo

    with pytest.raises(SystemExit) as stop:
        demo.run(tmp_path, tmp_path / "absent")
    assert stop.value.code == 2
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]) == 1


def test_sheets_leave_no_sample_out(scripts, tiny_bundle, tmp_path):
    from sample_sheets import chosen_prompts, draw

    manifest = tmp_path / "prompts.jsonl"
    manifest.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b", "b", "c", "d")))
    prompts = chosen_prompts(manifest, 4, seed=0)
    assert sorted(prompts) == ["a", "b", "c", "d"] and prompts != chosen_prompts(manifest, 4, seed=1)
    with pytest.raises(Emu3Error, match="has 4 different texts, 5 are wanted"):
        chosen_prompts(manifest, 5, seed=0)
    for line in ("[1]", '{"txt": "b"}', '{"text'):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(Emu3Error, match=r"bad\.jsonl has a line that is no object with the field text"):
            chosen_prompts(tmp_path / "bad.jsonl", 1, seed=0)
    draw(emu3_jax.load(tiny_bundle), prompts, tmp_path / "sheets", per_sheet=3, seed=0, guidance=3.0)
    assert sorted(file.name for file in (tmp_path / "sheets").iterdir()) == ["sheet-1.webp", "sheet-2.webp"]


@pytest.mark.slow
def test_the_small_checkpoint_converts_and_draws(scripts, vocabulary, tmp_path):
    from small_checkpoint import write_checkpoint

    emu3_jax.convert(write_checkpoint(tmp_path / "checkpoint", area=64 * 64), tmp_path / "bundle")
    (picture,) = emu3_jax.load(tmp_path / "bundle").generate("a cat", seed=1, progress=False)
    assert picture.size == (64, 64) and picture.info["prompt"] == "a cat"


def test_a_small_vocabulary_beside_a_vision_tokenizer(scripts, vocabulary, golden_bundle, tmp_path):
    from emoji_bundle import write_bundle

    bundle = Bundle.open(write_bundle(golden_bundle, tmp_path / "start", ranks=300))
    assert bundle.has("vision") and not bundle.has("decoder")
    tokenizer = bundle.tokenizer()
    codes = bundle.vision_config.codebook_size
    assert tokenizer.special == special_tokens(300, codes) and tokenizer.vocab_size == 300 + 211 + codes
    assert tokenizer.decode(tokenizer.encode("3d emoji of 🐶")) == "3d emoji of 🐶"
    with pytest.raises(Emu3Error, match="exists already"):
        write_bundle(golden_bundle, tmp_path / "start")


@pytest.mark.slow
def test_assets_are_a_whole_model_with_card_and_checksums(scripts, golden_bundle, golden_model, tmp_path, monkeypatch):
    import embedded_assets

    target = tmp_path / "assets" / "emoji"
    with pytest.raises(Emu3Error, match="the limit is 1"):
        monkeypatch.setattr(embedded_assets, "LIMIT", 1_000_000)
        embedded_assets.write_assets(golden_bundle, {}, target)
    assert not target.exists()
    monkeypatch.setattr(embedded_assets, "LIMIT", 10**9)
    curve = [{"scale": scale, "top1_share_of_truth": share} for scale, share in ((1.0, 0.31), (3.0, 0.774))]
    figures = {"text_to_image": {"best_guidance": 3.0, "guidance": curve}}
    assert embedded_assets.write_assets(golden_bundle, figures, target) > 0
    assert "Open Clipart" in (target / "NOTICE").read_text() and "Twemoji" in (target / "NOTICE").read_text()
    figures["reconstruction"] = {"pictures": {"psnr_db": 27.52}}
    figures |= {"procedural": {"extensions": {"all_right": 0.914}}, "motion": {"ratio": 0.876}}
    # Once more, over the first, now with the aims of the former model. The weights' files have random names.
    weights = sorted(target.rglob("weights/**/*"))
    assert embedded_assets.write_assets(golden_bundle, figures, target, about=embedded_assets.EMOJI) > 0
    assert sorted(target.rglob("weights/**/*")) == weights
    card = (target / "CARD.md").read_text()
    assert "| Reconstruction of unseen concepts: PSNR | 26.0 dB | 27.5 dB |" in card and '"psnr_db": 27.52' in card
    assert "top-1 on true pictures | 70.0% | 77.4% |" in card and "| 31.0% |" in card and "SSIM" not in card
    assert "second half all right | 90.0% | 91.4% |" in card
    assert "squared frame differences, divided by those of true clips | 0.5 to 2 | 0.88 |" in card
    assert "Twemoji" in (target / "NOTICE").read_text()
    monkeypatch.setattr(embedded, "DIRECTORY", target)
    model = emu3_jax.load(dtype="float32")
    options = {"area": 1024, "seed": 1}
    np.testing.assert_array_equal(model.generate("a", **options)[0], golden_model.generate("a", **options)[0])


def test_wrong_vocabulary_is_refused(scripts, tmp_path, monkeypatch):
    import small_checkpoint

    resources = tmp_path / "dashscope" / "resources"
    resources.mkdir(parents=True)
    (resources.parent / "__init__.py").touch()
    (resources / "qwen.tiktoken").write_text("IQ== 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Emu3Error, match=r"qwen\.tiktoken is not Emu3's vocabulary"):
        small_checkpoint.write_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


def linter(name: str) -> str:
    """Where the program is. Without it the test is skipped, unless continuous integration asks for it."""
    beside = pathlib.Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        reason = f"{name} is not installed: pip install -e '.[test]'"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def test_shell_scripts_are_linted():
    done = subprocess.run([linter("shellcheck"), *SHELL_SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dockerfile_is_linted():
    done = subprocess.run([linter("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dockerfile_copies_what_is_there():
    """What is copied exists, is not left out by .dockerignore, and the extras are the project's."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    copied = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and set(copied) == kept and all((ROOT / name).exists() for name in copied)
    extras = (ROOT / "pyproject.toml").read_text()
    for specification in re.findall(r'"\.\[(.*)\]"', (ROOT / "Dockerfile").read_text()):
        for extra in specification.split(","):
            for cuda in ("12", "13"):
                assert f"\n{extra.replace('${CUDA}', cuda)} = [" in extras


def in_venv(directory: pathlib.Path, name: str, install: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`in_venv` with a function of these shell commands, run in `directory`."""
    script = f"source {SCRIPTS / 'venv.sh'}; install() {{ {install}; }}; in_venv {name} install; echo ready"
    # What chose the environment of this very run chooses nothing here.
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "VENV")}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env=inherited | variables,
        capture_output=True,
        text=True,
    )


def test_environment_is_made_once(tmp_path):
    """`in_venv` installs for each name once, and again when pyproject.toml has changed; not if that failed."""
    (tmp_path / "pyproject.toml").write_text("a = 1")

    def run(name: str, install: str) -> tuple[int, str]:
        done = in_venv(tmp_path, name, install)
        return done.returncode, done.stdout

    assert run("demo", "false") == (1, ANNOUNCED)
    assert run("demo", "echo installed") == (0, ANNOUNCED + "installed\nready\n")
    assert run("demo", "echo installed") == (0, "ready\n")
    assert run("test", "echo installed") == (0, ANNOUNCED + "installed\nready\n")
    (tmp_path / "pyproject.toml").write_text("a = 2")
    assert run("demo", "echo installed") == (0, ANNOUNCED + "installed\nready\n")


def test_environment_of_another_python(tmp_path):
    """`VENV` names the directory and `PYTHON` what makes it; what another Python made is not taken for it."""
    (tmp_path / "pyproject.toml").touch()
    done = in_venv(tmp_path, "test", "true", PYTHON=sys.executable, VENV=".venv-other")
    assert (done.returncode, done.stdout) == (0, ANNOUNCED.replace(".venv", ".venv-other") + "ready\n")
    assert (tmp_path / ".venv-other" / "bin" / "python").exists() and not (tmp_path / ".venv").exists()
    other = tmp_path / "python3.99"
    other.write_text("#!/bin/sh\necho Python 3.99.0\n")
    other.chmod(0o755)
    done = in_venv(tmp_path, "test", "true", PYTHON=str(other), VENV=".venv-other")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and ".venv-other has Python 3.1" in done.stderr
    assert "is Python 3.99.0" in done.stderr and "VENV" in done.stderr


def test_old_python_is_named_in_one_line(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (tools / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
        (tools / name).chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    for chosen in ({}, {"PYTHON": "python3.12"}):
        done = in_venv(tmp_path, "demo", "true", PATH=f"{tools}:/usr/bin:/bin", **chosen)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1 and "Python 3.9.2" in done.stderr and "3.11" in done.stderr
        assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_table_of_decoding(scripts, monkeypatch, capsys):
    import bench_table

    small = ("decode", "--preset", "small", "--steps", "2", "--area", "1024", "--rows", "1")
    int8 = (*small, "2", "--quantize", "int8", "--logits")
    parts = {"exact": small, "int8": int8, "broken": ("decode", "--mesh", "x")}
    monkeypatch.setattr(bench_table, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["bench_table.py", "exact", "int8"])
    assert bench_table.main() == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = {row[0].removeprefix("| "): row[-1] for row in rows}
    assert "ms per step" in table["exact, batch size 1"] and "x batch size 1" in table["int8, batch size 2"]
    assert "relative error 0.0" in table["int8, logits of random weights"]
    assert table["sampler, share of a step"].endswith("% |")
    monkeypatch.setattr(sys, "argv", ["bench_table.py", "broken"])
    assert bench_table.main() == 1


def test_shards_per_host(scripts, monkeypatch, capsys):
    import shards_per_host

    words = ["--shards", "40", "--records", "8", "--hosts", "4", "--rows", "8", "--shuffle-shards", "1", "5"]
    monkeypatch.setattr(sys, "argv", ["shards_per_host.py", *words])
    shards_per_host.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "40 shards of 8 records, 4 hosts, 8 rows a batch"
    assert [line.split(" shards a host in an epoch")[0] for line in lines] == [
        "shuffle_shards=1: 10 / 10.0 / 10",
        "shuffle_shards=5: 10 / 10.0 / 10",
        "all records shuffled together: 35 / 37.5 / 39",
    ]


def test_the_table_of_the_automaton(scripts):
    import bench_table

    assert "--automaton" in bench_table.PARTS["emu35-int8"]
    figures = [{"pictures": 1, "automaton_share": 0.0002, "automaton_ms": 0.002}]
    figures.append({**figures[0], "parallel": 16, "automaton_share": 0.0213})
    assert list(bench_table.rows({"emu35-int8": figures})) == [
        ("emu35-int8, 1 at once, W = 1, automaton of interleave", "1% of a pass", "0.02%, 0.002 ms"),
        ("emu35-int8, 1 at once, W = 16, automaton of interleave", "1% of a pass", "2.13%, 0.002 ms"),
    ]
