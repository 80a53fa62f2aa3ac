"""Manifests and their records, and the bytes of a record."""

import concurrent.futures
import json
import pathlib
import re

import numpy as np
import pytest
from conftest import GOLDEN, golden_npz
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from emu3_jax import Clip, Emu3Error
from emu3_jax.data.manifest import Manifest, resize_to_area
from emu3_jax.data.records import Part, Record, Turn
from emu3_jax.data.sources.opening import ManifestSource
from emu3_jax.data.sources.records import SourceRecords

STORY = [
    {"role": "user", "text": "a story"},
    {"role": "assistant", "text": "A dog."},
    {"role": "assistant", "image": "a.png"},
]
TALK = [{"role": "user", "text": "Was?"}, {"role": "assistant", "text": "Ein Hund."}]


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest of the given lines (objects, or text as it stands); returns it."""

    def write(*lines) -> Manifest:
        file = tmp_path / "m.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return Manifest(file)

    return write


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
codes = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=4), elements=st.integers(0, 2**17))


@given(name=texts, text=texts, codes=st.none() | codes, turns=st.lists(st.builds(Turn, texts, texts), max_size=2))
def test_records_survive_their_bytes(name, text, codes, turns):
    record = Record.from_bytes(Record(name, text, codes, tuple(turns)).to_bytes())
    assert (record.name, record.text, record.conversation) == (name, text, tuple(turns))
    if codes is None:
        assert record.codes is None
    else:
        assert record.codes.dtype == np.int32
        np.testing.assert_array_equal(record.codes, codes)


pictures = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=4), elements=st.integers(0, 2**17))


@given(st.lists(texts | pictures, min_size=1, max_size=5), st.booleans())
def test_documents_survive_their_bytes(contents, roles):
    def part(content, role) -> Part:
        return Part(role, content) if isinstance(content, str) else Part(role, codes=content)

    document = [part(content, "assistant" if roles else None) for content in contents]
    if roles:
        document.insert(0, Part("user", "question"))
    again = Record.from_bytes(Record("name", "", document=tuple(document)).to_bytes()).document
    assert [(one.role, one.text, one.codes is None) for one in again] == [
        (one.role, one.text, one.codes is None) for one in document
    ]
    for one, other in zip(again, document, strict=True):
        if other.codes is not None:
            assert one.codes.dtype == np.int32
            np.testing.assert_array_equal(one.codes, other.codes)


def test_damaged_documents():
    whole = Record("n", "", document=(Part(None, codes=np.zeros((2, 2), np.int32)),)).to_bytes()
    for data in (whole[:-1], whole + b"0", whole.replace(b"[2, 2]", b"[2, 2, 1]"), whole.replace(b"null", b'"user"')):
        with pytest.raises(Emu3Error, match=r"the record is damaged|from user to user"):
            Record.from_bytes(data)


def test_a_code_takes_two_bytes_where_it_fits():
    short, long = (len(Record("n", "t", np.full((9, 9), top, np.int32)).to_bytes()) for top in (65535, 65536))
    assert long - short == 2 * 81


@pytest.mark.parametrize("cut", [b"", b"{}\n", b"[]\n", b"\xff", b'{"name": "a", "text": "b", "codes": 1}\n'])
def test_damaged_records(cut):
    with pytest.raises(Emu3Error, match="the record is damaged"):
        Record.from_bytes(cut)
    whole = Record("a", "b", np.zeros((2, 2), np.int32)).to_bytes()
    with pytest.raises(Emu3Error, match="the record is damaged"):
        Record.from_bytes(whole[:-1])


def test_entries(manifest, tmp_path):
    lines = manifest(
        {"image": "a.png", "text": "A"}, "", {"clip": "sub/c.gif", "text": "", "name": "clip"}, "   ",
        {"text": "plain"}, {"image": "/abs.png", "conversation": TALK},
    )  # fmt: skip
    first, second, third, fourth = (lines[index] for index in range(len(lines)))
    assert (first.name, first.image, first.clip, first.text) == ("a.png", tmp_path / "a.png", None, "A")
    assert (second.name, second.image, second.clip) == ("clip", None, tmp_path / "sub/c.gif")
    assert (third.name, third.image, third.clip, third.text) == ("line 5", None, None, "plain")
    assert (fourth.image, fourth.text) == (pathlib.Path("/abs.png"), "")
    assert fourth.conversation == (Turn("user", "Was?"), Turn("assistant", "Ein Hund."))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'image': 'a.png'}", "not readable as JSON"),
        ("\udcff", "not readable as JSON"),
        ("[1]", "is not an object"),
        ({"image": "a.png", "caption": "A"}, "unknown field 'caption'"),
        ({"image": "a.png", "clip": "b.gif", "text": "A"}, "both image and clip"),
        ({"image": "a.png"}, "neither text nor conversation"),
        ({"text": ""}, "its text is empty"),
        ({"image": 3, "text": "A"}, "image is 3: it must be text"),
        ({"image": "a.png", "text": None}, "neither text nor conversation"),
        ({"text": "\udcff"}, "surrogate"),
        ({"text": "A", "name": 1}, "name is 1"),
        ({"text": None}, "neither text nor conversation"),
        ({"image": "", "text": "A"}, "image is '', an empty path: name a file, or leave image out"),
        ({"clip": "", "text": "A"}, "clip is '', an empty path"),
        ({"clip": "  ", "text": "A"}, "an empty path"),
        ({"image": "gs://b/x.png", "text": "A"}, "gs:// addresses are not supported"),
        ({"image": "x" * 256, "text": "A"}, "is too long: a name has at most 255 bytes"),
        ({"image": "a\0b", "text": "A"}, "null character"),
        ({"image": "\ud800.png", "text": "A"}, "surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "not readable as JSON"),
        ({"conversation": "hello"}, "conversation is 'hello'"),
        ({"conversation": []}, "has 0 turns"),
        ({"conversation": TALK[:1]}, "has 1 turns: it must end with an answer"),
        ({"conversation": TALK[::-1]}, "turn 0 has role 'assistant': it must be 'user'"),
        ({"conversation": [{"role": "user"}]}, "turn 0 is"),
        ({"conversation": [{"role": "user", "text": 1}]}, "conversation turn 0 is 1"),
        ({"document": []}, "document is []: it must be a list of"),
        ({"document": STORY, "text": "A"}, "has both document and text"),
        ({"document": [{"text": "A", "image": "a.png"}]}, "document part 0 is"),
        ({"document": [{"text": "A", "colour": 1}]}, "document part 0 is"),
        ({"document": ["A"]}, "document part 0 is 'A'"),
        ({"document": [{"text": ""}]}, "document part 0 is an empty text"),
        ({"document": [{"text": "A"}, {"image": " "}]}, "document part 1 is ' ', an empty path"),
        ({"document": STORY[:1]}, "the document goes from user to user"),
        ({"document": STORY[1:]}, "the document goes from assistant to assistant"),
        ({"document": [*STORY, {"text": "B"}]}, "document part 3 has role None"),
        ({"document": [{"text": "A"}] * 10_001}, "the document has 10,001 parts"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    file = tmp_path / "m.jsonl"
    data = line.encode("utf-8", "surrogateescape") if isinstance(line, str) else json.dumps(line).encode()
    file.write_bytes(b'{"text": "good"}\n\n' + data + b"\n")
    lines = Manifest(file)
    assert lines[0].text == "good"
    with pytest.raises(Emu3Error) as error:
        lines[1]
    assert re.match(rf"{file} line 3(: | is damaged: )", str(error.value)) and reason in str(error.value)


def test_null_is_as_good_as_absent(manifest, tmp_path):
    lines = manifest(
        {"image": None, "clip": None, "text": "A", "conversation": None, "name": None},
        {"image": "a.png", "clip": None, "conversation": TALK, "text": None},
    )
    assert lines[0].image is None and lines[0].clip is None and lines[0].name == "line 1"
    assert lines[1].image == tmp_path / "a.png" and lines[1].text == "" and lines[1].name == "a.png"


def test_a_line_is_bounded(tmp_path):
    file = tmp_path / "m.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"text": "good"}\n')
        stream.truncate(1 << 40)  # takes no space
    with pytest.raises(Emu3Error, match=r"line 2: 16777217 bytes or more; the limit is 16,777,216"):
        Manifest(file)
    with pytest.raises(Emu3Error, match="it is a pipe or device; give a file"):
        Manifest("/dev/zero")


def test_lines_take_two_words_each(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_bytes(b"1\n" * 1000)
    assert Manifest(file)._places.nbytes == 16 * 1000


def test_manifests_that_are_none(tmp_path):
    with pytest.raises(Emu3Error, match="cannot read"):
        Manifest(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(Emu3Error, match="has no lines"):
        Manifest(tmp_path / "empty.jsonl")


def test_documents_of_a_manifest(manifest, tmp_path, golden_model):
    Image.open(GOLDEN / "palette.png").convert("RGB").save(tmp_path / "a.png")
    lines = manifest(
        {"document": STORY, "name": "dog"}, {"document": [{"image": "a.png", "role": None}, {"text": "B"}]}
    )
    assert [(part.role, part.text, part.image) for part in lines[0].document] == [
        ("user", "a story", None), ("assistant", "A dog.", None), ("assistant", "", tmp_path / "a.png"),
    ]  # fmt: skip
    records = SourceRecords(ManifestSource(lines), golden_model, area=None)
    first, second = records[0], records[1]
    assert (first.name, second.name) == ("dog", "line 2")
    assert [part.role for part in second.document] == [None, None]
    (codes,) = golden_model.tokenize([tmp_path / "a.png"])
    for part in (first.document[2], second.document[0]):
        np.testing.assert_array_equal(part.codes, codes)
    assert len({records.identity(0), records.identity(1)}) == 2
    missing = SourceRecords(ManifestSource(manifest({"document": [{"image": "b.png"}]})), golden_model, area=None)
    with pytest.raises(Emu3Error, match=r"m.jsonl line 1: .*b.png does not exist"):
        missing.check(0)


@pytest.mark.parametrize("size", [(150, 100), (61, 187), (7, 9)])
def test_sizes_are_those_of_the_reference(size):
    """`prepare_data.py`: both sides by the square root of the areas' ratio, rounded, and Pillow's default filter."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    ratio = (4096 / (size[0] * size[1])) ** 0.5
    expected = image.resize((round(size[0] * ratio), round(size[1] * ratio)))
    np.testing.assert_array_equal(np.asarray(resize_to_area(image, 4096)), np.asarray(expected))
    clip = resize_to_area(Clip(np.stack([np.asarray(image)] * 2), 12.0), 4096)
    np.testing.assert_array_equal(clip.frames, np.stack([np.asarray(expected)] * 2))
    assert clip.fps == 12.0


