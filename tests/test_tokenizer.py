"""The text tokenizer: golden cases, upstream's own construction as oracle, damaged files, and forging."""

import base64
import dataclasses
import hashlib
import json
import unicodedata

import pytest
import tiktoken
from conftest import golden_json
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_jax.config import SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.text import tokenizer as tokenizer_module
from emu3_jax.text.tokenizer import PATTERN, VISION_TOKENS_FILE, Tokenizer, special_tokens

GOLDEN = golden_json("text.json")
SMALL_RANKS, SMALL_CODEBOOK = 1000, 16


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return Tokenizer.from_files(vocabulary, SpecialTokens())


@pytest.fixture(scope="session")
def small(vocabulary):
    """The first 1,000 ranks and 16 codes."""
    lines = vocabulary.read_bytes().splitlines()[:SMALL_RANKS]
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}
    return Tokenizer(ranks, special_tokens(SMALL_RANKS, SMALL_CODEBOOK))


@pytest.fixture
def small_file(small, tmp_path):
    small.to_file(tmp_path / "emu3.tiktoken")
    return tmp_path / "emu3.tiktoken"


@pytest.fixture(scope="session")
def oracle(small):
    """The small vocabulary as upstream builds it: tiktoken itself knows the special tokens."""
    surfaces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    surfaces += ["<|image token|>", "<|image start|>", "<|image end|>"]
    surfaces += [f"<|visual token {i:06d}|>" for i in range(SMALL_CODEBOOK)]
    return tiktoken.Encoding(
        "oracle",
        pat_str=PATTERN,
        mergeable_ranks={small._bytes[rank]: rank for rank in range(SMALL_RANKS)},
        special_tokens={surface: SMALL_RANKS + i for i, surface in enumerate(surfaces)},
    )


# Text out of special tokens, halves of them, and characters that normal form C joins, splits or turns into ASCII.
_PIECES = ["<|endoftext|>", "<|extra_7|>", "<|image start|>", "<|visual token 000015|>", "<|visual token 000016|>"]
_PIECES += [
    "<|",
    "|>",
    "<|image",
    " start|>",
    "extra_",
    "<|<|",
    "e",
    "\u0301",
    "\u0338",
    "\u037e",
    "\u212a",
    "\u1fef",
    " ",
]
mixed_text = st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.parametrize("text, ids", GOLDEN["encode"])
def test_encode_equals_reference(tokenizer, text, ids):
    assert tokenizer.encode(text, allow_special=True) == ids
    if max(ids, default=0) < tokenizer.special.pad:
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("ids, text, text_without_special", GOLDEN["decode"])
def test_decode_equals_reference(tokenizer, ids, text, text_without_special):
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == text_without_special


def test_every_id_has_its_place(tokenizer):
    special = tokenizer.special
    assert special == special_tokens(151643, 32768) == SpecialTokens()
    assert tokenizer.vocab_size == special.visual_end == 184622
    assert tokenizer.decode([special.visual_end - 1]) == "<|visual token 032767|>"
    controls = tokenizer.decode([special.bos, special.eos, special.eol, special.eof, special.pad])
    assert controls == "<|extra_203|><|extra_204|><|extra_200|><|extra_201|><|endoftext|>"


@given(text=st.text())
def test_decode_inverts_encode(small, text):
    try:
        ids = small.encode(text)
    except Emu3Error:
        return
    assert small.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=mixed_text)
def test_special_tokens_as_upstream_finds_them(small, oracle, text):
    ids = small.encode(text, allow_special=True)
    assert ids == oracle.encode(unicodedata.normalize("NFC", text), allowed_special="all", disallowed_special=())
    assert small.decode(ids) == oracle.decode(ids)


@given(text=mixed_text)
def test_text_cannot_forge_special_tokens(small, text):
    allowed = small.encode(text, allow_special=True)
    if max(allowed, default=0) < SMALL_RANKS:
        assert small.encode(text) == allowed
    else:
        with pytest.raises(Emu3Error, match=r"special token <\|.*allow_special=True"):
            small.encode(text)


def test_lone_surrogates_become_replacement_characters(small):
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"


# White space of all kinds, in runs, beside what PATTERN lets it belong to.
_SPACES = st.text(" \t\n\r\x0b\x85\xa0\u2003\u2028\u3000", min_size=1, max_size=9)
_spaced = st.lists(_SPACES | st.sampled_from([*"a1.,\u0301\x1c\U0001d400", "'s", "\u4e2d", "\ud800"]), max_size=9)


