"""Training the vision tokenizer: the step's parts, the loop, its checkpoints, and the bundle at its end."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.cli.main import main
from emu3_jax.config import VisionConfig
from emu3_jax.data.pixels import PixelData
from emu3_jax.errors import Emu3Error
from emu3_jax.media.clips import save_clip
from emu3_jax.models.vision import VisionTokenizer
from emu3_jax.models.vision_layers import Numerics
from emu3_jax.models.vision_temporal import CausalConv3d, TemporalDownsample, TemporalUpsample
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.training import vision as vision_loop
from emu3_jax.training import vision_step
from emu3_jax.training.config import OptimizerConfig
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.vision import train_vision
from emu3_jax.training.vision_config import LossConfig, PixelConfig, VisionTrainConfig
from emu3_jax.training.vision_losses import structural_similarity
from emu3_jax.training.vision_step import VisionTrainer, augmented, nearest

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow]

# As few layers as there can be: most of the time goes into compiling. One recipe for all tests is compiled once.
VISION = VisionConfig(
    codebook_size=64,
    temporal_factor=2,
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    attention_stages=(),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Eight pictures and four clips of coloured rectangles, 16x16."""
    directory = tmp_path_factory.mktemp("pictures")
    rng, lines = np.random.default_rng(0), []

    def picture():
        pixels = np.full((16, 16, 3), 255, np.uint8)
        top, left = rng.integers(0, 8, 2)
        pixels[top : top + 8, left : left + 8] = rng.integers(0, 256, 3)
        return pixels

    for index in range(8):
        Image.fromarray(picture()).save(directory / f"{index}.png")
        lines.append({"image": f"{index}.png", "text": "a rectangle"})
    for index in range(4):
        save_clip(np.stack([picture() for _ in range(6)]), directory / f"{index}.webp", 8)
        lines.append({"clip": f"{index}.webp", "text": "rectangles"})
    lines.append({"text": "no picture"})
    file = directory / "manifest.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def config(manifest, tmp_path):
    return VisionTrainConfig(
        directory=str(tmp_path / "run"),
        vision=VISION,
        pixels=PixelConfig((str(manifest),), size=16, stills=4, clips=2, frames=4, in_memory=True, workers=2),
        steps=8,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=1, clip_norm=1.0, eps=1e-8
        ),
        loss=LossConfig(structure=0.1),
        average=0.5,
        evaluation=(str(manifest),),
        evaluate_every=4,
        checkpoint_every=4,
        log_every=1,
        mesh="data=1",
        keep=3,
    )


@pytest.fixture(scope="module")
def trainers():
    """`VisionTrainer`, but one for all configs with the same programs: they are traced and compiled once."""

    @functools.cache
    def made(config, mesh):
        return VisionTrainer(config, mesh)

    def trainer(config, mesh):
        return made(dataclasses.replace(config, directory="", evaluation=(), export_dtype="float32"), mesh)

    return trainer


@pytest.fixture
def in_loops(trainers, monkeypatch):
    """Training loops take their trainers from there."""
    monkeypatch.setattr(vision_loop, "VisionTrainer", trainers)


def batch(config, number=0):
    p = config.pixels
    data = PixelData(p.manifests, p.size, p.frames, in_memory=True, workers=1)
    return data.batch(number, p.stills, p.clips)


# ------------------------------------------------------------------------------------------------ the parts


def test_stills_and_clips_together_are_as_they_are_alone(config, trainers):
    rng = np.random.default_rng(0)
    stills = jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    clips = jnp.asarray(rng.uniform(-1, 1, (1, 8, 16, 16, 3)), jnp.float32)
    model = VisionTokenizer(VISION)
    variables = {"params": trainers(config, make_mesh("data=1")).initial_state().params}

    @jax.jit
    def together(variables):
        return model.apply(variables, stills, clips, lambda z: z, method="reconstruct")

    @jax.jit
    def alone(variables):
        still, clip = (model.apply(variables, x, method="latents") for x in (stills, clips))
        drawn = (
            model.apply(variables, still, True, method="decode_vectors"),
            model.apply(variables, clip, False, method="decode_vectors")[0],
        )
        return jnp.concatenate([still.reshape(-1, 4), clip.reshape(-1, 4)]), jnp.concatenate(drawn)

    for found, expected in zip(together(variables), alone(variables), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("layer", "frames"),
    [
        (lambda numerics: CausalConv3d(numerics, 6), 1),
        (lambda numerics: CausalConv3d(numerics, 6, (3, 3, 3)), 5),
        (TemporalDownsample, 8),
        (TemporalUpsample, 3),
    ],
)
def test_convolutions_of_folded_frames(layer, frames):
    x = jax.random.normal(jax.random.key(0), (2, frames, 6, 5, 4))

    folded, plain = (
        layer(numerics)
        for numerics in (Numerics(jnp.dtype(jnp.float32), tf32_pairs=False, differentiated=True), Numerics())
    )
    parameters, trained = (nn.unbox(jax.jit(m.init)(jax.random.key(1), x)) for m in (plain, folded))
    jax.tree.map(np.testing.assert_array_equal, trained, parameters)
    outputs, slopes = [], []
    for module in (folded, plain):
        outputs.append(jax.jit(module.apply)(parameters, x))
        slopes.append(jax.jit(jax.grad(lambda p, m=module: (m.apply(p, x) ** 3).sum()))(parameters))
    np.testing.assert_allclose(*outputs, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), *slopes)


