"""Vocabulary files, upstream's and transformers', and the ids of control and visual tokens that they tell."""

import base64
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emu3_jax.config import MAX_CODES, MAX_IDS, SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.foreign import MAX_JSON_BYTES, limit, parse_json, read_bytes, read_object
from emu3_jax.printable import shown

VISION_TOKENS_FILE = "emu3_vision_tokens.txt"
ADDED_TOKENS_FILE = "added_tokens.json"
FETCH = "fetch the file again"
_MAX_BYTES = 64 << 20  # of a vocabulary file; the public one has 2.5 MB
_MAX_RANKS = 1 << 21
MAX_TOKEN = 1024  # bytes of one token; the public vocabulary's longest has 128
MAX_ADDED = 1 << 14

# The ids after the ranks, in order; the visual tokens follow.
TEXT_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_PLACEHOLDER = "<|extra_0|>"  # transformers calls its id <image>, so that vocabularies may lack it
_IMAGE_CONTROLS = ("<|image token|>", "<|image start|>", "<|image end|>")
CONTROLS = TEXT_CONTROLS + _IMAGE_CONTROLS
SURFACES = {
    "pad": "<|endoftext|>", "bos": "<|extra_203|>", "eos": "<|extra_204|>", "eol": "<|extra_200|>",
    "eof": "<|extra_201|>", "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>",
}  # fmt: skip
_VISUAL_FORM = re.compile(r"<\|visual token (\d{6,7})\|>")


def special_tokens(num_ranks: int, codebook_size: int) -> SpecialTokens:
    """The ids that follow from a vocabulary of `num_ranks` byte sequences and a codebook of `codebook_size` codes."""
    controls = {field: num_ranks + CONTROLS.index(surface) for field, surface in SURFACES.items()}
    return SpecialTokens(**controls, visual_start=num_ranks + len(CONTROLS), visual_count=codebook_size)


def tokens_of_surfaces(ids: Mapping[str, Any], codebook_size: int | None) -> SpecialTokens | None:
    """The ids that a table of surface forms tells, such as `vocabulary_map` or a tokenizer's added tokens.

    Args:
        ids: surface form to id, among others.
        codebook_size: codes of the vision tokenizer; None takes as many as the table has visual tokens.

    Returns:
        The ids, or None where the table has no control or visual token from whose id the others follow.

    Raises:
        Emu3Error: visual tokens are not numbered in the order of their codes, or are fewer or more than the codebook
            has.
    """
    starts = {code: ids[surface] for surface in ids if (code := _visual_code(surface)) is not None}
    if codebook_size is None:
        codebook_size = len(starts) or SpecialTokens.visual_count
    controls = {surface: ids[surface] for surface in CONTROLS if surface in ids and surface != _PLACEHOLDER}
    found = {surface: i for surface, i in controls.items() if is_whole(i, 0)}
    if starts:
        if set(starts) != set(range(codebook_size)):
            raise Emu3Error(
                f"it names {len(starts)} visual tokens, but the codebook has {codebook_size} codes: use the files of "
                "one and the same model"
            )
        start = starts[0]
        if not is_whole(start, len(CONTROLS)) or any(i != start + code for code, i in starts.items()):
            raise Emu3Error(f"its visual tokens have no consecutive ids from {shown(start)} on: {FETCH}")
        num_ranks = start - len(CONTROLS)
    elif found:
        surface = max(found, key=CONTROLS.index)  # the image controls come last, and are nobody else's
        num_ranks = found[surface] - CONTROLS.index(surface)
    else:
        return None
    if num_ranks < 256:
        raise Emu3Error(f"its control tokens leave room for {num_ranks} ranks, and there are 256 bytes: {FETCH}")
    for surface, i in controls.items():
        if i != num_ranks + CONTROLS.index(surface):
            expected = num_ranks + CONTROLS.index(surface)
            raise Emu3Error(f"it has {surface} at id {shown(i)}, its other tokens want {expected}: {FETCH}")
    return special_tokens(num_ranks, codebook_size)


def _visual_code(surface: str) -> int | None:
    match = _VISUAL_FORM.fullmatch(surface) if surface.startswith("<|v") else None
    return None if match is None else int(match[1])


def count_ranks(vocabulary: Path) -> int:
    """How many ranks upstream's vocabulary file holds. Raises `Emu3Error` if it cannot be read."""
    return _read_vocabulary(Path(vocabulary)).count(b"\n")


