"""Config files of training: read, changed by `--set`, and refused."""

import dataclasses
import pathlib
import zipfile

import pytest
from config_files import write_config

from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig, load_config

BASE = TrainConfig(
    directory="",
    model=ModelConfig("model", dtype="float32"),
    data=DataConfig((Source("data", TextToImage(loss="all", prompt_dropout=0.3)),), sequence_length=64, packing=2),
    batch_size=2,
    steps=40,
    optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
    mesh="fsdp=2",
    checkpoint_every=10,
    keep=2,
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> pathlib.Path:
    """A file that holds `BASE`."""
    return write_config(tmp_path_factory.mktemp("config") / "small.py", BASE)


def test_config_files_and_overrides(config_file, tmp_path):
    changed = load_config(
        config_file, ["data.sources.0.weight=2", "optimizer.clip_norm=1", "data.seed=5", "mesh=tensor=2"]
    )
    assert changed.data.sources[0].weight == 2 and changed.data.seed == 5 and changed.mesh == "tensor=2"
    assert changed.optimizer.clip_norm == 1.0
    assert load_config(config_file) == BASE
    for override, reason in {
        "steps": "write path.to.field=value",
        "stepps=3": "did you mean steps",
        "data.sources.1.weight=2": "not an index from 0 to 0",
        "steps.more=2": "has no fields",
        "steps=many": "steps is 'many': it must be a whole number",
        "model.dropout=1": "dropout is 1",
        "model.noise=1.5": "noise is 1.5: it must be a number from 0 to 1",
        "batch_size=3": "",
    }.items():
        if reason:
            with pytest.raises(Emu3Error, match=reason):
                load_config(config_file, [override])
    with pytest.raises(Emu3Error, match="no such config file"):
        load_config(tmp_path / "absent.py")
    for text, reason in {
        "x = 1 +": r"bad\.py line 1: SyntaxError",
        "x = 1": "defines no function `config`",
        "x = 1\nx = 1 / 0": r"bad\.py line 2: ZeroDivisionError: division by zero; correct the file",
        "config = 5": "defines no function `config`",
        "def config():\n    import sys\n    sys.exit(0)": r"bad\.py line 3: SystemExit: 0; correct the file",
        "raise SystemExit": r"bad\.py line 1: SystemExit; correct",
        "class E(Exception):\n    __str__ = None\nraise E": r"bad\.py line 3: E; correct",
        "def config():\n    return config()": r"bad\.py line 2: RecursionError",
        "def config():\n    raise BaseException('x' * 10**6)": r"bad\.py line 2: BaseException: xxx",
        "x = '\0'": r"bad\.py.*null bytes",
        "x = " + "(" * 1000: r"bad\.py.*correct the file",
        "def config():\n    from emu3_jax.training.config import OptimizerConfig as O\n    return O(eps=0)": "eps is 0",
    }.items():
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(Emu3Error, match=reason):
            load_config(tmp_path / "bad.py")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("mesh=(1,2)", "mesh is"),
        ("steps=" + "9" * 5000, "steps is '999"),
        ("steps=10**9**9", r"steps is '10\*\*9\*\*9'"),
        ("steps=" + "[" * 10**5, "steps is '"),
        ("steps=" + "-" * 10**5 + "1", "steps is '"),
        ("steps={[]: 1}", "steps is"),
        ("steps=b'a'", "steps is b'a'"),
        ("steps=4294967296", "steps is 4294967296: it must be at most 2147483647"),
        ("seed=4294967296", "seed is 4294967296: it must be at most 4294967295"),
        ("directory=5", "directory is 5"),
        ("directory=a\0b", "directory: the path .* has a null character"),
        ("directory=xyz://b/run", r"directory: 'xyz://b/run': xyz:// addresses are not supported"),
        ("directory=gs://b/run", r"'gs://b/run': 'b' is not a legal bucket name"),
        ("model.bundle=s3://b/model", "s3:// addresses are not supported"),
        ("data.sources.0.path=https://h/d", "https:// addresses are not supported"),
        ("data.sources.0.path=" + "x" * 300, "too long"),
        ("data.sources.²=1", "is not an index"),
        ("data.sources.٣.path=x", "is not an index"),
        ("data.sources.-1.path=x", "is not an index"),
        ("data.sources=5", "sources is 5: it must be a tuple of Source"),
        ("data.sources=({},)", "must be a tuple of Source"),
        ("data.packing=1000000000", "packing is 1000000000"),
        ("data.sequence_length=1000000000", "sequence_length is 1000000000"),
        ("batch_size=1000000000", "batch_size is 1000000000: it must be less than"),
        ("model.dtype=[]", "dtype is"),
        ("model.unroll=0", "unroll is 0: it must be a whole number >= 1"),
        ("model.unroll=all", "unroll is 'all': it must be a whole number >= 1"),
        ("evaluation=[[]]", "evaluation is"),
        ("optimizer.algorithm=sgd", "algorithm is 'sgd': it must be adamw or muon"),
        ("profile={1, 2}", "profile is"),
        ("\x1b[31m=1", "has no field"),
        ("." * 1000 + "=1", "has no field ''"),
    ],
)
def test_odd_overrides(config_file, override, reason):
    with pytest.raises(Emu3Error, match=reason) as error:
        load_config(config_file, [override])
    assert str(error.value).startswith("--set ") and str(error.value).isprintable() and len(str(error.value)) <= 300


@pytest.mark.parametrize("name", ["config", "config.txt", "config.pyc", "config.zip", "config.py"])
@pytest.mark.parametrize("command", [["train"], ["evaluate"], ["plan", "--topology", "v5e:2x2"]])
def test_only_python_files_are_run(tmp_path, capfd, command, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("__main__.py", "print('it runs')")
    assert main([*command, str(tmp_path / name)]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "it runs" not in said.err
    if name != "config.py":
        assert f"{name}: a config file is a Python program, so its name must end in .py" in said.err
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "folder.py" / "__main__.py").write_text("print('it runs')")
    assert main([*command, str(tmp_path / "folder.py")]) == 2
    assert "no such config file" in capfd.readouterr().err


def test_what_a_config_prints_goes_to_standard_error(tmp_path, capsys):
    (tmp_path / "c.py").write_text("print('one')\ndef config():\n    print('two')\n    return 5\n")
    assert load_config(tmp_path / "c.py") == 5
    assert capsys.readouterr() == ("", "one\ntwo\n")


def test_the_command_names_the_culprit(config_file, capsys):
    assert main(["train", str(config_file), "--set", "model.remat=some"]) == 2
    assert "model.remat=some: ModelConfig field remat is 'some'" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["lora_t2i_8b", "vision_emoji"])
def test_muon_is_for_all_weights_of_a_decoder(config):
    file = pathlib.Path(__file__).parent.parent / "configs" / f"{config}.py"
    with pytest.raises(Emu3Error, match="algorithm is 'muon': it must be adamw for"):
        load_config(file, ["optimizer.algorithm=muon"])


@pytest.mark.parametrize("file", sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py")), ids=str)
def test_shipped_configs_are_legal(file):
    assert dataclasses.is_dataclass(load_config(file))
