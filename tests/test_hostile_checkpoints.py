"""Checkpoint directories that are damaged or hostile: a result or one line, whatever their files and texts hold."""

import base64
import functools
import json
import pathlib

import numpy as np
import pytest
from conftest import golden_json
from hostile import damaged, damaged_json, examples, gives_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from published_configs import IMAGE, TRANSFORMERS_4, TRANSFORMERS_5, UPSTREAM_DECODER, UPSTREAM_VISION, VQ

from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.doctor import doctor
from emu3_jax.checkpoints.published import Published
from emu3_jax.checkpoints.tensors import write_safetensors
from emu3_jax.errors import Emu3Error
from emu3_jax.text.tokenizer import Tokenizer, special_tokens
from emu3_jax.text.vocabulary import CONTROLS, tokens_of_vocabulary

fuzzed = examples(150)
NAMES = ("vocab_size", "rope_parameters", "weight_map", "image_processor", "added_tokens", "<|image end|>", "")
damaged_object = functools.partial(damaged_json, names=NAMES)
BAD_LINES = [b"==== 3\n", b"QQ== -1\n", b"QQ== 99999999999999999999\n", b"QQ== 1e3\n", b"QQ==\n", b"Q 1 2\n"]
BAD_LINES.append(base64.b64encode(b"x" * 2000) + b" 300\n")
RANKS, CODES = 300, 4
TOKENS = special_tokens(RANKS, CODES)

# ------------------------------------------------------------------------------------------------ directories

