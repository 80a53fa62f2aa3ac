"""Batches: packing, mixing, sharding, dropout, positions that can be kept, and what cannot be batched."""

import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import golden_json, golden_npz
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rows import SPECIAL, numbers, segments

from emu3_jax import Emu3Error
from emu3_jax.data.pipeline import Batches, DataConfig, Source, evaluation_batches, training_batches
from emu3_jax.data.prepare import prepare
from emu3_jax.data.records import Record, Turn
from emu3_jax.data.sequences import ImageToText, NextFrame, TextOnly, TextToImage
from emu3_jax.data.shards import Codebook
from emu3_jax.text.prompts import CHAT
from emu3_jax.text.tokenizer import Tokenizer

CODEBOOK = Codebook(SPECIAL.visual_count, "0" * 64)
LENGTH = 64


class Listed:
    """Records in memory, to be prepared."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.digest = repr([record.to_bytes() for record in records])

    def __len__(self):
        return len(self.records)

    def check(self, index):
        pass

    def __getitem__(self, index):
        return self.records[index]


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer.from_files(vocabulary, SPECIAL)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Prepares records; returns the directory."""

    def prepared(records: list[Record], codebook: Codebook = CODEBOOK, shards: int = 1) -> str:
        directory = tmp_path_factory.mktemp("data") / "out"
        prepare(Listed(records), directory, codebook, shards=shards)
        return str(directory)

    return prepared


def picture(number: int, rows: int = 2, columns: int = 3) -> Record:
    """A picture that is known by its code."""
    return Record(f"p{number}", f"caption {number}", np.full((rows, columns), number, np.int32))


@pytest.fixture(scope="module")
def pictures(write) -> str:
    """Thirteen pictures of several aspect ratios, in three shards."""
    shapes = [(2, 3), (3, 2), (1, 4), (4, 4), (5, 2)]
    return write([picture(number, *shapes[number % 5]) for number in range(13)], shards=3)


@pytest.fixture(scope="module")
def documents(write) -> str:
    return write([Record(f"d{number}", "word " * (1 + number % 9)) for number in range(20)], shards=2)


@pytest.fixture
def start(tokenizer):
    """Makes training batches with small defaults; closes them at the end."""
    opened: list[Batches] = []

    def batches(*sources: Source, batch_size=2, process_index=0, process_count=1, codebook_sha256=None, **fields):
        config = DataConfig(sources, **{"sequence_length": LENGTH, "packing": 3, **fields})
        options = {"codebook_sha256": codebook_sha256, "process_index": process_index, "process_count": process_count}
        opened.append(training_batches(config, tokenizer, CHAT, batch_size, **options))
        return opened[-1]

    yield batches
    for one in opened:
        one.close()


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    length=st.integers(48, 80),
    packing=st.integers(1, 4),
)
def test_packing_keeps_every_sequence_whole_and_in_order(write, tokenizer, lengths, length, packing):
    directory = write([Record(f"r{i}", f"{i} " + "7" * n) for i, n in enumerate(lengths)])

    def rows(packing, count):
        config = DataConfig((Source(directory, TextOnly()),), length, packing=packing)
        batches = training_batches(config, tokenizer, CHAT, 1)
        found = [
            [segment["tokens"].tolist() for segment in segments([batch])] for batch in itertools.islice(batches, count)
        ]
        batches.close()
        return found

    packed = rows(packing, 3 * packing)
    stream = [tokens for (tokens,) in rows(0, sum(map(len, packed)))]
    for first in range(0, len(packed), packing):  # rows that were filled together hold a stretch of the stream
        together = packed[first : first + packing]
        stretch = [stream.pop(0) for row in together for _ in row]
        assert sorted(stretch) == sorted(tokens for row in together for tokens in row)
        for row in together:
            rest = iter(stretch)
            assert all(tokens in rest for tokens in row)  # in the stream's order


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_epoch_is_every_record_once(start, pictures, in_memory):
    batches = start(Source(pictures, TextToImage()), packing=0, in_memory=in_memory)
    found = numbers(segments(itertools.islice(batches, 13)))
    assert sorted(found[:13]) == sorted(found[13:]) == list(range(13))
    assert found[:13] != found[13:] and found[:13] != list(range(13))


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_seed_decides_the_order(start, pictures, in_memory):
    def order(seed):
        batches = start(Source(pictures, TextToImage()), packing=0, seed=seed, in_memory=in_memory)
        return numbers(segments(itertools.islice(batches, 6)))

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_packing_wastes_little_and_mixes_aspect_ratios(start, pictures):
    batches = list(itertools.islice(start(Source(pictures, TextToImage()), packing=8), 10))
    assert len(set(numbers(segments(batches)))) == 13
    assert np.mean([(batch["segment_ids"] > 0).mean() for batch in batches]) > 0.8
    assert max(batch["segment_ids"].max() for batch in batches) >= 3


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_read_different_shares_of_one_stream(start, pictures, processes):
    source = Source(pictures, TextToImage())
    count = 2 * 13  # two epochs
    whole = numbers(segments(itertools.islice(start(source, packing=0, batch_size=1), count)))
    shares = [
        numbers(
            segments(
                itertools.islice(
                    start(source, packing=0, batch_size=1, process_index=index, process_count=processes),
                    count // processes,
                )
            )
        )
        for index in range(processes)
    ]
    for index, share in enumerate(shares):
        assert share == whole[index::processes][: len(share)]


