"""The text tokenizer: upstream Emu3's byte-pair encoding (tiktoken) and its control and visual tokens."""

import base64
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import tiktoken

from emu3_jax.config import MAX_IDS, SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, reading
from emu3_jax.printable import shown
from emu3_jax.text.vocabulary import (
    ADDED_TOKENS_FILE,
    BYTE_OF_CHARACTER,
    CONTROLS,
    FETCH,
    MAX_ADDED,
    MAX_TOKEN,
    SURFACES,
    TEXT_CONTROLS,
    VISION_TOKENS_FILE,
    no_vocabulary,
    read_added,
    read_listed,
    read_ranks,
    read_transformers,
)
from emu3_jax.text.vocabulary import count_ranks as count_ranks
from emu3_jax.text.vocabulary import special_tokens as special_tokens

# How upstream's tokenizer cuts text into the pieces that byte pairs are merged in.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Everything that has the form of a special token; whether it is one, the table of special tokens says.
_SPECIAL_FORM = r"<\|[a-z0-9_ ]+\|>"


# What PATTERN's `\s` matches, and the longest run of it that tiktoken is given: it keeps a state per character of
# `\s+(?!\S)`, and ends in a panic at a million.
_RUN = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_LONG_RUN = 10_000
_FLAGS = ("lstrip", "rstrip", "single_word")  # of a transformers tokenizer's added token


class SpecialTokenError(Emu3Error):
    """A text has a special token in it that was not allowed."""

    def __init__(self, token: str):
        super().__init__(
            f"the text contains the special token {token}: take it out, or pass allow_special=True "
            "(--allow-special) where the text's author may write control tokens"
        )
        self.token = token