@given(pieces=_spaced)
@settings(max_examples=500, derandomize=True)
def test_long_runs_of_white_space_are_cut_as_the_pattern_cuts_them(small, oracle, pieces):
    text = "".join(pieces)
    expected = oracle.encode_ordinary(unicodedata.normalize("NFC", text))
    for longest in (1, 2, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer_module, "_LONG_RUN", longest)
            assert small.encode(text) == expected


@pytest.mark.parametrize("space", [" ", "\u3000", "\r\n"])
@pytest.mark.parametrize("before, after", [("x", "y"), ("\ud800", "")])
def test_a_million_spaces(small, capfd, before, after, space):
    """The library that cuts text would end in a panic, which is no `Exception`, and print a trace."""
    text = before + space * 1_000_000 + after
    assert small.decode(small.encode(text)) == text.replace("\ud800", "\ufffd")
    assert capfd.readouterr().err == ""


def test_a_panic_becomes_one_line(small, monkeypatch):
    class Panic(BaseException):
        pass

    class Library:
        def encode_ordinary(self, text):
            raise Panic("called `Result::unwrap()`")

    monkeypatch.setattr(small, "_bpe", Library())
    with pytest.raises(Emu3Error, match=r"^the text is damaged \(Panic: called .*shorten it$"):
        small.encode("a")


def test_added_words(small, tmp_path):
    end = small.special.visual_end
    added = {"gluon": end, "gluons": end + 1, "<|extra_word|>": end + 5, "[PAD]": end + 6}
    ranks = {token: rank for rank, token in enumerate(small._bytes[:SMALL_RANKS])}
    special = dataclasses.replace(small.special, pad=end + 6)
    extended = Tokenizer(ranks, special, added)
    assert extended.vocab_size == end + 7
    hello, dot = small.encode("a "), small.encode(".")
    assert extended.encode("a gluons.") == [*hello, end + 1, *dot]
    assert extended.decode([*hello, end + 1, end + 5, special.boi, end + 3], skip_special=True) == "a gluons"
    assert small.decode([end + 100], skip_special=True) == ""  # a row of a padded embedding
    assert extended.decode([end, end + 3]) == "gluon"  # an id between words stands for nothing
    with pytest.raises(Emu3Error, match=r"the text contains the special token <\|extra_word"):
        extended.encode("<|extra_word|>")
    assert extended.encode("<|extra_word|>", allow_special=True) == [end + 5]
    extended.to_file(tmp_path / "emu3.tiktoken")
    again = Tokenizer.from_files(tmp_path / "emu3.tiktoken", special)
    assert (again.added, again._bytes) == (added, extended._bytes)
    for wrong in ({"": end}, {"a": end, "b": end}, {"\ud800": end}, {"a": 2**40}, {"<|im_end|>": end}):
        with pytest.raises(Emu3Error, match="the added token"):
            Tokenizer(ranks, small.special, wrong)


def test_decode_cuts_no_character_short(small):
    ids = small.encode("日")
    assert small.decode(ids) == "日"
    assert small.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize("outside", [-1, SMALL_RANKS + 211 + SMALL_CODEBOOK, 2**40])
def test_ids_outside_the_vocabulary(small, outside):
    with pytest.raises(Emu3Error, match=f"token id {outside} is outside the vocabulary: legal ids are 0 to 1226"):
        small.decode([0, outside])


def test_small_vocabulary_shifts_every_id(small, small_file):
    special = small.special
    assert (special.pad, special.bos, special.visual_start, small.vocab_size) == (1000, 1206, 1211, 1227)
    assert small.encode("<|image start|><|visual token 000015|>", allow_special=True) == [special.boi, 1226]
    again = Tokenizer.from_files(small_file, special)
    assert again.encode("Hello, world!") == small.encode("Hello, world!")


def test_file_is_byte_for_byte_the_public_one(tokenizer, tmp_path):
    tokenizer.to_file(tmp_path / "emu3.tiktoken")
    digest = hashlib.sha256((tmp_path / "emu3.tiktoken").read_bytes()).hexdigest()
    assert digest == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def test_unwritable_file(small, tmp_path):
    with pytest.raises(Emu3Error, match=r"cannot write .*No such file"):
        small.to_file(tmp_path / "missing" / "emu3.tiktoken")


@pytest.mark.parametrize("field", ["pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof"])
def test_disagreeing_config(small, small_file, field):
    special = dataclasses.replace(small.special, **{field: 5})
    with pytest.raises(
        Emu3Error, match=f"emu3.tiktoken: .*1000 ranks put token {field} at id .* but the config says 5"
    ):
        Tokenizer.from_files(small_file, special)