def test_dead_codes_become_the_worst_coded_latents(config, trainers):
    trainer = trainers(config, make_mesh("data=1"))
    state = trainer.initial_state()
    codebook = state.params["quantize"]["embedding"]
    # Almost all latents are a code; one lies far off, and every dead code moves there.
    latents = jnp.tile(codebook[:1], (500, 1)).at[77].set(codebook[0] + 5)
    found = jax.jit(trainer._codes)(state, latents, jnp.zeros(500, jnp.int32), jax.random.key(0))[0]
    np.testing.assert_allclose(found[1:], jnp.tile(latents[77], (len(codebook) - 1, 1)), atol=1e-6)


def test_nearest_code_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    latents, codebook = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 5, 4), (64, 4)))
    expected = ((latents[..., None, :] - codebook[None, None]) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest(latents, codebook), expected)
    monkeypatch.setattr(vision_step, "_SCORES", 4 * 64)
    np.testing.assert_array_equal(nearest(latents, codebook), expected)


def test_similarity_is_1_for_equals_and_less_for_others():
    a, b = (jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (1, 16, 16, 3)), jnp.float32) for seed in (0, 1))
    assert structural_similarity(a, a) == pytest.approx(1, abs=1e-5)
    assert abs(structural_similarity(a, b)) < 0.3


def test_augmentation_keeps_some_pictures_and_treats_frames_alike(config):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    settings = dataclasses.replace(config.pixels, augment=0.5)
    compiled = jax.jit(augmented, static_argnums=2)
    found = np.asarray(compiled(pixels, jax.random.key(0), settings))
    kept = np.isclose(found, pixels / 127.5 - 1, atol=1e-6).all(axis=(1, 2, 3))
    assert 16 < kept.sum() < 48
    assert np.abs(found).max() <= 1
    clips = np.repeat(pixels[:8, None], 3, axis=1)
    changed = np.asarray(compiled(clips, jax.random.key(0), dataclasses.replace(settings, augment=1.0)))
    np.testing.assert_allclose(changed[:, 0], changed[:, 2], atol=1e-6)
    assert np.abs(changed[:, 0] - (pixels[:8] / 127.5 - 1)).max() > 0.1


def test_batches_follow_from_seed_and_number(manifest):
    data = PixelData([str(manifest)], 16, 4, in_memory=True, workers=2, seed=1)
    lazy = PixelData([str(manifest)], 16, 4, in_memory=False, workers=2, seed=1)
    batches = data.batches(3, 4, 2)
    for number, found in zip(range(3, 6), batches, strict=False):
        for kind, expected in lazy.batch(number, 4, 2).items():
            np.testing.assert_array_equal(found[kind], expected)
    batches.close()
    # Two batches of four are one epoch of the eight pictures.
    epoch = np.concatenate([data.batch(number, 4, 0)["stills"] for number in (0, 1)])
    assert len(np.unique(epoch.reshape(8, -1), axis=0)) == 8
    halves = [data.batch(0, 4, 2, slice(part, None, 2)) for part in (0, 1)]
    np.testing.assert_array_equal(halves[1]["stills"], data.batch(0, 4, 2)["stills"][1::2])
    assert data.identity == lazy.identity != PixelData([str(manifest)], 16, 4, in_memory=False, workers=1).identity


