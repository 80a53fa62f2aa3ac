"""Training on preference pairs: it learns them, resumes exactly, and gives the same results on every mesh."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
from config_files import write_config
from pair_cases import picture_pairs

from emu3_jax import Emu3Error
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.pairs import write_pairs
from emu3_jax.data.sequences import Preference, TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training import decoder_job, references, runner
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.loop import train
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.preference_config import PreferenceConfig

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow, pytest.mark.usefixtures("shared_trainers")]

STEPS = 12


@pytest.fixture(scope="module")
def data(tiny_bundle, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("pairs") / "data"
    write_pairs(picture_pairs(), directory, bundle_codebook(Bundle.open(tiny_bundle)))
    return str(directory)


@pytest.fixture(scope="module")
def base(tiny_bundle, data) -> TrainConfig:
    source = Source(data, Preference())
    return TrainConfig(
        directory="",
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig((source,), sequence_length=48, packing=0),
        batch_size=8,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=1),
        preference=PreferenceConfig(cross_entropy=0.1),
        mesh="fsdp=1",
        checkpoint_every=5,
        evaluation=(("pairs", source),),
        evaluate_every=STEPS,
    )


@pytest.fixture(scope="module")
def config_file(base, tmp_path_factory) -> pathlib.Path:
    """A file that holds `base`."""
    return write_config(tmp_path_factory.mktemp("config") / "pairs.py", base)


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", str(config_file), "--set", f"directory={directory}", "--quiet"]) == 0
    return directory


def lines(directory, group="train") -> list[dict]:
    others = ("seconds", "tokens_per_second", "group")
    found = [line for line in read_metrics(pathlib.Path(directory)) if line["group"] == group]
    return [{name: value for name, value in line.items() if name not in others} for line in found]


def test_it_learns_the_pairs(whole):
    first, last = lines(whole)[0], lines(whole)[-1]
    assert first["loss"] == pytest.approx(np.log(2) + 0.1 * first["cross_entropy"], abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5) and first["pairs"] == 4
    assert last["margin"] > 0.5 and last["accuracy"] == 1 and last["loss"] < first["loss"]
    (evaluated,) = lines(whole, "evaluation/pairs")
    assert evaluated["pairs"] == 12 and evaluated["accuracy"] == 1


def test_what_the_command_says(config_file, whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    changes = ["preference.beta=0.2", f"directory={run}"]  # constants may change, as the learning rate may
    assert main(["train", str(config_file), *(word for change in changes for word in ("--set", change))]) == 0
    said = capsys.readouterr().err
    assert "a step: 8 rows (4 pairs) of 48 tokens" in said and "data: 12 pairs in" in said
    assert "evaluation every 12 steps: pairs (12 pairs)" in said
    assert f"to use it: emu3-jax generate 'text 0' --model {run}/model -o out/pictures" in said


# ------------------------------------------------------------------------------------------------ resuming


class Killed(Exception):
    pass


def kill(*_):
    raise Killed


def test_a_stopped_run_resumes_exactly(base, whole, tmp_path, monkeypatch):
    """It is stopped in the pass over the reference, and again after a checkpoint."""
    config = dataclasses.replace(base, directory=str(tmp_path / "run"))
    monkeypatch.setattr(references, "_SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        write = references.References._write
        patch.setattr(references.References, "_write", lambda *arguments: (write(*arguments), kill()))
        with pytest.raises(Killed):
            train(config, progress=False)
    (file,) = (tmp_path / "run/reference").iterdir()
    assert np.isfinite(np.load(file)).all(axis=1).sum() == 4, "what was computed is kept"
    with monkeypatch.context() as patch:
        patch.setattr(runner._Loop, "_stopping", lambda at, _: at.step == 7)
        assert train(config, progress=False).step == 7
    np.testing.assert_array_equal(np.load(file), np.load(next((whole / "reference").iterdir())))
    monkeypatch.setattr(decoder_job.DecoderJob, "_load_params", kill)  # nothing is computed again
    train(config, progress=False)
    assert lines(tmp_path / "run") == lines(whole)
    trained = [Bundle.open(run / "model").arrays("decoder") for run in (tmp_path / "run", whole)]
    for (param, found), (_, wanted) in zip(*trained, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=str(param.path))


def test_another_reference_is_refused(base, whole, tmp_path, tiny_bundle, monkeypatch):
    run = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(decoder_job, "part_digest", lambda *_: "0" * 64)
    with pytest.raises(Emu3Error, match="holds checkpoints of another model: its reference has decoder"):
        train(dataclasses.replace(base, directory=str(run)), progress=False)


def test_a_damaged_file_is_named(base, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (file,) = (run / "reference").iterdir()
    for content in (b"", file.read_bytes()[:-4], b"\x80\x04N."):  # the last one is a pickle
        file.write_bytes(content)
        with pytest.raises(Emu3Error, match=f"{file.name}.*[:;] delete it, and run again"):
            train(dataclasses.replace(base, directory=str(run)), progress=False)


# ------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(("mesh", "accumulation"), [("data=2,fsdp=2", 1), ("fsdp=1,sequence=2,tensor=2", 4)])
def test_meshes_and_microbatches_change_nothing(base, whole, tmp_path, mesh, accumulation):
    config = dataclasses.replace(base, directory=str(tmp_path), mesh=mesh, accumulation=accumulation, evaluation=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Loop, "_stopping", lambda at, _: at.step == 3)
        train(config, progress=False)
    for found, wanted in zip(lines(tmp_path), lines(whole)[:3], strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            if name == "accuracy" and wanted["margin"] == pytest.approx(0, abs=2e-5):
                continue  # the model still equals its reference, so which side it prefers is rounding
            assert found[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name
    assert abs(wanted["margin"]) > 1e-3, "the last step compares accuracies"


@pytest.fixture(scope="module")
def adapted(base) -> TrainConfig:
    optimizer = dataclasses.replace(base.optimizer, learning_rate=1e-2)
    return dataclasses.replace(base, adapter=Adapter(rank=4, base="float32"), optimizer=optimizer, steps=6)


@pytest.fixture(scope="module")
def adapters_off(adapted, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that computes the reference in each step."""
    directory = tmp_path_factory.mktemp("adapters") / "run"
    preference = dataclasses.replace(adapted.preference, reference="adapters_off")
    train(dataclasses.replace(adapted, directory=str(directory), preference=preference), progress=False)
    return directory


