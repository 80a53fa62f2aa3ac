"""Preference pairs: two samples of one prompt, the better one first; and their directories of prepared data.

A side of a pair is what the model drew, stored as it was drawn. Codes of a picture or a clip stand for its visual
tokens one to one. An answer is stored as token ids: its text could be encoded to other ids, whose probability differs.
`emu3-jax pairs` writes such directories, and `emu3-jax train` reads them with the task `data.sequences.Preference`.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.data.records import PAIRS, check_text, read_header, stored_codes
from emu3_jax.data.shards import FORMAT, INDEX, Codebook, Index, PreparedShards, Shard, write_json, write_shard
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_number
from emu3_jax.files import new_directory
from emu3_jax.foreign import reading
from emu3_jax.printable import shown

SHARD_PAIRS = 1024  # pairs in a shard by default
_AXES = {1: "an answer", 2: "a picture", 3: "a clip"}


@dataclass(frozen=True, eq=False)
class Sample:
    """What the model drew for a prompt.

    Attributes:
        prompt: the prompt as text; the question of an answer.
        tokens: codes int32 [h, w] of a picture or [t, h, w] of a clip; or the token ids int32 [n] of an answer, with
            its EOS if the model drew one.
        pictures: codes [h, w] or [t, h, w] of the pictures and clips that an answer is about, in their order.
    """

    prompt: str
    tokens: np.ndarray
    pictures: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class Pair:
    """A preference pair.

    Attributes:
        name: name of the pair in error messages.
        prompt: see `Sample`.
        chosen: the better sample's tokens, see `Sample`.
        rejected: the worse sample's tokens, of the same kind as `chosen`.
        margin: by how much the chosen sample's reward is higher, or None if unknown. Training does not read it.
        pictures: see `Sample`.
    """

    name: str
    prompt: str
    chosen: np.ndarray
    rejected: np.ndarray
    margin: float | None = None
    pictures: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, name: str, chosen: Sample, rejected: Sample, margin: float | None = None) -> "Pair":
        """Makes a pair of two samples. Raises an `Emu3Error` that names the pair if their prompts differ."""
        same = len(chosen.pictures) == len(rejected.pictures) and all(
            map(np.array_equal, chosen.pictures, rejected.pictures)
        )
        if chosen.prompt != rejected.prompt or not same:
            what = "prompts" if chosen.prompt != rejected.prompt else "pictures of the prompts"
            found = f" ({shown(chosen.prompt)} and {shown(rejected.prompt)})" if what == "prompts" else ""
            raise Emu3Error(f"pair {shown(name)}: the {what} differ{found}: pair only samples of one prompt")
        return cls(name, chosen.prompt, chosen.tokens, rejected.tokens, margin, chosen.pictures)

    @property
    def kind(self) -> str:
        """What both sides are: "an answer", "a picture" or "a clip"."""
        return _AXES[self.chosen.ndim]

    def check(self, codes: int | None = None, ids: int | None = None) -> None:
        """Checks the pair.

        Args:
            codes: number of codes in the codebook, or None not to check the codes' upper bound.
            ids: number of token ids of the model, or None not to check the upper bound of an answer's ids.

        Raises:
            Emu3Error: names the pair and what is wrong with it.
        """
        try:
            check_text("name", self.name)
            check_text("prompt", self.prompt)
            ok = self.margin is None or is_number(self.margin)
            if not ok:
                raise Emu3Error(f"margin is {shown(self.margin)}: it must be a number, or None")
            self._check_sides(codes, ids)
        except Emu3Error as error:
            raise Emu3Error(f"pair {shown(self.name)}: {error}") from error

    def _check_sides(self, codes: int | None, ids: int | None) -> None:
        for side in ("chosen", "rejected"):
            tokens = getattr(self, side)
            _check_integers(side, tokens, tuple(_AXES))
            what, count = ("token id", ids) if tokens.ndim == 1 else ("code", codes)
            _check_range(side, tokens, what, count)
        if self.chosen.ndim != self.rejected.ndim:
            found = f"{_AXES[self.chosen.ndim]} and the rejected one {_AXES[self.rejected.ndim]}"
            raise Emu3Error(f"the chosen side is {found}: pair samples of one kind")
        if np.array_equal(self.chosen, self.rejected):
            raise Emu3Error("both sides are equal, so there is nothing to prefer: leave the pair out")
        if self.pictures and self.chosen.ndim != 1:
            raise Emu3Error(f"its prompt has pictures, but its sides are {self.kind}: only answers are about pictures")
        for number, picture in enumerate(self.pictures):
            _check_integers(f"picture {number} of the prompt", picture, (2, 3))
            _check_range(f"picture {number} of the prompt", picture, "code", codes)

    def to_bytes(self) -> bytes:
        """Serialises the pair: a line of JSON, then all codes and ids (see `records.stored_codes`)."""
        stored = [stored_codes(tokens) for tokens in (self.chosen, self.rejected, *self.pictures)]
        (chosen, rejected, *pictures) = (described for described, _ in stored)
        header: dict[str, Any] = {"name": self.name, "prompt": self.prompt, "chosen": chosen, "rejected": rejected}
        if self.margin is not None:
            header["margin"] = float(self.margin)
        if pictures:
            header["pictures"] = pictures
        line = json.dumps(header, ensure_ascii=False, allow_nan=False)
        return line.encode() + b"\n" + b"".join(words for _, words in stored)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Pair":
        """Reads bytes that `to_bytes` wrote. Raises an `Emu3Error` if they are damaged."""
        with reading("the pair", "make the pairs again"):
            header, stored = read_header("the pair", data)
            chosen, rejected = (stored.read(header[side], tuple(_AXES)) for side in ("chosen", "rejected"))
            pictures = tuple(stored.read(picture, (2, 3)) for picture in header.get("pictures", ()))
            stored.end()
            pair = cls(header["name"], header["prompt"], chosen, rejected, header.get("margin"), pictures)
            pair.check()
            return pair


class PreparedPairs(PreparedShards):
    """Random access to the pairs of a directory that `write_pairs` wrote. Works as a data source for Grain."""

    kind = PAIRS

    def __getitem__(self, index: int) -> Pair:
        """Reads pair `index`. Raises an `Emu3Error` that names the shard if it is damaged."""
        return self._read(index, Pair.from_bytes)


def write_pairs(
    pairs: Iterable[Pair],
    output: Path,
    codebook: Codebook,
    *,
    vocab_size: int | None = None,
    shard_pairs: int = SHARD_PAIRS,
) -> Index:
    """Writes pairs as prepared data, all or nothing. Equal pairs give equal bytes.

    Args:
        pairs: the pairs, in the order in which they are written.
        output: a new directory, local or in a bucket.
        codebook: codebook of the vision tokenizer that the codes belong to.
        vocab_size: number of token ids of the model that drew the answers; None if there are none. Training checks
            the ids again.
        shard_pairs: number of pairs in a shard.

    Returns:
        The index.

    Raises:
        Emu3Error: `output` exists or cannot be written, there are no pairs, or a pair is not legal: see `Pair.check`.
            Errors of `pairs` pass unchanged.
    """
    digest = hashlib.sha256(f"{FORMAT} {PAIRS} {codebook.size} {codebook.sha256} {shard_pairs}\n".encode())

    def checked(chunk: Iterable[Pair]) -> Iterator[Pair]:
        for pair in chunk:
            pair.check(codebook.size, vocab_size)
            data = pair.to_bytes()
            digest.update(f"{len(data)}\n".encode())
            digest.update(data)
            yield pair

    rest, shards = iter(pairs), list[Shard]()
    with new_directory(output, 0) as directory:
        while (first := next(rest, None)) is not None:
            file = directory / f"shard-{len(shards):05d}.arrayrecord"
            count, size = write_shard(file, checked(itertools.chain([first], itertools.islice(rest, shard_pairs - 1))))
            shards.append(Shard(file.name, count, size))
        if not shards:
            raise Emu3Error(f"there are no pairs to write to {output}: give samples with different rewards")
        index = Index(digest.hexdigest(), codebook, tuple(shards), PAIRS)
        write_json(directory / INDEX, index.to_json())
    return index


def _check_integers(what: str, tokens: Any, axes: tuple[int, ...]) -> None:
    ok = isinstance(tokens, np.ndarray) and np.issubdtype(tokens.dtype, np.integer) and tokens.size
    if not ok or tokens.ndim not in axes:
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else shown(tokens)
        legal = ", or ids [n] of an answer" if 1 in axes else ""
        raise Emu3Error(f"{what} is {found}: it must be codes [h, w] of a picture or [t, h, w] of a clip{legal}")


def _check_range(what: str, tokens: np.ndarray, kind: str, count: int | None) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    most = 2**31 if count is None else count
    if low < 0 or high >= most:
        raise Emu3Error(
            f"{what}: {kind} {low if low < 0 else high} is out of range, legal are 0 to {most - 1}: give samples that "
            "this model drew"
        )
