"""The text tokenizer: upstream Emu3's byte-pair encoding (tiktoken) and its control and visual tokens."""

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import tiktoken

from emu3_jax.config import SpecialTokens
from emu3_jax.errors import Emu3Error

# How upstream's tokenizer cuts text into the pieces that byte pairs are merged in.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VISION_TOKENS_FILE = "emu3_vision_tokens.txt"

# The ids after the ranks, in order; the visual tokens follow.
_TEXT_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_IMAGE_CONTROLS = ("<|image token|>", "<|image start|>", "<|image end|>")
_CONTROLS = _TEXT_CONTROLS + _IMAGE_CONTROLS
_SURFACES = {
    "pad": "<|endoftext|>", "bos": "<|extra_203|>", "eos": "<|extra_204|>", "eol": "<|extra_200|>",
    "eof": "<|extra_201|>", "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>",
}  # fmt: skip
# Everything that has the form of a special token; whether it is one, the table of special tokens says.
_SPECIAL_FORM = re.compile(r"<\|[a-z0-9_ ]+\|>")


def special_tokens(num_ranks: int, codebook_size: int) -> SpecialTokens:
    """The ids that follow from a vocabulary of `num_ranks` byte sequences and a codebook of `codebook_size` codes."""
    controls = {field: num_ranks + _CONTROLS.index(surface) for field, surface in _SURFACES.items()}
    return SpecialTokens(**controls, visual_start=num_ranks + len(_CONTROLS), visual_count=codebook_size)


def count_ranks(vocabulary: Path) -> int:
    """How many ranks a vocabulary file holds. Raises `Emu3Error` if it cannot be read."""
    return len(_read_bytes(Path(vocabulary)).splitlines())


