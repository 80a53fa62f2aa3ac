"""Evaluation: its parts, and the command from end to end. `test_judge` has metrics and the judge."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from emu35 import vision_of_emu35
from PIL import Image
from tiny_bundle import SIDE

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.evaluation import control, metrics, motion, reconstruction
from emu3_jax.evaluation.config import GROUPS, EvaluateConfig, JudgeConfig
from emu3_jax.evaluation.image_to_text import _compare, parse
from emu3_jax.evaluation.items import Data, Item, choose
from emu3_jax.evaluation.judge import Judge
from emu3_jax.evaluation.page import Cell, Curve, Row, Section, render
from emu3_jax.evaluation.procedural import Motion, Still, rasterise_clip, rasterise_still
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.generation.codec import decode, encode
from emu3_jax.media.clips import Clip, save_clip
from emu3_jax.preference.scoring import judge_settings
from emu3_jax.preference.shipped_rewards import SHIPPED

pytestmark = pytest.mark.compiled_quickly

JUDGE = JudgeConfig(steps=4, batch_size=8, width=8)
FAILS = "the test must not come here"


# ------------------------------------------------------------------------------------------------ data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """Six concepts in three styles, three of them as clips, and two drawn shapes, still and moving.

    In the layout of scripts/build_emoji.py.
    """
    root = tmp_path_factory.mktemp("evaluation") / "data"
    root.mkdir()
    lines = []

    def add(name, kind, split, pixels, **fields):
        file = f"{name}.webp"
        if pixels.ndim == 4:
            save_clip(pixels, root / file, 8.0)
        else:
            Image.fromarray(pixels).save(root / file, lossless=True)
        common = {"style": "procedural", "concept": "", "tags": [], "group": "procedural", "subgroup": ""}
        lines.append(common | {"name": name, "file": file, "kind": kind, "split": split} | fields)

    draw = np.random.default_rng(0)
    for number in range(6):
        drawn = draw.integers(0, 256, (6, 6, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        about = {"concept": f"1f60{number}", "label": f"face {number}", "group": GROUPS[number % 2]}
        for shade, style in enumerate(("3d", "flat", "noto")):
            split = "concept" if number == 5 else "style" if (number + shade) % 5 == 0 else "train"
            add(f"{style}-{number}", "picture", split, drawn // (shade + 1), style=style, **about)
        if number > 2:
            frames = np.stack([np.roll(drawn, step, axis=1) for step in range(8)])
            split = ("style", "train", "concept")[number - 3]
            add(f"clip-{number}", "clip", split, frames, style="animated", **about)
    for colour, split in (("red", "triple"), ("blue", "train")):
        still = Still(colour, "square", "large", "white", "left")
        add(f"{colour}-still", "procedural_picture", split, rasterise_still(still, SIDE), label=still.caption,
            **dataclasses.asdict(still))  # fmt: skip
        clip = Motion(colour, "square", "large", "white", "moves up")
        add(f"{colour}-clip", "procedural_clip", split, rasterise_clip(clip, SIDE), label=clip.caption,
            **dataclasses.asdict(clip))  # fmt: skip
    (root / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def config(tiny_bundle, data, tmp_path) -> EvaluateConfig:
    """Over a copy of the data, since the judge is kept there."""
    shutil.copytree(data, tmp_path / "data")
    return EvaluateConfig(
        directory=str(tmp_path / "out"), model=str(tiny_bundle), data=str(tmp_path / "data"), batch_size=4,
        guidance=(1.0, 2.0), rows=3, judge=JUDGE,
    )  # fmt: skip


@pytest.fixture
def evaluate(config, tmp_path):
    """Runs the command on `config` with `--set` of the given fields; returns its exit code."""

    def run(*arguments: str, **fields) -> int:
        file = tmp_path / "config.py"
        names = "from emu3_jax.evaluation.config import EvaluateConfig, JudgeConfig, ReconstructionConfig"
        file.write_text(f"{names}\n\ndef config():\n    return {config!r}\n")
        sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
        return main(["evaluate", str(file), "--quiet", *sets, *arguments])

    return run


def pictures(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


# ------------------------------------------------------------------------------------------------ the judge


@pytest.mark.slow
def test_the_reward_of_the_judge(tiny_bundle, config):
    """Its settings go to workers as JSON; each worker loads the judge that the first call of `score` trained."""
    vision = emu3_jax.load(tiny_bundle).vision
    settings = json.loads(json.dumps(judge_settings(config.data, vision, JUDGE, progress=False)))
    assert settings == judge_settings(config.data, vision, JUDGE, progress=False)
    assert settings["side"] == [SIDE, SIDE, 3] and len(settings["concepts"]) == 5  # one is held out
    assert settings["captions"]["3d emoji of face 1"] == "1f601" and "3d emoji of face 5" not in settings["captions"]
    styles = {caption.split()[0] for caption, concept in settings["captions"].items() if concept == "1f601"}
    assert styles == {item.style for item in Data(config.data).where("picture")}  # with or without a picture
    reward = SHIPPED["judge"](**settings)
    found = reward(["3d emoji of face 1", "flat emoji of face 2"], list(pictures(2)))
    assert found.shape == (2,) and (found > 0).all() and (found < 1).all()
    with pytest.raises(ValueError, match="the prompt 'a cat' is no caption of the judge's training pictures"):
        reward(["a cat"], list(pictures(1)))
    with pytest.raises(ValueError, match="the picture has 16x16 pixels, the judge knows 24x24"):
        reward(["3d emoji of face 1"], list(pictures(1, 16)))
    with pytest.raises(Emu3Error, match=r"items\.jsonl: there is no such file"):
        judge_settings(pathlib.Path(config.data) / "none", vision)


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.slow
def test_reconstruction_is_that_of_the_model(tiny_bundle, data):
    model = emu3_jax.load(tiny_bundle)
    reconstruct = Reconstructor(model.vision, batch_size=4, progress=False)
    items = Data(data)
    stills, clips = (items.pixels(items.where(kind)) for kind in ("picture", "clip"))
    assert stills.shape == (18, SIDE, SIDE, 3) and clips.shape == (3, 8, SIDE, SIDE, 3)
    np.testing.assert_array_equal(reconstruct.encode(stills), model.tokenize(list(stills)))
    np.testing.assert_array_equal(reconstruct.encode(clips), model.tokenize(list(clips)))
    codes = reconstruct.encode(clips[:, :6])  # filled up to eight frames
    assert codes.shape == (3, 2, 3, 3) and reconstruct(clips[:, :6]).shape == clips[:, :6].shape
    expected = [np.asarray(image) for image in model.detokenize(reconstruct.encode(stills[:3]))]
    # A batch may round otherwise in the last bit.
    assert np.abs(reconstruct(stills[:3]).astype(int) - np.stack(expected)).max() <= 1


def test_cases_are_a_fixed_choice(data):
    items = Data(data).where("picture")
    assert choose(items, None, 0, "a") == choose(items, 18, 0, "a") == items
    chosen = choose(items, 5, 0, "a")
    assert chosen == choose(items, 5, 0, "a") and len(set(chosen)) == 5
    assert chosen == sorted(chosen, key=lambda item: item.name)
    assert chosen != choose(items, 5, 1, "a") and chosen != choose(items, 5, 0, "b")


def test_answers():
    assert parse("3d emoji of dog face") == ("3d", "dog face")
    assert parse(" flat emoji of eye. ") == ("flat", "eye")
    assert parse("dog face") == ("", "dog face")


def test_descriptions_of_items_with_their_own_caption():
    emoji = Item("a", "a.webp", "picture", "3d", "1f436", "dog face", "animals", "style")
    assert _compare(emoji, "3d emoji of dog face") == (True, True)
    assert _compare(emoji, "flat emoji of dog face.") == (False, True)
    clipart = dataclasses.replace(emoji, said="line drawing of a slice of pizza")
    assert clipart.caption == "line drawing of a slice of pizza"
    assert _compare(clipart, "line drawing of a slice of pizza") == (True, True)
    assert _compare(clipart, "clipart of a slice of pizza") == (False, True)
    assert _compare(clipart, "line drawing of a pizza") == (True, False)


def test_the_page_escapes_and_needs_no_other_file():
    cells = (Cell("<b>&", pictures(1)[0], True), Cell("clip", pictures(4), False))
    curve = Curve("scale", (1.0, 2.0), {"top1": (0.0, 0.5)})
    page = render("<title>", {"a": "</pre>"}, [Section("s", "t", (Row("<row>", cells),), curve)])
    assert "&lt;b&gt;&amp;" in page and "<row>" not in page and "&lt;/pre&gt;" in page
    assert page.count("data:image/png") == 1 and page.count("data:image/webp") == 1 and "<svg" in page
    assert 'class="right"' in page and 'class="wrong"' in page and 'src="http' not in page


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cases", 0), ("batch_size", 0), ("guidance", ()), ("guidance", (2.0, 1.0)), ("guidance", 3.0), ("top_p", 0),
        ("figures", ("speed",)), ("directory", ""), ("groups", ()), ("judge", None), ("seed", -1), ("rows", -1),
        ("codebook_cases", 0), ("clip_guidance", -1.0),
    ],
)  # fmt: skip
def test_configs_are_checked(field, value):
    with pytest.raises(Emu3Error, match=field):
        EvaluateConfig(**{"directory": "out", field: value})


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("width", 12), ("label_smoothing", 1.0), ("seed", None)])
def test_judge_configs_are_checked(field, value):
    with pytest.raises(Emu3Error, match=field):
        JudgeConfig(**{field: value})


# ------------------------------------------------------------------------------------------------ the command


def test_from_end_to_end(evaluate, config, capsys, tmp_path):
    assert evaluate() == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed)
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == ["evaluation.json", "index.html"]
    assert json.loads((out / "evaluation.json").read_text()) == figures
    assert figures["model"] == "tiny" and figures["skipped"] == {}

    stills, clips = figures["reconstruction"]["pictures"], figures["reconstruction"]["clips"]
    assert (stills["cases"], stills["codebook_cases"], clips["cases"], clips["codebook_cases"]) == (3, 20, 1, 5)
    for part in (stills, clips):
        assert 0 < part["psnr_db"] < 60 and part["ssim"] < 1
        assert 0 < part["codebook_use_percent"] <= 100 and 1 <= part["perplexity"] <= 64

    codebook = figures["reconstruction"]["codebook"]
    assert codebook["codes"] == 64 and codebook["counted"] == 9 * (20 + 5 * 2) and 0 < codebook["use_percent"] <= 100

    drawn = figures["text_to_image"]
    assert drawn["cases"] == drawn["judge"]["cases"] == 3 and drawn["judge"]["concepts"] == 5
    assert drawn["judge"]["training_pictures"] == 12 and drawn["judge"]["top5"] == 1
    assert (tmp_path / "data" / drawn["judge"]["file"]).is_file()
    assert [point["scale"] for point in drawn["guidance"]] == [1, 2]
    for point in drawn["guidance"]:
        assert point["top5"] == point["top5_share_of_truth"] == point["top5_share_of_reconstruction"] == 1
        assert point["nearest_training_distance"] > 0 and 0 <= point["copied"] <= 1
        assert 0 <= point["memorised"] <= 1
    assert drawn["training_reconstruction_distance"]["cases"] == 12
    assert set(drawn["nearness_of_references"]) == {"truth", "reconstruction"}

    said = figures["image_to_text"]
    assert said["description"]["cases"] == said["category"]["cases"] == 3
    assert said["description"]["label_exact"] == 0 and said["category"]["always_the_commonest"] == 1
    assert said["shapes"]["cases"] == said["clips"]["cases"] == 1
    assert "position_right" in said["shapes"] and "motion_right" in said["clips"]
    drawn = figures["procedural"]
    assert list(drawn) == ["stills", "clips", "extensions"]
    for name, part in drawn.items():
        assert part["cases"] == part["truth_all_right"] == 1 and part["guidance"] == 3
        last = "position_right" if name == "stills" else "motion_right"
        assert {"colour_right", "shape_right", last, "all_right", "reconstruction_all_right"} <= set(part)
    moving = figures["motion"]
    assert moving["cases"] == 1 and moving["guidance"] == 3
    assert moving["true_energy"] > 0 and moving["generated_energy"] >= 0
    assert moving["ratio"] == pytest.approx(moving["generated_energy"] / moving["true_energy"], abs=1e-5)
    assert moving["reconstruction_ratio"] == pytest.approx(
        moving["reconstruction_energy"] / moving["true_energy"], abs=1e-5
    )
    assert moving["within_twice"] == (0.5 <= moving["ratio"] <= 2)

    page = (out / "index.html").read_text()
    assert "animated emoji of face 3" in page and "Procedural extensions" in page
    assert "3d emoji of face 0" in page and "guidance 1" in page and "<svg" in page

    # Again, with the kept judge: the same to the letter.
    assert evaluate("-o", str(tmp_path / "again")) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again" / "index.html").read_text() == page


def test_fewer_cases_and_figures(evaluate, capsys, tmp_path):
    assert evaluate(figures="('reconstruction',)", cases=2, codebook_cases=4) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["reconstruction"]["pictures"]["codebook_cases"] == 4
    assert figures["reconstruction"]["pictures"]["cases"] == 2
    assert set(figures["skipped"]) == {"text_to_image", "image_to_text", "procedural", "motion"}
    assert not list((tmp_path / "data").glob("judge-*"))


def test_the_features_of_the_judge(evaluate, config, capsys, tmp_path):
    """The judge is the one of the figure "text_to_image", and the distance is over held-out pictures."""
    sets = {"reconstruction.features": "judge", "reconstruction.pictures": tmp_path / "kept"}
    assert evaluate(figures="('reconstruction',)", **sets) == 0
    figures = json.loads(capsys.readouterr().out)["reconstruction"]
    about = figures["pictures"]["frechet_distance"]
    assert about.pop("distance") > 0 and "frechet_distance" not in figures["clips"]
    assert about == {"features": "judge", "pictures": 3, "dimensions": 16 * JUDGE.width, "full_rank": False}
    (file,) = (tmp_path / "data").glob("judge-*")

    judge = Judge.load(file, JUDGE.width, [str(i) for i in range(5)], (SIDE, SIDE, 3))
    shown = [np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "kept" / name).iterdir())])
             for name in ("true", "reconstructed")]  # fmt: skip
    features = judge.features(shown[0], batch_size=2)
    assert features.shape == (3, 16 * JUDGE.width)
    dense = judge.params["Dense_0"]
    verdicts = (features @ dense["kernel"] + dense["bias"]).argmax(axis=1)
    assert judge.verdicts(shown[0]) == [str(verdict) for verdict in verdicts]


class Drawer:
    """Stands for a model: makes what `draw` says of a row's number and of the frames that it was given."""

    def __init__(self, draw):
        self.draw, self.asked = draw, []

    def generate_clips(self, prompts, *, extend=None, **options):
        self.asked.append({"prompts": prompts, **options})
        given = [None] * len(prompts) if extend is None else [clip.frames for clip in extend]
        return [Clip(self.draw(number, frames)) for number, frames in enumerate(given)]