def test_disagreeing_visual_range(small, small_file):
    special = dataclasses.replace(small.special, visual_start=2000)
    with pytest.raises(Emu3Error, match="visual_start at id 1211, but the config says 2000"):
        Tokenizer.from_files(small_file, special)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "999 ranks put token pad at id 999"),
        (lambda data: data[:-3], "ranks are not 0 to 999"),
        (lambda data: data[: data.rindex(b" ")], "line 1000 is"),
        (lambda data: data.replace(b" 7\n", b" x\n"), "line 8 is"),
        (lambda data: data.replace(b" 7\n", b" 8\n"), "ranks are not 0 to 999"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "line 1 is 'version https"),
        (lambda data: b"", "0 ranks"),
        (lambda data: b"\xff\xfe\x00" + data, "line 1 is"),
        (lambda data: b"".join(data.splitlines(keepends=True)[:200]), "lacks the single byte"),
    ],
)
def test_damaged_vocabulary_file(small, small_file, damage, message):
    small_file.write_bytes(damage(small_file.read_bytes()))
    with pytest.raises(Emu3Error, match=message) as error:
        Tokenizer.from_files(small_file, small.special)
    assert "emu3.tiktoken" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("load", [Tokenizer.from_files, Tokenizer.from_transformers])
def test_missing_vocabulary_file(load, small, tmp_path):
    with pytest.raises(Emu3Error, match=r"cannot read .*absent: there is no such file"):
        load(tmp_path / "absent", small.special)


def test_vision_token_list(small, small_file):
    listing = small_file.with_name(VISION_TOKENS_FILE)
    text = small.vision_tokens_text()
    assert text.splitlines()[:4] == ["<|image token|>", "<|image start|>", "<|image end|>", "<|visual token 000000|>"]
    listing.write_text(text)
    assert Tokenizer.from_files(small_file, small.special).vocab_size == small.vocab_size
    listing.write_text(text + "<|visual token 000016|>\n")
    with pytest.raises(Emu3Error, match=r"emu3_vision_tokens.txt lists 20 tokens, but this model has 19"):
        Tokenizer.from_files(small_file, small.special)
    listing.write_text(text.replace("000007", "000070"))
    with pytest.raises(Emu3Error, match=r"emu3_vision_tokens.txt lists '<\|visual token 000070\|>' where"):
        Tokenizer.from_files(small_file, small.special)


def _byte_level(tokenizer: Tokenizer) -> dict[str, int]:
    """The ranks in GPT-2's spelling of bytes, by transformers' own table."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = bytes_to_unicode()
    tokens = tokenizer._bytes[: tokenizer.special.pad]
    return {"".join(table[byte] for byte in token): rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="session")
def hub_vocabulary(small):
    return _byte_level(small)


def _tokenizer_json(vocabulary, added=()):
    tokens = [{"content": content, "id": i} for content, i in added]
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": tokens})


@pytest.mark.oracle
def test_ranks_from_transformers(small, hub_vocabulary, tmp_path):
    added = [("<|image start|>", small.special.boi), ("<image>", SMALL_RANKS + 3)]
    (tmp_path / "tokenizer.json").write_text(_tokenizer_json(hub_vocabulary, added))
    (tmp_path / "vocab.json").write_text(json.dumps(hub_vocabulary | {"<|endoftext|>": SMALL_RANKS}))
    for name in ("tokenizer.json", "vocab.json"):
        found = Tokenizer.from_transformers(tmp_path / name, small.special)
        assert found._bytes == small._bytes


@pytest.mark.oracle
def test_whole_vocabulary_from_transformers(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(_tokenizer_json(_byte_level(tokenizer)))
    found = Tokenizer.from_transformers(tmp_path / "tokenizer.json", SpecialTokens())
    assert found._bytes == tokenizer._bytes


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not a byte-level BPE"),
        ('{"model": {"vocab": {"a"', "not a byte-level BPE"),
        ("[]", "not a byte-level BPE"),
        ('{"model": {"type": "Unigram"}}', "not a byte-level BPE"),
        ('{"\u65e5": 3}', "not a byte-level BPE"),
        ('{"a": "b"}', "not a byte-level BPE"),
        ("{}", "0 ranks"),
        ('{"a": 0, "b": 2}', "2 ranks are not 0 to 1"),
    ],
)
def test_damaged_transformers_file(small, tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(Emu3Error, match=message) as error:
        Tokenizer.from_transformers(tmp_path / "tokenizer.json", small.special)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.oracle
def test_transformers_file_that_moves_a_control_token(small, hub_vocabulary, tmp_path):
    (tmp_path / "tokenizer.json").write_text(_tokenizer_json(hub_vocabulary, [("<|image end|>", 1001)]))
    with pytest.raises(Emu3Error, match=r"puts <\|image end\|> at id 1001, but the config needs it at 1210"):
        Tokenizer.from_transformers(tmp_path / "tokenizer.json", small.special)
