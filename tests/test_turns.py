"""Conversations of texts and pictures in turn: what a kept cache gives is what the whole prompt gives."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from conftest import GOLDEN
from emu35 import vision_of_emu35, write_decoder
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints.convert import convert
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine, interleaving, session
from emu3_jax.generation.documents import grammar_of
from emu3_jax.generation.grammar import Grammar, Picture, inside_pictures, picture_ids, split
from emu3_jax.generation.interleaving import InterleavedRow
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.schedule import text_schedule
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings
from emu3_jax.text.prompts import next_turn_prompt

pytestmark = [pytest.mark.slow, pytest.mark.compiled_quickly]

TINY = Grammar(tiny.CONFIG.tokens, tuple(range(1, 11)), 11, most_digits=1)
LATER = [18, 3, 4, 5]  # EOS and a new question


@pytest.fixture
def fed(monkeypatch):
    """The number of tokens of each new part that was computed after a kept cache."""
    found = []
    resume = interleaving.resume

    def counted(*arguments, **options):
        found.append(np.asarray(arguments[3]).tolist())
        return resume(*arguments, **options)

    monkeypatch.setattr(interleaving, "resume", counted)
    return found


@pytest.fixture
def asked(monkeypatch):
    """As `fed`, of sessions."""
    found = []
    resume = engine.resume

    def counted(*arguments, **options):
        found.append(np.asarray(arguments[3]).tolist())
        return resume(*arguments, **options)

    monkeypatch.setattr(engine, "resume", counted)
    return found


def first_rows(contexts, count=2):
    prompts = ([17, 1, 2], [17, 4, 5, 6, 7, 8], [17, 3])[:count]
    return [
        InterleavedRow(ids, [17, 9] if contexts > 1 else None, [17] if contexts > 2 else None, (2, 2), 40 + 7 * index)
        for index, ids in enumerate(prompts)
    ]


def later_rows(rows, written):
    """The rows of a second turn: pictures that were cut off are left out."""
    found = []
    for row, ids in zip(rows, written, strict=True):
        pieces = split(ids.tolist(), TINY, strict=False)
        if isinstance(pieces[-1], Picture) and not pieces[-1].whole:
            ids = ids[: len(ids) - 1 - ids[::-1].tolist().index(TINY.tokens.boi)]
        pictures = ids[inside_pictures(ids, TINY)].tolist()
        found.append(
            dataclasses.replace(
                row,
                prompt=[*row.prompt, *ids.tolist(), *LATER],
                unconditional=None if row.unconditional is None else [*row.unconditional, *pictures, *LATER[:2]],
                steps=30,
            )
        )
    return found


def tiny_settings(rows):
    """For text and pictures, and the scales of guidance by pictures."""
    count = len(rows)
    text = tiny.settings(count, temperature=8.0, top_k=22, seed=np.arange(count) + 104)
    visual = tiny.settings(count, temperature=1.3, top_k=6, top_p=0.95, guidance=2.0)
    return text, visual, None if rows[0].empty is None else [1.5] * count


def tiny_run(rows, params=None, **options):
    params = tiny.params() if params is None else params
    return interleaving.run(params, tiny.CONFIG, TINY, rows, *tiny_settings(rows), **options)


def assert_turns_are_equal(rows, fed, **options):
    """Three turns with a kept cache, against whole prompts."""
    kept = Kept()
    for turn in range(3):
        expected = tiny_run(rows, **options)
        found = tiny_run(rows, kept=kept, **options)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(fed) == turn  # the first turn has nothing to go on from
        rows = later_rows(rows, found)
    return rows


def test_turns_with_a_kept_cache_are_those_of_whole_prompts(fed):
    rows = assert_turns_are_equal(first_rows(contexts=3), fed)
    whole = [len(row.prompt) for row in rows]
    assert all(count < 16 for turn in fed for count in turn) and min(whole) > 60


def test_a_narrow_cache_that_grows_and_passes_of_several_tokens(fed, monkeypatch):
    sizes = []
    monkeypatch.setattr("emu3_jax.generation.shapes.CACHE_GROWTH", 64)
    put = Kept.put

    def noted(kept, cache, *rest):
        sizes.append(cache.slots)
        put(kept, cache, *rest)

    monkeypatch.setattr(Kept, "put", noted)
    assert_turns_are_equal(first_rows(2), fed, narrow_cache=True, parallel=4)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_conversations_that_begin_differently_share_a_program():
    interleaving.decode.jitted.clear_cache()
    rows = first_rows(contexts=3, count=1)
    for prompt in (rows[0].prompt, [*rows[0].prompt, *[3, 4] * 40]):  # 64 and 128 slots
        tiny_run([dataclasses.replace(rows[0], prompt=prompt)], kept=Kept())
    assert interleaving.decode.jitted._cache_size() == 1


def test_turns_on_a_mesh(fed):
    """Rows that fill the batch up are computed in no later turn from their beginning."""
    mesh = make_mesh("data=2,tensor=2")
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    kept, rows = Kept(), first_rows(2, count=1)
    for _ in range(2):
        expected = tiny_run(rows)
        found = tiny_run(rows, params, kept=kept, mesh=mesh)
        np.testing.assert_array_equal(found[0], expected[0])
        rows = later_rows(rows, found)
    assert len(fed) == 1 and max(fed[0]) < 16


def test_other_prompts_and_an_interrupted_turn(fed):
    kept = Kept()
    rows = first_rows(contexts=3)  # as above: the same programs
    tiny_run(rows, kept=kept)
    other = [dataclasses.replace(row, prompt=[17, 1, 2, 7, 7], unconditional=[17, 8], steps=9) for row in rows]
    for one, expected in zip(tiny_run(other, kept=kept), tiny_run(other), strict=True):
        np.testing.assert_array_equal(one, expected)
    # What their prompts have in common with those of the first turn is kept, but for each prompt's last token.
    assert fed == [[2, 4, 1, 1, 1, 1]]
    assert kept.take([[1]] * 3, 16) is None  # another number of rows
    tiny_run(rows, kept=kept)
    turn = interleaving.stream(tiny.params(), tiny.CONFIG, TINY, rows, *tiny_settings(rows), kept=kept)
    next(turn)
    turn.close()
    assert kept.take([[1]] * 6, 16) is None


@pytest.mark.parametrize(
    "options", [{}, {"parallel": 4}, {"narrow_cache": True}, {"guided": True}, {"mesh": "data=2,tensor=2"}],
    ids=["plain", "windows", "narrow", "guided", "mesh"],
)  # fmt: skip
def test_sessions_with_a_kept_cache(asked, options):
    """Three turns of questions and answers, against whole prompts."""
    options = dict(options)
    guided, params = options.pop("guided", False), tiny.params()
    if "mesh" in options:
        options["mesh"] = make_mesh(options["mesh"])
        params = jax.device_put(params, decoder_shardings(tiny.CONFIG, options["mesh"]))
    settings = tiny.settings(1, temperature=2.0, guidance=1.5 if guided else 1.0)
    kept, prompt, negative = Kept(), [17, 1, 2, 3], [17] if guided else None
    for turn in range(3):
        row = session.Row(prompt, text_schedule(9), negative)
        narrow = options.get("narrow_cache", False)
        whole = session.run(tiny.params(), tiny.CONFIG, [row], settings, narrow_cache=narrow)
        made = session.run(params, tiny.CONFIG, [row], settings, kept=kept, **options)
        np.testing.assert_array_equal(made.ids, whole.ids)
        assert len(asked) == turn
        written = made.ids[0][made.ids[0] != tiny.CONFIG.tokens.pad].tolist()
        prompt = [*prompt, *written, 4, 5, 6]
        negative = [*negative, *written, 4] if guided else None
    assert all(count < 16 for turn in asked for count in turn)


def test_a_conversation_keeps_its_cache(golden_model, asked):
    """The answers are those of whole prompts, of which later turns compute only the new part."""
    talk = golden_model.converse(max_new_tokens=5)
    answers = [talk.ask("What is this", GOLDEN / "photo.png"), talk.ask("And why"), talk.ask("Is it")]
    assert len(asked) == 2 and all(count < 40 for turn in asked for count in turn)
    alone = golden_model.converse(max_new_tokens=5)
    for question, expected, shown in zip(
        ("What is this", "And why", "Is it"), answers, (True, False, False), strict=True
    ):
        alone._kept = Kept()
        assert alone.ask(question, GOLDEN / "photo.png" if shown else ()) == expected
    assert len(asked) == 2


def test_logits_after_a_kept_cache():
    """Of rows with unequal numbers of kept and of new tokens."""
    from emu3_jax.generation.shapes import align_right
    from emu3_jax.models.cache import KVCache

    prompts = np.random.default_rng(3).integers(0, 16, (2, 40)).tolist()
    prompts[1] = prompts[1][:31]
    whole, start = align_right(prompts, 40, 16)
    expected, _ = tiny.forward(tiny.params(), whole, KVCache.create(tiny.CONFIG, start, 40), last_only=True)
    first, start = align_right([prompts[0][:20], prompts[1][:29]], 32, 16)
    _, cache = tiny.forward(tiny.params(), first, KVCache.create(tiny.CONFIG, start, 64))
    kept = Kept()
    kept.put(cache.replace(lockstep=False), start, 32, [prompts[0][:20], [*prompts[1][:29], 5]])
    tail = kept.take(prompts, 16)
    assert tail.counts.tolist() == [20, 2]
    apply = jax.jit(Decoder(tiny.CONFIG).apply)
    found, _ = apply({"params": tiny.params()}, tail.tokens, tail.roomy(0), last_only=tail.counts - 1)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_a_conversation_of_a_whole_model(tiny_bundle, fed):
    """`Turns.send` gives what the whole conversation gives as one prompt, and computes only what is new."""
    model = emu3_jax.load(tiny_bundle, dtype="float32")
    options = {"max_new_tokens": 20, "guidance": 2.0, "seed": 5}
    turns, pieces = model.interleave_turns(**options), []
    first = turns.send("a dog", on_piece=pieces.append)
    second = turns.send("again")
    assert [text for text, _ in turns.turns] == ["a dog", "again"] and len(fed) == 1
    assert [piece.kind for piece in pieces] == [piece.kind for piece in first.pieces]
    language = model.language
    (alone,) = model.interleave("a dog", **options)
    np.testing.assert_array_equal(first.ids, alone.ids)
    answer = first.ids[first.prompt_length :].tolist()
    said = answer[:-1] if first.ended else answer
    question = next_turn_prompt(language.tokenizer, language.config.tokens, language.templates, "again")
    expected = [*first.ids[: first.prompt_length].tolist(), *said, language.config.tokens.eos, *question]
    assert second.ids[: second.prompt_length].tolist()[-len(question) :] == question
    if not any(piece.kind == "picture" and not piece.whole for piece in first.pieces):
        assert second.ids[: second.prompt_length].tolist() == expected
    with pytest.raises(emu3_jax.Emu3Error, match="text is None: it must be one text"):
        turns.send(None)
    with pytest.raises(emu3_jax.Emu3Error, match=r"the conversation takes .* positions: begin a new one"):
        turns.send("word " * 300)
    assert len(turns.turns) == 2


# ------------------------------------------------------------------------------------------------ Emu3.5


@pytest.fixture(scope="module")
def model(tmp_path_factory, vocabulary):
    """The golden model of Emu3.5, which writes a text, a picture and a text."""
    root = tmp_path_factory.mktemp("emu35")
    convert([write_decoder(root / "lm", vocabulary, steer=True)], root / "bundle", progress=False)
    return emu3_jax.Emu3("emu35", emu3_jax.load(root / "bundle", dtype="float32").language, vision_of_emu35())


GREEDY = {"task": "story", "temperature": 0.0, "text_temperature": 0.0, "guidance": 2.0, "size": (2, 3)}


def test_a_conversation_is_what_its_whole_prompts_give(model, fed, monkeypatch):
    stream, rows = interleaving.stream, []

    def noted(*arguments, **options):
        rows.extend(arguments[3])
        return stream(*arguments, **options)

    monkeypatch.setattr(interleaving, "stream", noted)
    chat = model.interleave_turns(**GREEDY, max_new_tokens=18)
    heard = []
    first = chat.send("How to cook dumplings", on_piece=heard.append)
    assert heard == first.pieces and [piece.kind for piece in heard] == ["text", "picture", "text"]
    second = chat.send("Now with soup", Image.new("RGB", (40, 30)))
    language = model.language
    rule, tokenizer = grammar_of(language), language.tokenizer
    begins = tokenizer.special_ids["<|extra_100|>"]
    shown = picture_ids(model.tokenize([Image.new("RGB", (40, 30))], area=720 * 720)[0], rule)
    question = [*tokenizer.encode("USER: Now with soup"), *shown, *tokenizer.encode(" ASSISTANT: "), begins]
    prompt = second.ids[: second.prompt_length].tolist()
    assert prompt == [*first.ids.tolist(), tokenizer.special.eos, *question]
    answer = first.ids[first.prompt_length :]
    empty = tokenizer.encode("You are a helpful assistant. USER:  ASSISTANT: ")
    drawn = answer[inside_pictures(answer, rule)].tolist()
    unconditional = [
        tokenizer.special.bos, *empty, begins, *drawn, tokenizer.special.eos,
        *tokenizer.encode("USER: "), *shown, *tokenizer.encode(" ASSISTANT: "), begins,
    ]  # fmt: skip
    assert max(fed[0]) == len(question) + 2  # the last token and EOS
    row = InterleavedRow(prompt, unconditional, size=(2, 3), steps=18)
    assert len(rows) == 2 and rows[1] == row
    greedy = tiny.settings(1, temperature=0.0, guidance=2.0, seed=1)
    (expected,) = interleaving.run(language.params, language.config, rule, [row], greedy, greedy)
    np.testing.assert_array_equal(second.ids[second.prompt_length :], expected)
    assert [text for text, _ in chat.turns] == ["How to cook dumplings", "Now with soup"]


def test_a_picture_that_was_cut_off_is_no_part_of_later_turns(model):
    chat = model.interleave_turns(**GREEDY, max_new_tokens=16)
    first = chat.send("How to cook dumplings")
    assert not first.pieces[-1].whole
    second = chat.send("Again")
    eos, boi = (getattr(model.language.config.tokens, name) for name in ("eos", "boi"))
    opened = first.ids.tolist().index(boi)
    prompt = second.ids[: second.prompt_length].tolist()
    assert prompt[: opened + 1] == [*first.ids[:opened].tolist(), eos] and boi not in prompt


def test_what_a_conversation_refuses(model):
    with pytest.raises(Emu3Error, match=r"a model of Emu3\.5 needs a task"):
        model.interleave_turns()
    with pytest.raises(Emu3Error, match="size is 7"):
        model.interleave_turns(task="story", size=7)
    chat = model.interleave_turns(**GREEDY, max_new_tokens=6)
    first = chat.send("How to cook dumplings")

    def stop(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.send("Once more", on_piece=stop)
    with pytest.raises(Emu3Error, match="on_text is 3: it must be a function, or None"):
        chat.send("Once more", on_text=3)
    for text, image, reason in (
        (["a", "b"], (), "text is .* it must be one text"),
        ("a <|image start|>", (), "special token"),
        ("a", "nowhere.png", "cannot read nowhere.png"),
        ("word " * 5000, (), "the conversation takes .* begin a new one"),
    ):
        with pytest.raises(Emu3Error, match=reason) as caught:
            chat.send(text, image)
        assert len(str(caught.value)) <= 300 and not str(caught.value).startswith("row")
    assert [document for _, document in chat.turns] == [first]
    same = first.prompt_length + 4  # then a picture begins, which is cut off
    assert chat.send("Once more").ids[:same].tolist() == first.ids[:same].tolist()
