"""The figure "reconstruction": the Fréchet distance, functions that users name, and folders of pictures."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
from emu35 import vision_of_emu35
from PIL import Image
from tiny_bundle import SIDE

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.comparison import Comparison, Features
from emu3_jax.evaluation.config import EvaluateConfig, ReconstructionConfig
from emu3_jax.evaluation.functions import PictureFunction
from emu3_jax.evaluation.picture_folder import PictureFolder, cut
from emu3_jax.evaluation.reconstruction import Reconstructor, measure
from emu3_jax.evaluation.run import open_data

pytestmark = pytest.mark.compiled_quickly

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "eval_reconstruction.py"
FUNCTIONS = """
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import helper


@dataclasses.dataclass
class Holder:
    calls: int = 0


holder = Holder()


def colours(pictures):
    holder.calls += 1
    print("not on standard output")
    means = pictures.reshape(len(pictures), -1, 3).mean(axis=1)
    pictures[:] = 0  # of a copy
    return means


def nothing(*pictures):
    return None


def ones(pictures):
    return [[1.0]] * len(pictures)


def hangs(*pictures):
    with ThreadPoolExecutor() as pool:  # Python waits for its threads before it exits
        pool.submit(time.sleep, 1e5)


def few(*pictures):
    return [1.0]


def nan(*pictures):
    return [[float("nan")]] * len(pictures[0])


def fails(*pictures):
    raise KeyError("no\\nsuch picture")


def leaves(*pictures):
    raise SystemExit(0)


def growing(pictures):
    holder.calls += 1
    return [[0.0] * holder.calls] * len(pictures)


def far(true, again):
    return abs(true.astype(float) - again).mean(axis=(1, 2, 3)) + helper.MORE


number = 3
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "helper.py").write_text("MORE = 1\n")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path / "functions.py"


def pictures(count: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


# ------------------------------------------------------------------------------------------------ the Fréchet distance


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    means = a.mean(axis=0) - b.mean(axis=0)
    return float(means @ means + np.trace(covariances[0] + covariances[1] - 2 * root.real))


@pytest.mark.parametrize(("rows", "width"), [((300, 200), 24), ((3000, 1100), 8)])
def test_frechet_distance(rows, width):
    draw = np.random.default_rng(0)
    mix = draw.standard_normal((width, width))
    a, b = (draw.standard_normal((count, width)) @ mix + shift for count, shift in zip(rows, (0, 0.5), strict=True))
    b[:, 0] *= 1.5
    assert metrics.frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-9)
    assert metrics.frechet_distance(a.astype(np.float32), b) == pytest.approx(by_definition(a, b), rel=1e-5)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-12)
    assert metrics.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(4 * width)


def test_frechet_distance_of_fewer_pictures_than_features():
    """Independent axes have a closed form, also where covariances are not of full rank."""
    draw = np.random.default_rng(0)
    axes = np.linalg.qr(draw.standard_normal((40, 40)))[0]
    spread = np.linalg.qr(np.concatenate([np.ones((5, 1)), draw.standard_normal((5, 2))], axis=1))[0][:, 1:]
    a, b = (spread @ (np.diag(scales) @ axes[:2]) for scales in ((3.0, 1.0), (1.0, 2.0)))  # covariances: squares / 4
    assert metrics.frechet_distance(a, b) == pytest.approx((4 + 1) / 4, rel=1e-12)
    assert metrics.frechet_distance(a, spread @ axes[2:4]) == pytest.approx((9 + 1 + 1 + 1) / 4, rel=1e-12)
    with pytest.raises(Emu3Error, match="needs at least 2 pictures, there are 1"):
        metrics.frechet_distance(a[:1], b)


# ------------------------------------------------------------------------------------------------ parts


def test_pictures_are_cut_as_the_field_does():
    ramp = np.zeros((40, 101, 3), np.uint8)
    ramp[..., 0] = np.arange(101)
    whole = Image.fromarray(ramp)
    same = np.asarray(cut(whole, 40))
    np.testing.assert_array_equal(same, ramp[:, 30:70])  # round(30.5) is 30
    resized = whole.resize((50, 20), Image.Resampling.BICUBIC)  # int(50.5)
    np.testing.assert_array_equal(np.asarray(cut(whole, 20)), np.asarray(resized)[:, 15:35])
    assert cut(Image.new("RGB", (3, 5)), 16).size == (16, 16)