class Tokenizer:
    """Text to ids and back, id for id like upstream's `Emu3Tokenizer`.

    The ids are the ranks, then `<|endoftext|> <|im_start|> <|im_end|>`, `<|extra_0|>` to `<|extra_204|>`,
    `<|image token|> <|image start|> <|image end|>` and the visual tokens. A smaller vocabulary shifts them all. Words
    that somebody added to a trained model follow the visual tokens.
    """

    def __init__(self, ranks: Mapping[bytes, int], special: SpecialTokens, added: Mapping[str, int] | None = None):
        """Checks the vocabulary.

        Args:
            ranks: maps byte sequences to 0..N-1, all 256 single bytes among them.
            special: the model's control and visual tokens, which must agree with N. `pad`, which no text holds, may
                also be one of `added`.
            added: words with ids of their own, past the visual tokens.

        Raises:
            Emu3Error: one of them is damaged or disagrees with another.
        """
        n = len(ranks)
        if sorted(ranks.values()) != list(range(n)):
            raise Emu3Error(f"the vocabulary's {n} ranks are not 0 to {n - 1}, each once: fetch the file again")
        lacking = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
        if lacking is not None:
            raise Emu3Error(f"the vocabulary of {n} ranks lacks the single byte {lacking}: fetch the file again")
        expected = special_tokens(n, special.visual_count)
        for field in (*SURFACES, "visual_start"):
            ours, theirs = getattr(expected, field), getattr(special, field)
            if ours != theirs and not (field == "pad" and theirs >= special.visual_end):
                raise Emu3Error(
                    f"the vocabulary's {n} ranks put token {field} at id {ours}, but the config says {theirs}: "
                    "use the vocabulary and config.json of one and the same model"
                )
        self.special = special
        visual = (f"<|visual token {code:06d}|>" for code in range(special.visual_count))
        self._special_ids = {surface: n + i for i, surface in enumerate((*CONTROLS, *visual))}
        self._num_ranks = n
        self._added = _checked_added(added or {}, self._special_ids, special)
        self._bytes = [b""] * n + [surface.encode() for surface in self._special_ids]  # by id
        for token, rank in ranks.items():
            self._bytes[rank] = token
        # What is no id between the added words stands for nothing.
        self._bytes += [b""] * (max(self._added.values(), default=-1) + 1 - len(self._bytes))
        for word, i in self._added.items():
            self._bytes[i] = word.encode()
        self._words = {i for word, i in self._added.items() if not re.fullmatch(_SPECIAL_FORM, word)}
        self._marked = re.compile("|".join([*_patterns(self._added), _SPECIAL_FORM]))
        with reading("the vocabulary", FETCH):
            self._bpe = tiktoken.Encoding("emu3", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={})

    @classmethod
    def from_files(cls, vocabulary: Path, special: SpecialTokens) -> "Tokenizer":
        """Reads upstream's vocabulary file, lines of base64 and rank (`emu3.tiktoken`).

        The list of image and visual tokens beside it, `emu3_vision_tokens.txt`, adds nothing to the vocabulary: where
        the file exists, it is checked. `added_tokens.json` beside it holds words that were added after training.

        Raises:
            Emu3Error: a file is unreadable, damaged, or disagrees with `special`.
        """
        vocabulary = Path(vocabulary)
        tokenizer = cls._named(vocabulary, read_ranks(vocabulary), special, read_added(vocabulary.parent))
        listing = vocabulary.with_name(VISION_TOKENS_FILE)
        if listing.exists():
            tokenizer._check_vision_tokens(listing)
        return tokenizer

    @classmethod
    def from_transformers(cls, tokenizer_json: Path, special: SpecialTokens) -> "Tokenizer":
        """Derives the ranks from a Hugging Face byte-level `tokenizer.json` (or `vocab.json`): its ids below them.

        Raises:
            Emu3Error: the file is unreadable, damaged, not byte-level BPE, or disagrees with `special`.
        """
        path = Path(tokenizer_json)
        found = read_transformers(path)
        num_ranks = special.visual_start - len(CONTROLS)
        with reading(path, FETCH):
            try:
                ranks = {
                    bytes(map(BYTE_OF_CHARACTER.__getitem__, token)): i
                    for token, i in found.vocabulary.items()
                    if i < num_ranks
                }
            except KeyError as error:
                raise no_vocabulary(path, f"the character {shown(error.args[0])} spells no byte") from error
        added = {word: i for word, i in found.all.items() if i >= special.visual_end}
        for word in added:
            flags = [flag for flag in _FLAGS if found.flags.get(word, {}).get(flag)]
            if flags:
                raise Emu3Error(
                    f"{path}: the added token {shown(word)} has {flags[0]}, which is not supported: clear it"
                )
        tokenizer = cls._named(path, ranks, special, added)
        for surface, ours in tokenizer._special_ids.items():
            if found.all.get(surface, ours) != ours:
                raise Emu3Error(
                    f"{path} puts {surface} at id {found.all[surface]}, but the config needs it at {ours}: "
                    "use the tokenizer and config.json of one and the same model"
                )
        return tokenizer

    @classmethod
    def _named(
        cls, path: Path, ranks: Mapping[bytes, int], special: SpecialTokens, added: Mapping[str, int]
    ) -> "Tokenizer":
        try:
            return cls(ranks, special, added)
        except Emu3Error as error:
            raise Emu3Error(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Ranks, control tokens, visual tokens and added words together."""
        return len(self._bytes)

    @property
    def added(self) -> dict[str, int]:
        """Words that were added after training, and their ids."""
        return dict(self._added)

    @property
    def special_ids(self) -> dict[str, int]:
        """Surface form to id of every control and visual token, in the order of their ids."""
        return dict(self._special_ids)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text` in Unicode normal form C.

        With `allow_special`, surface forms of special tokens in the text become those tokens, as upstream always
        does. Without it such text is an error, so that nobody's text forges a control token.

        Raises:
            SpecialTokenError: the text holds a special token and `allow_special` is false.
        """
        text = unicodedata.normalize("NFC", text)
        ids, start = [], 0
        for match in self._marked.finditer(text):
            word_id = self._added.get(match[0])
            special_id = self._special_ids.get(match[0], word_id)
            if special_id is None:
                continue
            if not allow_special and special_id not in self._words:
                raise SpecialTokenError(match[0])
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(special_id)
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of text without special tokens, whatever it holds."""
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character; upstream's library replaces it in this way
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with reading("the text", "shorten it"):
            ids = []
            for part, is_piece in _in_parts(text):
                ids += self._bpe._encode_single_piece(part) if is_piece else self._bpe.encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        `skip_special` drops control and visual tokens, and ids past the vocabulary, which an embedding has rows for
        where it was padded.

        Raises:
            Emu3Error: an id lies outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if skip_special:
            ids = [i for i in ids if i < self._num_ranks or i in self._words]
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise Emu3Error(f"token id {outside} is outside the vocabulary: legal ids are 0 to {self.vocab_size - 1}")
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def to_file(self, path: Path) -> None:
        """Writes the ranks in upstream's format; for the public vocabulary the same bytes as the public file.

        Added words go into `added_tokens.json` beside it.
        """
        path = Path(path)
        ranks = enumerate(self._bytes[: self._num_ranks])
        text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks)
        try:
            path.write_text(text, encoding="ascii", newline="\n")
            if self._added:
                path.with_name(ADDED_TOKENS_FILE).write_text(json.dumps(self._added, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise Emu3Error(f"cannot write {path}: {error.strerror}; choose another place or free space") from error

    def vision_tokens_text(self) -> str:
        """What upstream's `emu3_vision_tokens.txt` holds: image controls and visual tokens, one per line."""
        return "".join(f"{surface}\n" for surface in list(self._special_ids)[len(TEXT_CONTROLS) :])

    def _check_vision_tokens(self, path: Path) -> None:
        found = read_listed(path)
        expected = self.vision_tokens_text().splitlines()
        remedy = "remove the file (the list is derived then) or fetch it again"
        if len(found) != len(expected):
            raise Emu3Error(f"{path} lists {len(found)} tokens, but this model has {len(expected)}: {remedy}")
        for line, ours in zip(found, expected, strict=True):
            if line != ours:
                raise Emu3Error(f"{path} lists {shown(line)} where {ours!r} belongs: {remedy}")


# ------------------------------------------------------------------------------------------------ text


def _in_parts(text: str) -> Iterator[tuple[str, bool]]:
    """`text` in parts that PATTERN cuts as it cuts the whole, with no long run of white space among them.

    Yields:
        Each part, and whether it is one whole piece of PATTERN's, to be merged as it is. A run of white space is cut by
        PATTERN behind its last line end, and before its last character where something follows, which that
        character may belong to. Line ends at its start belong to punctuation before it.
    """
    start = 0
    # Every run is looked at: to look for long ones alone would try each of their ends.
    for run in _RUN.finditer(text) if len(text) >= _LONG_RUN else ():
        begin, end = run.span()
        if end - begin < _LONG_RUN:
            continue
        if begin > start and unicodedata.category(text[begin - 1])[0] not in "LN":
            begin += len(text[begin:end]) - len(text[begin:end].lstrip("\r\n"))
        if begin > start:
            yield text[start:begin], False
        lines = max(text.rfind("\n", begin, end), text.rfind("\r", begin, end)) + 1 or begin
        last = end if end == len(text) else max(end - 1, lines)
        yield from ((text[a:b], True) for a, b in itertools.pairwise((begin, lines, last)) if a < b)
        start = last
    if start < len(text):
        yield text[start:], False


# ------------------------------------------------------------------------------------------------ added words


def _checked_added(added: Mapping[str, int], ids: Mapping[str, int], special: SpecialTokens) -> dict[str, int]:
    """The added words that are no control or visual tokens.

    Raises:
        Emu3Error: one is empty or has a number that is another token's, or there are absurdly many.
    """
    words = {word: i for word, i in added.items() if i >= special.visual_end}
    again = "use the tokenizer and config.json of one and the same model"
    for word, i in added.items():
        if word not in words and ids.get(word, i) != i:
            raise Emu3Error(f"{shown(word)} has the id {i}, but the config needs it at {ids[word]}: {again}")
    limit("the vocabulary", "added tokens", len(words), MAX_ADDED)
    seen: dict[int, str] = {}
    for word, i in words.items():
        if not word or len(word) > MAX_TOKEN or i >= MAX_IDS or word in ids or i in seen:
            raise Emu3Error(f"the added token {shown(word)} has the id {i}: it must be a word with an id of its own")
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise Emu3Error(f"the added token {shown(word)} has half of a character: remove it")
        seen[i] = word
    return words


def _patterns(words: Iterable[str]) -> list[str]:
    """Regular expressions that find words in text; of two that begin alike, the longer one is meant.

    One for each first character: where text has another one, a word costs no time.
    """
    groups: dict[str, list[str]] = {}
    for word in sorted(words, key=len, reverse=True):
        groups.setdefault(word[0], []).append(re.escape(word[1:]))
    return [f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in groups.items()]
