"""Emu3.5's vision tokenizer from published files to codes: every form of them, there and back, and bad input."""

import json
import os
import pathlib
import shutil

import emu35_vision
import huggingface_hub
import numpy as np
import pytest
from commands import run
from conftest import GOLDEN, golden_json, golden_npz
from emu35 import weights, write_decoder
from hostile import damaged, damaged_json, examples, gives_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

import emu3_jax
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.doctor import doctor
from emu3_jax.checkpoints.export import export
from emu3_jax.checkpoints.published import Published
from emu3_jax.checkpoints.published_config import ibq_from_published, ibq_to_published
from emu3_jax.checkpoints.yaml_config import read_yaml_object
from emu3_jax.config import AreaConfig, IbqConfig
from emu3_jax.errors import Emu3Error

PICTURES = ("photo", "alpha", "gray", "tall", "large")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
    """`model.safetensors` and `config.json`; not to be changed."""
    return emu35_vision.write_vision(tmp_path_factory.mktemp("published") / "vq")


@pytest.fixture(scope="module")
def bundle(published, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("bundles") / "ibq"
    convert([published], path, progress=False)
    return path


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


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------------------------------------ there and back


def test_there_and_back(published, bundle, tmp_path):
    made = Bundle.open(bundle)
    assert (made.vision_config, made.image_config) == (emu35_vision.CONFIG, AreaConfig(1024 * 1024))
    assert not made.has("decoder") and not made.has("tokenizer")
    assert json.loads((bundle / "vision" / "config.json").read_text())["vision"]["kind"] == "ibq"
    export(made, tmp_path / "back", "upstream", progress=False)
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", "model.safetensors"]
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), weights("vq"))
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text()) == golden_json("emu35/hf_configs.json")["vq_flat"]
    )


@pytest.mark.slow
def test_beside_a_decoder(published, vocabulary, tmp_path):
    """Both parts of Emu3.5 in one bundle, and back."""
    decoder = write_decoder(tmp_path / "lm", vocabulary)
    made = convert([decoder, published], tmp_path / "bundle", progress=False)
    assert made.decoder_config.tokens.visual_count == made.vision_config.codebook_size == 131072
    assert not [finding for finding in doctor(tmp_path / "bundle", progress=False) if finding.level != "ok"]
    export(made, tmp_path / "back", "upstream", progress=False)
    for directory, part in {"language_model": "lm", "vision_tokenizer": "vq"}.items():
        assert_same_bits(load_file(tmp_path / "back" / directory / "model.safetensors"), weights(part))