# A tensor that tells each layout, and its config.json.
LAYOUTS = {
    "model.layers.0.x": UPSTREAM_DECODER,
    "lm_head.weight": TRANSFORMERS_5["text_config"],
    "encoder.down.0": UPSTREAM_VISION,
    "encoder.down_block.0": VQ,
    "quant_conv.weight": golden_json("emu35/hf_configs.json")["vq_flat"],
    "text_model.x": TRANSFORMERS_4,
    "model.text_model.x": {
        **TRANSFORMERS_5,
        "vq_config": {**VQ, "codebook_size": CODES},
        "vocabulary_map": {"<|image end|>": 1210, **{f"<|visual token {i:06d}|>": 1211 + i for i in range(CODES)}},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An empty directory for each module's run; tests make their own in it."""
    return tmp_path_factory.mktemp("hostile")


def directory_of(root: pathlib.Path, tensor: str) -> pathlib.Path:
    """A directory with a weights file of one tensor and a sound config.json."""
    directory = root / tensor
    if not directory.exists():
        directory.mkdir()
        entry = (tensor, (2,), np.dtype(np.float32))
        write_safetensors(directory / "model.safetensors", [entry], [np.zeros(2, np.float32)])
        (directory / "config.json").write_text(json.dumps(LAYOUTS[tensor]))
    return directory


def examine(directory: pathlib.Path) -> None:
    """Everything that `convert` and `doctor` do with a directory before they read weights."""
    source = gives_or_refuses(lambda: Published.open(directory))
    if source is None:
        return
    vision = gives_or_refuses(source.vision_config) if "vision" in source.layout.parts else None
    if vision is not None:
        gives_or_refuses(source.image_config)
        gives_or_refuses(source.image_gaps)
    decoder = None
    if "decoder" in source.layout.parts:
        decoder = gives_or_refuses(lambda: source.decoder_config(vision and vision.codebook_size))
    if decoder is not None:
        gives_or_refuses(lambda: source.tokenizer(decoder.tokens))
    for line in source.misfits(decoder, vision):
        assert line.isprintable() and len(line) < 1500


@pytest.mark.parametrize("tensor", LAYOUTS)
@fuzzed
@given(data=st.data())
def test_config_json(root, tensor, data):
    directory = directory_of(root, tensor)
    found = data.draw(damaged_object(LAYOUTS[tensor]))
    (directory / "config.json").write_text(json.dumps(found))
    examine(directory)


@fuzzed
@given(data=st.data())
def test_bytes_of_config_json(root, data):
    directory = directory_of(root, "model.layers.0.x")
    (directory / "config.json").write_bytes(data.draw(damaged(json.dumps(UPSTREAM_DECODER).encode())))
    examine(directory)


@fuzzed
@given(data=st.data())
def test_picture_preprocessing(root, data):
    directory = directory_of(root, "encoder.down.0")
    (directory / "config.json").write_text(json.dumps(UPSTREAM_VISION))
    sound = {"preprocessor_config.json": IMAGE, "processor_config.json": {"image_processor": IMAGE}}
    for name, whole in sound.items():
        (directory / name).unlink(missing_ok=True)
        if data.draw(st.booleans()):
            (directory / name).write_text(json.dumps(data.draw(damaged_object(whole))))
    examine(directory)


@fuzzed
@given(data=st.data())
def test_shard_index(root, data):
    directory = root / "index"
    directory.mkdir(exist_ok=True)
    if not (directory / "a.safetensors").exists():
        (directory / "config.json").write_text(json.dumps(UPSTREAM_DECODER))
        entry = ("model.layers.0.x", (2,), np.dtype(np.float32))
        write_safetensors(directory / "a.safetensors", [entry], [np.zeros(2, np.float32)])
    whole = {"metadata": {"total_size": 8}, "weight_map": {"model.layers.0.x": "a.safetensors", "b": "a.safetensors"}}
    found = data.draw(damaged_object(whole))
    (directory / "model.safetensors.index.json").write_text(json.dumps(found))
    examine(directory)


@pytest.mark.parametrize("name", ["../a.safetensors", "/tmp/a.safetensors", "a\0b", "..", "", "x" * 300, "\x1b[31m"])
def test_shards_are_beside_their_index(tmp_path, name):
    """Files elsewhere are not read, even where they exist."""
    directory = tmp_path / "model"
    directory.mkdir()
    entry = ("model.layers.0.x", (2,), np.dtype(np.float32))
    write_safetensors(tmp_path / "a.safetensors", [entry], [np.zeros(2, np.float32)])
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(Emu3Error, match="1 of its shards are not beside it"):
        Published.open(directory)


@pytest.mark.parametrize(
    "config, legal",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: it must be at most 1,024"),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, "hidden_size is 1000000000: it must be at most"),
        ({"vocab_size": 10**400}, "vocab_size is .*: it must be at most"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is .*: it must be a finite number"),
        ({"rope_parameters": [1]}, "rope_parameters is .*: it must be an object"),
        ({"vocabulary_map": "x" * 10**6}, "vocabulary_map is .*: it must be an object"),
    ],
)
def test_absurd_configs_are_refused_at_once(tmp_path, config, legal):
    """Before a name of a layer is made: 10^9 of them would take hundreds of gigabytes."""
    directory = directory_of(tmp_path, "model.layers.0.x")
    (directory / "config.json").write_text(json.dumps({**UPSTREAM_DECODER, **config}))
    with pytest.raises(Emu3Error, match=legal):
        convert([directory], tmp_path / "out")
    assert any("config field" in finding.what for finding in doctor(directory, progress=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_deep_json(tmp_path, name):
    directory = directory_of(tmp_path, "encoder.down.0")
    (directory / name).write_bytes(b'{"a":' * 100_000)
    if name.startswith("model"):
        (directory / "model.safetensors").unlink()
    with pytest.raises(Emu3Error, match=rf"{name} is damaged: it is nested too deeply"):
        Published.open(directory).image_config()


# ------------------------------------------------------------------------------------------------ vocabularies

PIECES = [bytes([byte]) for byte in range(256)] + [b"  " * 2**i for i in range(3)]
PIECES += [b"a%c" % byte for byte in range(0x61, 0x7B)] + [b"b%c" % byte for byte in range(0x61, 0x70)]
TIKTOKEN = b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(PIECES))
SURFACES = [*CONTROLS, *(f"<|visual token {code:06d}|>" for code in range(CODES))]


def byte_level() -> dict[str, int]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    spell = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    return {"".join(spell[byte] for byte in piece): rank for rank, piece in enumerate(PIECES)}


VOCAB = byte_level()
TOKENIZER_JSON = {
    "model": {"type": "BPE", "vocab": VOCAB, "merges": []},
    "added_tokens": [{"content": surface, "id": RANKS + i} for i, surface in enumerate(SURFACES)]
    + [{"content": "gluon", "id": RANKS + len(SURFACES), "lstrip": False}],
}


def read_vocabulary(path: pathlib.Path) -> None:
    """As of a directory, whose config may say anything; what is read can be used and written."""
    read = Tokenizer.from_transformers if path.suffix == ".json" else Tokenizer.from_files
    for codes in (None, CODES):
        tokens = gives_or_refuses(lambda codes=codes: tokens_of_vocabulary(path, codes))
        for special in (tokens, TOKENS):
            tokenizer = special and gives_or_refuses(lambda special=special: read(path, special))
            if tokenizer is not None:
                assert tokenizer.decode(tokenizer.encode("ab  c\n")) == "ab  c\n"


def test_sound_vocabularies(root):
    for name, whole in (("tokenizer.json", TOKENIZER_JSON), ("vocab.json", VOCAB)):
        (root / name).write_text(json.dumps(whole))
        assert tokens_of_vocabulary(root / name, CODES) == TOKENS
        assert Tokenizer.from_transformers(root / name, TOKENS).encode("ab") == [PIECES.index(b"ab")]
    (root / "emu3.tiktoken").write_bytes(TIKTOKEN)
    assert tokens_of_vocabulary(root / "emu3.tiktoken", CODES) == TOKENS
    assert Tokenizer.from_files(root / "emu3.tiktoken", TOKENS).vocab_size == TOKENS.visual_end


@fuzzed
@given(data=st.data())
def test_tokenizer_json(root, data):
    keep = [*VOCAB] if data.draw(st.booleans()) else ()  # else nearly all damage is of its hundreds of entries
    (root / "tokenizer.json").write_text(json.dumps(data.draw(damaged_object(TOKENIZER_JSON, keep=keep))))
    read_vocabulary(root / "tokenizer.json")


@fuzzed
@given(data=st.data())
def test_bytes_of_tokenizer_json(root, data):
    (root / "tokenizer.json").write_bytes(data.draw(damaged(json.dumps(TOKENIZER_JSON).encode())))
    read_vocabulary(root / "tokenizer.json")


@fuzzed
@given(data=st.data())
def test_vocab_json(root, data):
    directory = root / "vocab"
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(data.draw(damaged_object(VOCAB))))
    (directory / "added_tokens.json").unlink(missing_ok=True)
    if data.draw(st.booleans()):
        added = {surface: RANKS + i for i, surface in enumerate([*SURFACES[-5:], "gluon"], len(SURFACES) - 5)}
        (directory / "added_tokens.json").write_text(json.dumps(data.draw(damaged_object(added))))
    read_vocabulary(directory / "vocab.json")


@fuzzed
@given(data=st.data())
def test_tiktoken(root, data):
    directory = root / "tiktoken"
    directory.mkdir(exist_ok=True)
    (directory / "emu3.tiktoken").write_bytes(data.draw(damaged(TIKTOKEN, BAD_LINES)))
    (directory / "emu3_vision_tokens.txt").unlink(missing_ok=True)
    if data.draw(st.integers(0, 3)) == 0:
        listing = "\n".join(SURFACES[-CODES - 3 :]).encode()
        (directory / "emu3_vision_tokens.txt").write_bytes(data.draw(damaged(listing)))
    read_vocabulary(directory / "emu3.tiktoken")


def test_vocabularies_of_absurd_size_are_not_read(root):
    directory = root / "huge"
    directory.mkdir()
    for name in ("emu3.tiktoken", "tokenizer.json"):
        with (directory / name).open("wb") as stream:
            stream.truncate(1 << 40)  # takes no space
        with pytest.raises(Emu3Error, match="1099511627776 bytes; the limit is"):
            tokens_of_vocabulary(directory / name, CODES)
    (directory / "emu3.tiktoken").write_bytes(b"\n" * (3 << 20))
    with pytest.raises(Emu3Error, match="3145728 ranks; the limit is 2,097,152"):
        tokens_of_vocabulary(directory / "emu3.tiktoken", CODES)
    (directory / "emu3.tiktoken").write_bytes(TIKTOKEN + base64.b64encode(b"x" * 2000) + b" 300\n")
    with pytest.raises(Emu3Error, match="2000 bytes in the token of line 301; the limit is 1,024"):
        Tokenizer.from_files(directory / "emu3.tiktoken", TOKENS)


# ------------------------------------------------------------------------------------------------ texts

TEXTS = ["\0", "\x1b", " " * 30_000, "\n" * 30_000, "\u3000" * 20_000, "\ud800", "\udc00", "<|", "|>", "e\u0301"]
TEXTS += ["<|endoftext|>", "<|visual token 000003|>", "<|visual token 000009|>", "{image}", "{text}", "\ufdfa" * 99]


@fuzzed
@given(text=st.lists(st.sampled_from(TEXTS) | st.text(max_size=5), max_size=6).map("".join), allow=st.booleans())
def test_texts(tokenizer, text, allow):
    ids = gives_or_refuses(lambda: tokenizer.encode(text, allow_special=allow))
    if ids is not None:
        tokenizer.decode(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({piece: rank for rank, piece in enumerate(PIECES)}, TOKENS)