def test_records_hold_the_codes_of_the_reference(manifest, golden_model):
    golden = golden_npz("images.npz")
    names = ["photo", "tall", "palette"]
    lines = manifest(*({"image": str(GOLDEN / f"{name}.png"), "text": name} for name in names), {"text": "plain"})
    records = SourceRecords(ManifestSource(lines), golden_model, area=None)
    for index, name in enumerate(names):
        np.testing.assert_array_equal(records[index].codes, golden[f"{name}/codes"][0])
    assert records[3].codes is None and records[3].text == "plain"
    other = SourceRecords(ManifestSource(lines), golden_model, area=4096)
    assert other[0].codes.shape == (7, 10)  # 78x52 pixels, and the processor's multiples of 8
    assert other.digest != records.digest


def test_a_picture_of_several_lines_is_encoded_once(manifest, golden_model):
    photo, gray = (str(GOLDEN / f"{name}.png") for name in ("photo", "gray"))
    lines = [{"image": photo, "text": str(n)} for n in range(3)] + [{"image": gray, "text": "g"}]
    lines += [{"image": "absent.png", "text": "a"}, {"image": photo, "text": "again"}]
    encoded = []

    class Counted(SourceRecords):
        def _encode(self, medium):
            encoded.append(medium.path.name)
            return super()._encode(medium)

    records = Counted(ManifestSource(manifest(*lines)), golden_model, area=None)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(records.__getitem__, (0, 1, 2, 3, 5)))
    assert sorted(encoded) == ["gray.png", "photo.png"]
    np.testing.assert_array_equal(found[0].codes, found[4].codes)
    with pytest.raises(Emu3Error, match=r"absent\.png does not exist"):
        records[4]


