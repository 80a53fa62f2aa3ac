"""The grammar of rows that write text and pictures in turn: an automaton per row, as arrays in the decode loop.

The static schedule (`schedule`) serves pictures whose place is known. Here a row decides by itself to draw: in text,
BOI opens the size of a picture; IMG ends the size; then come the rows of visual tokens with their line ends; EOI leads
back to text; EOS in text ends the row. The layouts of Emu3 and Emu3.5 differ by the fields of `Grammar` alone.

B rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.config import DecoderConfig, SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.sampling import Array
from emu3_jax.generation.schedule import SAMPLED_FREE, SAMPLED_VISUAL

# What `legal` returns where several ids are legal, beside SAMPLED_FREE (an id of text) and SAMPLED_VISUAL. These three
# are part of a size: a digit from 1 to 9, a digit, and a digit or what ends this side of the size.
FIRST_DIGIT, DIGIT, DIGIT_OR_END = -3, -4, -5

MODES = TEXT, SIZE, PICTURE = 0, 1, 2
MOST_DIGITS = 4  # of a side that is known beforehand
_NO_LIMIT = 1 << 30


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The layout of pictures in a family of models.

    Attributes:
        tokens: the model's control tokens and visual ids.
        digits: ids of the texts "0" to "9".
        times: id of the text "*", between rows and columns of a size.
        least_digits: smallest number of digits of a side that the model chooses.
        most_digits: largest number of digits of a side that the model chooses.
        last_line_end: whether EOL follows the last row of visual tokens too.
        frame_end: whether EOF stands before EOI.
        same_size: whether all pictures of a row have the size of the first one.
    """

    tokens: SpecialTokens
    digits: tuple[int, ...]
    times: int
    least_digits: int = 1
    most_digits: int = 3
    last_line_end: bool = True
    frame_end: bool = True
    same_size: bool = False

    @classmethod
    def of(cls, config: DecoderConfig, digits: Sequence[int], times: int) -> "Grammar":
        """The grammar of a decoder's family. `digits` and `times` are the ids of "0" to "9" and of "*"."""
        common: dict[str, Any] = {"tokens": config.tokens, "digits": tuple(digits), "times": times}
        if config.family == "emu3.5":
            return cls(**common, least_digits=2, most_digits=2, last_line_end=False, frame_end=False, same_size=True)
        return cls(**common)

    def picture_length(self, rows: int, columns: int) -> int:
        """The number of tokens of a picture from BOI to EOI."""
        head = 2 + len(f"{rows}*{columns}")
        return head + rows * (columns + 1) + self._ends

    @property
    def least_side(self) -> int:
        """The smallest side that the model can choose."""
        return 10 ** (self.least_digits - 1)

    @property
    def most_side(self) -> int:
        """The largest side that the model can choose."""
        return 10**self.most_digits - 1

    @property
    def _ends(self) -> int:
        """The number of tokens after a picture's IMG, without rows * (columns + 1) of them."""
        return self.frame_end + 1 - (not self.last_line_end)


