"""Conversion and export: bit for bit there and back in every layout, live transformers on the far side, bad input."""

import builtins
import dataclasses
import errno
import json
import pathlib
import shutil
import weakref
from collections import namedtuple

import checkpoint_cases as cases
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import golden_json, reference_weights
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Emu3ForCausalLM, Emu3ForConditionalGeneration, Emu3VQVAE

import emu3_jax
from emu3_jax.checkpoints import bundle as bundle_module
from emu3_jax.checkpoints import parts
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.export import export
from emu3_jax.checkpoints.hub import fetch
from emu3_jax.checkpoints.tensors import Tensor
from emu3_jax.config import ImageConfig
from emu3_jax.errors import Emu3Error

pytestmark = [pytest.mark.oracle, pytest.mark.compiled_quickly]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A transformers 5 checkpoint; not to be changed."""
    return cases.transformers_5(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def bundle(source, tmp_path_factory):
    return convert([source], tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


# ------------------------------------------------------------------------------------------------ there and back


def test_upstream_there_and_back(golden_checkpoint, tmp_path):
    made = convert([golden_checkpoint / "lm", golden_checkpoint / "vq"], tmp_path / "bundle")
    assert [part for part in bundle_module.PARTS if made.has(part)] == ["decoder", "vision", "tokenizer"]
    assert (made.decoder_config.dtype, made.image_config.max_pixels) == ("float32", 16384)
    export(made, tmp_path / "back", "upstream")
    for part, directory in (("lm", "language_model"), ("vq", "vision_tokenizer")):
        cases.assert_same_bits(cases.tensors_of(tmp_path / "back" / directory), reference_weights(part))
    back = tmp_path / "back" / "language_model"
    assert (back / "emu3.tiktoken").read_bytes() == (golden_checkpoint / "lm" / "emu3.tiktoken").read_bytes()
    assert len((back / "emu3_vision_tokens.txt").read_text().split("\n")) == 3 + 32768 + 1
    for part, directory in (("lm", "language_model"), ("vq", "vision_tokenizer")):
        before = golden_json("hf_configs.json")[part]
        after = json.loads((tmp_path / "back" / directory / "config.json").read_text())
        differing = {k for k in after.keys() & before.keys() if after[k] != before[k]}
        assert differing <= {"architectures", "torch_dtype", "attention_dropout"}
    again = convert([tmp_path / "back" / "language_model", tmp_path / "back" / "vision_tokenizer"], tmp_path / "again")
    assert again.decoder_config == made.decoder_config
    assert (again.vision_config, again.image_config) == (made.vision_config, made.image_config)


@pytest.mark.parametrize(
    "write", [cases.transformers_5, cases.standalone_decoder, cases.standalone_vision, cases.bin_shards]
)
def test_transformers_there_and_back(write, tmp_path):
    source = write(tmp_path / "source")
    export(convert([source], tmp_path / "bundle"), tmp_path / "back", "transformers")
    cases.assert_same_bits(cases.tensors_of(tmp_path / "back"), cases.tensors_of(source))


def test_transformers_4_there_and_back(tmp_path):
    """The decoder in bfloat16, the vision tokenizer in float32; the names come back as transformers 5's."""
    source = cases.transformers_4(tmp_path / "source")
    made = convert([source], tmp_path / "bundle")
    assert made.decoder_config.dtype == "bfloat16"
    export(made, tmp_path / "back", "transformers")

    def renamed(name):
        for old, new in (("text_model.lm_head.", "lm_head."), ("text_model.model.", "model.text_model.")):
            name = name.replace(old, new) if name.startswith(old) else name
        return f"model.{name}" if name.startswith("vqmodel.") else name

    expected = {renamed(name): array for name, array in cases.tensors_of(source).items()}
    cases.assert_same_bits(cases.tensors_of(tmp_path / "back"), expected)


