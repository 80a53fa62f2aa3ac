"""What a model has written, from ids to texts and pictures: pieces, documents, and reading them while they grow."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import grammar
from emu3_jax.generation.codec import Vision, decode_picture
from emu3_jax.generation.grammar import Grammar
from emu3_jax.generation.interleaving import InterleavedRow
from emu3_jax.generation.language import Language
from emu3_jax.printable import shown
from emu3_jax.text.tasks import ANSWER_ENDS, PLANS
from emu3_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a document.

    Attributes:
        kind: "text", "plan" or "picture". A plan is what some models write before an answer or a picture.
        text: the text of a text or plan, else "".
        codes: int32 [h, w] of a picture, else None. Rows of codes that the model did not write are left out.
        picture: the decoded picture, else None.
        whole: False for a picture that the largest number of tokens cut off.
    """

    kind: str
    text: str = ""
    codes: np.ndarray | None = None
    picture: Image.Image | None = None
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class Growing:
    """A picture that is being written.

    Attributes:
        number: which picture of its document it is, from 0 on.
        size: rows and columns of visual tokens of the whole picture.
        codes: int32 [h, w], the rows of codes that are finished.
        picture: these rows, decoded. Later rows may still change their pixels, most of all near the lower edge.
    """

    number: int
    size: tuple[int, int]
    codes: np.ndarray
    picture: Image.Image


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with pictures that a model wrote.

    Attributes:
        pieces: its texts, plans and pictures, in order.
        ids: int32, the ids of prompt and answer.
        prompt_length: number of `ids` that belong to the prompt.
        ended: whether the model ended it with EOS, and not the largest number of tokens.
    """

    pieces: list[Piece]
    ids: np.ndarray
    prompt_length: int
    ended: bool

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures, in order."""
        return [piece.picture for piece in self.pieces if piece.picture is not None]


class Reader:
    """Turns the growing ids of a row into pieces. `document` is there once the row is done."""

    def __init__(
        self, language: Language, vision: Callable[[], Vision], rule: Grammar, row: InterleavedRow, growing: bool
    ):
        self.document: Document | None = None
        self._growing, self._shown = growing, 0  # number of rows of a growing picture that were shown
        self._language, self._vision, self._rule, self._row = language, vision, rule, row
        self._pieces: list[Piece] = []
        self._read = 0  # number of ids that are read

    def read(self, ids: np.ndarray, done: bool) -> Iterator[Piece | Growing | str]:
        """Yields what is new, given the ids so far. Ids of pieces that are complete are not read again.

        A string is the whole text so far of the piece that comes next, if it is a text.
        """
        ended = bool(len(ids) and ids[-1] == self._language.config.tokens.eos)
        fresh = ids[self._read : len(ids) - ended].tolist()
        parts = grammar.split(fresh, self._rule, strict=False)
        self._read += len(fresh)
        growing: list[int] | grammar.Picture = []
        if parts and not done and not (isinstance(parts[-1], grammar.Picture) and parts[-1].whole):
            growing = parts.pop()  # it is read again once there is more of it
            boi = self._rule.tokens.boi
            self._read -= len(growing) if isinstance(growing, list) else fresh[::-1].index(boi) + 1
        for part in parts:
            for piece in map(self._decoded, self._of(part)):
                self._pieces.append(piece)
                self._shown = 0
                yield piece
        if isinstance(growing, list):
            *_, last = [None, *_texts(growing, self._language.tokenizer)]
            if last is not None and last.kind == "text":
                yield last.text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character
        elif self._growing and growing.size is not None:
            yield from self._finished_rows(growing.codes, growing.size)
        if done:
            prompt = self._row.prompt
            whole = np.concatenate([np.asarray(prompt, np.int32), ids.astype(np.int32)])
            self.document = Document(self._pieces, whole, len(prompt), ended)

    def _of(self, part: "list[int] | grammar.Picture") -> Iterator[Piece]:
        if isinstance(part, grammar.Picture):
            if part.size is not None:
                columns = part.size[1]
                full = len(part.codes) // columns
                yield Piece("picture", codes=part.codes[: full * columns].reshape(full, columns), whole=part.whole)
            return
        yield from _texts(part, self._language.tokenizer)

    def _finished_rows(self, codes: np.ndarray, size: tuple[int, int]) -> Iterator[Growing]:
        """The picture so far, if rows of it have been finished since the last time."""
        count = len(codes) // size[1]
        if count <= self._shown:
            return
        self._shown = count
        codes = codes[: count * size[1]].reshape(count, size[1])
        # Decoded at its whole size, so that all its parts share one program. The last row stands for those to come.
        picture = decode_picture(self._vision(), np.pad(codes, ((0, size[0] - count), (0, 0)), mode="edge"))
        height = picture.height * count // size[0]
        number = sum(piece.kind == "picture" for piece in self._pieces)
        yield Growing(number, size, codes, picture.crop((0, 0, picture.width, height)))

    def _decoded(self, piece: Piece) -> Piece:
        if piece.codes is None or not len(piece.codes):
            return piece
        return dataclasses.replace(piece, picture=decode_picture(self._vision(), piece.codes))


def _texts(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The texts and plans in a run of text ids. Blank ones are left out."""
    special = tokenizer.special_ids
    begins = {special[first]: special[last] for first, last in PLANS.values()}
    run: list[int] = []
    end: int | None = None

    def piece() -> Iterator[Piece]:
        text = tokenizer.decode(run, skip_special=True)
        if text.strip():
            yield Piece("text" if end is None else "plan", text)

    for token in ids:
        if token == special[ANSWER_ENDS]:
            continue
        if (end is None and token in begins) or token == end:
            yield from piece()
            run, end = [], begins.get(token) if end is None else None
            continue
        run.append(token)
    yield from piece()


def check_callbacks(**callbacks: Any) -> None:
    """Raises an `Emu3Error` for a callback, given by its argument's name, that is neither None nor a function."""
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise Emu3Error(f"{name} is {shown(callback)}: it must be a function, or None")


def deliver(
    item: Piece | Growing | str,
    on_piece: Callable[..., Any] | None,
    on_rows: Callable[..., Any] | None,
    on_text: Callable[..., Any] | None,
    *row: int,
) -> None:
    """Calls the callback, if there is one, that an item of `Reader.read` is for: with `row`, if given, and the item."""
    callback = on_rows if isinstance(item, Growing) else on_text if isinstance(item, str) else on_piece
    if callback is not None:
        callback(*row, item)
