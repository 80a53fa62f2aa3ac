"""The command line as scripts rely on it: files, texts, exit codes, and nothing half-written."""

import contextlib
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from commands import run
from conftest import GOLDEN, golden_npz
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints import embedded
from emu3_jax.media.clips import load_clip, save_clip


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def text_fields(path) -> dict[str, str]:
    with Image.open(path) as image:
        return image.text


def load_npz(path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return dict(data)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def error_of(capsys, here):
    """Runs a command that must fail; returns its one line. Checks that nothing was left behind."""

    def fail(*arguments) -> str:
        before = sorted(os.listdir(here))
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert sorted(os.listdir(here)) == before
        assert error.startswith("emu3-jax: error: ") and error.count("\n") == 1
        return error

    return fail


def test_convert_tokenize_detokenize(golden_checkpoint, here, capsys):
    assert run("convert", golden_checkpoint / "lm", golden_checkpoint / "vq", "-o", "bundle", "--quiet") == 0
    files = [GOLDEN / f"{name}.png" for name in ("photo", "tall", "palette")]
    assert run("tokenize", *files, "--model", "bundle", "-o", "codes.npz") == 0
    codes, golden = load_npz("codes.npz"), golden_npz("images.npz")
    assert sorted(codes) == ["palette", "photo", "tall"]
    for name, array in codes.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, golden[f"{name}/codes"][0])
    capsys.readouterr()
    assert run("detokenize", "codes.npz", "--model", "bundle", "-o", "pictures") == 0
    assert capsys.readouterr().out.split() == [f"pictures/{name}.png" for name in ("photo", "tall", "palette")]
    assert picture("pictures/tall.png").shape == (184, 64, 3)
    assert run("doctor", "bundle") == 0


@pytest.mark.slow
def test_a_clip_there_and_back(golden_bundle, here):
    frames = [Image.new("RGB", (64, 64), (40 * i, 0, 90)) for i in range(6)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:], duration=100)
    assert run("tokenize", "clip.gif", "--model", golden_bundle, "-o", "codes.npz") == 0
    assert load_npz("codes.npz")["clip"].shape == (2, 8, 8)
    for kind in ("webp", "gif"):
        assert run("detokenize", "codes.npz", "--model", golden_bundle, "--clip-format", kind, "-o", "clips") == 0
        assert picture(f"clips/clip.{kind}").shape == (64, 64, 3)
    assert load_clip(here / "clips" / "clip.webp").fps == 8.0  # codes hold no rate: the default of `video`
    cut = ("detokenize", "codes.npz", "--model", golden_bundle, "--frames", 6, "--clip-format", "png", "-o", "cut")
    assert run(*cut) == 0 and len(load_clip(here / "cut" / "clip.png").frames) == 6


@pytest.fixture
def loaded(golden_bundle, golden_model, monkeypatch):
    """Commands get the golden model without loading it anew, which takes most of their time; others are loaded."""
    load = emu3_jax.load

    def loaded_or_load(model=None, **options):
        return golden_model if str(model) == str(golden_bundle) else load(model, **options)

    monkeypatch.setattr("emu3_jax.load", loaded_or_load)


