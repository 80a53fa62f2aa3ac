"""The automaton of text and pictures: against an independent recogniser on random choices, and on golden sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_json, golden_npz
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_jax.config import DecoderConfig, SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.grammar import (
    DIGIT,
    DIGIT_OR_END,
    FIRST_DIGIT,
    Grammar,
    GrammarState,
    Picture,
    advance,
    known,
    legal,
    legal_in_size,
    may_open,
    skip,
    split,
    upcoming,
)
from emu3_jax.generation.schedule import SAMPLED_FREE, SAMPLED_VISUAL

TOKENS = SpecialTokens(pad=20, bos=21, eos=22, img=23, boi=24, eoi=25, eol=26, eof=27, visual_start=28, visual_count=4)
EMU3 = Grammar(TOKENS, tuple(range(10)), 10)
EMU35 = Grammar(TOKENS, tuple(range(10)), 10, 2, 2, last_line_end=False, frame_end=False, same_size=True)
step = jax.jit(lambda state, token, grammar: advance(state, token, grammar), static_argnums=2)
ask = jax.jit(legal, static_argnums=1)
ask_many = jax.jit(upcoming, static_argnums=(1, 2))
known_of = jax.jit(known, static_argnums=1)


def choices(answer, grammar, state_side):
    """The ids that an answer of `legal` stands for."""
    end = TOKENS.img if state_side else grammar.times
    return {
        SAMPLED_FREE: list(range(TOKENS.visual_start)),
        SAMPLED_VISUAL: list(range(TOKENS.visual_start, TOKENS.visual_end)),
        FIRST_DIGIT: list(grammar.digits[1:]),
        DIGIT: list(grammar.digits),
        DIGIT_OR_END: [*grammar.digits, end],
    }.get(answer, [answer])


def picture(rows, columns, grammar, draw):
    """The ids of a picture, written out by hand."""
    ids = [TOKENS.boi, *map(int, str(rows)), grammar.times, *map(int, str(columns)), TOKENS.img]
    for row in range(rows):
        ids += [draw() for _ in range(columns)]
        if row < rows - 1 or grammar is EMU3:
            ids.append(TOKENS.eol)
    return [*ids, *([TOKENS.eof] if grammar is EMU3 else []), TOKENS.eoi]


@pytest.mark.parametrize("grammar", [EMU3, EMU35], ids=["emu3", "emu3.5"])
@given(data=st.data())
@settings(max_examples=25)
def test_every_walk_is_a_sequence_and_every_sequence_a_walk(grammar, data):
    """Walks of several rows at once, with any choice that is legal, are read back by `split`."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sizes = [None, (2, 3), (12, 1), (1, 10)]
    state = GrammarState.of(sizes)
    walks = [[] for _ in sizes]
    for _ in range(60):
        answers, sides = np.asarray(ask(state, grammar)), np.asarray(state.side)
        tokens = []
        for row, answer in enumerate(answers.tolist()):
            options = choices(answer, grammar, sides[row])
            # Text opens a picture often, and sizes stay small.
            weights = np.ones(len(options))
            if answer == SAMPLED_FREE:
                weights[[TOKENS.eoi, TOKENS.img, TOKENS.eos]] = 0
                weights[TOKENS.boi] = 8
            if answer == DIGIT_OR_END:
                weights[-1] = 30
            tokens.append(int(rng.choice(options, p=weights / weights.sum())))
            walks[row].append(tokens[-1])
        state = step(state, jnp.asarray(tokens, jnp.int32), grammar)
    for size, walk in zip(sizes, walks, strict=True):
        pieces = split(walk, grammar)
        pictures = [piece for piece in pieces if isinstance(piece, Picture)]
        assert all(piece.whole for piece in pictures[:-1])
        for piece in pictures:
            if size is not None and piece.size is not None:
                assert piece.size == size
            if piece.whole:
                assert len(piece.codes) == piece.size[0] * piece.size[1]
        found = [piece.size for piece in pictures if piece.size is not None]
        if grammar.same_size:
            assert len(set(found)) <= 1


