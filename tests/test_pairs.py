"""Preference pairs as prepared data: they come back as written, and bad pairs and other kinds of data are refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from prepare_entries import Entries

from emu3_jax import Emu3Error
from emu3_jax.data.pairs import Pair, PreparedPairs, Sample, write_pairs
from emu3_jax.data.prepare import prepare
from emu3_jax.data.shards import Codebook, Index, PreparedData

CODEBOOK = Codebook(100, "0" * 64)
PICTURE = Pair("p", "a red square", np.arange(6).reshape(2, 3), np.arange(6)[::-1].reshape(2, 3), 0.25)
CLIP = Pair("c", "rain", np.ones((2, 3, 4), np.int32), np.zeros((2, 3, 4), np.int32))
ANSWER = Pair("a", "Wo ist \u00e4?", np.array([5, 70_000]), np.array([6]), 1.0, (np.full((2, 2), 99), CLIP.chosen))


def assert_same(found: Pair, wanted: Pair) -> None:
    assert (found.name, found.prompt, found.margin) == (wanted.name, wanted.prompt, wanted.margin)
    arrays = [(found.chosen, wanted.chosen), (found.rejected, wanted.rejected)]
    for one, other in [*arrays, *zip(found.pictures, wanted.pictures, strict=True)]:
        assert one.dtype == np.int32
        np.testing.assert_array_equal(one, other)


def test_pairs_come_back_in_their_order(tmp_path):
    pairs = [PICTURE, CLIP, ANSWER]
    index = write_pairs(iter(pairs), tmp_path / "a", CODEBOOK, vocab_size=70_001, shard_pairs=2)
    data = PreparedPairs(tmp_path / "a")
    assert data.index == index == Index.read(tmp_path / "a") and [shard.records for shard in index.shards] == [2, 1]
    for found, wanted in zip(map(data.__getitem__, range(3)), pairs, strict=True):
        assert_same(found, wanted)
    write_pairs(pairs, tmp_path / "b", CODEBOOK, shard_pairs=2)
    assert all((tmp_path / "b" / file.name).read_bytes() == file.read_bytes() for file in (tmp_path / "a").iterdir())
    other = write_pairs(pairs[:2], tmp_path / "c", CODEBOOK)
    assert other.job != index.job, "the digest tells other pairs apart"


def test_pairs_and_records_are_told_apart(tmp_path):
    write_pairs([PICTURE], tmp_path / "pairs", CODEBOOK)
    prepare(Entries(2), tmp_path / "records", CODEBOOK)
    assert "kind" not in json.loads((tmp_path / "records/index.json").read_text()), "as older versions wrote it"
    with pytest.raises(Emu3Error, match=r"holds pairs .*, but records are needed: .* emu3-jax prepare wrote"):
        PreparedData(tmp_path / "pairs")
    with pytest.raises(Emu3Error, match=r"holds records .*, but pairs are needed: .* emu3-jax pairs wrote"):
        PreparedPairs(tmp_path / "records")
    file = tmp_path / "pairs/index.json"
    file.write_text(file.read_text().replace('"pairs"', '"triples"'))
    with pytest.raises(Emu3Error, match="kind is 'triples', but this version reads records, pairs"):
        PreparedPairs(tmp_path / "pairs")


def test_a_pair_of_two_samples_needs_one_prompt():
    chosen, rejected = Sample("dog", PICTURE.chosen), Sample("dog", PICTURE.rejected)
    pair = Pair.of("x", chosen, rejected, 0.5)
    assert (pair.name, pair.prompt, pair.margin, pair.kind) == ("x", "dog", 0.5, "a picture")
    assert pair.chosen is chosen.tokens and pair.rejected is rejected.tokens
    with pytest.raises(Emu3Error, match=r"pair 'x': the prompts differ .'dog' and 'cat'.: pair only samples of one"):
        Pair.of("x", chosen, dataclasses.replace(rejected, prompt="cat"))
    with pytest.raises(Emu3Error, match=r"pair 'x': the pictures of the prompts differ"):
        Pair.of("x", chosen, dataclasses.replace(rejected, pictures=ANSWER.pictures))


BAD = [
    (PICTURE, {"rejected": CLIP.chosen}, "the chosen side is a picture and the rejected one a clip"),
    (PICTURE, {"rejected": PICTURE.chosen}, "both sides are equal"),
    (PICTURE, {"chosen": np.full((2, 3), 100)}, "chosen: code 100 is out of range, legal are 0 to 99"),
    (PICTURE, {"rejected": np.full((2, 3), -1)}, "rejected: code -1 is out of range"),
    (PICTURE, {"chosen": np.ones((2, 3))}, "chosen is float64 .2, 3.: it must be codes"),
    (PICTURE, {"chosen": np.zeros((0, 3), int)}, "chosen is int64 .0, 3."),
    (PICTURE, {"chosen": [1]}, "chosen is .1.: it must be codes"),
    (PICTURE, {"pictures": ANSWER.pictures}, ".*only answers are about pictures"),
    (PICTURE, {"margin": float("nan")}, "margin is nan"),
    (PICTURE, {"prompt": "\ud800"}, "prompt has an unpaired surrogate"),
    (ANSWER, {"chosen": np.array([80_000])}, "chosen: token id 80000 is out of range, legal are 0 to 79999"),
    (ANSWER, {"pictures": (np.array([1]),)}, "picture 0 of the prompt is int64 .1."),
    (ANSWER, {"pictures": (np.array([[100]]),)}, "picture 0 of the prompt: code 100 is out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("pair", "change", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_pairs_are_named_and_nothing_is_written(tmp_path, pair, change, message):
    bad = dataclasses.replace(pair, name="number 7", **change)
    with pytest.raises(Emu3Error, match=f"pair 'number 7': {message}") as error:
        write_pairs([CLIP, bad], tmp_path / "out", CODEBOOK, vocab_size=80_000)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_no_pairs_and_an_existing_directory(tmp_path):
    with pytest.raises(Emu3Error, match="there are no pairs to write"):
        write_pairs([], tmp_path / "out", CODEBOOK)
    (tmp_path / "out").mkdir()
    with pytest.raises(Emu3Error, match="out exists already"):
        write_pairs([PICTURE], tmp_path / "out", CODEBOOK)


def test_damaged_pairs(tmp_path):
    write_pairs([PICTURE, CLIP], tmp_path / "good", CODEBOOK)
    data = ANSWER.to_bytes()
    for damaged in (data[:-1], data + b"0", b"{}\n", b"[]\n", b"", data.replace(b'"prompt"', b'"text"')):
        with pytest.raises(Emu3Error, match=r"the pair|the record"):
            Pair.from_bytes(damaged)
    shutil.copytree(tmp_path / "good", tmp_path / "cut")
    file = tmp_path / "cut/shard-00000.arrayrecord"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Emu3Error, match=r"has .* bytes, but index.json says"):
        PreparedPairs(tmp_path / "cut")