@pytest.mark.parametrize("vocabulary", ["emu3.tiktoken", "tokenizer.json", "vocabulary_map"])
def test_padded_and_extended_vocabularies(source, bundle, tmp_path, vocabulary):
    """As `resize_token_embeddings` leaves them: rows past the visual tokens, two for new words, the others for none."""
    words = {"gluon": cases.TOKENS.visual_end, "[PAD]": cases.TOKENS.visual_end + 1}
    export(bundle, tmp_path / "padded", "transformers")
    padded = tmp_path / "padded"
    weights = load_file(padded / "model.safetensors")
    cases.pad_vocabulary(weights, rows=13)
    save_file(weights, padded / "model.safetensors")
    config = json.loads((padded / "config.json").read_text())
    config["text_config"] |= {"vocab_size": config["text_config"]["vocab_size"] + 13, "pad_token_id": words["[PAD]"]}
    if vocabulary != "vocabulary_map":
        del config["vocabulary_map"]
    (padded / "config.json").write_text(json.dumps(config))
    if vocabulary == "emu3.tiktoken":
        cases.write_vocabulary(padded / "emu3.tiktoken")
        (padded / "added_tokens.json").write_text(json.dumps(words))
    else:
        tokenizer = json.loads((padded / "tokenizer.json").read_text())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        tokenizer["added_tokens"] += [{"content": word, "id": i, **flags} for word, i in words.items()]
        (padded / "tokenizer.json").write_text(json.dumps(tokenizer))
    made = convert([padded], tmp_path / "bundle")
    assert made.decoder_config.tokens == dataclasses.replace(cases.TOKENS, pad=words["[PAD]"])
    assert made.decoder_config.vocab_size == cases.TOKENS.visual_end + 13
    assert made.tokenizer().added == words
    assert made.tokenizer().encode("a gluon") == [*bundle.tokenizer().encode("a "), words["gluon"]]
    for layout in ("transformers", "upstream"):
        export(made, tmp_path / layout, layout)
        directories = [tmp_path / layout / name for name in ("language_model", "vision_tokenizer")]
        again = convert(directories if layout == "upstream" else [tmp_path / layout], tmp_path / f"{layout}-bundle")
        assert again.decoder_config.tokens == made.decoder_config.tokens
        assert again.decoder_config.vocab_size == made.decoder_config.vocab_size
        assert again.tokenizer().added == words
        export(again, tmp_path / f"{layout}-back", "transformers")
        cases.assert_same_bits(cases.tensors_of(tmp_path / f"{layout}-back"), weights)


def test_a_padded_model_draws_and_answers_the_same(source, bundle, tmp_path, copy):
    weights = load_file(copy / "model.safetensors")
    cases.pad_vocabulary(weights, rows=13)
    save_file(weights, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] += 13
    (copy / "config.json").write_text(json.dumps(config))
    models = [emu3_jax.load(path) for path in (bundle.path, convert([copy], tmp_path / "padded").path)]
    first, second = (model.generate_sequences("a", area=32 * 32, top_k=8, seed=1)[0] for model in models)
    np.testing.assert_array_equal(first.ids, second.ids)
    # A new row is the others' mean, which is never the likeliest: the answers are the same, too.
    answers = [model.chat([[]], "b", max_new_tokens=8) for model in models]
    assert answers[0] == answers[1]


def test_between_the_families(bundle, source, tmp_path):
    """transformers -> bundle -> upstream -> bundle -> transformers, in shards."""
    export(bundle, tmp_path / "upstream", "upstream", shard_bytes=100_000)
    shards = sorted((tmp_path / "upstream" / "vision_tokenizer").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    parts = [tmp_path / "upstream" / name for name in ("language_model", "vision_tokenizer")]
    again = convert(parts, tmp_path / "again")
    assert again.num_batches_tracked == bundle.num_batches_tracked and min(again.num_batches_tracked.values()) > 1
    export(again, tmp_path / "back", "transformers", shard_bytes=100_000)
    cases.assert_same_bits(cases.tensors_of(tmp_path / "back"), cases.tensors_of(source))


# ------------------------------------------------------------------------------------------------ live transformers


def strictly_loaded(cls, directory):
    loaded, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def test_the_exported_model_computes_the_same_in_transformers(bundle, tmp_path):
    export(bundle, tmp_path / "back", "transformers", shard_bytes=100_000)
    loaded, original = strictly_loaded(Emu3ForConditionalGeneration, tmp_path / "back"), cases.model()
    ids = torch.randint(0, cases.RANKS, (2, 9), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16, 16]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)
        codes = [m.get_image_tokens(pixels, sizes) if hasattr(m, "get_image_tokens") else
                 m.model.get_image_tokens(pixels, sizes) for m in (loaded, original)]  # fmt: skip
    assert torch.equal(*codes)


