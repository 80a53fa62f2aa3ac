"""Reads the vocabulary files of upstream and of transformers, and derives the ids of control and visual tokens."""

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
_MAX_BYTES = 64 << 20  # maximum size of a vocabulary file; the public file has 2.5 MB
_MAX_RANKS = 1 << 21
MAX_TOKEN = 1024  # maximum bytes of a token; the longest token of the public vocabulary has 128
MAX_ADDED = 1 << 14

# The control tokens in the order of their ids, which follow the ranks. The visual tokens come next.
TEXT_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_PLACEHOLDER = "<|extra_0|>"  # transformers calls this id <image>, so its vocabularies may lack <|extra_0|>
_IMAGE_CONTROLS = ("<|image token|>", "<|image start|>", "<|image end|>")
CONTROLS = TEXT_CONTROLS + _IMAGE_CONTROLS
SURFACES = {
    "pad": "<|endoftext|>", "bos": "<|extra_203|>", "eos": "<|extra_204|>", "eol": "<|extra_200|>",
    "eof": "<|extra_201|>", "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>",
}  # fmt: skip
_VISUAL_FORM = re.compile(r"<\|visual token (\d{6,7})\|>")


def special_tokens(num_ranks: int, codebook_size: int) -> SpecialTokens:
    """Computes the ids of control and visual tokens for `num_ranks` byte sequences and `codebook_size` codes."""
    controls = {field: num_ranks + CONTROLS.index(surface) for field, surface in SURFACES.items()}
    return SpecialTokens(**controls, visual_start=num_ranks + len(CONTROLS), visual_count=codebook_size)


def tokens_of_surfaces(ids: Mapping[str, Any], codebook_size: int | None) -> SpecialTokens | None:
    """Derives ids of control and visual tokens from a table: `vocabulary_map`, or added tokens of a tokenizer.

    Args:
        ids: maps the text forms of tokens to ids. Other entries are ignored.
        codebook_size: number of codes of the vision tokenizer. By default, the number of visual tokens in the table.

    Returns:
        The ids; None if the table contains no control or visual token.

    Raises:
        Emu3Error: the ids of the visual tokens do not follow the order of codes, their number differs from
            `codebook_size`, or the ids of the control tokens contradict each other.
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
            raise Emu3Error(f"its visual tokens do not have consecutive ids from {shown(start)} on: {FETCH}")
        num_ranks = start - len(CONTROLS)
    elif found:
        surface = max(found, key=CONTROLS.index)  # image control tokens come last; only Emu3 has them
        num_ranks = found[surface] - CONTROLS.index(surface)
    else:
        return None
    if num_ranks < 256:
        raise Emu3Error(f"its control tokens leave ids for {num_ranks} ranks, but at least 256 are needed: {FETCH}")
    for surface, i in controls.items():
        if i != num_ranks + CONTROLS.index(surface):
            expected = num_ranks + CONTROLS.index(surface)
            raise Emu3Error(f"it has {surface} at id {shown(i)}, but its other tokens imply id {expected}: {FETCH}")
    return special_tokens(num_ranks, codebook_size)


def _visual_code(surface: str) -> int | None:
    match = _VISUAL_FORM.fullmatch(surface) if surface.startswith("<|v") else None
    return None if match is None else int(match[1])


def count_ranks(vocabulary: Path) -> int:
    """Counts the ranks in upstream's vocabulary file. Raises `Emu3Error` if it cannot be read."""
    return _read_vocabulary(Path(vocabulary)).count(b"\n")


def tokens_of_vocabulary(path: Path, codebook_size: int | None) -> SpecialTokens:
    """Derives the ids of control and visual tokens from a vocabulary file.

    Args:
        path: `emu3.tiktoken`, `tokenizer.json` or `vocab.json`.
        codebook_size: number of codes of the vision tokenizer. By default, the number of visual tokens that the
            vocabulary lists, or else the published 32,768.

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
    """Reads upstream's vocabulary file. Each line holds a base64 token and its rank.

    Returns:
        The rank of each byte sequence.

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
            raise Emu3Error(f"{path} line {number} repeats the token of an earlier line: {FETCH}")
        ranks[token] = number_of
    return ranks


