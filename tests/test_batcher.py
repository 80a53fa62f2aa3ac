"""The batcher: jobs that join at any time get what they would get alone; the queue, events, errors, and compilation."""

import gc
import threading
import time
import weakref

import jax
import numpy as np
import pytest
from PIL import Image
from serving_stand_ins import CHAT, kill_in_mid_stream, served, wait_until

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.serving import batcher as batching
from emu3_jax.serving.app import make_app
from emu3_jax.serving.batcher import Batcher
from emu3_jax.serving.fair_queue import FairQueue, Full
from emu3_jax.serving.jobs import (
    AnswerJob,
    AnswerText,
    Busy,
    Closing,
    Failed,
    Finished,
    PictureJob,
    PictureRows,
    Started,
    TooLarge,
)
from emu3_jax.serving.pool import Pool, pool_slots, rows_that_fit, widths

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return emu3_jax.load(tiny_bundle, dtype="float32")


@pytest.fixture(scope="module")
def shared(model):
    """A batcher of two rows. Its jobs do not know of each other."""
    with_rows = Batcher(model, rows=2, passes=3, slots=[192, 384], rows_every=0.0)
    yield with_rows
    with_rows.close(finish=True)


@pytest.fixture
def batcher(model):
    """Makes batchers, and closes them."""
    made = []

    def make(**options):
        made.append(Batcher(model, **{"rows": 1, "passes": 3, "slots": [192], **options}))
        return made[-1]

    yield make
    for one in made:
        one.close(finish=False)