def test_a_folder_of_pictures(tmp_path):
    root = tmp_path / "pictures"
    for name in ("b.png", "a/c.JPG", "a/d.webp", ".hidden/e.png", "a/.f.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
        if not name.startswith("."):
            Image.new("RGB", (30, 20)).save(root / name, format="PNG")
    (root / "notes.txt").write_text("no picture")
    folder = PictureFolder(root)
    assert folder.files == ["a/c.JPG", "a/d.webp", "b.png"]
    assert folder.pixels("b.png", 10).shape == (10, 10, 3)
    for bad, words in ((tmp_path / "none", "does not exist"), (root / "b.png", "is a file")):
        with pytest.raises(Emu3Error, match=words):
            PictureFolder(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Emu3Error, match="holds no pictures"):
        PictureFolder(tmp_path / "empty")


def test_a_function_of_pictures(functions, capsys):
    colours = PictureFunction.load(f"{functions}:colours", "features", 60)
    given = pictures(3)
    np.testing.assert_allclose(colours(given, dims=2), pictures(3).mean(axis=(1, 2)))
    np.testing.assert_array_equal(given, pictures(3))  # the function's changes stay in its copy
    far = PictureFunction.load(f"{functions}:far", "pairwise", 60)
    np.testing.assert_allclose(far(given, 255 - given, dims=1), metrics.distance(given, 255 - given) + 1)
    assert (colours.name, far.name) == ("colours", "far") and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", r"returned an array of shape \[\] for 3 pictures: return one of \[3, D\]"),
        ("few", r"returned an array of shape \[1\]"),
        ("nan", "returned NaN or infinity"),
        ("fails", r"functions.py:fails line \d+: KeyError: 'no\\nsuch picture'; correct the file"),
        ("leaves", "SystemExit: 0"),
        ("far", "far: TypeError: far.. missing 1 required"),
    ],
)
def test_functions_that_fail(functions, name, words):
    function = PictureFunction.load(f"{functions}:{name}", "features", 60)
    with pytest.raises(Emu3Error, match=words):
        function(pictures(3), dims=2)


def test_functions_that_cannot_be_loaded(functions):
    broken = functions.with_name("broken.py")
    for text, words in (("import nowhere\n", "line 1: ModuleNotFoundError"), ("def x(:\n", "line 1: SyntaxError")):
        broken.write_text(text)
        with pytest.raises(Emu3Error, match=words):
            PictureFunction.load(f"{broken}:x", "features", 60)
    for name in ("number", "absent"):
        with pytest.raises(Emu3Error, match=f"the file defines no function {name}"):
            PictureFunction.load(f"{functions}:{name}", "features", 60)
    with pytest.raises(Emu3Error, match="there is no such file"):
        PictureFunction.load("absent.py:x", "pairwise", 60)
    with pytest.raises(Emu3Error, match=r"must be FILE\.py:NAME"):
        PictureFunction.load("judge", "pairwise", 60)


@pytest.mark.parametrize(
    ("field", "value"),
    [("side", 0), ("side", 1.5), ("features", "inception"), ("features", 3), ("pairwise", "judge"), ("pictures", ""),
     ("timeout", 0), ("timeout", float("inf"))],
)  # fmt: skip
def test_configs_are_checked(field, value):
    with pytest.raises(Emu3Error, match=field):
        ReconstructionConfig(**{field: value})


def test_a_file_that_takes_too_long(functions):
    slow = functions.with_name("slow.py")
    slow.write_text("import time\ntime.sleep(1e5)\n")
    with pytest.raises(
        Emu3Error, match=r"pairwise .*slow.py:x: it took longer than 0.2 s; correct the file, or raise "
    ):
        PictureFunction.load(f"{slow}:x", "pairwise", 0.2)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def photos(tmp_path):
    """Seven pictures of several sizes and formats."""
    root, draw = tmp_path / "photos", np.random.default_rng(0)
    root.mkdir()
    for number in range(7):
        coarse = draw.integers(0, 256, (4 + number, 9 - number, 3), np.uint8)
        name = root / f"{number}.{('png', 'webp')[number % 2]}"
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(name, lossless=True)
    return root


@pytest.fixture
def evaluate(tiny_bundle, photos, tmp_path):
    """Runs the command with `--set` of the given fields; returns its exit code."""

    def run(**fields) -> int:
        given = {"model": tiny_bundle, "data": photos, "batch_size": 4, "rows": 5, "reconstruction.side": SIDE} | fields
        sets = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
        return main(["evaluate", str(CONFIG), "-o", str(tmp_path / "out"), "--quiet", *sets])

    return run