def test_mixtures_have_their_weights(start, pictures, documents):
    sources = (Source(pictures, TextToImage(), weight=3), Source(documents, TextOnly(), weight=1))
    found = segments(itertools.islice(start(*sources, packing=0), 40))
    visual = [bool((segment["tokens"] >= SPECIAL.visual_start).any()) for segment in found]
    assert sum(visual) == 60 and 20 - sum(visual[:27]) in (-1, 0, 1)
    # Processes keep the mixture, whatever its period.
    share = segments(itertools.islice(start(*sources, packing=0, process_index=1, process_count=4), 10))
    assert sum(bool((segment["tokens"] >= SPECIAL.visual_start).any()) for segment in share) == 15


def test_prompts_are_dropped_by_record_and_epoch(start, pictures):
    def dropped(seed=0, dropout=0.5, count=26, **options):
        source = Source(pictures, TextToImage(prompt_dropout=dropout))
        batches = start(source, packing=0, batch_size=1, seed=seed, **options)
        found = segments(itertools.islice(batches, count))
        keys = zip(numbers(found), range(count), strict=True)
        return {
            (number, place // 13): s["tokens"][1] == SPECIAL.boi for (number, place), s in zip(keys, found, strict=True)
        }

    first = dropped()
    assert len(first) == 26 and 5 <= sum(first.values()) <= 21
    assert any(first[number, 0] != first[number, 1] for number in range(13))
    assert dropped() == first and dropped(seed=1) != first
    assert not any(dropped(dropout=0.0).values()) and all(dropped(dropout=1.0).values())


def test_the_default_share_of_dropped_prompts(write, start):
    directory = write([picture(number, 1, 1) for number in range(1000)])
    found = segments(itertools.islice(start(Source(directory, TextToImage()), packing=0, batch_size=100), 20))
    share = np.mean([segment["tokens"][1] == SPECIAL.boi for segment in found])
    assert 0.03 < share < 0.07  # 0.05 of 2,000: four standard deviations are 0.02


def resumed(start, stop_at: int, make, count: int = 9) -> None:
    """Checks that the position after `stop_at` batches yields the identical rest."""
    batches = make()
    taken = list(itertools.islice(batches, stop_at))
    assert len(taken) == stop_at
    state = json.loads(json.dumps(batches.get_state()))
    skipped = batches.skipped
    rest = list(itertools.islice(batches, count))
    again = make()
    again.set_state(state)
    assert again.skipped == skipped
    for expected, found in zip(rest, itertools.islice(again, count), strict=True):
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])


@pytest.mark.parametrize("packing", [0, 1, 3])
@pytest.mark.parametrize("stop_at", [0, 1, 2, 5, 11])
def test_an_iterator_resumes_at_any_batch(start, pictures, documents, packing, stop_at):
    sources = (Source(pictures, TextToImage(prompt_dropout=0.5), 2), Source(documents, TextOnly()))
    resumed(start, stop_at, lambda: start(*sources, packing=packing, sequence_length=48))


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("stop_at", [1, 11])
def test_sequences_in_memory_resume_too(start, pictures, documents, stop_at, packing):
    sources = (Source(pictures, TextToImage(prompt_dropout=0.5), 2), Source(documents, TextOnly()))
    resumed(start, stop_at, lambda: start(*sources, packing=packing, sequence_length=48, in_memory=True))