@pytest.mark.slow
def test_tokenize_resamples_clips_and_tiles_frames(golden_bundle, golden_model, here, loaded):
    save_clip(np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), np.uint8), here / "clip.png", 10.0)
    arguments = ("tokenize", "clip.png", GOLDEN / "gray.png", "--model", golden_bundle, "-o", "codes.npz")
    for options, extra in (
        ({"fps": 5.0, "frames": 4}, ("--fps", 5, "--frames", 4)),
        ({"frames": 8}, ("--frames", 8)),
        ({"frames": 4, "tile": 64}, ("--frames", 4, "--tile", 64)),
    ):
        assert run(*arguments, *extra) == 0
        codes = load_npz("codes.npz")
        expected = golden_model.tokenize([here / "clip.png", GOLDEN / "gray.png"], **options)
        assert codes["clip"].shape == (options["frames"] // 4, 8, 12)
        for name, array in zip(("clip", "gray"), expected, strict=True):
            np.testing.assert_array_equal(codes[name], array)
    whole = golden_model.tokenize([here / "clip.png"], frames=4)[0]
    assert (whole != codes["clip"]).any()
    assert run("detokenize", "codes.npz", "--model", golden_bundle, "--tile", 64, "-o", "clips") == 0
    assert load_clip(here / "clips" / "clip.webp").frames.shape == (4, 64, 96, 3)


def test_bad_clips_get_one_line_and_exit_code_2(golden_bundle, error_of, here, loaded):
    out = ("--model", golden_bundle, "-o", "new.npz")
    frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    for suffix in ("gif", "webp", "png", "mp4", "webm"):
        save_clip(frames, here / f"whole.{suffix}", 2.0)
        data = (here / f"whole.{suffix}").read_bytes()
        (here / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
        (here / f"text.{suffix}").write_text("not a clip")
        for name in (f"cut.{suffix}", f"text.{suffix}", f"absent.{suffix}"):
            assert name in error_of("tokenize", name, *out)
    assert "give a picture or clip that exists" in error_of("tokenize", "absent", *out)
    (here / "sizes").mkdir()
    assert "holds no pictures" in error_of("tokenize", "sizes", *out)
    for number, side in enumerate((64, 64, 72)):
        Image.new("RGB", (side, 64)).save(here / "sizes" / f"{number}.png")
    assert "2.png is 72x64 pixels, but the clip's first frame is 64x64" in error_of("tokenize", "sizes", *out)
    assert "fps is 0" in error_of("tokenize", "whole.gif", "--fps", 0, *out)
    assert "frames is -1" in error_of("tokenize", "whole.gif", "--frames=-1", *out)
    assert "tile is 60" in error_of("tokenize", "whole.gif", "--tile", 60, *out)
    np.savez(here / "codes.npz", x=np.zeros((2, 8, 8), int))
    for options in (("--tile", 8), ("--frames", 0)):
        assert f"{options[0][2:]} is {options[1]}" in error_of(
            "detokenize", "codes.npz", *options, "--model", golden_bundle, "-o", "out"
        )


def test_pictures_of_any_name_there_and_back(golden_bundle, here, loaded, capsys):
    """Names that NumPy takes for arguments of its own, and what a shell or a terminal would act on."""
    names = ["file.png", "allow_pickle.png", "file.jpg.png", "-é 日本;$(x).png"]
    for name in names:
        Image.new("RGB", (64, 64), "red").save(here / name)
    assert run("tokenize", *(f"./{name}" for name in names), "--model", golden_bundle, "-o", "codes.npz") == 0
    assert run("detokenize", "codes.npz", "--model", golden_bundle, "-o", "out") == 0
    assert sorted(os.listdir("out")) == sorted(names)


def test_names_are_checked_before_work(error_of, here, monkeypatch):
    monkeypatch.setattr("emu3_jax.load", lambda *_, **__: pytest.fail("work began"))
    out = ("-o", "new.npz")
    assert "has control characters: rename it" in error_of("tokenize", "a\x1b[2J.png", *out)
    assert "has control characters: rename it" in error_of("tokenize", "caf\udce9.png", *out)
    assert "would become one file: rename one" in error_of("tokenize", "a/x.png", "b/X.gif", *out)
    assert "too long for a file: shorten it" in error_of("tokenize", "x" * 250 + ".png", *out)
    assert "fps is 1e+09" in error_of("tokenize", "a.gif", "--fps", 1e9, *out)
    assert "frames is 1000000000" in error_of("tokenize", "a.gif", "--frames", 10**9, *out)


def test_codes_of_strangers(golden_bundle, error_of, here, monkeypatch):
    """Names that leave the folder, claims of sizes, and what is no array: refused before the model is loaded."""
    monkeypatch.setattr("emu3_jax.load", lambda *_, **__: pytest.fail("work began"))
    for name in ("codes_escape.npz", "codes_case.npz", "codes_20000.npz"):
        assert name in error_of("detokenize", GOLDEN.parent / "corpus" / name, "-o", "out")
    os.mkfifo(here / "pipe.npz")
    assert "it is a pipe or device" in error_of("detokenize", "pipe.npz", "-o", "out")


def test_areas_without_bounds(golden_bundle, error_of, loaded):
    for area in (2_000_000_000, (1 << 22) + 1):
        assert f"area is {area}: it must be" in error_of("generate", "a", "--area", area, "-o", "out")
        assert f"area is {area}: it must be" in error_of("video", "a", "--area", area, "-o", "out")


def test_areas_near_no_picture(golden_bundle, error_of, here, loaded):
    small = ("--area", 7, "--model", golden_bundle, "-o", "out")
    (here / "prompts.txt").write_text("a")
    (here / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(here / "pictures" / "a.png")
    (here / "pictures" / "a.txt").write_text("red")
    for command in (("generate", "a"), ("video", "a"), ("sample", "prompts.txt", "-n", 1)):
        line = error_of(*command, *small)
        assert "area is 7: at ratio 1:1 it must be at least 144 pixels" in line, command
    assert "area is 256: at ratio 2:1 it must be at least 288 pixels" in error_of(
        "generate", "a", "--ratio", "2:1", "--area", 256, "--model", golden_bundle, "-o", "out"
    )
    assert "area is 7: it must be a number of pixels from 256" in error_of("prepare", "pictures", *small)


def test_clips_of_one_frame_and_without_durations(golden_bundle, here, loaded):
    """Animated files of one frame are pictures; folders and videos of one are clips, filled up to the first four."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    for suffix in ("gif", "mp4"):
        save_clip(frames[:1], here / f"{suffix}_one.{suffix}", 10.0)
    (here / "folder_one").mkdir()
    Image.fromarray(frames[0]).save(here / "folder_one" / "0.png")
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(here / "untimed.gif", save_all=True, append_images=rest, duration=0)
    files = ("gif_one.gif", "mp4_one.mp4", "folder_one", "untimed.gif")
    assert run("tokenize", *files, "--model", golden_bundle, "-o", "codes.npz") == 0
    shapes = {name: codes.shape for name, codes in load_npz("codes.npz").items()}
    assert shapes == {"gif_one": (8, 8), "mp4_one": (1, 8, 8), "folder_one": (1, 8, 8), "untimed": (2, 8, 8)}
    assert run("tokenize", "untimed.gif", "--fps", 20, "--model", golden_bundle, "-o", "codes.npz") == 0
    assert load_npz("codes.npz")["untimed"].shape == (3, 8, 8)  # 6 frames at 10 per second are 12 at 20


def test_generate_equals_the_golden_pictures(golden_bundle, here):
    assert run(
        "generate", "a shiba inu", "a portrait of young girl. best quality.", "--model", golden_bundle, "--ratio",
        "1:1", "4:3", "--area", 9216, "--negative", "lowres, bad anatomy", "--greedy", "--dtype", "float32",
        "--save-tokens", "-o", "out",
    ) == 0  # fmt: skip
    golden = golden_npz("generate.npz")
    assert sorted(os.listdir("out")) == ["000.png", "001.png", "tokens.npz"]
    for index in range(2):
        np.testing.assert_array_equal(picture(f"out/00{index}.png"), golden[f"batch/image{index}"])
    assert text_fields("out/001.png") == {
        "prompt": "a portrait of young girl. best quality.", "negative": "lowres, bad anatomy", "size": "112x80",
        "ratio": "4:3", "seed": "1", "guidance": "3", "temperature": "0", "top-k": "2048", "top-p": "1",
        "passes": "149", "model": "golden", "software": "emu3-jax",
    }  # fmt: skip
    tokens = load_npz("out/tokens.npz")
    assert sorted(tokens) == ["0", "1"] and tokens["0"][0] == 151849 and tokens["1"][-1] == 151850


def test_chat_prints_answers(golden_bundle, golden_model, capsys, here):
    expected = golden_model.chat([GOLDEN / "gray.png"], "What is this", max_new_tokens=6)[0]
    asked = ("chat", GOLDEN / "gray.png", "--prompt", "What is this", "--max-new-tokens", 6)
    assert run(*asked, "--model", golden_bundle, "--dtype", "float32", "--greedy") == 0
    assert capsys.readouterr().out == expected + "\n"
    assert run(*asked, "--model", golden_bundle, "--dtype", "float32", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(GOLDEN / "gray.png"), "prompt": "What is this", "answer": expected,
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["upstream", "transformers"])
def test_export_and_doctor(layout, tiny_bundle, here):
    assert run("export", tiny_bundle, "-o", "exported", "--layout", layout, "--quiet") == 0
    assert run("convert", *(["exported"] if layout == "transformers" else sorted(here.glob("exported/*"))),
               "-o", "again", "--quiet") == 0  # fmt: skip
    assert run("doctor", "again") == 0


def test_video_writes_a_clip_for_each_prompt(golden_bundle, here, loaded, capsys):
    arguments = ("--area", 1024, "--frames", 4, "--model", golden_bundle, "-o", "clips", "--quiet")
    assert run("video", "a", "b", *arguments, "--format", "gif") == 0
    assert capsys.readouterr().out.splitlines() == ["clips/000.gif", "clips/001.gif"]
    assert load_clip(here / "clips" / "000.gif").frames.shape[1:] == (32, 32, 3)


def test_doctor_exits_with_2_on_an_error(here, capsys):
    (here / "config.json").write_text("{}")
    assert run("doctor", here, "--json") == 2
    assert json.loads(capsys.readouterr().out.splitlines()[0])["level"] == "error"


BENCH = ("bench", "decode", "--preset", "small", "--steps", 2, "--area")


@pytest.fixture(scope="module")
def exact():
    """The lines of the benchmark without quantisation."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(*BENCH, 4096) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_bench_prints_json_lines(exact):
    assert exact[0]["copy_gb_per_s"] > 0 and exact[1]["cache_length"] == 64 + 36
    assert exact[-1]["picture"] == "64x64" and exact[-1]["tokens"] == 72


@pytest.mark.slow
def test_bench_compares_quantised_logits(exact, capsys):
    moved = exact[1]["bytes_per_step"]
    assert run(*BENCH, 4096, "--quantize", "int8", "--logits") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 0 < lines[-1]["logit_error"] < 0.05 and lines[-1]["same_likeliest"] > 0.8
    assert lines[0]["quantize"] == "int8" and 0.5 < lines[1]["bytes_per_step"] / moved < 0.53


@pytest.mark.slow
def test_bench_of_parallel_decoding(capsys):
    options = ("--preset", "small", "--steps", 8, "--area", 4096, "--parallel", "off", 4, "--tokens-per-pass", 2, 3)
    assert run("bench", "decode", *options, "--whole") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert [line.get("parallel", 1) for line in lines] == [1, 1, 4, 4]
    assert lines[0]["ms_per_step"] > 0 and lines[2]["ms_per_pass"] > 0
    last = lines[3]
    assert last["tokens_per_pass"] == 72 / (1 + 35)  # prefill, and 70 sampled or forced tokens by two
    slower, faster = (last[f"seconds_per_picture_at_{rate}_tokens_per_pass"] for rate in (2, 3))
    assert slower >= faster and last["whole_run_s"] > 0
    for bad in ("0.5", "129", "nan"):
        assert run("bench", "decode", "--tokens-per-pass", bad) == 2
        assert f"--tokens-per-pass: '{bad}' is not a number from 1 to 128" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_on_a_mesh_and_bad_combinations(capsys):
    arguments = (*BENCH, 1024, "--mesh", "tensor=2")
    assert run(*arguments, "--whole") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["mesh"]["tensor"] == 2 and lines[-1]["pixels_s"] > 0 and 0 < lines[-1]["sampler_share"] < 1
    assert run(*arguments, "--model") == 2
    assert "--mesh works only with a preset" in capsys.readouterr().err
    assert run(*arguments[:-1], "tensor=3") == 2
    assert "mesh tensor=3" in capsys.readouterr().err


def test_bench_refuses_logits_that_nothing_moves(capsys):
    for arguments in ((), ("--quantize", "int8", "--model")):
        assert run("bench", "decode", "--preset", "small", "--logits", *arguments) == 2
        assert "--logits compares" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_of_a_bundle(golden_bundle, capsys):
    assert run("bench", "decode", "--model", golden_bundle, "--area", 1024, "--whole") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["model"] == str(golden_bundle)
    assert lines[-1]["picture"] == "32x32" and lines[-1]["prompt_to_pixels_s"] > 0


def test_bad_input_gets_one_line_and_exit_code_2(golden_bundle, error_of, here, loaded, monkeypatch):
    model = ("--model", golden_bundle, "-o", "out")
    small = ("--area", 1024, *model)
    (here / "text.png").write_text("not a picture")
    (here / "cut.png").write_bytes((GOLDEN / "photo.png").read_bytes()[:2000])
    Image.new("RGB", (100, 4)).save(here / "strip.png")
    (here / "file").write_text("")
    np.savez(here / "codes.npz", x=np.full((2, 2), 40000))
    np.savez(here / "object.npz", x=np.asarray([{}], object))
    assert "ratio" in error_of("generate", "a", "--ratio", "square", *small)
    assert "5:1" in error_of("generate", "a", "--ratio", "7:1", *small)
    assert "area" in error_of("generate", "a", "--area", 10, *model)
    assert "<|image start|>" in error_of("generate", "a <|image start|>", *small)
    assert "4096 positions" in error_of("generate", "word " * 4500, *small)
    assert "guidance is -1.0" in error_of("generate", "a", "--guidance=-1", *small)
    assert "file" in error_of("generate", "a", "--area", 1024, "--model", golden_bundle, "-o", "file")
    with monkeypatch.context() as context:
        context.setattr(embedded, "DIRECTORY", here / "none")
        assert "no model was given" in error_of("generate", "a", "-o", "out")
    assert "absent" in error_of("generate", "a", "--model", "absent", "-o", "out")
    out = ("--model", golden_bundle, "-o", "new.npz")
    for name in ("text.png", "cut.png", "strip.png", "absent.png"):
        assert name in error_of("tokenize", name, *out)
        assert name in error_of("chat", name, "--prompt", "What is this", "--model", golden_bundle)
    assert "rename one" in error_of("tokenize", GOLDEN / "photo.png", GOLDEN / "photo.png", *out)
    assert ".npz" in error_of("tokenize", GOLDEN / "photo.png", "--model", golden_bundle, "-o", "codes.txt")
    assert "40000" in error_of("detokenize", "codes.npz", *model)
    assert "object.npz" in error_of("detokenize", "object.npz", *model)
    assert "text.png" in error_of("detokenize", "text.png", *model)
    assert "exists" in error_of("convert", "absent", "-o", golden_bundle)
    assert "absent" in error_of("export", "absent", "-o", "out", "--layout", "upstream")
    assert "file" in error_of("export", "file", "-o", "out", "--layout", "upstream")


def test_a_bad_value_is_corrected_where_it_came_from(golden_bundle, golden_checkpoint, error_of, here):
    """One line: the file, the field, the value, what is legal and the remedy. Python's values are in no config.json."""
    legal = "it must be a whole number > 0"
    published, bundle = here / "published", here / "bundle" / "decoder"
    shutil.copytree(golden_checkpoint / "lm", published)
    shutil.copytree(golden_bundle / "decoder", bundle, ignore=lambda *_: ["weights"])
    for directory, field in ((published, "num_hidden_layers"), (bundle, "num_layers")):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: -1}))
    error = error_of("convert", published, "-o", "new")
    assert f"{published}/config.json: config field num_hidden_layers is -1: {legal}; correct it in config.json" in error
    error = error_of("chat", GOLDEN / "gray.png", "--prompt", "a", "--model", bundle.parent)
    assert f"{bundle}/config.json: config field num_layers is -1: {legal}; correct it in config.json" in error
    lines = ("from emu3_jax import DecoderConfig", "def config():", "    return DecoderConfig(num_layers=-1)", "")
    (here / "recipe.py").write_text("\n".join(lines))
    error = error_of("train", "recipe.py")
    assert f"recipe.py: DecoderConfig field num_layers is -1: {legal}" in error and "config.json" not in error


def test_a_bundle_without_the_part_that_is_needed(golden_bundle, error_of, here):
    shutil.copytree(golden_bundle / "vision", here / "eyes" / "vision")
    error = error_of("generate", "a", "--model", "eyes", "-o", "out")
    assert "eyes has no decoder" in error
    assert run("tokenize", GOLDEN / "gray.png", "--model", "eyes", "-o", "codes.npz") == 0


def test_a_full_disk_leaves_nothing(golden_bundle, error_of, loaded, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array", full)
    arguments = (GOLDEN / "gray.png", "--model", golden_bundle, "-o", "codes.npz")
    assert re.search(r"codes\.npz.*No space left on device", error_of("tokenize", *arguments))


def test_ctrl_c_is_130(monkeypatch, capsys, golden_bundle):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("emu3_jax.load", interrupted)
    assert run("generate", "a", "--model", golden_bundle, "-o", "out") == 130
    assert capsys.readouterr().err == "emu3-jax: interrupted\n"