def test_a_folder_from_end_to_end(evaluate, tiny_bundle, photos, functions, capsys, tmp_path):
    further = {"features": f"{functions}:colours", "pairwise": f"{functions}:far", "pictures": tmp_path / "kept"}
    assert evaluate(**{f"reconstruction.{name}": value for name, value in further.items()}) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)["reconstruction"]

    folder = PictureFolder(photos)
    true = np.stack([folder.pixels(file, SIDE) for file in folder.files])
    reconstruct = Reconstructor(emu3_jax.load(tiny_bundle).vision, 4, progress=False)
    codes = reconstruct.encode(true)
    again = reconstruct.decode(codes)
    counts = metrics.code_counts(codes, 64)
    distance = metrics.frechet_distance(*(x.mean(axis=(1, 2)) for x in (true, again)))
    assert figures["pictures"] == {
        "cases": 7,
        "side": SIDE,
        "psnr_db": pytest.approx(metrics.psnr(true, again).mean(), abs=1e-5),
        "ssim": pytest.approx(metrics.ssim(true, again).mean(), abs=1e-5),
        "frechet_distance": {
            "features": "colours", "distance": pytest.approx(distance, abs=1e-5), "pictures": 7, "dimensions": 3,
            "full_rank": True,
        },
        "pairwise": {"far": pytest.approx(metrics.distance(true, again).mean() + 1, abs=1e-5)},
    }  # fmt: skip
    assert figures["codebook"] == {
        "codes": 64, "counted": codes.size, "use_percent": pytest.approx(100 * (counts > 0).mean(), abs=1e-5),
        "perplexity": pytest.approx(metrics.perplexity(counts), abs=1e-5),
    }  # fmt: skip
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/png") == 2 * 5
    for name, expected in (("true", true), ("reconstructed", again)):
        files = sorted((tmp_path / "kept" / name).iterdir())
        assert [file.name for file in files] == [f"{number:06}.png" for number in range(7)]
        np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), expected)

    # Fewer cases are the same ones each time, also in a size that the model's other commands would reduce.
    small = {"cases": 3, "reconstruction.side": 72}
    assert evaluate(**small) == evaluate(**small) == 0
    first, second = capsys.readouterr().out.split("}\n{")
    assert first.strip("{}\n") == second.strip("{}\n") and '"cases": 3' in first


@pytest.mark.slow
def test_a_folder_with_the_vision_tokenizer_of_emu35(photos, tmp_path):
    config = EvaluateConfig(
        directory=str(tmp_path), data=str(photos), figures=("reconstruction",), batch_size=4, rows=0,
        reconstruction=ReconstructionConfig(side=32),
    )  # fmt: skip
    folder, reconstruct = open_data(config), Reconstructor(vision_of_emu35(), 4, progress=False)
    figures, _ = measure(folder, config, reconstruct, skipped={}, progress=False)
    true = np.stack([folder.pixels(file, 32) for file in folder.files])
    assert figures["pictures"]["psnr_db"] == pytest.approx(metrics.psnr(true, reconstruct(true)).mean(), abs=0.01)
    assert figures["codebook"]["counted"] == reconstruct.encode(true).size


def test_too_few_pictures_for_the_features_are_told(capsys):
    comparison = Comparison(Features("colours", lambda x: x.mean(axis=(1, 2))), None, None)
    comparison.add(pictures(3), pictures(3) // 2)
    assert comparison.figures()["frechet_distance"]["full_rank"] is False
    assert "the covariances of 3 features of 3 pictures are not of full rank" in capsys.readouterr().err


def test_bad_input_gets_one_line_and_writes_nothing(evaluate, photos, functions, capsys, tmp_path):
    def error_of(**fields) -> str:
        fields = {name.replace("__", "."): value for name, value in fields.items()}
        assert evaluate(**{"reconstruction.pictures": tmp_path / "kept"} | fields) == 2
        error = capsys.readouterr().err
        assert error.startswith("emu3-jax: error: ") and error.count("\n") == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "kept").exists()
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".emu3-tmp")]
        return error

    assert "does not exist" in error_of(data=tmp_path / "none")
    assert "none/items.jsonl" in error_of(data=tmp_path / "none", figures="('reconstruction','motion')")
    assert "reconstruction.side is 20" in error_of(reconstruction__side=20)
    assert "must be FILE.py:NAME, judge or None" in error_of(reconstruction__features="inception")
    assert "need evaluation data" in error_of(reconstruction__features="judge")
    assert "returned NaN or infinity" in error_of(reconstruction__features=f"{functions}:nan")
    assert "have 2 numbers for a picture, and 1 for an earlier one" in error_of(
        reconstruction__features=f"{functions}:growing"
    )
    assert "shape [1] for 4 pictures" in error_of(reconstruction__pairwise=f"{functions}:few")
    assert "needs at least 2 pictures" in error_of(reconstruction__features=f"{functions}:ones", cases=1)
    assert "photos exists already" in error_of(reconstruction__pictures=photos)
    assert "it is inside" in error_of(reconstruction__pictures=photos / "kept")
    (photos / "3.webp").write_bytes((photos / "3.webp").read_bytes()[:40])
    assert "3.webp" in error_of()


@pytest.mark.slow
def test_a_function_that_hangs_ends_the_command(photos, functions, tiny_bundle, tmp_path):
    """In a process of its own, which also has to exit."""
    fields = {"model": tiny_bundle, "data": photos, "reconstruction.side": SIDE, "reconstruction.timeout": 1}
    fields |= {"reconstruction.features": f"{functions}:hangs", "reconstruction.pictures": tmp_path / "kept"}
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "emu3_jax", "evaluate", str(CONFIG), "-o", str(tmp_path / "out"), "--quiet", *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert f"error: features {functions}:hangs: it took longer than 1 s; correct the file, or" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["functions.py", "helper.py", "photos"]