class GrammarState(flax.struct.PyTreeNode):
    """Where each row is. All int32 [B].

    Attributes:
        mode: TEXT, SIZE or PICTURE.
        at: number of tokens after BOI (in SIZE) or after IMG (in PICTURE).
        side: in SIZE, 0 before "*" and 1 after it.
        count: in SIZE, number of digits of this side so far.
        rows: rows of visual tokens of the present picture, as far as its size is known.
        columns: likewise, columns.
        known_rows: rows of every further picture, or 0 if the model chooses.
        known_columns: likewise, columns.
        left: number of tokens that the row may still write. A size that the model chooses lets the picture end there.
        most_rows: largest number of rows of visual tokens that the model may choose.
        most_columns: likewise, columns.
    """

    mode: Array
    at: Array
    side: Array
    count: Array
    rows: Array
    columns: Array
    known_rows: Array
    known_columns: Array
    left: Array
    most_rows: Array
    most_columns: Array

    @classmethod
    def of(
        cls,
        sizes: Sequence[tuple[int, int] | None],
        steps: Sequence[int] | None = None,
        limits: Sequence[tuple[int, int] | None] | None = None,
    ) -> "GrammarState":
        """Rows in text, in the host's memory.

        Args:
            sizes: rows and columns of all pictures of each row, or None if the model chooses.
            steps: largest number of tokens of each row, or None for no limit.
            limits: largest rows and columns that the model may choose, for each row; None for no limit.
        """
        known = np.asarray([size or (0, 0) for size in sizes], np.int32).reshape(-1, 2)
        none = np.zeros(len(sizes), np.int32)
        left = none + _NO_LIMIT if steps is None else np.asarray(steps, np.int32)
        most = [limit or (_NO_LIMIT, _NO_LIMIT) for limit in limits or [None] * len(sizes)]
        rows, columns = np.asarray(most, np.int32).reshape(-1, 2).T
        return cls(none, none, none, none, none, none, known[:, 0], known[:, 1], left, rows, columns)


def legal(state: GrammarState, grammar: Grammar) -> jax.Array:
    """The next id of each row where only one is legal, else what may be sampled (a negative number), int32 [B].

    `may_open` and `legal_in_size` say which ids of text and of a size are legal.
    """
    special = grammar.tokens
    digits = jnp.asarray(grammar.digits, jnp.int32)
    # A size that is known: the text "rows*columns", then IMG.
    first, second = (_digit_count(side) for side in (state.known_rows, state.known_columns))
    of_rows = _digit(state.known_rows, state.at)
    of_columns = _digit(state.known_columns, state.at - first - 1)
    known = jnp.where(state.at < first, digits[of_rows], digits[of_columns])
    known = jnp.where(state.at == first, grammar.times, known)
    known = jnp.where(state.at == first + 1 + second, special.img, known)
    # A size that the model chooses.
    end = jnp.where(state.side == 0, grammar.times, special.img)
    chosen = jnp.where(state.count < grammar.least_digits, DIGIT, DIGIT_OR_END)
    chosen = jnp.where(state.count == 0, FIRST_DIGIT, chosen)
    largest, _ = _digit_bounds(state, grammar)
    chosen = jnp.where((state.count >= grammar.least_digits) & (largest < 0), end, chosen)
    size = jnp.where(state.known_rows > 0, known, chosen)
    # Visual tokens.
    line = state.columns + 1
    following, last = state.at + 1, state.rows * line  # `last` is the place of the last row's line end
    picture = jnp.where(following % line == 0, special.eol, SAMPLED_VISUAL)
    after = following - last - (1 if grammar.last_line_end else 0)
    ends = (special.eof, special.eoi) if grammar.frame_end else (special.eoi,)
    for index, token in enumerate(ends):
        picture = jnp.where(after == index, token, picture)
    modes = (jnp.full_like(state.mode, SAMPLED_FREE), size, picture)
    return jnp.select([state.mode == mode for mode in (TEXT, SIZE, PICTURE)], modes)


def may_open(state: GrammarState, grammar: Grammar) -> jax.Array:
    """Whether BOI is legal in the text of each row, bool [B].

    Where the model chooses sizes, it is not if even the smallest picture does not fit into the tokens that are left. A
    picture of a known size may begin at any time, and be cut off.
    """
    return jnp.asarray(state.known_rows > 0) | (_most_rows(state, state.left - 1, grammar) >= grammar.least_side)


def legal_in_size(state: GrammarState, grammar: Grammar) -> jax.Array:
    """Which ids are legal in a size that the model chooses: bool [B, 12], for the digits, "*" and IMG."""
    largest, smallest = _digit_bounds(state, grammar)
    digit = jnp.arange(len(grammar.digits), dtype=jnp.int32)[None]
    fits = (digit >= smallest[:, None]) & (digit <= largest[:, None])
    ends = state.count >= grammar.least_digits
    return jnp.concatenate([fits, (ends & (state.side == 0))[:, None], (ends & (state.side == 1))[:, None]], axis=1)