def test_extensions_are_read_from_the_new_frames_alone(tiny_bundle, data, config, monkeypatch):
    """What the truth shows in its first half must not count: a clip that stops there is wrong in its motion only."""
    monkeypatch.setattr(control, "generate", lambda model, prompts, side, **_: pictures(len(prompts)))
    reconstruct = Reconstructor(emu3_jax.load(tiny_bundle).vision, 4, progress=False)
    clip = Motion("red", "square", "large", "white", "moves up")
    whole = rasterise_clip(clip, SIDE)
    for ending, shares in (
        (whole[4:], (1, 1, 1, 1)),
        (whole[3:4].repeat(4, axis=0), (1, 1, 0, 0)),
        (rasterise_clip(dataclasses.replace(clip, colour="blue"), SIDE)[4:], (0, 1, 1, 0)),
        (np.full_like(whole[4:], 255), (0, 0, 0, 0)),
    ):

        def draw(number, given, ending=ending):
            return whole if given is None else np.concatenate([given, ending])

        model = Drawer(draw)
        figures, sections = control.measure(model, Data(data), config, reconstruct, skipped={}, progress=False)
        got = figures["extensions"]
        assert tuple(got[f"{name}_right"] for name in ("colour", "shape", "motion", "all")) == shares
        assert got["truth_all_right"] == 1 and figures["clips"]["all_right"] == 1
        assert [asked["frames"] for asked in model.asked] == [8, 4]
        np.testing.assert_array_equal(sections[2].rows[0].cells[1].pixels, np.concatenate([whole[:4], ending]))