@pytest.mark.parametrize("grammar", [EMU3, EMU35], ids=["emu3", "emu3.5"])
@given(data=st.data())
@settings(max_examples=15)
def test_sequences_written_by_hand_are_walks(grammar, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    side = st.integers(10, 12) if grammar is EMU35 else st.integers(1, 12)
    size = data.draw(st.tuples(side, side))
    ids, pictures = [], []
    for _ in range(data.draw(st.integers(1, 2))):
        ids += rng.integers(11, 20, data.draw(st.integers(0, 3))).tolist()
        part = picture(*size, grammar, lambda: int(rng.integers(TOKENS.visual_start, TOKENS.visual_end)))
        assert len(part) == grammar.picture_length(*size)
        pictures.append(part)
        ids += part
    known = data.draw(st.booleans())
    state = GrammarState.of([size if known else None])
    for token in [*ids, TOKENS.eos]:
        answer = int(ask(state, grammar)[0])
        assert token in choices(answer, grammar, int(state.side[0])), (token, answer)
        state = step(state, jnp.asarray([token], jnp.int32), grammar)
    assert [piece.size for piece in split(ids, grammar) if isinstance(piece, Picture)] == [size] * len(pictures)


@pytest.mark.parametrize("grammar", [EMU3, EMU35], ids=["emu3", "emu3.5"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 1)])
def test_a_picture_is_known_to_its_end(grammar, size):
    """Answers of many places together are those of the walk, and `skip` leads from place to place: to IMG, to EOI."""
    ids = picture(*size, grammar, lambda: TOKENS.visual_start)
    start = step(jax.tree.map(jnp.asarray, GrammarState.of([size])), jnp.asarray([TOKENS.boi]), grammar)
    for first, last in ((1, ids.index(TOKENS.img)), (ids.index(TOKENS.img) + 1, len(ids) - 1)):
        state, answers, count = start, [], last + 1 - first
        for place in range(first, last + 1):
            assert known_of(state, grammar)[0] == last + 1 - place
            answers.append(int(ask(state, grammar)[0]))
            state = step(state, jnp.asarray([ids[place]]), grammar)
        assert ask_many(start, grammar, 16)[0, :count].tolist() == answers
        for skipped in range(count):
            there = step(skip(start, jnp.asarray([skipped])), jnp.asarray([ids[first + skipped]]), grammar)
            assert ask_many(there, grammar, 16)[0, : count - skipped - 1].tolist() == answers[skipped + 1 :]
        fields = ("mode", "at", "rows", "columns", "known_rows", "known_columns", "left")
        assert [int(getattr(there, name)[0]) for name in fields] == [int(getattr(state, name)[0]) for name in fields]
        start = there
    assert int(state.mode[0]) == 0


@pytest.mark.parametrize("grammar", [EMU3, EMU35], ids=["emu3", "emu3.5"])
def test_a_size_that_the_model_chooses_is_not_known(grammar):
    state = advance(jax.tree.map(jnp.asarray, GrammarState.of([None])), jnp.asarray([TOKENS.boi]), grammar)
    assert known(state, grammar).tolist() == [1]


@pytest.mark.parametrize("run", list(golden_json("emu35/generate.json")["runs"]))
def test_golden_sequences_are_walks(run):
    told, arrays = golden_json("emu35/generate.json")["runs"][run], golden_npz("emu35/generate.npz")
    config = DecoderConfig(vocab_size=282926, tokens=SpecialTokens(visual_count=131072), family="emu3.5")
    grammar = Grammar.of(config, range(15, 25), 9)
    prompt, generated = arrays[f"{run}/prompt_ids"].tolist(), arrays[f"{run}/generated"].tolist()
    given_sizes = [piece.size for piece in split(prompt, grammar) if isinstance(piece, Picture)]
    size = tuple(told["size"]) if "size" in told else None
    if given_sizes and (size is None or not told.get("force_same_image_size", True)):
        size = given_sizes[-1]
    state = GrammarState.of([size])
    for index, token in enumerate(generated):
        answer, finite = int(ask(state, grammar)[0]), int(arrays[f"{run}/finite"][index])
        assert answer < 0 or answer == token, index
        assert (finite == 1) if answer >= 0 else (finite >= 1)
        if answer == SAMPLED_FREE:
            assert token < config.tokens.visual_start
        state = step(state, jnp.asarray([token], jnp.int32), grammar)
    pictures = [piece for piece in split(generated, grammar) if isinstance(piece, Picture)]
    expected = [tuple(value[::-1]) for kind, value in told["pieces"] if kind == "image"]
    assert [tuple(16 * side for side in p.size) for p in pictures if p.whole] == expected or told.get("no_pictures")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([11, 25], "id 1 of the sequence is 25, which belongs into a picture, but no BOI opened one"),
        ([28], "id 0 of the sequence is 28, which belongs into a picture"),
        ([24, 1, 24], "id 2 of the sequence is 24, which does not belong into the size of a picture"),
        ([24, 1, 10, 23], "id 3 of the sequence is 23, which does not belong into the size of a picture"),
        ([24, 1, 10, 2, 23, 28, 24], "id 6 of the sequence is 24, which does not belong into a picture of 1.2"),
        ([24, 1, 10, 1, 23, 28, 26, 25], "id 7 of the sequence is 25, which does not belong into a picture of 1.1"),
    ],
)
def test_ids_that_are_no_sequence(ids, message):
    with pytest.raises(Emu3Error, match=message):
        split(ids, EMU3)


