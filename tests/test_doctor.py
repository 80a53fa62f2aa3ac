"""The doctor finds each silent fault that it promises to find, and none in a sound model."""

import functools
import importlib.metadata
import json
import shutil

import checkpoint_cases as cases
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.doctor import doctor
from emu3_jax.errors import Emu3Error

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A published checkpoint without fault; not to be changed."""
    directory = cases.transformers_5(tmp_path_factory.mktemp("source") / "sound")
    edit(directory, image_area=4096)
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return directory


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


def edit(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def complaints(path):
    """Level and sentence of everything that is not well."""
    findings = doctor(path, progress=False)
    assert all(f.remedy for f in findings if f.level == "warn")
    return [f"{f.level}: {f.what}" for f in findings if f.level != "ok"]


def assert_one(found, start):
    assert len(found) == 1 and found[0].startswith(start), found


def test_sound_models_have_no_complaint(source, tmp_path):
    assert complaints(source) == []
    assert complaints(convert([source], tmp_path / "bundle").path) == []
    assert doctor(source, progress=False)[0].what == (
        "a published checkpoint of the transformers 5 layout: decoder and vision"
    )


def test_the_golden_checkpoint_is_sound(golden_checkpoint):
    assert complaints(golden_checkpoint / "lm") == complaints(golden_checkpoint / "vq") == []


EMBEDDING, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"


def poison(value):
    def change(weights):
        weights[HEAD][3, 5] = value

    return change


def clear(weights):
    weights[HEAD][:] = 0


def tie(weights):
    weights[HEAD] = weights[EMBEDDING].copy()


def reset_statistics(weights):
    for name in weights:
        if name.endswith(("running_mean", "running_var")):
            weights[name][:] = float(name.endswith("running_var"))


def cast(dtype, *starts):
    def change(weights):
        for name in weights:
            if name.startswith(starts) and weights[name].dtype == np.float32:
                weights[name] = weights[name].astype(dtype)

    return change


VALUE_FAULTS = [
    (poison(np.nan), "error: 1 weights hold NaN or infinity"),
    (poison(-np.inf), "error: 1 weights hold NaN or infinity"),
    (clear, "error: 1 weights are zero throughout"),
    (tie, "error: "),
    (reset_statistics, "warn: the vision tokenizer's batch norms have mean 0 and variance 1 everywhere"),
    (cast(ml_dtypes.bfloat16, "model.vqmodel."), "warn: the vision tokenizer is stored in bfloat16"),
    (cast(np.float16, "model.text_model.", HEAD), "warn: the decoder is stored in float16"),
    (cast(ml_dtypes.bfloat16, HEAD), "warn: the decoder's weights mix bfloat16, float32"),
]


@pytest.mark.parametrize(("change", "complaint"), VALUE_FAULTS)
def test_faults_of_values(copy, tmp_path, change, complaint):
    """In the published directory and in the bundle made of it."""
    edit_weights(copy, change)
    for path in (copy, convert([copy], tmp_path / "bundle").path):
        assert_one(complaints(path), complaint)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_infinity_is_seen_in_short_dtypes_and_large_numbers_are_not(copy, dtype):
    edit_weights(copy, lambda w: (cast(dtype, "model.text_model.", HEAD)(w), w[HEAD].fill(ml_dtypes.finfo(dtype).max)))
    assert not [c for c in complaints(copy) if "infinity" in c]
    edit_weights(copy, poison(np.inf))
    assert_one([c for c in complaints(copy) if "infinity" in c], "error: 1 weights hold NaN or infinity, first lm_head")


def test_tied_head_is_explained(copy):
    edit_weights(copy, tie)
    assert_one(complaints(copy), f"error: {HEAD} and {EMBEDDING} are identical: the head was tied")


def test_misfits_of_names_and_shapes(copy):
    def change(weights):
        weights["model.text_model.stray"] = weights.pop("model.text_model.norm.weight")

    edit_weights(copy, change)
    assert complaints(copy) == [
        "error: weights: 1 missing: model.text_model.norm.weight",
        "error: weights: 1 unmapped: model.text_model.stray",
    ]


def test_fields_that_default_silently(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["text_config"]["rope_parameters"], config["image_area"]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "preprocessor_config.json").unlink()
    found = complaints(copy)
    assert len(found) == 3 and all(c.startswith("warn: ") for c in found)
    assert "no preprocessor_config.json" in found[0] and "no rope_theta" in found[1] and "no image_area" in found[2]


def test_a_field_out_of_range_does_not_stop_the_examination(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0
    (copy / "config.json").write_text(json.dumps(config))
    edit_weights(copy, clear)
    found = complaints(copy)
    assert [c.split(":")[0] for c in found] == ["error", "error"]
    assert "rms_norm_eps is 0" in found[0] and "zero throughout" in found[1]


def test_bad_values_of_published_files_name_the_file(copy):
    """Each with the field as the file calls it, the value, what is legal and the remedy, in one line."""
    edit(copy, text_config=[])
    assert_one(complaints(copy), "error: ")
    edit(copy, text_config={"num_hidden_layers": 0})
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": 0}))
    must = "it must be a whole number > 0; correct it in config.json"
    image = "it must be three finite numbers > 0; correct it in preprocessor_config.json"
    assert complaints(copy) == [
        f"error: {copy / 'preprocessor_config.json'}: config field image_std is (0, 0, 0): {image}",
        f"error: {copy / 'config.json'}: config field num_hidden_layers is 0: {must}",
    ]
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_processor": 3}))
    assert "config field image_processor is 3: it must be an object" in complaints(copy)[0]


def test_vocabularies(copy):
    (copy / "emu3.tiktoken").unlink()
    assert_one(complaints(copy), "warn: there is no vocabulary file")
    cases.write_vocabulary(copy / "emu3.tiktoken")
    (copy / "emu3_vision_tokens.txt").write_text("<|image token|>\n")
    found = complaints(copy)
    assert_one(found, "error: ")
    assert "emu3_vision_tokens.txt lists 1 tokens, but this model has 67" in found[0]


def test_codes_without_an_id(copy, tmp_path):
    bundle = convert([copy], tmp_path / "bundle").path
    (bundle / "SHA256SUMS").unlink()
    file = bundle / "decoder" / "config.json"
    config = json.loads(file.read_text())
    config["tokens"]["visual_count"] -= 1
    file.write_text(json.dumps(config))
    found = [c for c in complaints(bundle) if "SHA256SUMS" not in c]
    assert found == ["error: the decoder has 63 visual ids, the vision tokenizer 64 codes"]


def test_padded_and_extended_vocabularies(copy, tmp_path):
    """Neither is a fault; without a vocabulary and `vocabulary_map` nothing tells the ids."""
    edit_weights(copy, functools.partial(cases.pad_vocabulary, rows=9))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] += 9
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "added_tokens.json").write_text(json.dumps({"gluon": cases.TOKENS.visual_end + 2}))
    for path in (copy, convert([copy], tmp_path / "bundle").path):
        assert complaints(path) == []
        sentences = [finding.what for finding in doctor(path, progress=False)]
        assert "the embedding has 9 rows past the visual tokens, whose ids end at 530" in sentences
        assert "the vocabulary has 534 tokens, 1 of them added after training" in sentences
    del config["vocabulary_map"], config["text_config"]["bos_token_id"]
    (copy / "config.json").write_text(json.dumps(config))
    assert complaints(copy) == []
    (copy / "emu3.tiktoken").unlink()
    (complaint,) = complaints(copy)
    assert "vocab_size is 540, not the published 184622, and nothing says which ids" in complaint
    assert complaint.endswith("copy the model's vocabulary (emu3.tiktoken or tokenizer.json) beside config.json")


def test_bundles_without_a_part_and_with_the_wrong_template(source, tmp_path):
    bundle = convert([source], tmp_path / "My-Stage1", template="chat").path
    assert_one(complaints(bundle), "warn: the prompt template is 'chat', but the name My-Stage1 says Stage1")
    shutil.rmtree(bundle / "vision")
    shutil.rmtree(bundle / "tokenizer")
    assert complaints(bundle) == ["warn: the bundle has no vision part", "warn: the bundle has no tokenizer part"]


def test_damage_is_a_finding(copy, tmp_path):
    bundle = convert([copy], tmp_path / "bundle").path
    (bundle / "vision" / "weights" / "_METADATA").unlink()
    found = complaints(bundle)
    assert_one(found, "error: ")
    assert "a file of the bundle is missing: " in found[0] and "vision/weights/_METADATA" in found[0]
    (bundle / "SHA256SUMS").unlink()  # as bundles of older versions
    (held,) = [line for line in complaints(bundle) if line.startswith("error: ")]
    assert "vision/weights holds" in held
    (copy / "model.safetensors").write_bytes(b"short")
    assert_one(complaints(copy), "error: ")
    with pytest.raises(Emu3Error, match="is not a directory: give a bundle or a checkpoint directory"):
        doctor(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("version", "bad"),
    [
        ("4.44.0", 0),
        ("4.51.3", 0),
        ("4.52.0", 1),
        ("4.57.1", 1),
        ("5.0.0rc1", 1),
        ("5.22.1", 1),
        ("5.23.0", 0),
        (None, 0),
    ],
)
def test_oracles_that_drop_pictures(golden_checkpoint, monkeypatch, version, bad):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert len([c for c in complaints(golden_checkpoint / "vq") if "drop the pictures" in c]) == bad