def test_clips_become_frames_of_codes(manifest, golden_model, tmp_path):
    frames = [Image.new("RGB", (64, 64), (40 * i, 0, 90)) for i in range(6)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=100)
    records = SourceRecords(ManifestSource(manifest({"clip": "c.gif", "text": "red"})), golden_model, area=4096)
    assert records[0].codes.shape == (2, 8, 8)


def test_pictures_that_cannot_be_used(manifest, golden_model, tmp_path):
    (tmp_path / "broken.png").write_bytes((GOLDEN / "photo.png").read_bytes()[:500])
    Image.new("RGB", (400, 20)).save(tmp_path / "long.png")
    tokenizer = golden_model.language.tokenizer
    lines = manifest(
        {"image": "missing.png", "text": "A"}, {"image": "broken.png", "text": "B"}, {"image": "long.png", "text": "C"},
        {"text": "<|image start|>"},
    )  # fmt: skip
    records = SourceRecords(ManifestSource(lines), golden_model, None, tokenizer)
    for index, reason in enumerate(["does not exist", "cannot read", "too elongated", "special token"]):
        with pytest.raises(Emu3Error, match=reason) as error:
            records[index]
        assert f"m.jsonl line {index + 1}: " in str(error.value)
    for index in (0, 3):  # these are known before any work
        with pytest.raises(Emu3Error):
            records.check(index)
    with pytest.raises(Emu3Error, match="area is 0"):
        SourceRecords(ManifestSource(lines), golden_model, 0)
