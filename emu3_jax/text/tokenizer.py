"""The text tokenizer: upstream Emu3's byte-pair encoding (tiktoken), with its control and visual tokens."""

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

# Upstream's pattern. It splits text into pieces; byte pairs merge inside a piece only.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Matches every special token, and also text that only looks like one.
_SPECIAL_FORM = r"<\|[a-z0-9_ ]+\|>"

# Matches white space like `\s` in PATTERN. tiktoken panics on a run of a million characters, because it keeps
# a state for each character of `\s+(?!\S)`. So it never gets a run of _LONG_RUN characters or more.
_RUN = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_LONG_RUN = 10_000
_FLAGS = ("lstrip", "rstrip", "single_word")  # flags of added tokens in transformers that we do not support


class SpecialTokenError(Emu3Error):
    """A text contains a special token, and `allow_special` is false.

    Attributes:
        token: the special token, such as "<|extra_203|>".
        row: index of the row whose prompt is the text; None if the text is no row's prompt, or the row is not known.
    """

    def __init__(self, token: str, row: int | None = None):
        super().__init__(
            f"the text contains the special token {token}: remove it, or pass allow_special=True "
            "(--allow-special) if you trust the text's author with control tokens"
        )
        self.token, self.row = token, row


class Tokenizer:
    """Converts text to ids and back, with the same ids as upstream's `Emu3Tokenizer`.

    Ids are numbered in this order: the ranks of the vocabulary; `<|endoftext|> <|im_start|> <|im_end|>`;
    `<|extra_0|>` to `<|extra_204|>`; `<|image token|> <|image start|> <|image end|>`; the visual tokens; words that
    were added after training. So all special ids depend on the number of ranks.
    """

    def __init__(self, ranks: Mapping[bytes, int], special: SpecialTokens, added: Mapping[str, int] | None = None):
        """Checks the vocabulary and prepares the encoder.

        Args:
            ranks: maps byte sequences to ranks 0..N-1. Must contain all 256 single bytes.
            special: the model's control and visual tokens, which must agree with N. Only `pad`, which never occurs in
                text, may have an id after the visual tokens.
            added: maps added words to ids after the visual tokens.

        Raises:
            Emu3Error: an argument is damaged, or disagrees with another one.
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
        # Unused ids between the added words decode to nothing.
        self._bytes += [b""] * (max(self._added.values(), default=-1) + 1 - len(self._bytes))
        for word, i in self._added.items():
            self._bytes[i] = word.encode()
        self._words = {i for word, i in self._added.items() if not re.fullmatch(_SPECIAL_FORM, word)}
        self._marked = re.compile("|".join([*_patterns(self._added), _SPECIAL_FORM]))
        with reading("the vocabulary", FETCH):
            self._bpe = tiktoken.Encoding("emu3", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={})

    @classmethod
    def from_files(cls, vocabulary: Path, special: SpecialTokens) -> "Tokenizer":
        """Reads upstream's vocabulary file `emu3.tiktoken`. Each line holds a base64 token and its rank.

        Two optional files in the same directory are also read. `emu3_vision_tokens.txt` lists the image and visual
        tokens; it is only checked. `added_tokens.json` holds words that were added after training.

        Args:
            vocabulary: the file.
            special: the model's control and visual tokens.

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
        """Reads a byte-level `tokenizer.json` or `vocab.json` of transformers. Ids below the control tokens are ranks.

        Args:
            tokenizer_json: the file.
            special: the model's control and visual tokens.

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
                raise no_vocabulary(path, f"the character {shown(error.args[0])} stands for no byte") from error
        added = {word: i for word, i in found.all.items() if i >= special.visual_end}
        for word in added:
            flags = [flag for flag in _FLAGS if found.flags.get(word, {}).get(flag)]
            if flags:
                raise Emu3Error(
                    f"{path}: the added token {shown(word)} sets {flags[0]}, which is not supported: set it to false"
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
        """Number of ids: ranks, control tokens, visual tokens, and ids up to the last added word."""
        return len(self._bytes)

    @property
    def added(self) -> dict[str, int]:
        """Words that were added after training, and their ids."""
        return dict(self._added)

    @property
    def special_ids(self) -> dict[str, int]:
        """Maps the text form of every control and visual token to its id, in the order of ids."""
        return dict(self._special_ids)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Converts text to ids, after normalisation to Unicode form C.

        Args:
            text: any string.
            allow_special: whether special tokens written in the text, such as `<|extra_203|>`, become control tokens.
                Upstream always allows them. By default they are refused, so that a foreign text cannot inject one.

        Raises:
            SpecialTokenError: the text contains a special token and `allow_special` is false.
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
        """Converts text to ids without looking for special tokens."""
        try:
            text.encode()
        except UnicodeEncodeError:  # an unpaired surrogate; tiktoken replaces it in the same way
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with reading("the text", "shorten it"):
            ids = []
            for part, is_piece in _in_parts(text):
                ids += self._bpe._encode_single_piece(part) if is_piece else self._bpe.encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Converts ids to text. Bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: whether to drop control and visual tokens, and ids above the vocabulary. A model whose
                embedding was padded can produce ids above the vocabulary.

        Raises:
            Emu3Error: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if skip_special:
            ids = [i for i in ids if i < self._num_ranks or i in self._words]
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise Emu3Error(f"token id {outside} is outside the vocabulary: legal ids are 0 to {self.vocab_size - 1}")
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def to_file(self, path: Path) -> None:
        """Writes the ranks in upstream's format, and added words to `added_tokens.json` in the same directory.

        The public vocabulary gives the same bytes as the public file.

        Raises:
            Emu3Error: a file cannot be written.
        """
        path = Path(path)
        try:
            for name, data in self._files(path.name).items():
                path.with_name(name).write_bytes(data)
        except OSError as error:
            raise Emu3Error(f"cannot write {path}: {error.strerror}; choose another place or free space") from error

    @property
    def nbytes(self) -> int:
        """The size of the files that `to_file` writes."""
        return sum(map(len, self._files("").values()))

    def _files(self, name: str) -> dict[str, bytes]:
        """The bytes of the files that `to_file` writes, by name; `name` is that of the file of ranks."""
        ranks = enumerate(self._bytes[: self._num_ranks])
        files = {name: "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks).encode()}
        if self._added:
            files[ADDED_TOKENS_FILE] = (json.dumps(self._added, indent=2) + "\n").encode()
        return files

    def vision_tokens_text(self) -> str:
        """The contents of upstream's `emu3_vision_tokens.txt`: image control tokens and visual tokens, one per line."""
        return "".join(f"{surface}\n" for surface in list(self._special_ids)[len(TEXT_CONTROLS) :])

    def _check_vision_tokens(self, path: Path) -> None:
        found = read_listed(path)
        expected = self.vision_tokens_text().splitlines()
        remedy = "remove the file, which is optional, or fetch it again"
        if len(found) != len(expected):
            raise Emu3Error(f"{path} lists {len(found)} tokens, but this model has {len(expected)}: {remedy}")
        for line, ours in zip(found, expected, strict=True):
            if line != ours:
                raise Emu3Error(f"{path} lists {shown(line)} where {ours!r} belongs: {remedy}")


