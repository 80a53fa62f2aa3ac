"""Clips of the batcher: frames are those of `Emu3.generate_clips` alone, and appear while later ones are sampled."""

import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.serving import batcher as batching
from emu3_jax.serving.batcher import Batcher
from emu3_jax.serving.jobs import ClipFrames, ClipJob, Failed, Finished, PictureJob, Started, TooLarge

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return emu3_jax.load(tiny_bundle, dtype="float32")


@pytest.fixture(scope="module")
def shared(model):
    made = Batcher(model, rows=2, passes=5, slots=[192, 384], rows_every=0.0)
    yield made
    made.close(finish=True)


def picture(side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8))


# A latent frame of 24x24 pixels has 13 tokens, so 64 frames take more positions than there are: two rows.
CLIPS = [
    {"prompt": "a beating heart", "frames": 6, "seed": 1},
    {"prompt": "x", "negative": "something long", "frames": 3, "ratio": "2:1", "guidance": 1.0, "seed": 2},
    {"prompt": "a tree", "frames": 90, "guidance": 2.0, "top_k": 7, "seed": 2**32 - 1},
    {"prompt": "a tree", "frames": 5, "area": 1600, "temperature": 0.0, "picture": picture()},
]


@pytest.mark.parametrize("fields", CLIPS, ids=["one row", "ratio", "several rows", "continued"])
def test_clips_are_those_of_the_model_alone(model, shared, fields):
    """Beside other jobs, and a picture that joins when the clip has begun."""
    ticket = shared.submit(ClipJob(**fields))
    events = ticket.events()
    assert isinstance(next(events), Started)
    others = [shared.submit(PictureJob(prompt="a", seed=seed)) for seed in range(3)]
    *shown, last = events
    assert isinstance(last, Finished) and all(isinstance(event, ClipFrames) for event in shown)
    options = {name: value for name, value in fields.items() if name not in ("prompt", "picture")}
    given = fields.get("picture")
    (alone,) = model.generate_clips(fields["prompt"], extend=given, **options)
    np.testing.assert_array_equal(last.clip, alone.frames)
    first = int(given is not None)
    assert [event.first for event in shown] == list(range(first, len(alone.frames), 4))
    np.testing.assert_array_equal(np.concatenate([event.frames for event in shown]), alone.frames[first:])
    for seed, other in enumerate(others):
        *_, done = other.events()
        (drawn,) = model.generate("a", seed=seed)
        np.testing.assert_array_equal(np.asarray(done.picture), np.asarray(drawn))
    assert shared.figures()["rows_used"] == 0


def test_a_long_clip_counts_once(model, shared):
    before = shared.figures()
    job = ClipJob(prompt="a", frames=90)
    *_, last = shared.submit(job).events()
    after = shared.figures()
    assert after["jobs_finished_total"] - before["jobs_finished_total"] == 1
    assert last.tokens == after["tokens_total"] - before["tokens_total"] > 23 * 13
    assert last.passes > 23 * 9 and last.prompt_tokens > 0


def test_a_long_clip_that_is_cancelled_frees_its_row(shared):
    ticket = shared.submit(ClipJob(prompt="a", frames=1000))
    events = ticket.events()
    while not (isinstance(event := next(events), ClipFrames) and event.first > 80):
        pass
    ticket.cancel()
    *_, last = shared.submit(PictureJob(prompt="a")).events()
    assert isinstance(last, Finished) and list(events) == []


def test_closing_gives_up_long_clips(model):
    made = Batcher(model, rows=1, passes=5, slots=[384])
    tickets = [made.submit(ClipJob(prompt="a", frames=1000)) for _ in range(2)]
    next(tickets[0].events())
    made.close(finish=False)
    assert [list(ticket.events())[-1] for ticket in tickets] == [Failed(batching.CLOSING)] * 2


def test_frames_that_cannot_be_encoded_fail_alone(shared, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("emu3_jax.serving.clip_rows.encode_end", broken)
    *_, last = shared.submit(ClipJob(prompt="a", frames=90)).events()
    assert last == Failed(batching.BROKEN) and "a job cannot begin" in caplog.text
    monkeypatch.undo()
    *_, last = shared.submit(ClipJob(prompt="a", frames=2)).events()
    assert isinstance(last, Finished)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frames": 0}, "frames is 0: it must be a whole number >= 1"),
        ({"frames": 10**9}, "frames is 1000000000: it must be at most"),
        ({"fps": 0.0}, "fps is 0.0: it must be a finite number > 0"),
        ({"ratio": "9:1"}, "ratio 9:1 is too elongated"),
        ({"guidance": -1.0}, "guidance is -1.0: it must be a number from 0"),
        ({"prompt": "<|image start|>"}, "special token"),
        ({"negative": "<|image start|>"}, "special token"),
        ({"prompt": None}, "prompt is None: it must be a text"),
    ],
)
def test_illegal_fields_of_clips(shared, fields, words):
    with pytest.raises(Emu3Error, match=words):
        shared.submit(ClipJob(**{"prompt": "a", **fields}))


def test_clips_that_never_fit(shared, model):
    with pytest.raises(TooLarge, match=r"256 positions hold the prompt and 0 frames .* choose a smaller area"):
        shared.submit(ClipJob(prompt="a", area=128 * 128))
    with pytest.raises(TooLarge, match="256 positions"):
        shared.submit(ClipJob(prompt="word " * 300))
    small = Batcher(model, rows=1, slots=[128])
    try:
        with pytest.raises(
            TooLarge, match=r"exceed the server's 128: .*, or ask for a smaller picture, clip or answer"
        ):
            small.submit(ClipJob(prompt="a", frames=64))
    finally:
        small.close(finish=True)