def test_stored_references_and_adapters_off_are_one(adapted, adapters_off, tmp_path):
    assert not (adapters_off / "reference").exists() and lines(adapters_off)[-1]["accuracy"] == 1
    train(dataclasses.replace(adapted, directory=str(tmp_path / "run")), progress=False)
    for found, wanted in zip(lines(tmp_path / "run"), lines(adapters_off), strict=True):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


def test_simpo_needs_no_reference(base, tmp_path):
    config = dataclasses.replace(base, directory=str(tmp_path / "run"), preference=PreferenceConfig("simpo", beta=2.0))
    train(dataclasses.replace(config, steps=3, evaluate_every=3), progress=False)
    assert not (tmp_path / "run/reference").exists()
    assert lines(tmp_path / "run")[-1]["margin"] > lines(tmp_path / "run")[0]["margin"]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": None}, "preference is None: it must be a PreferenceConfig where data.sources have the task"),
        ({"batch_size": 6, "accumulation": 2}, "batch_size is 6: it must be a multiple of 4: a pair takes two rows"),
        ({"preference": PreferenceConfig(reference="adapters_off")}, "reference is 'adapters_off': it must be stored"),
        (
            {"evaluation": (("x", Source("", TextToImage())),)},
            "it must be sources with the task Preference if and only",
        ),
        ({"mesh": "fsdp=8"}, "batch_size is 8, and the mesh splits rows into 8 parts .*, and 2 rows belong together"),
    ],
)
def test_bad_configs(base, tmp_path, changes, message):
    with pytest.raises(Emu3Error, match=message):
        train(dataclasses.replace(base, directory=str(tmp_path / "run"), **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_suit_pairs(base):
    for field, value in {"dropout": 0.1, "noise": 0.5}.items():
        with pytest.raises(Emu3Error, match=f"{field} is {value}: it must be 0 where preference pairs are trained"):
            dataclasses.replace(base, model=dataclasses.replace(base.model, **{field: value}))
    with pytest.raises(Emu3Error, match=r"pairs.*need packing=0"):
        dataclasses.replace(base.data, packing=8)
    other = Source(base.data.sources[0].path, TextToImage())
    with pytest.raises(Emu3Error, match="sources has preference pairs beside other data"):
        dataclasses.replace(base.data, sources=(*base.data.sources, other))
    with pytest.raises(Emu3Error, match=r"holds pairs .*, but records are needed"):
        train(
            dataclasses.replace(
                base, directory="unused", preference=None, data=DataConfig((other,), 48), evaluation=()
            ),
            progress=False,
        )