@pytest.mark.parametrize(
    ("write", "cls"), [(cases.standalone_decoder, Emu3ForCausalLM), (cases.standalone_vision, Emu3VQVAE)]
)
def test_single_parts_load_in_transformers(write, cls, tmp_path):
    export(convert([write(tmp_path / "source")], tmp_path / "bundle"), tmp_path / "back", "transformers")
    strictly_loaded(cls, tmp_path / "back")


def test_the_exported_tokenizer_cuts_text_as_upstream_does(golden_checkpoint, tmp_path):
    made = convert([golden_checkpoint / "lm"], tmp_path / "bundle")
    export(made, tmp_path / "back", "transformers")
    exported = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert len(exported) == 184622
    for text, ids in ((c["text"], c["ids"]) if isinstance(c, dict) else c for c in golden_json("text.json")["encode"]):
        if "<|extra_0|>" not in text:  # transformers' picture placeholder has its id
            assert exported.encode(text, add_special_tokens=False) == ids, text
    back = convert([tmp_path / "back"], tmp_path / "again").tokenizer()
    assert back.encode("a best_quality picture.com\n\n 它") == made.tokenizer().encode(
        "a best_quality picture.com\n\n 它"
    )


@pytest.mark.parametrize(
    ("template", "rendered"),
    [("chat", "You are a helpful assistant. USER: <image>What?. ASSISTANT:"), ("stage1", "<image>What?")],
)
def test_the_exported_chat_template_is_upstreams(source, tmp_path, template, rendered):
    export(convert([source], tmp_path / "bundle", template=template), tmp_path / "back", "transformers")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == rendered


# ------------------------------------------------------------------------------------------------ options


def test_dtype_casts_the_decoder_and_leaves_the_vision_tokenizer(source, bundle, tmp_path):
    cast = convert([source], tmp_path / "cast", dtype="bfloat16")
    assert cast.decoder_config.dtype == "bfloat16"
    stored = dict(cast.arrays("decoder"))
    for (param, array), (_, original) in zip(stored.items(), bundle.arrays("decoder"), strict=True):
        assert array.dtype == ml_dtypes.bfloat16
        assert array.tobytes() == original.astype(ml_dtypes.bfloat16).tobytes(), param.name
    assert {a.dtype for _, a in cast.arrays("vision")} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [("Emu3-Stage1", None, "stage1"), ("Emu3-Gen", None, "chat"), ("Emu3-Stage1", "chat", "chat")],
)
def test_the_template_follows_the_name_or_the_argument(copy, tmp_path, name, chosen, expected):
    assert convert([copy.rename(tmp_path / name)], tmp_path / "out", template=chosen).template == expected


def test_a_hub_id_is_downloaded(source, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns, tqdm_class):
        asked.append((repo, "*.safetensors" in allow_patterns, "*.py" in allow_patterns))
        names = ["config.json", "../x.json", "sub/x.json", "/x.json", "..\\x.json"]
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(kept) == ["config.json"], "a name with separators could lead out of the cache"
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    convert(["BAAI/Emu3-Gen"], tmp_path / "out")
    assert asked == [("BAAI/Emu3-Gen", True, False)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["config.json", "model.safetensors", "model.ckpt", "config.yaml", "run.py"],
         ["config.json", "config.yaml", "model.safetensors"]),
        (["config.json", "pytorch_model.bin", "emu3.tiktoken"], ["config.json", "emu3.tiktoken", "pytorch_model.bin"]),
        (["config.yaml", "model.ckpt", "README.md", "last.ckpt"], ["config.yaml", "model.ckpt"]),
        (["config.json"], ["config.json"]),
    ],
)  # fmt: skip
def test_one_form_of_the_weights_is_downloaded(tmp_path, monkeypatch, files, expected):
    """Emu3.5's vision tokenizer is published as safetensors, and as model.ckpt with config.yaml."""

    def snapshot_download(repo, allow_patterns, ignore_patterns, tqdm_class):
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in kept:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch("BAAI/Emu3.5-VisionTokenizer") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


class Tracked(np.ndarray):
    """A NumPy array that can tell when it is freed."""