def _digit_bounds(state: GrammarState, grammar: Grammar) -> tuple[jax.Array, jax.Array]:
    """The largest and the smallest digit that may follow in a size. If none may, the largest is negative."""
    room = state.left + state.at  # tokens that may follow the picture's BOI
    # The largest side that fits. The number of its digits takes tokens too: each number of digits is tried.
    rest = room - 2 - _digit_count(state.rows) - grammar._ends
    columns = _largest(state.most_columns, lambda digits: (rest - digits) // jnp.maximum(state.rows, 1) - 1, grammar)
    limit = jnp.where(state.side == 0, _most_rows(state, room, grammar), columns)
    value = jnp.where(state.side == 0, state.rows, state.columns)
    # With this digit, the smallest number that the digits can become must not exceed the limit.
    zeros = jnp.clip(grammar.least_digits - 1 - state.count, 0, MOST_DIGITS - 1)
    powers = jnp.asarray([10**power for power in range(MOST_DIGITS)], jnp.int32)
    largest = jnp.minimum(limit // powers[zeros] - 10 * value, len(grammar.digits) - 1)
    return jnp.where(state.count < grammar.most_digits, largest, -1), (state.count == 0).astype(jnp.int32)


def _most_rows(state: GrammarState, room: Array, grammar: Grammar) -> jax.Array:
    """The most rows of visual tokens so that a picture of the fewest columns takes at most `room` tokens after BOI."""
    columns = grammar.least_side
    rest = room - 2 - grammar.least_digits - grammar._ends
    return _largest(state.most_rows, lambda digits: (rest - digits) // (columns + 1), grammar)


def _largest(most: Array, fits: Callable[[int], Array], grammar: Grammar) -> jax.Array:
    """The largest side up to `most`, given the largest one that fits with a number of digits."""
    found = [
        jnp.minimum(jnp.minimum(jnp.asarray(most), 10**digits - 1), fits(digits))
        for digits in range(grammar.least_digits, grammar.most_digits + 1)
    ]
    return functools.reduce(jnp.maximum, found)


def upcoming(state: GrammarState, grammar: Grammar, count: int) -> jax.Array:
    """What is legal for the next `count` tokens, int32 [B, count], see `legal`.

    It means something for the next tokens that `known` counts.
    """
    ahead = jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda places: legal(state.replace(at=state.at + places), grammar), out_axes=1)(ahead)


def known(state: GrammarState, grammar: Grammar) -> jax.Array:
    """For how many next tokens, at least 1, `upcoming` means something: int32 [B].

    To EOI in a picture, to IMG in a size that is known, else 1.
    """
    lines = state.rows * (state.columns + 1) - (not grammar.last_line_end)
    digits = _digit_count(state.known_rows) + _digit_count(state.known_columns)
    size = jnp.where(in_known_size(state), digits + 2 - state.at, 1)
    return jnp.where(state.mode == PICTURE, lines + grammar.frame_end + 1 - state.at, size)


def in_known_size(state: GrammarState) -> jax.Array:
    """Which rows are in the size of a picture that is known beforehand, between BOI and IMG: bool [B]."""
    return (state.mode == SIZE) & (state.known_rows > 0)


def skip(state: GrammarState, count: jax.Array) -> GrammarState:
    """The state after `count` tokens (int32 [B]), fewer than `known` counts."""
    return state.replace(at=state.at + count, left=state.left - count)


def one_pass(state: GrammarState, grammar: Grammar, window: int) -> tuple[GrammarState, jax.Array]:
    """What a pass of `interleaving.decode` asks of the automaton alone, to measure its cost.

    Args:
        state: rows within pictures.
        grammar: the grammar.
        window: tokens W of a pass per row.

    Returns:
        The state after a token of each row; and what was legal, int32 [B, 2W - 1].
    """
    legal_ids = upcoming(state, grammar, 2 * window - 1)
    settled = jnp.minimum(1, known(state, grammar))
    token = jnp.where(legal_ids[:, 0] < 0, grammar.tokens.visual_start, legal_ids[:, 0])
    return advance(skip(state, settled - 1), token, grammar), legal_ids


def advance(state: GrammarState, token: jax.Array, grammar: Grammar) -> GrammarState:
    """The state after a token (int32 [B]) that `legal` allows."""
    special = grammar.tokens
    digits = jnp.asarray(grammar.digits, jnp.int32)
    is_digit = token[:, None] == digits[None]
    digit = jnp.argmax(is_digit, axis=1).astype(jnp.int32)
    text, size, picture = (state.mode == mode for mode in (TEXT, SIZE, PICTURE))
    opens, starts, ends = text & (token == special.boi), size & (token == special.img), picture & (token == special.eoi)
    between = size & (token == grammar.times)
    reads = size & is_digit.any(axis=1)

    def side(value: Array, which: int) -> jax.Array:
        value = jnp.where(opens, 0, value)
        return jnp.where(reads & (state.side == which), value * 10 + digit, value)

    # A size that is known need not have been read.
    given = starts & (state.known_rows > 0)
    rows = jnp.where(given, state.known_rows, side(state.rows, 0))
    columns = jnp.where(given, state.known_columns, side(state.columns, 1))
    keep = starts & grammar.same_size
    return GrammarState(
        mode=jnp.where(opens, SIZE, jnp.where(starts, PICTURE, jnp.where(ends, TEXT, state.mode))),
        at=jnp.where(opens | starts | text, 0, state.at + 1),
        side=jnp.where(opens, 0, jnp.where(between, 1, state.side)),
        count=jnp.where(opens | between, 0, state.count + reads),
        rows=rows,
        columns=columns,
        known_rows=jnp.where(keep, rows, state.known_rows),
        known_columns=jnp.where(keep, columns, state.known_columns),
        left=state.left - 1,
        most_rows=state.most_rows,
        most_columns=state.most_columns,
    )


def _digit_count(number: Array) -> jax.Array:
    """The number of decimal digits, at least 1."""
    powers = jnp.asarray([10**power for power in range(1, MOST_DIGITS)], jnp.int32)
    return 1 + jnp.sum(number[:, None] >= powers[None], axis=1, dtype=jnp.int32)


def _digit(number: Array, place: Array) -> jax.Array:
    """The decimal digit at a place, counted from the first one."""
    power = jnp.clip(_digit_count(number) - 1 - place, 0, MOST_DIGITS - 1)
    return jnp.asarray(number) // jnp.asarray([10**p for p in range(MOST_DIGITS)], jnp.int32)[power] % 10


# ------------------------------------------------------------------------------------------------ reading


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in a sequence of ids.

    Attributes:
        size: rows and columns of visual tokens; None if its size is cut off.
        codes: int32 [n], its codes so far, row by row.
        whole: whether its EOI is there.
    """

    size: tuple[int, int] | None
    codes: np.ndarray
    whole: bool


def split(ids: Sequence[int], grammar: Grammar, *, strict: bool = True) -> list[list[int] | Picture]:
    """Splits a sequence into runs of text ids and pictures. Only the last picture may be cut off.

    Args:
        ids: the sequence.
        grammar: the model's grammar.
        strict: whether EOI, IMG and visual ids outside of pictures are refused. A model may write them in text.

    Raises:
        Emu3Error: a picture's tokens are not as the grammar wants, for example a BOI within a picture.
    """
    special = grammar.tokens
    pieces: list[list[int] | Picture] = []
    position = 0
    while position < len(ids):
        if ids[position] == special.boi:
            picture, length = _read_picture(ids[position:], grammar, position)
            pieces.append(picture)
            position += length
            continue
        token = int(ids[position])
        stray = token in (special.eoi, special.img) or special.visual_start <= token < special.visual_end
        if strict and stray:
            raise Emu3Error(
                f"id {position} of the sequence is {token}, which belongs into a picture, but no BOI opened one"
            )
        if not pieces or isinstance(pieces[-1], Picture):
            pieces.append([])
        text = pieces[-1]
        assert isinstance(text, list)
        text.append(token)
        position += 1
    return pieces


def _read_picture(ids: Sequence[int], grammar: Grammar, offset: int) -> tuple[Picture, int]:
    """Reads a picture from its BOI on. Returns it and the number of its ids."""
    special = grammar.tokens
    sides: list[str] = ["", ""]
    side, position = 0, 1
    while position < len(ids) and ids[position] != special.img:
        token = int(ids[position])
        if token in grammar.digits and len(sides[side]) < MOST_DIGITS:
            sides[side] += str(grammar.digits.index(token))
        elif token == grammar.times and side == 0 and sides[0]:
            side = 1
        else:
            raise _unfit(offset + position, token, "the size of a picture")
        position += 1
    if position == len(ids):
        return Picture(None, np.zeros(0, np.int32), False), position
    rows, columns = (int(text) if text else 0 for text in sides)
    if not rows or not columns:
        raise _unfit(offset + position, special.img, "the size of a picture")
    position += 1
    expected = layout(rows, columns, grammar)
    found = np.asarray(ids[position : position + len(expected)], np.int64)
    wanted = expected[: len(found)]
    visual = (found >= special.visual_start) & (found < special.visual_end)
    fits = np.where(wanted == SAMPLED_VISUAL, visual, found == wanted)
    if not fits.all():
        place = int(np.argmin(fits))
        raise _unfit(offset + position + place, int(found[place]), f"a picture of {rows}*{columns}")
    codes = (found[wanted == SAMPLED_VISUAL] - special.visual_start).astype(np.int32)
    return Picture((rows, columns), codes, len(found) == len(expected)), position + len(found)


def layout(rows: int, columns: int, grammar: Grammar) -> np.ndarray:
    """What follows a picture's IMG up to its EOI: ids, and SAMPLED_VISUAL for each visual token; int64."""
    special = grammar.tokens
    lines = np.full((rows, columns + 1), SAMPLED_VISUAL, np.int64)
    lines[:, columns] = special.eol
    flat = lines.reshape(-1) if grammar.last_line_end else lines.reshape(-1)[:-1]
    return np.append(flat, [special.eof, special.eoi] if grammar.frame_end else [special.eoi])


def picture_ids(codes: np.ndarray, grammar: Grammar) -> list[int]:
    """The ids of a picture from BOI to EOI. `codes`: int [h, w], within the codebook."""
    rows, columns = codes.shape
    special = grammar.tokens
    body = layout(rows, columns, grammar)
    body[body == SAMPLED_VISUAL] = codes.reshape(-1).astype(np.int64) + special.visual_start
    size = [grammar.times if character == "*" else grammar.digits[int(character)] for character in f"{rows}*{columns}"]
    return [special.boi, *size, special.img, *body.tolist()]


def inside_pictures(ids: np.ndarray, grammar: Grammar) -> np.ndarray:
    """Which ids that a row wrote belong to pictures, from BOI to EOI: bool [n]."""
    found, inside = np.zeros(len(ids), bool), False
    for place, token in enumerate(ids.tolist()):
        inside = inside or token == grammar.tokens.boi
        found[place] = inside
        inside = inside and token != grammar.tokens.eoi
    return found


def _unfit(position: int, token: int, where: str) -> Emu3Error:
    return Emu3Error(f"id {position} of the sequence is {token}, which does not belong into {where}")