def test_tables_give_what_single_files_give(manifest):
    held = PixelData((str(manifest),), 16, 6, in_memory=True, workers=1, seed=3)
    read = PixelData((str(manifest),), 16, 6, in_memory=False, workers=1, seed=3)
    assert held._tables["stills"] is not None and held._tables["clips"] is not None and read._tables["clips"] is None
    for number in range(4):  # over several epochs of eight pictures and four clips
        for part in (slice(None), slice(1, None, 2)):
            found, expected = (data.batch(number, 5, 3, part) for data in (held, read))
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_larger_pictures_are_scaled_and_cropped(tmp_path):
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "wide.png")
    (tmp_path / "m.jsonl").write_text('{"image": "wide.png", "text": ""}\n')
    data = PixelData([str(tmp_path / "m.jsonl")], 16, 4, in_memory=False, workers=1)
    assert data.batch(0, 2, 0)["stills"].shape == (2, 16, 16, 3)


# ------------------------------------------------------------------------------------------------ the step


def test_a_step_follows_statistics_and_revives_codes(config, trainers):
    trainer = trainers(config, make_mesh("data=1"))
    state = trainer.initial_state()
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = trainer.step(state, batch(config))  # with a learning rate of 0
    assert metrics["codes_revived"] > 56  # at the start every code becomes a latent of the data
    assert all(np.isfinite(float(value)) for value in metrics.values())
    norm = state.params["encoder"]["time_res_stack_0"]["norm1"]
    assert float(jnp.abs(norm["mean"]).max()) > 0 and float(jnp.abs(norm["var"] - 1).max()) > 1e-3
    state, metrics = trainer.step(state, batch(config, 1))
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), state.params, before)
    assert all(value > 0 for value in jax.tree.leaves(moved))
    assert metrics["codes_revived"] < 56 and 0 < metrics["codes_used"] <= 1


def test_a_mesh_changes_nothing(config, trainers):
    found = []
    for mesh in ("data=1", "data=2"):
        trainer = trainers(config, make_mesh(mesh))
        state, _ = trainer.step(trainer.initial_state(), jax.device_put(batch(config), trainer.batch_sharding))
        found.append(trainer.step(state, jax.device_put(batch(config, 1), trainer.batch_sharding))[1])
    for name in ("loss", "gradient_norm", "psnr"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-3)


def test_the_discriminator_waits_for_its_step(config):
    config = dataclasses.replace(config, loss=LossConfig(adversarial=0.5, adversarial_from=1), dtype="bfloat16")
    trainer = VisionTrainer(config, make_mesh("data=1"))
    state = trainer.initial_state()
    first = jax.tree.map(np.asarray, state.discriminator[0])
    state, metrics = trainer.step(state, batch(config))
    assert metrics["adaptive_weight"] == 0
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(state.discriminator[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = trainer.step(state, batch(config, 1))
    assert metrics["adaptive_weight"] > 0
    state, metrics = trainer.step(state, batch(config, 2))
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert any(np.abs(a - np.asarray(b)).max() > 0 for a, b in zip(
        jax.tree.leaves(first), jax.tree.leaves(state.discriminator[0]), strict=True
    ))  # fmt: skip


# ------------------------------------------------------------------------------------------------ the loop


def test_a_run_and_one_that_goes_on_are_equal_and_export_what_they_evaluated(config, in_loops, tmp_path, capsys):
    whole = train_vision(config, progress=False)
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run") if line["group"] == "train"}
    assert losses[8] < losses[1]
    evaluated = [line for line in read_metrics(tmp_path / "run") if line["group"] == "evaluation/stills"]
    assert [line["step"] for line in evaluated] == [4, 8] and evaluated[-1]["cases"] == 8
    assert (tmp_path / "run" / "samples" / "00000008.png").exists()

    again = dataclasses.replace(config, directory=str(tmp_path / "again"), export_dtype="bfloat16")
    train_vision(again, progress=False)
    # As if killed after the checkpoint of step 4: what came later is not there.
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    train_vision(again, progress=False)
    resumed = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "again") if line["group"] == "train"}
    assert resumed == losses

    model = emu3_jax.load(whole.model)
    folder = pathlib.Path(config.pixels.manifests[0]).parent
    pictures = [np.asarray(Image.open(folder / f"{index}.png")) for index in range(8)]
    drawn = model.detokenize(model.tokenize(pictures))
    errors = [((np.asarray(a, float) - b) ** 2).mean() for a, b in zip(drawn, pictures, strict=True)]
    assert np.mean(10 * np.log10(255**2 / np.asarray(errors))) == pytest.approx(evaluated[-1]["psnr"], abs=0.05)

    half = Bundle.open(tmp_path / "again" / "model")
    assert {str(array.dtype) for array in half.stored("vision").values()} == {"bfloat16"}
    assert main(["convert", str(tmp_path / "run"), "-o", str(tmp_path / "converted")]) == 0
    assert Bundle.open(tmp_path / "converted").vision_config == VISION
    # A tokenizer that is there already can be trained on.
    further = dataclasses.replace(config, directory=str(tmp_path / "further"), bundle=str(whole.model), evaluation=())
    capsys.readouterr()
    train_vision(further, progress=True)
    assert read_metrics(tmp_path / "further")[0]["loss"] < losses[1]
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == f"train: 8 steps, in {tmp_path}/further"
    assert re.fullmatch(r"trained: all [\d,]+ parameters of a vision tokenizer", lines[1])
    assert lines[2:5] == [
        "a step: 4 pictures and 2 clips of 4 frames, each of 16x16 pixels",
        f"data: 8 pictures, 4 clips in {config.pixels.manifests[0]}",
        "devices: 1 (cpu)",
    ]
    assert re.fullmatch(r"the first step took \d+ s, compilation included; a step takes .+ of each device", lines[7])
    step = r"step \d of 8: loss [\d.]+, psnr [\d.]+ dB, \d+% of the codes(, time left \d+ s)?"
    assert all(re.fullmatch(step, line) for line in lines[8:-2]) and lines[-3].startswith("step 8 of 8: ")
    assert lines[-1] == f"to use it: emu3-jax tokenize PICTURE --model {tmp_path}/further/model -o out/codes.npz"