def test_a_picture_that_is_cut_off():
    (piece,) = split([24, 2, 10, 2, 23, 28, 29, 26, 30], EMU3)
    assert (piece.size, piece.codes.tolist(), piece.whole) == ((2, 2), [0, 1, 2], False)
    (piece,) = split([24, 2, 10], EMU3)
    assert (piece.size, piece.whole) == (None, False)


def sizes_that_fit(grammar, room, limit):
    """Every text of a size whose whole picture takes at most `room` tokens, counted on pictures written by hand."""
    sides = range(10, 100) if grammar is EMU35 else range(1, 1000)
    line_ends = 0 if grammar is EMU3 else -1
    return {
        f"{rows}*{columns}!"
        for rows in sides[: limit[0]]
        for columns in sides[: min(limit[1], room // rows)]
        if rows <= limit[0]
        and columns <= limit[1]
        and 3 + len(f"{rows}*{columns}") + rows * (columns + 1) + line_ends + (grammar is EMU3) <= room
    }


@pytest.mark.parametrize("grammar", [EMU3, EMU35], ids=["emu3", "emu3.5"])
@given(data=st.data())
@settings(max_examples=40)
def test_free_sizes_end_within_the_tokens_that_are_left(grammar, data):
    """Each token of a size is legal exactly if a size that fits begins so, and a BOI if any size fits."""
    least = 10 if grammar is EMU35 else 1
    before = data.draw(st.integers(0, 3))
    room = data.draw(st.one_of(st.integers(1, 2000), st.sampled_from([10, 11, 116, 117, 118, 130])))
    limit = data.draw(st.one_of(st.none(), st.tuples(*[st.integers(least, 130)] * 2)))
    state = jax.tree.map(jnp.asarray, GrammarState.of([None], [before + room], [limit]))
    for _ in range(before):
        state = step(state, jnp.asarray([11]), grammar)
    fitting = sizes_that_fit(grammar, room, limit or (999, 999))
    assert bool(may_open(state, grammar)[0]) == bool(fitting)
    if not fitting:
        return
    state, text = step(state, jnp.asarray([TOKENS.boi]), grammar), ""
    ids = {**{str(digit): digit for digit in range(10)}, "*": grammar.times, "!": TOKENS.img}
    while not text.endswith("!"):
        expected = {size[len(text)] for size in fitting if size.startswith(text)}
        answer = int(ask(state, grammar)[0])
        if answer >= 0:
            found = {answer}
        else:
            mask = np.asarray(legal_in_size(state, grammar))[0]
            found = {
                i for i, allowed in zip([*grammar.digits, grammar.times, TOKENS.img], mask, strict=True) if allowed
            }
        assert found == {ids[character] for character in expected}, (text, room, limit)
        text += data.draw(st.sampled_from(sorted(expected)))
        state = step(state, jnp.asarray([ids[text[-1]]]), grammar)
    rows, columns = map(int, text[:-1].split("*"))
    whole = picture(rows, columns, grammar, lambda: TOKENS.visual_start)
    assert len(whole) == grammar.picture_length(rows, columns) <= room
    assert int(state.left[0]) == room - len(text) - 1