def test_motion_is_compared_with_the_true_clip(tiny_bundle, data, config):
    reconstruct = Reconstructor(emu3_jax.load(tiny_bundle).vision, 4, progress=False)
    items = Data(data)
    true = items.pixels(items.where("clip", "style"))
    energy = metrics.motion_energy(true)[0]
    stopped = true[0].copy()
    stopped[4:] = stopped[3]
    for drawn, ratio, differs, within in (
        (true[0], 1, 1, 1),
        (true[0] // 2, 0.25, 0.5, 0),
        (stopped, 3 / 7, 3 / 7, 0),
        (true[0] * 0, 0, 0, 0),
    ):
        model = Drawer(lambda number, given, drawn=drawn: drawn)
        figures, sections = motion.measure(model, items, config, reconstruct, skipped={}, progress=False)
        assert figures["true_energy"] == pytest.approx(energy)
        assert figures["ratio"] == pytest.approx(ratio, rel=0.1) and figures["within_twice"] == within
        assert figures["difference_ratio"] == pytest.approx(differs, rel=0.1)
        assert model.asked[0]["prompts"] == ["animated emoji of face 3"] and model.asked[0]["frames"] == 8
        assert sections[0].rows[0].cells[2].right == bool(within)


def test_a_model_without_decoder(evaluate, tiny_bundle, capsys, tmp_path):
    shutil.copytree(tiny_bundle / "vision", tmp_path / "eyes" / "vision")
    assert evaluate(model=tmp_path / "eyes") == 2
    assert "eyes has no decoder" in capsys.readouterr().err
    assert evaluate(model=tmp_path / "eyes", figures="('reconstruction',)") == 0


def test_bad_input_gets_one_line_and_writes_nothing(evaluate, tiny_bundle, data, capsys, tmp_path):
    def error_of(*arguments, **fields) -> str:
        assert evaluate(*arguments, **fields) == 2
        error = capsys.readouterr().err
        assert error.startswith("emu3-jax: error: ") and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    assert "absent/items.jsonl" in error_of(data="absent")
    assert "no field 'guidanc'" in error_of(guidanc=1)
    assert "cases is -1" in error_of(cases=-1)
    assert "absent is not a directory" in error_of(model="absent")
    (tmp_path / "file").write_text("")
    assert "file is a file" in error_of("-o", str(tmp_path / "file"))
    other = tmp_path / "other.py"
    other.write_text("def config():\n    return 1\n")
    assert main(["evaluate", str(other)]) == 2
    assert "needs an EvaluateConfig" in capsys.readouterr().err

    lines = (data / "items.jsonl").read_text().splitlines()
    items = tmp_path / "data" / "items.jsonl"
    for broken, words in (
        ("{", "line 2: not readable as JSON"),
        ("[]", "line 2: not a JSON object"),
        (json.dumps(json.loads(lines[1]) | {"kind": "song"}), "kind is 'song'"),
        (json.dumps(json.loads(lines[1]) | {"label": None}), "field label is None"),
        (lines[0], "occurs twice"),
    ):
        items.write_text("\n".join([lines[0], broken, *lines[2:]]) + "\n")
        assert words in error_of()
    items.write_text("\n".join(lines) + "\n")
    picture = tmp_path / "data" / "3d-5.webp"
    Image.new("RGB", (32, 32)).save(picture)
    assert "all must have the same size" in error_of(figures="('reconstruction',)")
    picture.unlink()
    assert "3d-5.webp" in error_of(figures="('reconstruction',)")


def test_pictures_that_the_model_would_resize(tiny_bundle):
    reconstruct = Reconstructor(emu3_jax.load(tiny_bundle).vision, 4, progress=False)
    with pytest.raises(Emu3Error, match="resizes pictures of 20x20 pixels"):
        reconstruct.encode(pictures(1, 20))


def test_reconstruction_with_the_vision_tokenizer_of_emu35(data, tmp_path):
    """Pictures keep their own area; clips are skipped, with the reason."""
    vision = vision_of_emu35()
    shutil.copytree(data, tmp_path / "data")
    for file in (tmp_path / "data").glob("*.webp"):
        with Image.open(file) as picture:
            if not getattr(picture, "is_animated", False):
                picture.resize((32, 48)).save(file, lossless=True)
    items, skipped = Data(tmp_path / "data"), {}
    config = EvaluateConfig(directory=str(tmp_path), data=str(tmp_path / "data"), batch_size=4, rows=1)
    reconstruct = Reconstructor(vision, 4, progress=False)
    figures, sections = reconstruction.measure(items, config, reconstruct, skipped=skipped, progress=False)
    stills = items.pixels(items.where("picture")[:3])
    assert stills.shape == (3, 48, 32, 3)
    expected = [encode(vision, picture, area=48 * 32) for picture in stills]
    np.testing.assert_array_equal(reconstruct.encode(stills), expected)
    pictures_of = [np.asarray(decode(vision, codes)) for codes in expected]
    assert np.abs(reconstruct(stills).astype(int) - np.stack(pictures_of)).max() <= 1
    assert list(figures) == ["pictures", "codebook"] and figures["codebook"]["codes"] == 131072
    assert skipped == {"reconstruction.clips": "the vision tokenizer of Emu3.5 knows pictures alone"}
    assert len(sections) == 1
    with pytest.raises(Emu3Error, match="resizes pictures of 24x24 pixels"):
        reconstruct.encode(pictures(1, 24))
    with pytest.raises(Emu3Error, match="knows pictures alone"):
        reconstruct.encode(pictures(8, 32)[None])