def tokens_of_vocabulary(path: Path, codebook_size: int | None) -> SpecialTokens:
    """The ids of control and visual tokens that a vocabulary file tells: `emu3.tiktoken`, `tokenizer.json` or
    `vocab.json`.

    Args:
        path: of the file.
        codebook_size: codes of the vision tokenizer; None takes what the vocabulary says, else the published size.

    Raises:
        Emu3Error: the file is unreadable or damaged.
    """
    path = Path(path)
    if path.suffix != ".json":
        listing = path.with_name(VISION_TOKENS_FILE)
        if codebook_size is None and listing.exists():
            codebook_size = sum(_visual_code(line) is not None for line in read_listed(listing)) or None
        return special_tokens(count_ranks(path), codebook_size or SpecialTokens.visual_count)
    ids = read_transformers(path)
    try:
        tokens = tokens_of_surfaces(ids.all, codebook_size)
    except Emu3Error as error:
        raise Emu3Error(f"{path}: {error}") from error
    return tokens or special_tokens(len(ids.vocabulary), codebook_size or SpecialTokens.visual_count)


# ------------------------------------------------------------------------------------------------ files


def read_ranks(path: Path) -> dict[bytes, int]:
    """Upstream's vocabulary file, lines of a base64 token and its rank.

    Raises:
        Emu3Error: the file is unreadable or damaged.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_vocabulary(path).splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token:
                raise ValueError("an empty token")
            number_of = int(rank)
        except ValueError as error:
            raise Emu3Error(
                f"{path} line {number} is {shown(line[:40].decode(errors='replace'))}: it must be a base64 token "
                f"and its rank; {FETCH}"
            ) from error
        limit(path, f"bytes in the token of line {number}", len(token), MAX_TOKEN)
        if token in ranks:
            raise Emu3Error(f"{path} line {number} has a token that an earlier line has, too: {FETCH}")
        ranks[token] = number_of
    return ranks


def _read_vocabulary(path: Path) -> bytes:
    """A vocabulary file whose last line is ended."""
    data = read_bytes(path, _MAX_BYTES, "give the tokenizer's file")
    limit(path, "ranks", data.count(b"\n"), _MAX_RANKS)
    return data if data.endswith(b"\n") or not data else data + b"\n"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a transformers vocabulary file holds: byte-level tokens, those and added ones, and flags of added ones."""

    vocabulary: Mapping[str, int]
    all: Mapping[str, int]
    flags: Mapping[str, Mapping[str, Any]]


def read_transformers(path: Path) -> Found:
    """`tokenizer.json`, or `vocab.json` with the `added_tokens.json` beside it."""
    raw = read_bytes(path, MAX_JSON_BYTES, FETCH)
    try:
        data = parse_json(raw, path, FETCH)
    except Emu3Error as error:
        raise no_vocabulary(path, error) from error
    if not isinstance(data, dict):
        raise no_vocabulary(path, "it holds no object")
    model = data.get("model")
    whole = isinstance(model, dict)
    if whole and model.get("type", "BPE") != "BPE":
        raise no_vocabulary(path, f"its model is {shown(model['type'])}")
    vocabulary = model.get("vocab") if isinstance(model, dict) else data
    added = data.get("added_tokens", []) if whole else []
    if not isinstance(vocabulary, dict):
        raise no_vocabulary(path, "it has no vocab")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and is_whole(token.get("id"), 0)
        for token in added
    ):
        raise no_vocabulary(path, "its added_tokens are no list of content and id")
    bad = next((token for token, i in vocabulary.items() if not is_whole(i, 0) or i >= MAX_IDS), None)
    if bad is not None:
        raise no_vocabulary(path, f"{shown(bad)} has the id {shown(vocabulary[bad])}")
    limit(path, "added tokens", len(added), MAX_CODES + MAX_ADDED)
    limit(path, "characters of a token", max(map(len, vocabulary), default=0), MAX_TOKEN)
    beside = {} if whole else read_added(path.parent)
    every = {**vocabulary, **beside, **{token["content"]: token["id"] for token in added}}
    return Found(vocabulary, every, {token["content"]: token for token in added})


def no_vocabulary(path: Path, reason: object) -> Emu3Error:
    return Emu3Error(f"{path} is not a byte-level BPE tokenizer.json or vocab.json ({reason}): {FETCH}")


def read_added(directory: Path) -> dict[str, int]:
    """`added_tokens.json` of a directory, words to ids; empty without the file."""
    path = directory / ADDED_TOKENS_FILE
    if not os.path.lexists(path):
        return {}
    added = read_object(path, FETCH)
    wrong = next((word for word, i in added.items() if not is_whole(i, 0)), None)
    if wrong is not None:
        raise Emu3Error(f"{path}: {shown(wrong)} has the id {shown(added[wrong])}: it must be a whole number; {FETCH}")
    return added


def read_listed(path: Path) -> list[str]:
    """The tokens that `emu3_vision_tokens.txt` lists."""
    text = read_bytes(path, _MAX_BYTES, "give the tokenizer's file").decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of byte-level vocabularies: printable bytes spell themselves, others stand from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