@pytest.mark.oracle
@pytest.mark.parametrize("nested", [False, True])
def test_ckpt_and_yaml(bundle, tmp_path, nested, monkeypatch):
    """`model.ckpt` and `config.yaml`, with and without "state_dict"."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in weights("vq").items()}
    source = tmp_path / "vq"
    source.mkdir()
    torch.save({"state_dict": state, "global_step": 7} if nested else state, source / "model.ckpt")
    (source / "config.yaml").write_text(emu35_vision.yaml_text())
    assert not [finding for finding in doctor(source, progress=False) if finding.level == "error"]
    # The hub has the same files.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(source))
    made = convert(["BAAI/Emu3.5-VisionTokenizer"], tmp_path / "made", progress=False)
    assert made.vision_config == Bundle.open(bundle).vision_config
    export(made, tmp_path / "back", "upstream", progress=False)
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), weights("vq"))


def test_both_forms_of_the_config_are_one(tmp_path):
    forms = golden_json("emu35/hf_configs.json")
    assert ibq_from_published(forms["vq"]) == ibq_from_published(forms["vq_flat"]) == emu35_vision.CONFIG
    (tmp_path / "config.yaml").write_text(emu35_vision.yaml_text())
    assert read_yaml_object(tmp_path / "config.yaml") == forms["vq"]
    assert ibq_to_published(emu35_vision.CONFIG) == forms["vq_flat"]
    full = ibq_from_published(golden_json("emu35/vq.json")["config"])
    assert full == IbqConfig()


def test_doctor_has_nothing_against_it(published, bundle):
    for path in (published, bundle):
        findings = doctor(path, progress=False)
        assert {finding.level for finding in findings} <= {"ok", "warn"}
        warned = [
            finding.what for finding in findings if finding.level == "warn" and "transformers" not in finding.what
        ]
        assert warned == (["the bundle has no decoder part", "the bundle has no tokenizer part"] * (path == bundle))


def test_doctor_finds_what_is_missing(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attn_resolutions": [16, 32], "embed_dim": 16}))
    (finding,) = [f for f in doctor(copy, progress=False) if f.level == "error" and "missing" in f.what]
    assert "encoder.down.3.attn.0.norm.weight" in finding.what


# ------------------------------------------------------------------------------------------------ the command line


def test_commands(published, here, capsys):
    """Convert, tokenize and detokenize on a bundle of this part alone."""
    assert run("convert", published, "-o", "bundle", "--quiet") == 0
    assert run("doctor", "bundle", "--quiet") == 0
    files = [GOLDEN / "emu35" / f"{name}.png" for name in PICTURES]
    assert run("tokenize", *files, "--area", 2304, "--model", "bundle", "-o", "codes.npz", "--quiet") == 0
    golden = golden_npz("emu35/images.npz")
    with np.load("codes.npz") as codes:
        assert sorted(codes) == sorted(PICTURES)
        for name in PICTURES:
            assert codes[name].dtype == np.int32
            np.testing.assert_array_equal(codes[name], golden[f"{name}/codes"])
    drawn = golden_npz("emu35/vision.npz")
    np.savez("drawn.npz", drawn=drawn["drawn_codes/codes"][0])
    assert run("detokenize", "drawn.npz", "--model", "bundle", "-o", "pictures", "--quiet") == 0
    with Image.open("pictures/drawn.png") as image:
        found = np.asarray(image).astype(int)
    exact = np.moveaxis(drawn["drawn_codes/reconstruction"][0], 0, -1)
    expected = ((exact + np.float32(1)) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    # Within the tolerance of 1e-4 a value may fall on the other side of a step.
    assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 0.01


def test_tiles(bundle):
    """In tiles of another size codes differ, but their number does not; one tile is the whole picture."""
    model = emu3_jax.load(bundle)
    file = GOLDEN / "emu35" / "photo.png"
    (whole,) = model.tokenize([file], area=96 * 96)
    (one,) = model.tokenize([file], area=96 * 96, tile=256)
    np.testing.assert_array_equal(one, whole)
    (tiled,) = model.tokenize([file], area=96 * 96, tile=64)
    assert tiled.shape == whole.shape
    (picture,) = model.detokenize([tiled], tile=64)
    assert picture.size == (16 * whole.shape[1], 16 * whole.shape[0])


def test_on_a_mesh(bundle):
    """Spread over two devices, its codes are the golden ones."""
    model = emu3_jax.load(bundle, mesh="fsdp=2", vision=bundle)
    (codes,) = model.tokenize([GOLDEN / "emu35" / "photo.png"], area=2304)
    np.testing.assert_array_equal(codes, golden_npz("emu35/images.npz")["photo/codes"])


def test_what_it_cannot_do(bundle, golden_bundle, error_of):
    photo, clip = GOLDEN / "emu35" / "photo.png", pathlib.Path("scripts/assets/emoji/star-moves-down.webp")
    clip = pathlib.Path(__file__).parents[1] / clip
    ours = ("--model", bundle, "--quiet")
    line = error_of("tokenize", clip, *ours, "-o", "codes.npz")
    assert "star-moves-down.webp: a clip: the vision tokenizer of Emu3.5 knows pictures alone" in line
    assert "area is 0: it must be a number of pixels" in error_of("tokenize", photo, "--area", 0, *ours, "-o", "c.npz")
    line = error_of("tokenize", photo, "--area", 2304, "--model", golden_bundle, "-o", "codes.npz")
    assert "area is 2304: this vision tokenizer resizes pictures of other areas" in line
    line = error_of("export", bundle, "--layout", "transformers", "-o", "back")
    assert "transformers has no class for Emu3.5's vision tokenizer: export it with --layout upstream" in line


def test_a_clip_of_codes_is_refused(bundle, error_of, here):
    np.savez("clip.npz", clip=np.zeros((2, 3, 4), np.int32))
    line = error_of("detokenize", "clip.npz", "--model", bundle, "-o", "pictures", "--quiet")
    assert "codes of a clip: the vision tokenizer of Emu3.5 knows pictures alone" in line
    np.savez("clip.npz", clip=np.full((3, 4), 131072, np.int32))
    line = error_of("detokenize", "clip.npz", "--model", bundle, "-o", "pictures", "--quiet")
    assert "code 131072 at [0, 0] is outside the codebook: codes must be from 0 to 131071" in line


# ------------------------------------------------------------------------------------------------ bad configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, "field double_z is True: it must be false"),
        ({"double_z": None}, "field double_z is None: it must be false"),
        ({"ch": 40}, "field ch is 40: it must be a multiple of 32"),
        ({"n_embed": 0}, "field n_embed is 0"),
        ({"ddconfig": 5}, "field ddconfig is 5: it must be an object"),
        ({"ddconfig": {"double_z": False}}, "has no z_channels, in_channels, out_ch, resolution, ch, ch_mult"),
    ],
)
def test_bad_configs(change, message):
    config = golden_json("emu35/hf_configs.json")["vq"]
    inner = {name: value for name, value in change.items() if name in config["ddconfig"]}
    config = config | {"ddconfig": config["ddconfig"] | inner} | {k: v for k, v in change.items() if k not in inner}
    with pytest.raises(Emu3Error, match=message):
        ibq_from_published(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not readable as YAML (expected ',' or ']', but got '<stream end>', line 1)"),
        ("a: &x [1]\nb: *x\n", "holds an alias (*name)"),
        ("- 1\n", "holds no object of named fields"),
        ("1: 2\n", "holds no object of named fields"),
        ("", "holds no object of named fields"),
        ("a: !!python/object/apply:os.getcwd []\n", "not readable as YAML (could not determine a constructor"),
        ("a: \x00", "not readable as YAML"),
        ("[" * 20_000 + "]" * 20_000, "20000 brackets; the limit is 200"),
        ("- " * 20_000, "nested too deeply"),
        ("a: 1\n" * 20_000, "the limit is 65,536"),
        ("a: 2024-99-99\n", "is damaged"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Emu3Error) as caught:
        read_yaml_object(tmp_path / "config.yaml")
    assert message in str(caught.value).replace(str(tmp_path), "") and len(str(caught.value)) <= 300


def test_a_directory_without_weights_or_config(tmp_path):
    (tmp_path / "config.yaml").write_text(emu35_vision.yaml_text())
    with pytest.raises(Emu3Error, match=r"no weights found; expected model\.safetensors, .* or model\.ckpt"):
        Published.open(tmp_path)
    (tmp_path / "config.yaml").rename(tmp_path / "other.yaml")
    with pytest.raises(Emu3Error, match=r"config\.json: not found"):
        Published.open(tmp_path)


@examples(100)
@given(data=st.data())
def test_hostile_configs(tmp_path_factory, data):
    """A result or one line, whatever the two files hold."""
    forms = golden_json("emu35/hf_configs.json")
    gives_or_refuses(lambda: ibq_from_published(data.draw(damaged_json(forms["vq"]))))
    gives_or_refuses(lambda: ibq_from_published(data.draw(damaged_json(forms["vq_flat"]))))
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_bytes(data.draw(damaged(emu35_vision.yaml_text().encode())))
    found = gives_or_refuses(lambda: read_yaml_object(file))
    if found is not None:
        gives_or_refuses(lambda: ibq_from_published(found))


def test_parts_of_two_families(published, vocabulary, golden_checkpoint, tmp_path):
    """Each decoder with the other family's vision tokenizer."""
    ours = write_decoder(tmp_path / "lm", vocabulary)
    with pytest.raises(Emu3Error, match=r"lm is a decoder of Emu3\.5, which has 131072 visual ids, but the vision"):
        convert([ours, golden_checkpoint / "vq"], tmp_path / "out", progress=False)
    with pytest.raises(Emu3Error, match=r"is a decoder of Emu3, but .* is the vision tokenizer of Emu3\.5"):
        convert([golden_checkpoint / "lm", published], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