def _read_vocabulary(path: Path) -> bytes:
    """Reads a vocabulary file, and adds a line end to the last line if it has none."""
    data = read_bytes(path, _MAX_BYTES, "give the tokenizer's file")
    limit(path, "ranks", data.count(b"\n"), _MAX_RANKS)
    return data if data.endswith(b"\n") or not data else data + b"\n"


@dataclasses.dataclass(frozen=True)
class Found:
    """The contents of a transformers vocabulary file.

    Attributes:
        vocabulary: byte-level tokens and their ids.
        all: byte-level tokens and added tokens, and their ids.
        flags: the JSON object of each added token in `tokenizer.json`, with flags such as `lstrip`.
    """

    vocabulary: Mapping[str, int]
    all: Mapping[str, int]
    flags: Mapping[str, Mapping[str, Any]]


def read_transformers(path: Path) -> Found:
    """Reads `tokenizer.json`, or `vocab.json` together with `added_tokens.json` in the same directory.

    Raises:
        Emu3Error: a file is unreadable or damaged, or the tokenizer is not a byte-level BPE.
    """
    raw = read_bytes(path, MAX_JSON_BYTES, FETCH)
    try:
        data = parse_json(raw, path, FETCH)
    except Emu3Error as error:
        raise no_vocabulary(path, error) from error
    if not isinstance(data, dict):
        raise no_vocabulary(path, "it is not a JSON object")
    model = data.get("model")
    whole = isinstance(model, dict)
    if whole and model.get("type", "BPE") != "BPE":
        raise no_vocabulary(path, f"its model type is {shown(model['type'])}")
    vocabulary = model.get("vocab") if isinstance(model, dict) else data
    added = data.get("added_tokens", []) if whole else []
    if not isinstance(vocabulary, dict):
        raise no_vocabulary(path, "it has no vocab")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and is_whole(token.get("id"), 0)
        for token in added
    ):
        raise no_vocabulary(path, "its added_tokens is not a list of objects with content and id")
    bad = next((token for token, i in vocabulary.items() if not is_whole(i, 0) or i >= MAX_IDS), None)
    if bad is not None:
        raise no_vocabulary(path, f"{shown(bad)} has the id {shown(vocabulary[bad])}")
    limit(path, "added tokens", len(added), MAX_CODES + MAX_ADDED)
    limit(path, "characters of a token", max(map(len, vocabulary), default=0), MAX_TOKEN)
    beside = {} if whole else read_added(path.parent)
    every = {**vocabulary, **beside, **{token["content"]: token["id"] for token in added}}
    return Found(vocabulary, every, {token["content"]: token for token in added})


def no_vocabulary(path: Path, reason: object) -> Emu3Error:
    """Makes the error for a file that is not a vocabulary of transformers."""
    return Emu3Error(f"{path} is not a byte-level BPE tokenizer.json or vocab.json ({reason}): {FETCH}")


def read_added(directory: Path) -> dict[str, int]:
    """Reads the words and ids in `added_tokens.json` of a directory. Empty if the file does not exist."""
    path = directory / ADDED_TOKENS_FILE
    if not os.path.lexists(path):
        return {}
    added = read_object(path, FETCH)
    wrong = next((word for word, i in added.items() if not is_whole(i, 0)), None)
    if wrong is not None:
        raise Emu3Error(f"{path}: {shown(wrong)} has the id {shown(added[wrong])}: it must be a whole number; {FETCH}")
    return added


def read_listed(path: Path) -> list[str]:
    """Reads the tokens that `emu3_vision_tokens.txt` lists."""
    text = read_bytes(path, _MAX_BYTES, "give the tokenizer's file").decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _byte_of_character() -> dict[str, int]:
    """Makes GPT-2's byte-level alphabet: printable bytes map to themselves, the others to U+0100 and following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