# ------------------------------------------------------------------------------------------------ text


def _in_parts(text: str) -> Iterator[tuple[str, bool]]:
    """Splits text so that tiktoken never sees a long run of white space. The ids do not change.

    PATTERN splits a run of white space after its last line end. If text follows, PATTERN also splits before the run's
    last character, which may belong to the next piece. Line ends at the start of a run belong to punctuation before it.

    Yields:
        Each part of the text, and whether the part is a single piece of PATTERN, which must not be split again.
    """
    start = 0
    # Search for runs of any length. A regular expression for long runs only would take quadratic time.
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
    """Returns the added words that are not control or visual tokens.

    Raises:
        Emu3Error: a word is empty or too long, has the id of another token, or has an unpaired surrogate, or there are
            too many words.
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
            raise Emu3Error(
                f"the added token {shown(word)} has the id {i}: it must have 1 to {MAX_TOKEN} characters, and an id < "
                f"{MAX_IDS:,} that no other token has"
            )
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise Emu3Error(f"the added token {shown(word)} has an unpaired surrogate (half a character): remove it")
        seen[i] = word
    return words


def _patterns(words: Iterable[str]) -> list[str]:
    """Makes regular expressions that find added words. Longer words come first, so they win over their prefixes.

    Words are grouped by their first character, so a position with another character is rejected at once.
    """
    groups: dict[str, list[str]] = {}
    for word in sorted(words, key=len, reverse=True):
        groups.setdefault(word[0], []).append(re.escape(word[1:]))
    return [f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in groups.items()]