def test_rows_in_tables_are_the_rows_of_the_pipeline(start, pictures, documents):
    """Each record's row is the same, dropped prompts too; processes share a batch; the mixture has its weights."""
    sources = (Source(pictures, TextToImage(prompt_dropout=0.5, eos=True), 3), Source(documents, TextOnly()))

    def rows(batches):
        found = set()
        for batch in batches:
            for row in zip(*(batch[name] for name in sorted(batch)), strict=True):
                found.add(b"".join(np.ascontiguousarray(array).tobytes() for array in row))
        return found

    def take(count, **options):
        return list(itertools.islice(start(*sources, packing=0, **options), count))

    held = take(80, in_memory=True)
    assert rows(held) == rows(take(80))
    whole = take(10, in_memory=True, batch_size=4)
    halves = [take(10, in_memory=True, batch_size=2, process_index=i, process_count=2) for i in range(2)]
    for number, batch in enumerate(whole):
        for index, half in enumerate(halves):
            jax.tree.map(np.testing.assert_array_equal, half[number], {k: x[index::2] for k, x in batch.items()})
    found = segments(take(200, in_memory=True))
    visual = [bool((segment["tokens"] >= SPECIAL.visual_start).any()) for segment in found]
    assert 0.65 < np.mean(visual) < 0.85


def test_a_row_in_a_table_that_is_too_long(start, pictures):
    with pytest.raises(Emu3Error, match=r"has 2\d tokens, but a row has 20: raise sequence_length"):
        list(
            itertools.islice(start(Source(pictures, TextToImage()), packing=0, sequence_length=20, in_memory=True), 30)
        )


def test_rows_in_parts(start, pictures, documents):
    """Parts of rows hold what rows of their length would, in the same order; the mixture counts records."""
    alone = start(Source(pictures, TextToImage(prompt_dropout=0.5)), packing=0, in_memory=True, sequence_length=48)
    alone = [row for batch in itertools.islice(alone, 30) for row in split(batch, 1)]
    options = {"packing": 0, "in_memory": True, "sequence_length": 97}
    parts = start(Source(pictures, TextToImage(prompt_dropout=0.5), parts=2), **options)
    found = []
    for batch in itertools.islice(parts, 15):
        assert (batch["tokens"][:, 96:] == SPECIAL.pad).all() and not batch["segment_ids"][:, 96:].any()
        halves = split({name: array[:, :96] for name, array in batch.items()}, 2)
        for number, half in enumerate(halves):
            half["segment_ids"] = half["segment_ids"] // (number % 2 + 1)
        found += halves
    assert len(found) == len(alone)
    for part, row in zip(found, alone, strict=True):
        jax.tree.map(np.testing.assert_array_equal, part, row)
    sources = (Source(pictures, TextToImage(), 3), Source(documents, TextOnly(), parts=4))
    options["sequence_length"] = 120
    whole = list(itertools.islice(start(*sources, batch_size=4, **options), 50))
    counts = [len(np.unique(row)) - 1 for batch in whole for row in batch["segment_ids"]]
    assert 0.65 < counts.count(1) / (counts.count(1) + 4 * counts.count(4)) < 0.85 and set(counts) == {1, 4}
    for index in range(2):
        share = start(*sources, batch_size=2, process_index=index, process_count=2, **options)
        for batch, half in zip(whole, itertools.islice(share, 50), strict=True):
            jax.tree.map(np.testing.assert_array_equal, half, {name: x[index::2] for name, x in batch.items()})


def split(batch, parts: int) -> list[dict[str, np.ndarray]]:
    """Equal parts of rows, in the order of rows."""
    flat = {name: array.reshape(len(array) * parts, -1) for name, array in batch.items()}
    return [{name: array[row] for name, array in flat.items()} for row in range(len(batch["tokens"]) * parts)]


@pytest.mark.parametrize("stop_at", range(4))
def test_rows_in_parts_resume(start, pictures, documents, stop_at):
    sources = (Source(pictures, TextToImage(prompt_dropout=0.5), parts=2), Source(documents, TextOnly(), parts=3))
    resumed(start, stop_at, lambda: start(*sources, packing=0, sequence_length=96, in_memory=True))