def photo(width: int = 24, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def result(ticket) -> Finished:
    *_, last = ticket.events()
    assert isinstance(last, Finished), last
    return last


PICTURES = [
    {"prompt": "a red apple", "seed": 1},
    {"prompt": "a tree", "ratio": "2:1", "guidance": 1.0, "seed": 2},
    {"prompt": "x", "negative": "something long and blurry", "area": 2304, "top_k": 5, "seed": 3},
    {"prompt": "a tree", "ratio": "1:3", "temperature": 0.0, "guidance": 2.0},
    {"prompt": "", "area": 1600, "top_p": 0.7, "temperature": 1.5, "seed": 2**32 - 1},
]


def assert_alone(model, fields: dict, finished: Finished) -> None:
    (alone,) = model.generate(fields["prompt"], **{name: v for name, v in fields.items() if name != "prompt"})
    np.testing.assert_array_equal(np.asarray(finished.picture), np.asarray(alone))
    assert finished.picture.info == alone.info
    assert finished.passes == int(alone.info["passes"]) and finished.ended


def test_pictures_and_answers_that_join_at_any_time(model, shared):
    """Five pictures and two answers in two rows: each begins where another one is done."""
    answers = [
        AnswerJob(prompt="What is this", pictures=(photo(),), max_new_tokens=9, seed=4),
        AnswerJob(prompt="Why", max_new_tokens=30, temperature=0.8, top_p=0.9, seed=6),
    ]
    first = [shared.submit(PictureJob(**fields)) for fields in PICTURES[:3]]
    next(first[0].events())  # the others join when this one has begun
    asked = [shared.submit(job) for job in answers]
    later = [shared.submit(PictureJob(**fields)) for fields in PICTURES[3:]]
    for fields, ticket in zip(PICTURES, first + later, strict=True):
        assert_alone(model, fields, result(ticket))
    for job, ticket in zip(answers, asked, strict=True):
        sampling = {name: getattr(job, name) for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens")}
        (alone,) = model.chat([list(job.pictures)], job.prompt, **sampling)
        finished = result(ticket)
        assert finished.text == alone
        assert finished.ended == (finished.tokens < job.max_new_tokens)


def test_rows_are_used_again_and_counted(model, shared):
    before = shared.figures()
    tickets = [shared.submit(PictureJob(prompt="a", seed=seed)) for seed in range(5)]
    for seed, ticket in enumerate(tickets):
        assert_alone(model, {"prompt": "a", "seed": seed}, result(ticket))
    after = shared.figures()
    whole = [name for name in after if name.endswith("_total") and not name.endswith("by_kind_total")]
    grown = {name: after[name] - before[name] for name in whole}
    name = "jobs_finished_by_kind_total"
    assert after[name]["picture"] - before[name].get("picture", 0) == 5
    assert grown["device_seconds_total"] > 0
    assert sum(after["device_seconds_by_kind_total"].values()) == pytest.approx(after["device_seconds_total"], abs=0.01)
    assert grown["jobs_taken_total"] == grown["jobs_finished_total"] == grown["pictures_total"] == 5
    assert grown["tokens_total"] == 5 * (3 * 4 + 3)
    assert grown["passes_total"] < grown["row_passes_total"] <= 2 * grown["passes_total"]
    # 11 steps of a picture have a sampled token after them or are one; the first of them is prefill's.
    assert grown["row_passes_used_total"] == 5 * 10
    assert (after["rows"], after["rows_used"], after["queue_length"]) == (4, 0, 0)


def test_history_becomes_the_turns_of_a_conversation(model):
    from emu3_jax.generation.conversation import dialogue_prompt
    from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt

    language = model.language
    codes = [np.arange(9, dtype=np.int32).reshape(3, 3)]
    made = dialogue_prompt(language, [("Who", "A dog")], "Why", codes)
    tools = language.tokenizer, language.config.tokens, language.templates
    answered = [*language.tokenizer.encode("A dog"), language.config.tokens.eos]
    assert made == [*understanding_prompt(*tools, "Who", codes), *answered, *next_turn_prompt(*tools, "Why")]


# ------------------------------------------------------------------------------------------------ illegal fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ratio": "9:1"}, "ratio 9:1 is too elongated"),
        ({"ratio": 3}, "ratio is 3: it must be a text"),
        ({"area": -4}, "area is -4: it must be a whole number of pixels"),
        ({"area": 7}, "area is 7: at ratio 1:1 it must be at least 144 pixels"),
        ({"temperature": -1}, "temperature is -1: it must be 0, or a number from 1e-9 to 1e9"),
        ({"guidance": float("nan")}, "guidance is nan: it must be a number from 0 to 1e9"),
        ({"guidance": [1.0, 2.0]}, "guidance is .*: it must be one number"),
        ({"seed": 2**32}, "seed is 4294967296: it must be a whole number from 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"prompt": "<|image start|>"}, "special token"),
        ({"negative": "<|image start|>"}, "special token"),
        ({"prompt": None}, "prompt is None: it must be a text"),
    ],
)
def test_illegal_fields_of_pictures(shared, fields, words):
    with pytest.raises(Emu3Error, match=words):
        shared.submit(PictureJob(**{"prompt": "a", **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number >= 1"),
        ({"history": (("Who", "<|image start|>"),)}, "special token"),
        ({"prompt": "<|image start|>"}, "special token"),
        ({"pictures": (photo(4, 4),)}, "too small"),
        ({"history": (("Who", 3),)}, "history is 3: it must be a text"),
    ],
)
def test_illegal_fields_of_answers(shared, fields, words):
    with pytest.raises(Emu3Error, match=words):
        shared.submit(AnswerJob(**{"prompt": "a", **fields}))


def test_jobs_that_never_fit(shared, batcher):
    for job, words in (
        (PictureJob(prompt="a", area=64 * 256), "exceed the model's 256 positions"),
        (AnswerJob(prompt="word " * 300), "the model has 256 positions"),
    ):
        with pytest.raises(TooLarge, match=words):
            shared.submit(job)
    with pytest.raises(TooLarge, match="exceed the server's 192"):
        batcher().submit(AnswerJob(prompt="Why", max_new_tokens=200))


# ------------------------------------------------------------------------------------------------ the queue


def test_clients_take_turns():
    queue = FairQueue(7)
    for client, item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(client, client + item)
    with pytest.raises(Full, match="3 of your requests wait"):
        queue.put("a", "a4")
    queue.put("d", "d1")
    with pytest.raises(Full, match="the queue is full"):
        queue.put("e", "e1")
    assert queue.remove("d", "d1")
    assert queue.take(lambda item: item == "b1") == "b1"
    assert queue.remove("c", "c1") and not queue.remove("c", "c1")
    assert [queue.take(lambda item: True) for _ in range(4)] == ["a1", "b2", "a2", "a3"]
    assert queue.take(lambda item: True) is None and len(queue) == 0


def test_one_client_leaves_room_for_others():
    """Each of nine clients asks for as much as it can get; a caller without a name has no share."""
    queue, counts = FairQueue(64), []
    for client in "abcdefghi":
        counts.append(0)
        with pytest.raises(Full, match=f"{32 >> len(counts) - 1 or 1} of your requests wait|the queue is full"):
            for _ in range(65):
                queue.put(client, client)
                counts[-1] += 1
    assert counts == [32, 16, 8, 4, 2, 1, 1, 0, 0] and len(queue) == 64
    unnamed = FairQueue(5)
    for number in range(5):
        unnamed.put("", number)
    with pytest.raises(Full, match="the queue is full"):
        unnamed.put("", 5)


class Gate:
    """Holds the device's thread before each call of the device, until `open`."""

    def __init__(self, monkeypatch):
        self.open, self.held = threading.Event(), threading.Event()
        advance = Pool.advance

        def waiting(pool, passes):
            self.held.set()
            assert self.open.wait(60)
            return advance(pool, passes)

        monkeypatch.setattr(Pool, "advance", waiting)


def test_a_full_queue_cancelled_jobs_and_the_order(batcher, monkeypatch):
    gate, order = Gate(monkeypatch), []
    made = batcher(queue=3)
    begin = Pool.begin
    monkeypatch.setattr(Pool, "begin", lambda *a: (order.append(a[1].job.prompt), begin(*a))[1])
    running = made.submit(PictureJob(prompt="0", client="a"))
    assert gate.held.wait(60)
    waiting = [made.submit(PictureJob(prompt=name, client=name[0])) for name in ("a1", "a2", "b1")]
    with pytest.raises(Busy, match=r"the queue is full: try again in \d+ seconds") as raised:
        made.submit(PictureJob(prompt="c1", client="c"))
    assert raised.value.retry_after >= 1
    waiting[0].cancel()
    waiting.append(made.submit(PictureJob(prompt="c1", client="c")))
    running.cancel()
    assert list(running.events()) == list(waiting[0].events()) == []
    gate.open.set()
    for ticket in waiting[1:]:
        assert isinstance(result(ticket), Finished)
        ticket.cancel()  # too late: nothing happens
    assert order == ["0", "a2", "b1", "c1"]
    figures = made.figures()
    assert (figures["jobs_cancelled_total"], figures["jobs_refused_total"]) == (2, 1)
    assert (figures["jobs_finished_total"], figures["jobs_failed_total"], figures["rows_used"]) == (3, 0, 0)


def test_a_ticket_keeps_no_pictures(batcher):
    made, picture = batcher(), photo()
    kept = weakref.ref(picture)
    ticket = made.submit(AnswerJob(prompt="What", pictures=(picture,), max_new_tokens=2))
    del picture
    gc.collect()
    assert kept() is None and result(ticket).text is not None


def test_killed_clients_leave_no_row(model, batcher):
    """Twenty clients of a real model are killed in mid-stream. Then all rows are free, and a picture is drawn."""
    made = batcher(rows=3, slots=[384], passes=2)
    body = {"messages": [{"role": "user", "content": "Why"}], "max_tokens": 250, "temperature": 1.5}
    with served(make_app(made, model), made) as url:
        for seed in range(5):
            kill_in_mid_stream(url, CHAT, {**body, "seed": seed}, 4)
            wait_until(lambda: not (made.figures()["rows_used"] or made.figures()["queue_length"]))
        assert isinstance(result(made.submit(PictureJob(prompt="a"))), Finished)
    figures = made.figures()
    assert figures["jobs_taken_total"] == 21 == figures["jobs_cancelled_total"] + figures["jobs_finished_total"]
    assert figures["jobs_cancelled_total"] > 10 and figures["jobs_failed_total"] == 0


def test_closing(batcher, monkeypatch):
    gate = Gate(monkeypatch)
    finishing, hurried = batcher(), batcher()
    tickets = [one.submit(PictureJob(prompt="a", seed=seed)) for one in (finishing, hurried) for seed in (1, 2)]
    assert gate.held.wait(60)
    closing = [threading.Thread(target=one.close, args=(one is finishing,)) for one in (finishing, hurried)]
    for thread in closing:
        thread.start()
    gate.open.set()
    for thread in closing:
        thread.join()
    assert [type(list(ticket.events())[-1]) for ticket in tickets] == [Finished, Finished, Failed, Failed]
    for one in (finishing, hurried):
        with pytest.raises(Closing, match="the server shuts down: try again in 5 seconds"):
            one.submit(PictureJob(prompt="a"))
        assert one.figures()["closing"] is True


def test_after_a_failure_of_the_device_the_server_goes_on(model, batcher, monkeypatch, caplog):
    made = batcher(rows=2)
    read = Pool.read

    def broken(pool):
        monkeypatch.setattr(Pool, "read", read)
        raise RuntimeError("RESOURCE_EXHAUSTED at /some/path")

    monkeypatch.setattr(Pool, "read", broken)
    *_, last = made.submit(PictureJob(prompt="a")).events()
    assert last == Failed(batching.BROKEN)
    assert "RESOURCE_EXHAUSTED" in caplog.text
    assert_alone(model, {"prompt": "a", "seed": 7}, result(made.submit(PictureJob(prompt="a", seed=7))))
    assert made.figures()["jobs_failed_total"] == 1


def test_a_picture_that_cannot_be_encoded_fails_alone(batcher, monkeypatch, caplog):
    made = batcher(rows=2)

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("emu3_jax.serving.rows.encode_resized", broken)
    asked = made.submit(AnswerJob(prompt="What", pictures=(photo(),), max_new_tokens=3))
    drawn = made.submit(PictureJob(prompt="a"))
    assert list(asked.events()) == [Failed(batching.BROKEN)]
    assert isinstance(result(drawn), Finished)


# ------------------------------------------------------------------------------------------------ events


@pytest.fixture
def attentive(monkeypatch):
    """The device waits until all who have rows wait for it."""
    advance = Pool.advance

    def waiting(pool, passes):
        for ticket in pool.owners:
            while ticket is not None and not (ticket._reading and not ticket._events):
                time.sleep(0.001)
        advance(pool, passes)

    monkeypatch.setattr(Pool, "advance", waiting)


def test_a_picture_appears_row_by_row(shared, attentive):
    first, *shown, last = shared.submit(PictureJob(prompt="a red apple", area=4096, seed=3)).events()
    assert isinstance(first, Started) and first.waited >= 0
    assert isinstance(last, Finished)
    assert [rows.pixels.shape[0] for rows in shown] == [8, 16, 24, 32, 40, 48, 56]
    for rows in shown:
        assert isinstance(rows, PictureRows) and rows.size == (64, 64) and rows.pixels.dtype == np.uint8
        assert rows.pixels.shape[1:] == (64, 3) and rows.pixels.shape[0] % 8 == 0


def test_nothing_is_decoded_for_those_who_do_not_look(batcher, monkeypatch):
    from emu3_jax.serving import rows

    decoded, decoding = [], rows.decoding_picture
    monkeypatch.setattr(rows, "decoding_picture", lambda *a: (decoded.append(a), decoding(*a))[1])
    made = batcher(rows_every=0.0)
    ticket = made.submit(PictureJob(prompt="a red apple", area=4096))
    made.close(finish=True)
    assert [type(event) for event in ticket.events()] == [Started, Finished] and len(decoded) == 1


def test_the_parts_of_an_answer_are_the_answer(shared, attentive):
    *events, last = shared.submit(AnswerJob(prompt="Why", max_new_tokens=40, seed=11)).events()
    parts = [event.text for event in events if isinstance(event, AnswerText)]
    assert "".join(parts) == last.text and all(parts)
    assert len(parts) > 1


# ------------------------------------------------------------------------------------------------ programs


def test_nothing_compiles_after_warming_up(model, batcher):
    made = batcher(rows=2, slots=[192, 384])
    made.warm_up([("1:1", None), ("2:1", None)], idle=True)
    assert made.figures()["warm_ups_left"] > 0
    early = result(made.submit(PictureJob(prompt="a", seed=1)))  # before all is compiled
    while made.figures()["warm_ups_left"]:
        time.sleep(0.05)
    compiled = []

    def listen(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jobs = [
            PictureJob(prompt="a", seed=1),
            PictureJob(prompt="a tree", ratio="2:1", guidance=1.0, top_k=3, seed=2),
            AnswerJob(prompt="Why", max_new_tokens=5),
            AnswerJob(prompt="Why " * 60, max_new_tokens=5, top_p=0.5),
            PictureJob(prompt="a tree " * 20, temperature=0.0),
        ]
        results = [result(ticket) for ticket in [made.submit(job) for job in jobs]]
        assert compiled == []
        np.testing.assert_array_equal(early.picture, results[0].picture)
        jax.jit(lambda x: x + 1)(np.zeros(17)).block_until_ready()
        assert len(compiled) == 1  # what is counted is compilation
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_widths_and_slots(model):
    assert widths(384) == [32, 64, 128, 256]
    assert widths(10240) == [32, 64, 128, 256, 512, *range(1024, 10240, 1024)]
    assert pool_slots(model.language.config, 8) == [128, 384]
    published = emu3_jax.config.DecoderConfig()
    assert pool_slots(published, 8) == [10240]
    # All that the model can do fits.
    (pool,) = [Pool(model.language, 1, 384, batching.Options())]
    assert all(pool.fits(prompt, 256 - prompt) for prompt in range(1, 256))


def test_numbers_that_are_not_legal(model):
    with pytest.raises(Emu3Error, match="rows is 0: it must be a whole number >= 1"):
        Batcher(model, rows=0)


def test_a_budget_of_memory_limits_the_rows(model, batcher):
    # Two layers of keys and values of two heads of 8 float32 numbers each, for guidance twice; and two numbers a row.
    row = [2 * (2 * 2 * 2 * 8 * 4 * slots + 8) for slots in (192, 384)]
    for rows in (1, 3):
        need = rows * (sum(row) + row[1] // 2) + row[1]  # on CPUs with half a pool's, to resize it
        assert rows_that_fit(model.language, [192, 384], need) == rows
        assert batcher(rows=8, slots=[192, 384], memory=need).figures()["rows"] == 2 * rows
    with pytest.raises(Emu3Error, match=r"one row takes .* bytes for keys and values, but the server may take 1,000"):
        Batcher(model, memory=1000)