def test_a_loss_that_is_not_finite_stops_the_run(config, in_loops, monkeypatch):
    start = VisionTrainer.initial_state

    def broken(self, params=None):
        state = start(self, params)
        return state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))

    monkeypatch.setattr(VisionTrainer, "initial_state", broken)
    with pytest.raises(Emu3Error, match=r"the loss is nan .* at step 1; there is no checkpoint yet; lower"):
        train_vision(dataclasses.replace(config, evaluation=()), progress=False)


def test_blocks_that_are_computed_again(config):
    """Traced, not compiled: the step of large crops."""
    trainer = VisionTrainer(dataclasses.replace(config, remat=True), make_mesh("data=1"))
    program = jax.make_jaxpr(trainer.step)(trainer.abstract_state(), trainer.abstract_batch())
    assert "remat" in str(program)


def test_bad_input(config, manifest, tmp_path, capsys):
    def fails(match, **changes):
        with pytest.raises(Emu3Error, match=match):
            train_vision(dataclasses.replace(config, **changes), progress=False)

    pixels = config.pixels
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    fails("contain no pictures", pixels=dataclasses.replace(pixels, manifests=(str(tmp_path / "text.jsonl"),)))
    fails("smaller than a crop of 32", pixels=dataclasses.replace(pixels, size=32))
    fails("no such file|cannot read", pixels=dataclasses.replace(pixels, manifests=("absent.jsonl",)))
    fails("a multiple of 4, the size of mesh axis data", mesh="data=4", pixels=dataclasses.replace(pixels, stills=6))
    with pytest.raises(Emu3Error, match="a multiple of 2"):
        dataclasses.replace(config, pixels=dataclasses.replace(pixels, size=17))
    with pytest.raises(Emu3Error, match="a multiple of 2"):
        dataclasses.replace(config, pixels=dataclasses.replace(pixels, frames=5))
    with pytest.raises(Emu3Error, match="stills is 0"):
        dataclasses.replace(pixels, stills=0, clips=0)
    with pytest.raises(Emu3Error, match="dtype is 'float16'"):
        dataclasses.replace(config, dtype="float16")
    file = tmp_path / "config.py"
    file.write_text("def config(): return 3\n")
    assert main(["train", str(file)]) == 2
    assert "needs a TrainConfig or VisionTrainConfig" in capsys.readouterr().err


def test_other_pictures_or_another_model_are_refused(config, in_loops):
    config = dataclasses.replace(config, evaluation=())
    train_vision(config, progress=False)
    other = dataclasses.replace(config, pixels=dataclasses.replace(config.pixels, seed=7))
    with pytest.raises(Emu3Error, match="was trained on other data"):
        train_vision(other, progress=False)
    other = dataclasses.replace(config, vision=dataclasses.replace(VISION, codebook_size=32))
    with pytest.raises(Emu3Error, match="another model"):
        train_vision(other, progress=False)