def test_a_part_of_a_row_that_is_too_short(start, pictures):
    batches = start(Source(pictures, TextToImage(), parts=3), packing=0, sequence_length=60, in_memory=True)
    with pytest.raises(
        Emu3Error, match=r"has 2\d tokens, but each of the 3 parts of a row has 20: raise sequence_length"
    ):
        list(itertools.islice(batches, 30))


@pytest.mark.parametrize("stop_at", range(4))
def test_skipped_records_are_counted_across_resumption(start, pictures, stop_at):
    def make():
        return start(Source(pictures, TextToImage()), sequence_length=20, too_long="skip", packing=2, batch_size=1)

    resumed(start, stop_at, make)
    batches = make()
    found = numbers(segments(itertools.islice(batches, 60)))
    assert batches.skipped > 5 and 3 not in found  # picture 3 has 4 x 4 codes


def test_a_position_is_only_for_its_own_data(start, pictures, documents, tmp_path):
    state = start(Source(pictures, TextToImage())).get_state()
    for other in (
        start(Source(documents, TextOnly())),
        start(Source(pictures, TextToImage(loss="all"))),
        start(Source(pictures, TextToImage()), seed=1),
        start(Source(pictures, TextToImage()), batch_size=1),
        start(Source(pictures, TextToImage()), process_count=2),
    ):
        with pytest.raises(Emu3Error, match="the saved position belongs to other data"):
            other.set_state(state)
    (tmp_path / "moved").symlink_to(pictures)
    start(Source(str(tmp_path / "moved"), TextToImage())).set_state(state)


