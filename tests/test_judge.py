"""Metrics of pictures against their definitions, and a judge that learns and is kept."""

import os

import numpy as np
import pytest
from tiny_bundle import SIDE

from emu3_jax import Emu3Error
from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.config import JudgeConfig
from emu3_jax.evaluation.judge import get_judge, train

pytestmark = pytest.mark.compiled_quickly

TOY = JudgeConfig(steps=60, batch_size=16, width=8)  # one for all tests: what takes long is compiling it
FAILS = "the test must not come here"


# ------------------------------------------------------------------------------------------------ metrics


def pictures(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_psnr():
    a = pictures(2)
    b = a.copy()
    b[1] ^= 1  # every value one off
    np.testing.assert_allclose(metrics.psnr(a, b), [metrics.EQUAL_PSNR, 20 * np.log10(255)])
    np.testing.assert_allclose(metrics.psnr(a * 0, a * 0 + 255), 0)


def ssim_of_windows(x: np.ndarray, y: np.ndarray) -> float:
    """Equations 13 to 17 of Wang et al. for one channel, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (p[row : row + 11, column : column + 11].astype(float) for p in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * both + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def test_ssim():
    a = pictures(3)
    b = np.clip(a // 2 + pictures(3, seed=1) // 3 + 20, 0, 255).astype(np.uint8)
    b[2] = a[2]
    expected = [np.mean([ssim_of_windows(x[..., c], y[..., c]) for c in range(3)]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.ssim(a, b), expected, rtol=1e-9)
    assert expected[2] == pytest.approx(1) and expected[0] < 0.9
    with pytest.raises(Emu3Error, match="10x10"):
        metrics.ssim(pictures(1, 10), pictures(1, 10))


def test_use_of_the_codebook():
    counts = metrics.code_counts(np.array([[[0, 1], [2, 3]]] * 5), 8)
    assert counts.tolist() == [5, 5, 5, 5, 0, 0, 0, 0]
    assert metrics.perplexity(counts) == pytest.approx(4)
    assert metrics.perplexity(np.array([3, 0, 0])) == pytest.approx(1)


def test_nearest_picture(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 4)  # several blocks, the last one filled up
    among = pictures(10, 12)
    asked = np.concatenate([among[[7, 2]], pictures(2, 12, seed=1)])
    asked[1, 0, 0, 0] ^= 128
    far = np.abs(asked[:, None].astype(float) - among[None].astype(float)).mean(axis=(2, 3, 4))
    indices, distances = metrics.nearest(asked, among)
    np.testing.assert_array_equal(indices, far.argmin(axis=1))
    np.testing.assert_allclose(distances, far.min(axis=1))
    np.testing.assert_allclose(metrics.distance(asked, among[indices]), distances)
    assert distances[0] == 0


def test_motion_energy():
    clips = np.zeros((3, 4, 2, 2, 3), np.uint8)
    clips[1, 2:] = 255  # one of three steps, in all pixels; downwards and upwards alike
    clips[2, 1, 0, 0, 0] = 10  # two of three steps, in one of twelve values
    np.testing.assert_allclose(metrics.motion_energy(clips), [0, 255**2 / 3, 100 * 2 / 3 / 12])
    np.testing.assert_allclose(metrics.motion_energy(clips, power=1), [0, 255 / 3, 10 * 2 / 3 / 12])
    np.testing.assert_allclose(metrics.motion_energy(255 - clips), metrics.motion_energy(clips))


# ------------------------------------------------------------------------------------------------ the judge


@pytest.fixture(scope="module")
def toy():
    """Four concepts that differ in the quarter of the picture that is light."""
    labels = np.tile(np.arange(4), 12)
    drawn = pictures(len(labels), 16) // 4
    for picture, label in zip(drawn, labels, strict=True):
        row, column = divmod(int(label), 2)
        picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 150
    return drawn, labels


def test_a_judge_learns_and_is_kept(toy, tmp_path):
    drawn, labels = toy
    names = [f"concept {label}" for label in labels]
    learned, kept_out = drawn[:32], drawn[32:]
    judge = get_judge(tmp_path, TOY, learned, names[:32], reconstruct=lambda: learned, tokenizer="t", progress=False)
    assert judge.concepts == ("concept 0", "concept 1", "concept 2", "concept 3") and judge.pictures == 32
    assert (judge.ranks(kept_out, names[32:], batch_size=5) == 0).mean() > 0.9
    assert judge.verdicts(kept_out) == judge.verdicts(kept_out, batch_size=3)
    chances = np.stack([judge.probabilities(kept_out, [concept] * 16) for concept in judge.concepts])
    np.testing.assert_allclose(chances.sum(axis=0), 1)
    assert [judge.concepts[i] for i in chances.argmax(axis=0)] == judge.verdicts(kept_out)

    again = get_judge(
        tmp_path, TOY, learned, names[:32], reconstruct=lambda: pytest.fail(FAILS), tokenizer="t", progress=False
    )
    assert again.file == judge.file and os.listdir(tmp_path) == [judge.file.name]
    np.testing.assert_array_equal(again.ranks(drawn, names), judge.ranks(drawn, names))

    others = [
        get_judge(tmp_path, TOY, learned, names[:32], reconstruct=lambda: learned, tokenizer="another"),
        get_judge(tmp_path, TOY, learned[::-1], names[:32], reconstruct=lambda: learned, tokenizer="t"),
    ]
    assert len({judge.file, *(other.file for other in others)}) == 3
    judge.file.write_bytes(judge.file.read_bytes()[:100])
    with pytest.raises(Emu3Error, match="delete the file"):
        get_judge(tmp_path, TOY, learned, names[:32], reconstruct=lambda: learned, tokenizer="t")
    with pytest.raises(Emu3Error, match="needs at least two"):
        get_judge(tmp_path, TOY, learned, ["one"] * 32, reconstruct=lambda: learned, tokenizer="t")


def test_training_a_judge_twice_gives_the_same(toy):
    drawn, labels = toy
    first, second = (train(TOY, drawn[:32], drawn[:32], labels[:32], 4, progress=False) for _ in range(2))
    other = train(TOY, drawn[:32], 255 - drawn[:32], labels[:32], 4, progress=False)  # reconstructions are seen too
    np.testing.assert_array_equal(first["Dense_0"]["kernel"], second["Dense_0"]["kernel"])
    assert not np.array_equal(first["Dense_0"]["kernel"], other["Dense_0"]["kernel"])


def test_a_judge_that_cannot_be_kept(toy, tmp_path, capsys):
    drawn, labels = toy
    judge = get_judge(
        tmp_path / "absent",
        TOY,
        drawn[:32],
        [str(label) for label in labels[:32]],
        reconstruct=lambda: drawn[:32],
        tokenizer="t",
    )
    assert judge.file is None and "trains it again" in capsys.readouterr().err
