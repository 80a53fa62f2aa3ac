"""Preference pairs as training data: the sequences of both sides, and batches in which pairs stay together."""

import contextlib
import dataclasses

import numpy as np
import pytest
from pair_cases import picture_pairs
from tiny_bundle import CODES, TOKENS

from emu3_jax import Emu3Error
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.pairs import Pair, write_pairs
from emu3_jax.data.pipeline import evaluation_batches, training_batches
from emu3_jax.data.sequences import Preference
from emu3_jax.text.prompts import CHAT, generation_prompt, understanding_prompt

PAIRS = picture_pairs(10)
CLIP = Pair("c", "rain", np.ones((2, 2, 3), np.int32), np.zeros((2, 2, 3), np.int32))
ANSWER = Pair("a", "What?", np.array([5, 300, TOKENS.eos]), np.array([6]), 1.0, (PAIRS[0].chosen, CLIP.chosen))


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle):
    return Bundle.open(tiny_bundle).tokenizer()


def test_sides_follow_the_prompt_that_the_model_saw(tokenizer):
    for pair, head in ((PAIRS[0], "2*3"), (CLIP, "2*2*3")):
        made = Preference().sequence(pair, tokenizer, CHAT)
        prompt = generation_prompt(tokenizer, TOKENS, pair.prompt, *map(int, head.split("*")))
        for side, codes in ((made.chosen, pair.chosen), (made.rejected, pair.rejected)):
            assert side.tokens[: len(prompt)].tolist() == prompt
            assert side.tokens[side.loss_mask].tolist() == (codes.ravel() + TOKENS.visual_start).tolist()
    made = Preference().sequence(ANSWER, tokenizer, CHAT)
    prompt = understanding_prompt(tokenizer, TOKENS, CHAT, ANSWER.prompt, ANSWER.pictures)
    for side, ids in ((made.chosen, ANSWER.chosen), (made.rejected, ANSWER.rejected)):
        assert side.tokens.tolist() == [*prompt, *ids], "the ids as they were drawn"
        assert side.tokens[side.loss_mask].tolist() == ids.tolist()
    assert len(made) == len(made.chosen) == len(prompt) + 3


def test_tokens_that_the_model_does_not_have(tokenizer):
    bad = dataclasses.replace(ANSWER, rejected=np.array([TOKENS.visual_end]))
    with pytest.raises(Emu3Error, match=f"token id {TOKENS.visual_end} of an answer is out of range, the model has"):
        Preference().sequence(bad, tokenizer, CHAT)
    with pytest.raises(Emu3Error, match=r"code \d+ is outside the codebook"):
        Preference().sequence(dataclasses.replace(PAIRS[0], chosen=PAIRS[0].chosen + CODES), tokenizer, CHAT)


@pytest.fixture(scope="module")
def source(tiny_bundle, tmp_path_factory) -> Source:
    directory = tmp_path_factory.mktemp("pairs") / "data"
    codebook = bundle_codebook(Bundle.open(tiny_bundle))
    write_pairs([*PAIRS, CLIP, ANSWER], directory, codebook, vocab_size=TOKENS.visual_end)
    return Source(str(directory), Preference())


def check_rows(batch, tokenizer, pairs):
    """Rows 2i and 2i + 1 are the sides of pair i."""
    for row in range(0, len(batch["tokens"]), 2):
        number = batch["pair"][row]
        assert number == batch["pair"][row + 1]
        made = Preference().sequence(pairs[number], tokenizer, CHAT)
        for at, side in ((row, made.chosen), (row + 1, made.rejected)):
            size = batch["segment_ids"][at].sum()
            np.testing.assert_array_equal(batch["tokens"][at, :size], side.tokens)
            assert (batch["tokens"][at, size:] == TOKENS.pad).all()
            assert batch["loss_mask"][at].sum() == side.loss_mask.sum()


@pytest.mark.parametrize("in_memory", [False, True])
def test_training_batches_keep_pairs_together(source, tokenizer, in_memory):
    """Over two sources, each epoch of a source has each of its pairs once; a position is restored exactly."""
    config = DataConfig((source, source), 96, packing=0, in_memory=in_memory)
    numbers, pairs = [], 2 * [*PAIRS, CLIP, ANSWER]
    with contextlib.closing(training_batches(config, tokenizer, CHAT, 4)) as batches:
        for step in range(12):
            if step == 6:
                position = batches.get_state()
            batch = next(batches)
            assert {name: array.dtype for name, array in batch.items()} == {
                "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_,
                "pair": np.int32,
            }  # fmt: skip
            check_rows(batch, tokenizer, pairs)
            numbers += batch["pair"][::2].tolist()
    assert sorted(numbers) == list(range(24))
    with contextlib.closing(training_batches(config, tokenizer, CHAT, 4)) as batches:
        batches.set_state(position)
        assert next(batches)["pair"][::2].tolist() == numbers[12:14]


@pytest.mark.parametrize("too_long", ["stop", "skip"])
def test_pairs_go_on_with_any_number_of_hosts(source, tokenizer, too_long):
    """Two hosts, then four, then one read the pairs that one host reads."""
    config = DataConfig((source, source), 96 if too_long == "stop" else 26, packing=0, too_long=too_long)

    def hosts(count, *states):
        each = 8 // count
        made = [
            training_batches(
                config, tokenizer, CHAT, each, process_index=index, process_count=count,
                rows=range(index * each, (index + 1) * each),
            )
            for index in range(count)
        ]  # fmt: skip
        for batches in made if states else ():
            batches.set_state(*states)
        return made

    def numbers(made, steps):
        return [[int(pair) for one in made for pair in next(one)["pair"]] for _ in range(steps)]

    one = hosts(1)
    wanted = numbers(one, 9)
    two = hosts(2)
    found = numbers(two, 3)
    four = hosts(4, *(batches.get_state() for batches in two))
    found += numbers(four, 3)
    last = hosts(1, *(batches.get_state() for batches in four))
    assert found + numbers(last, 3) == wanted
    assert last[0].skipped == one[0].skipped and (last[0].skipped > 0) == (too_long == "skip")
    for batches in (*one, *two, *four, *last):
        batches.close()


def test_evaluation_has_each_pair_once(source, tokenizer):
    """On two processes of three pairs a batch; the clip and the answer are too long for the row."""
    found = []
    for process in range(2):
        batches = evaluation_batches(
            source, tokenizer, CHAT, 6, 26, too_long="skip", process_index=process, process_count=2
        )
        with contextlib.closing(batches):
            made = list(batches)
            assert len(made) == 2
            for batch in made:
                empty = batch["pair"] < 0
                assert not batch["loss_mask"][empty].any()
                check_rows({name: array[~empty] for name, array in batch.items()}, tokenizer, PAIRS)
                found += batch["pair"][::2].tolist()
    assert sorted(found) == [-1, -1, *range(10)]
    batches = evaluation_batches(source, tokenizer, CHAT, 6, 26)
    with contextlib.closing(batches), pytest.raises(Emu3Error, match=r"pair 'c' has .* tokens, but a row has 26"):
        list(batches)