def test_each_tensor_is_read_once_and_freed_before_the_next_array(source, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_WRITE_BYTES", 1)  # no small arrays together
    reads, alive, most = [], [0], [0]
    read = Tensor.read

    def freed():
        alive[0] -= 1

    def tracked_read(tensor):
        reads.append(tensor.name)
        array = read(tensor).view(Tracked)
        weakref.finalize(array, freed)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return array

    monkeypatch.setattr(Tensor, "read", tracked_read)
    convert([source], tmp_path / "out")
    assert sorted(reads) == sorted(cases.tensors_of(source))
    assert most[0] <= 3 + 1, "q, k and v make one array; one before them may still wait to be freed"


# ------------------------------------------------------------------------------------------------ bad input


def refused(match, *args, **kwargs):
    with pytest.raises(Emu3Error, match=match) as caught:
        convert(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_arguments(source, tmp_path):
    out = tmp_path / "out"
    refused("no SRC given", [], out)
    refused("dtype is 'int8': it must be float32, bfloat16, float16", [source], out, dtype="int8")
    refused("template is 'x': it must be chat or stage1", [source], out, template="x")
    refused("no such directory; give a checkpoint directory or a hub id", [tmp_path / "nowhere"], out)
    refused("both hold a decoder", [source, source], out)
    refused("exists already: choose another name", [source], tmp_path)
    refused(r"no weights found; expected model\.safetensors", [write_config_only(tmp_path / "empty")], out)
    assert not out.exists()
    with pytest.raises(Emu3Error, match="layout is 'jax': it must be upstream or transformers"):
        export(source, out, "jax")


def write_config_only(directory):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_the_hub_out_of_reach_or_not_installed(tmp_path, monkeypatch):
    refused(
        r"BAAI/Emu3-Nothing: no such directory, and the download from the hub failed",
        ["BAAI/Emu3-Nothing"],
        tmp_path / "o",
    )
    real = builtins.__import__

    def without_hub(name, *args):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    refused(r"pip install 'emu3-jax\[convert\]'", ["BAAI/Emu3-Gen"], tmp_path / "o")


def test_all_misfits_of_all_sources_are_reported_together(golden_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an error line has 300 characters, and pytest's paths are long
    lm, vq = (shutil.copytree(golden_checkpoint / part, pathlib.Path(part)) for part in ("lm", "vq"))
    weights = load_file(lm / "model.safetensors")
    weights["model.norm.stray"] = weights.pop("model.norm.weight")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][1:]
    save_file(weights, lm / "model.safetensors")
    weights = load_file(vq / "model.safetensors")
    del weights["encoder.conv_in.bias"]
    save_file(weights, vq / "model.safetensors")
    refused(
        r"1 missing: model\.norm\.weight; 1 unmapped: model\.norm\.stray; 1 misshapen: \S+up_proj\.weight \(found "
        r"\[159, 64\], expected \[160, 64\]\) \| .*vq: 1 missing: encoder\.conv_in\.bias",
        [lm, vq],
        tmp_path / "out",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lm", "vq"]


def test_picture_preprocessing_that_lacks_fields(source, copy, tmp_path, caplog):
    """What the file says holds, and what it lacks is told; of two files transformers' choice holds."""
    flat, nested = copy / "preprocessor_config.json", copy / "processor_config.json"
    flat.write_text(json.dumps({"min_pixels": 64, "max_pixels": 4096}))
    made = convert([copy], tmp_path / "flat").image_config
    assert made == ImageConfig(min_pixels=64, max_pixels=4096)
    assert "preprocessor_config.json has no image_mean, image_std: the published values are" in caplog.messages[-1]
    nested.write_text(json.dumps({"processor_class": "Emu3Processor"}))  # nothing about pictures
    assert convert([copy], tmp_path / "both").image_config == made
    whole = {"min_pixels": 16, "max_pixels": 256, "image_mean": 0.25, "image_std": [1, 2, 4]}
    nested.write_text(json.dumps({"image_processor": whole}))
    caplog.clear()
    expected = ImageConfig(16, 256, (0.25,) * 3, (1, 2, 4))
    assert convert([copy], tmp_path / "nested").image_config == expected
    assert caplog.messages == []
    flat.unlink()
    nested.write_text(json.dumps({"image_processor": {**whole, "spatial_factor": 8}}))
    refused(r"spatial_factor is 8: it must be 2, as of the vision tokenizer", [copy], tmp_path / "out")
    nested.write_text(json.dumps({"image_processor": 5}))
    refused(
        r"processor_config\.json: config field image_processor is 5: it must be an object", [copy], tmp_path / "out"
    )


def test_damaged_sources(copy, tmp_path):
    out, weights, config = tmp_path / "out", copy / "model.safetensors", copy / "config.json"
    whole, described = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-1])
    refused(r"model\.safetensors: truncated: its tensors end 1 bytes past the end", [copy], out)
    save_file({"bert.embeddings": np.ones(3, np.float32)}, weights)
    refused("not an Emu3 checkpoint .*'bert.embeddings'", [copy], out)
    weights.unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "../two.safetensors"}}))
    refused("2 of its shards are not beside it", [copy], out)
    index.write_text("{}")
    refused("has no weight_map", [copy], out)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**described, "vq_config": None}))
    refused(r"config\.json: has no vq_config, which the transformers 5 layout needs", [copy], out)
    described["text_config"]["rms_norm_eps"] = -1
    config.write_text(json.dumps(described))
    refused(r"config\.json: config field rms_norm_eps is -1", [copy], out)
    described["text_config"] |= {"rms_norm_eps": 1e-5, "num_hidden_layers": -1}
    config.write_text(json.dumps(described))
    refused(
        r"^\S+copy/config\.json: config field num_hidden_layers is -1: it must be a whole number > 0; "
        r"correct it in config\.json$",
        [copy],
        out,
    )
    config.unlink()
    refused(r"config\.json: not found", [copy], out)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_mixed_dtypes_in_one_array_need_a_choice(copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    name = "model.text_model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name].astype(np.float16)
    save_file(weights, copy / "model.safetensors")
    refused(r"different dtypes \(float16, float32\): choose one with --dtype", [copy], tmp_path / "out")
    convert([copy], tmp_path / "out", dtype="float32")


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),
            "disk is full",
        ),
        (ValueError("OUT_OF_RANGE: Failed writing: Disk quota exceeded [os_error_code='122']"), "disk is full"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_failure_half_way_leaves_nothing(source, tmp_path, monkeypatch, failure, shown):
    read, count = Tensor.read, iter(range(1000))

    def failing_read(tensor):
        if next(count) == 40:
            raise failure
        return read(tensor)

    monkeypatch.setattr(Tensor, "read", failing_read)
    with pytest.raises(Emu3Error if shown else KeyboardInterrupt, match=shown):
        convert([source], tmp_path / "sub" / "out")
    assert not (tmp_path / "sub").exists()


def test_the_space_that_is_needed_counts_the_tokenizer_too(bundle, source, tmp_path, monkeypatch):
    files = [path for path in (bundle.files / "tokenizer").iterdir() if path.name != "config.json"]
    tokenizer = sum(path.stat().st_size for path in files)
    assert tokenizer == bundle.tokenizer().nbytes > 1000
    parts = [part for part in ("decoder", "vision") if bundle.has(part)]
    arrays = sum(array.nbytes for part in parts for _, array in bundle.arrays(part))
    for free, enough in ((arrays + tokenizer - 1, False), (arrays + tokenizer, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: namedtuple("Usage", "free")(free))
        if enough:
            convert([source], tmp_path / "out")
        else:
            refused("free, but out needs", [source], tmp_path / "out")


def test_too_little_space_is_found_before_writing(bundle, source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    refused(
        r"has 1,000 bytes free, but out needs [0-9.]+ MB: free space or choose another disk", [source], tmp_path / "out"
    )
    with pytest.raises(Emu3Error, match=r"has 1,000 bytes free, but back needs [0-9.]+ MB: free space"):
        export(bundle, tmp_path / "back", "upstream")
    assert list(tmp_path.iterdir()) == []


def test_exporting_nothing(bundle, tmp_path):
    shutil.copytree(bundle.path / "tokenizer", tmp_path / "b" / "tokenizer")
    with pytest.raises(Emu3Error, match="there are no weights to export"):
        export(Bundle.open(tmp_path / "b"), tmp_path / "out", "upstream")
