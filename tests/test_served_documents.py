"""Documents of the batcher: those of `Emu3.interleave` alone, written between the passes of other jobs."""

import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.serving import batcher as batching
from emu3_jax.serving.batcher import Batcher
from emu3_jax.serving.jobs import (
    AnswerText,
    DocumentJob,
    DocumentPicture,
    Failed,
    Finished,
    PictureJob,
    Started,
    TooLarge,
    Unsupported,
)

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def model(tiny_bundle):
    """The tiny model, which opens a picture early: its head prefers BOI."""
    made = emu3_jax.load(tiny_bundle, dtype="float32")
    boi = made.language.config.tokens.boi
    head = made.language.params["head"]
    head["kernel"] = head["kernel"].at[boi].multiply(6.0)
    return made


@pytest.fixture(scope="module")
def shared(model):
    made = Batcher(model, rows=2, passes=5, slots=[192, 384], rows_every=0.0, documents=True)
    yield made
    made.close(finish=True)


def photo(side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8))


DOCUMENTS = [
    {"prompt": "Make it green", "pictures": (photo(),), "ratio": "1:1", "max_new_tokens": 70, "seed": 3},
    {"prompt": "Tell a story", "ratio": "2:1", "max_new_tokens": 60, "seed": 5, "guidance": 1.0},
    {"prompt": "x", "pictures": (photo(), photo(32)), "max_new_tokens": 90, "seed": 2, "text_temperature": 0.7},
]


def alone(model, fields):
    """What the model makes of the same job."""
    options = {name: value for name, value in fields.items() if name not in ("prompt", "pictures", "ratio")}
    ratio = fields.get("ratio")
    size = None if ratio is None else {"1:1": (3, 3), "2:1": (2, 4)}[ratio]
    (document,) = model.interleave(fields["prompt"], [list(fields.get("pictures", ()))], size=size, **options)
    return document


@pytest.mark.parametrize("fields", DOCUMENTS, ids=["edit", "no guidance", "sizes of the model's choice"])
def test_documents_are_those_of_the_model_alone(model, shared, fields):
    ticket = shared.submit(DocumentJob(**fields))
    others = [shared.submit(PictureJob(prompt="a", seed=seed)) for seed in range(3)]
    first, *events, last = ticket.events()
    assert isinstance(first, Started) and isinstance(last, Finished)
    document = alone(model, fields)
    whole = [piece for piece in document.pieces if piece.picture is not None]
    assert whole
    told = [event for event in events if isinstance(event, DocumentPicture)]
    assert [event.whole for event in told] == [piece.whole for piece in whole]
    for event, piece in zip(told, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(event.picture), np.asarray(piece.picture))
        assert event.picture.info["seed"] == str(fields["seed"])
    text = "".join(event.text for event in events if isinstance(event, AnswerText))
    assert text == last.text == "".join(piece.text for piece in document.pieces)
    assert (last.ended, last.prompt_tokens) == (document.ended, document.prompt_length)
    assert last.tokens == len(document.ids) - document.prompt_length
    assert last.picture_tokens == sum(picture.width * picture.height // 64 for picture in fields.get("pictures", ()))
    for seed, other in enumerate(others):
        *_, done = other.events()
        (drawn,) = model.generate("a", seed=seed)
        np.testing.assert_array_equal(np.asarray(done.picture), np.asarray(drawn))


def test_an_edit_ends_with_its_picture(model, shared):
    fields = DOCUMENTS[0]
    *events, last = shared.submit(DocumentJob(**fields, most_pictures=1)).events()
    first = next(piece for piece in alone(model, fields).pieces if piece.picture is not None)
    np.testing.assert_array_equal(np.asarray(last.picture), np.asarray(first.picture))
    assert last.ended and len(last.pictures) == 1
    assert isinstance(events[-1], DocumentPicture)


def test_others_go_on_while_a_document_is_written(shared):
    """A picture that is asked for after a long document is there before it."""
    written = shared.submit(DocumentJob(prompt="Tell a story", ratio="1:1", max_new_tokens=200))
    waiting = shared.submit(DocumentJob(prompt="Another story", ratio="1:1", max_new_tokens=20))
    next(written.events())
    *_, drawn = shared.submit(PictureJob(prompt="a")).events()
    assert isinstance(drawn, Finished) and not written.over
    written.cancel()
    *_, last = waiting.events()
    assert isinstance(last, Finished) and list(written.events()) == []
    assert shared.figures()["device_seconds_by_kind_total"]["document"] > 0


def test_closing_gives_up_documents(model):
    made = Batcher(model, rows=1, passes=5, slots=[384], documents=True)
    tickets = [made.submit(DocumentJob(prompt="a", ratio="1:1", max_new_tokens=200)) for _ in range(2)]
    next(tickets[0].events())
    made.close(finish=False)
    assert [list(ticket.events())[-1] for ticket in tickets] == [Failed(batching.CLOSING)] * 2


def test_a_document_that_fails_fails_alone(shared, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("emu3_jax.serving.documents.encode_resized", broken)
    *_, last = shared.submit(DocumentJob(**DOCUMENTS[0])).events()
    assert last == Failed(batching.BROKEN) and "a document failed" in caplog.text
    monkeypatch.undo()
    *_, last = shared.submit(DocumentJob(prompt="a", max_new_tokens=3)).events()
    assert isinstance(last, Finished)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ratio": "9:1"}, "ratio 9:1 is too elongated"),
        ({"guidance": -1.0}, "guidance is -1.0: it must be a number from 0"),
        ({"text_temperature": -1.0}, "text_temperature is -1.0: it must be 0, or a number from"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number from 1 on"),
        ({"prompt": "<|image start|>"}, "special token"),
        ({"prompt": None}, "prompt is None: it must be a text"),
        ({"pictures": (photo(4),)}, "too small"),
    ],
)
def test_illegal_fields_of_documents(shared, fields, words):
    with pytest.raises(Emu3Error, match=words):
        shared.submit(DocumentJob(**{"prompt": "a", **fields}))


def test_documents_that_never_fit(shared):
    with pytest.raises(TooLarge, match=r"the prompt takes .* tokens, but the model has 256 positions: shorten it"):
        shared.submit(DocumentJob(prompt="word " * 300))


def test_a_server_without_documents_says_what_to_do(model):
    made = Batcher(model, rows=1, slots=[192])
    try:
        with pytest.raises(Unsupported, match="start it with emu3-jax serve --documents and a model that was trained"):
            made.submit(DocumentJob(prompt="a"))
    finally:
        made.close(finish=True)