class Tokenizer:
    """Text to ids and back, id for id like upstream's `Emu3Tokenizer`.

    The ids are the ranks, then `<|endoftext|> <|im_start|> <|im_end|>`, `<|extra_0|>` to `<|extra_204|>`,
    `<|image token|> <|image start|> <|image end|>` and the visual tokens. A smaller vocabulary shifts them all.
    """

    def __init__(self, ranks: Mapping[bytes, int], special: SpecialTokens):
        """`ranks` maps byte sequences to 0..N-1, all 256 single bytes among them; `special` must agree with N."""
        n = len(ranks)
        if sorted(ranks.values()) != list(range(n)):
            raise Emu3Error(f"the vocabulary's {n} ranks are not 0 to {n - 1}, each once: fetch the file again")
        lacking = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
        if lacking is not None:
            raise Emu3Error(f"the vocabulary of {n} ranks lacks the single byte {lacking}: fetch the file again")
        expected = special_tokens(n, special.visual_count)
        for field in (*_SURFACES, "visual_start"):
            ours, theirs = getattr(expected, field), getattr(special, field)
            if ours != theirs:
                raise Emu3Error(
                    f"the vocabulary's {n} ranks put token {field} at id {ours}, but the config says {theirs}: "
                    "use the vocabulary and config.json of one and the same model"
                )
        self.special = special
        visual = (f"<|visual token {code:06d}|>" for code in range(special.visual_count))
        self._special_ids = {surface: n + i for i, surface in enumerate((*_CONTROLS, *visual))}
        self._num_ranks = n
        self._bytes = [b""] * n + [surface.encode() for surface in self._special_ids]  # by id
        for token, rank in ranks.items():
            self._bytes[rank] = token
        self._bpe = tiktoken.Encoding("emu3", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={})

    @classmethod
    def from_files(cls, vocabulary: Path, special: SpecialTokens) -> "Tokenizer":
        """Reads upstream's vocabulary file, lines of base64 and rank (`emu3.tiktoken`).

        The list of image and visual tokens beside it, `emu3_vision_tokens.txt`, adds nothing to the vocabulary: where
        the file exists, it is checked.

        Raises:
            Emu3Error: a file is unreadable, damaged, or disagrees with `special`.
        """
        vocabulary = Path(vocabulary)
        ranks = {}
        for number, line in enumerate(_read_bytes(vocabulary).splitlines(), start=1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise Emu3Error(
                    f"{vocabulary} line {number} is {line[:40].decode(errors='replace')!r}: it must be a base64 token "
                    "and its rank; fetch the file again"
                ) from error
        tokenizer = cls._named(vocabulary, ranks, special)
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
        try:
            data = json.loads(_read_bytes(path))
            model = data.get("model")
            vocabulary, added = (model["vocab"], data["added_tokens"]) if isinstance(model, dict) else (data, [])
            ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
            num_ranks = special.visual_start - len(_CONTROLS)
            ranks = {bytes(map(_BYTE_OF_CHARACTER.__getitem__, t)): i for t, i in vocabulary.items() if i < num_ranks}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Emu3Error(
                f"{path} is not a byte-level BPE tokenizer.json or vocab.json ({error!r}): fetch the file again"
            ) from error
        tokenizer = cls._named(path, ranks, special)
        for surface, ours in tokenizer._special_ids.items():
            if ids.get(surface, ours) != ours:
                raise Emu3Error(
                    f"{path} puts {surface} at id {ids[surface]}, but the config needs it at {ours}: "
                    "use the tokenizer and config.json of one and the same model"
                )
        return tokenizer

    @classmethod
    def _named(cls, path: Path, ranks: Mapping[bytes, int], special: SpecialTokens) -> "Tokenizer":
        try:
            return cls(ranks, special)
        except Emu3Error as error:
            raise Emu3Error(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Ranks, control tokens and visual tokens together."""
        return len(self._bytes)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text` in Unicode normal form C.

        With `allow_special`, surface forms of special tokens in the text become those tokens, as upstream always
        does. Without it such text is an error, so that nobody's text forges a control token.

        Raises:
            Emu3Error: the text holds a special token and `allow_special` is false.
        """
        text = unicodedata.normalize("NFC", text)
        ids, start = [], 0
        for match in _SPECIAL_FORM.finditer(text):
            special_id = self._special_ids.get(match[0])
            if special_id is None:
                continue
            if not allow_special:
                raise Emu3Error(
                    f"the text contains the special token {match[0]}: take it out, or pass allow_special=True "
                    "(--allow-special) where the text's author may write control tokens"
                )
            ids += self._bpe.encode_ordinary(text[start : match.start()])
            ids.append(special_id)
            start = match.end()
        return ids + self._bpe.encode_ordinary(text[start:])

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` drops control and visual tokens.

        Raises:
            Emu3Error: an id lies outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise Emu3Error(f"token id {outside} is outside the vocabulary: legal ids are 0 to {self.vocab_size - 1}")
        limit = self._num_ranks if skip_special else self.vocab_size
        return b"".join(self._bytes[i] for i in ids if i < limit).decode("utf-8", errors="replace")

    def to_file(self, path: Path) -> None:
        """Writes the ranks in upstream's format; for the public vocabulary the same bytes as the public file."""
        ranks = enumerate(self._bytes[: self._num_ranks])
        text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks)
        try:
            Path(path).write_text(text, encoding="ascii", newline="\n")
        except OSError as error:
            raise Emu3Error(f"cannot write {path}: {error.strerror}; choose another place or free space") from error

    def vision_tokens_text(self) -> str:
        """What upstream's `emu3_vision_tokens.txt` holds: image controls and visual tokens, one per line."""
        return "".join(f"{surface}\n" for surface in list(self._special_ids)[len(_TEXT_CONTROLS) :])

    def _check_vision_tokens(self, path: Path) -> None:
        found = [line.strip() for line in _read_bytes(path).decode(errors="replace").splitlines() if line.strip()]
        expected = self.vision_tokens_text().splitlines()
        remedy = "remove the file (the list is derived then) or fetch it again"
        if len(found) != len(expected):
            raise Emu3Error(f"{path} lists {len(found)} tokens, but this model has {len(expected)}: {remedy}")
        for line, ours in zip(found, expected, strict=True):
            if line != ours:
                raise Emu3Error(f"{path} lists {line[:40]!r} where {ours!r} belongs: {remedy}")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Emu3Error(f"cannot read {path}: {error.strerror}; give the tokenizer's file") from error


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of byte-level vocabularies: printable bytes spell themselves, others stand from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