def test_every_task_in_one_mixture(write, start, pictures, documents, tokenizer):
    turns = (Turn("user", "What"), Turn("assistant", "dog"))
    talks = write([Record("t", "", np.full((2, 2), 9, np.int32), turns)])
    clips = write([Record("c", "x", np.full((2, 2, 2), 5, np.int32))])
    found = segments(
        itertools.islice(
            start(
                Source(pictures, TextToImage()), Source(talks, ImageToText()), Source(clips, NextFrame()),
                Source(documents, TextOnly()),
            ),
            20,
        )
    )  # fmt: skip
    answers = [s["tokens"][s["loss_mask"]].tolist() for s in found]
    assert [*tokenizer.encode("dog"), SPECIAL.eos] in answers
    assert [SPECIAL.visual_start + 5] * 8 in answers


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_golden_sample_as_a_batch(in_memory, write, tokenizer, start):
    golden, case = golden_npz("train.npz"), golden_json("prompts.json")["train"]
    directory = write([Record("golden", case["text"], golden["codes"].astype(np.int32))])
    for vision_only in (True, False):
        task = TextToImage(loss="vision" if vision_only else "all", prompt_dropout=0.0)
        batch = next(
            start(
                Source(directory, task),
                packing=0,
                batch_size=1,
                sequence_length=128,
                in_memory=in_memory,
                loss_on_padding=not vision_only,
            )
        )
        prefix = f"vision_only={vision_only}"
        np.testing.assert_array_equal(batch["tokens"][0], golden[f"{prefix}/input_ids"])
        labels = np.where(batch["loss_mask"][0], batch["tokens"][0], -100)
        # The reference labels BOS too, and shifts it out of its loss.
        np.testing.assert_array_equal(labels[1:], golden[f"{prefix}/labels"][1:])
        real = golden[f"{prefix}/attention_mask"]
        np.testing.assert_array_equal(batch["segment_ids"][0], real if vision_only else np.where(real == 1, 1, -1))
        np.testing.assert_array_equal(batch["positions"][0], np.arange(128) * (real if vision_only else 1))


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_is_every_record_once_in_equally_many_batches(pictures, tokenizer, processes):
    source, shares = Source(pictures, TextToImage(prompt_dropout=1.0)), []
    for index in range(processes):
        batches = evaluation_batches(
            source, tokenizer, CHAT, 2, LENGTH, process_index=index, process_count=processes
        )  # fmt: skip
        shares.append(list(batches))
        batches.close()
    assert {len(share) for share in shares} == {-(-13 // (2 * processes))}
    for share in shares:  # neighbours, so that a process opens few shards
        mine = numbers(segments(share))
        assert mine == list(range(mine[0], mine[0] + len(mine)))
    found = segments(itertools.chain(*shares))
    assert sorted(numbers(found)) == list(range(13))
    assert all(segment["tokens"][1] != SPECIAL.boi for segment in found)


def test_records_longer_than_a_row(start, pictures, tokenizer):
    source = Source(pictures, TextToImage())
    with pytest.raises(Emu3Error) as error:
        list(itertools.islice(start(source, sequence_length=20), 20))
    assert "\n" not in str(error.value)
    assert f"{pictures}: record 'p" in str(error.value) and "a row has 20: raise sequence_length" in str(error.value)
    with pytest.raises(Emu3Error, match="a row has 20"):
        list(evaluation_batches(source, tokenizer, CHAT, 1, 20))
    left = segments(evaluation_batches(source, tokenizer, CHAT, 1, 20, too_long="skip"))
    assert 0 < len(left) < 13
    with pytest.raises(Emu3Error, match="no record fits a row of 4 tokens: raise sequence_length"):
        next(start(source, sequence_length=4, too_long="skip"))


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_one_record_that_fits_is_found(write, start, in_memory):
    """Also where it is the first of one epoch and the last of the next, or in the other process' share."""
    directory = write([picture(number, 1 if number == 2 else 8, 1) for number in range(4)])
    for seed in range(4):
        batches = start(
            Source(directory, TextToImage()), sequence_length=16, too_long="skip", seed=seed, in_memory=in_memory,
            packing=0, process_index=seed % 2, process_count=2,
        )  # fmt: skip
        assert set(numbers(segments(itertools.islice(batches, 5)))) == {2}


def test_records_skipped_in_evaluation_are_counted(pictures, tokenizer):
    source, counts, left = Source(pictures, TextToImage()), [], 0
    for index in range(2):
        batches = evaluation_batches(
            source, tokenizer, CHAT, 2, 20, too_long="skip", process_index=index, process_count=2
        )
        left += len(segments(batches))
        counts.append(batches.skipped)
        batches.close()
    assert min(counts) > 0 and left + sum(counts) == 13


def test_records_of_another_kind_are_named(start, documents):
    with pytest.raises(Emu3Error, match=rf"{documents}: record 'd\d+': is plain text, but text to image"):
        next(start(Source(documents, TextToImage())))


def test_a_damaged_shard_stops_training(write, start):
    directory = write([picture(number, 9, 9) for number in range(3)])
    with open(f"{directory}/shard-00000-of-00001.arrayrecord", "r+b") as shard:
        shard.seek(150)
        shard.write(b"damage")
    with pytest.raises(Emu3Error, match=r"arrayrecord is damaged \("):
        list(itertools.islice(start(Source(directory, TextToImage()), sequence_length=128), 3))


def test_data_of_another_tokenizer(write, start, pictures):
    with pytest.raises(Emu3Error, match="codebook of 8 codes, but the model has 32768"):
        start(Source(write([picture(0)], Codebook(8, "0" * 64)), TextToImage()))
    with pytest.raises(Emu3Error, match="another vision tokenizer"):
        start(Source(pictures, TextToImage()), codebook_sha256="1" * 64)
    start(Source(pictures, TextToImage()), codebook_sha256="0" * 64)
    with pytest.raises(Emu3Error, match=r"nowhere has no index\.json"):
        start(Source("nowhere", TextToImage()))


@pytest.mark.parametrize(
    ("options", "reason"), [({"batch_size": 0}, "batch_size is 0"), ({"process_index": 1}, "1 of 1")]
)
def test_bad_places(start, pictures, options, reason):
    with pytest.raises(Emu3Error, match=reason):
        start(Source(pictures, TextToImage()), **options)
    with pytest.raises(Emu3Error, match="packing is 1024: for each of the 64 rows of a process, so many rows of 8192"):
        start(Source(pictures, TextToImage()), batch_size=64, packing=1024, sequence_length=8192)


def test_an_iterator_left_open_ends_in_silence(pictures, vocabulary):
    program = f"""
from emu3_jax.config import SpecialTokens
from emu3_jax.data.pipeline import DataConfig, Source, training_batches
from emu3_jax.data.sequences import TextToImage
from emu3_jax.text.prompts import CHAT
from emu3_jax.text.tokenizer import Tokenizer

tokenizer = Tokenizer.from_files({str(vocabulary)!r}, SpecialTokens())
config = DataConfig((Source({pictures!r}, TextToImage()),), 64)
batches = training_batches(config, tokenizer, CHAT, 1)
print(next(batches)["tokens"].shape)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (process.stdout, process.stderr, process.returncode) == ("(1, 64)\n", "", 0)
