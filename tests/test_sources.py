"""Sources of captioned pictures: folders, lists and conversations, the share for validation."""

import csv
import json
import os
import random
import re

import numpy as np
import pytest
from captioned import ANY, Model, cell, picture, split, write, write_parquet, write_tar
from PIL import Image

from emu3_jax import Emu3Error
from emu3_jax.data.sources.conversations import Conversations
from emu3_jax.data.sources.folder import Folder
from emu3_jax.data.sources.opening import open_source
from emu3_jax.data.sources.packed import PackedNames
from emu3_jax.data.sources.records import SourceRecords
from emu3_jax.data.sources.tables import Columns
from emu3_jax.data.sources.tars import Tars
from emu3_jax.data.sources.validation import divide

# ---------------------------------------------------------------------------------------------------------- folders


def test_text_files_beside_pictures(tmp_path):
    write(tmp_path, {
        "a.png": picture(1), "a.txt": "one\n", "sub/b.JPG": picture(2, "JPEG"), "sub/b.txt": "\ufefftwo",
        "c.d.webp": picture(3, "WEBP"), "c.d.txt": " three ", "e.png": picture(4), "e.png.txt": "four",
        ".hidden.png": b"", ".git/x.png": b"", "notes.md": "no caption",
    })  # fmt: skip
    source = Folder(tmp_path, ANY)
    good, bad = split(source)
    assert good == {"a.png": "one", "c.d.webp": "three", "e.png": "four", "sub/b.JPG": "two"} and not bad
    assert [source[index].medium.load().size for index in range(4)] == [(8, 8)] * 4


@pytest.mark.parametrize("columns", [("file_name", "text"), ("image", "caption"), ("filename", "prompt")])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.csv", "captions.jsonl"])
def test_files_that_list_pictures(tmp_path, name, columns):
    write(tmp_path, {"a.png": picture(1), "sub/b.png": picture(2)})
    rows = [("a.png", 'a "red", round\nthing'), ("./sub/b.png", "b")]
    with (tmp_path / name).open("w", newline="") as stream:
        if name.endswith(".csv"):
            writer = csv.writer(stream)
            writer.writerows([("id", *columns), *((n, *row) for n, row in enumerate(rows))])
        else:
            stream.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n\n" for row in rows)
    expected = {"a.png": rows[0][1], "sub/b.png": "b"}
    assert split(Folder(tmp_path, ANY)) == (expected, [])
    if name != "captions.jsonl" or columns[0] == "file_name":
        assert split(open_source([str(tmp_path / name)], ANY)) == (expected, [])


def test_lists_in_folders_inside_name_what_lies_there(tmp_path):
    write(tmp_path, {
        "x/a.png": picture(1), "y/a.png": picture(2), "x/metadata.csv": "file_name,text\na.png,in x\n",
        "y/metadata.csv": "\ufefffile_name;text\r\na.png;in y, as spreadsheets write it\r\n",
    })  # fmt: skip
    assert split(Folder(tmp_path, ANY))[0] == {"x/a.png": "in x", "y/a.png": "in y, as spreadsheets write it"}


def test_columns_that_the_user_names(tmp_path):
    write(tmp_path, {"a.png": picture(), "metadata.csv": "where,text,what\na.png,no,yes\n"})
    with pytest.raises(
        Emu3Error, match=r"no column with the pictures' file names: its columns are \['where', 'text', 'what'\]"
    ):
        Folder(tmp_path, ANY)
    assert split(Folder(tmp_path, Columns("where", "what")))[0] == {"a.png": "yes"}


def test_what_a_folder_has_beside_is_told(tmp_path):
    write(tmp_path, {
        "good.png": picture(1), "good.txt": "good", "alone.png": picture(2), "empty.png": picture(3), "empty.txt": " ",
        "orphan.txt": "of no picture", "latin.png": picture(4), "latin.txt": b"caf\xe9",
        "sub/told.png": picture(7), "two.png": picture(5), "two.txt": "one",
        "same.png": picture(6), "same.txt": "the same",
        "metadata.jsonl": "\n".join([
            '{"file_name": "two.png", "text": "another"}', '{"file_name": "same.png", "text": "the same"}',
            '{"file_name": "gone.png", "text": "gone"}', '{"file_name": "../good.png", "text": "out"}', "{broken",
            r'{"file_name": ".\\sub\\told.png ", "text": " "}', '{"file_name": 3, "text": "number"}',
        ]),
    })  # fmt: skip
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {"good.png": "good", "same.png": "the same"}
    for reason in (
        "alone.png has no caption: write a caption to a .txt file", "empty.txt: the caption is empty",
        "orphan.txt: there is no picture with this name", "latin.txt is not UTF-8 text",
        "two.png has two captions, metadata.jsonl line 1 and two.txt", "gone.png does not exist: correct the name",
        "'../good.png' is not a path below this file's folder: write it relative",
        "metadata.jsonl line 5: not readable as JSON", "metadata.jsonl line 6: the caption is empty",
        "metadata.jsonl line 7: the name 3 is not text",
    ):  # fmt: skip
        assert [reason in line for line in bad].count(True) == 1, (reason, bad)
    assert len(bad) == 10


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("caption".encode("utf-16"), "is not UTF-8 text: save it in UTF-8"),
        ("caption".encode("utf-16-le"), "the caption contains null characters: save it as text in UTF-8"),
        (b"caf\xe9", "is not UTF-8 text"),
        (b" \r\n", "the caption is empty: write one"),
        (b"x" * ((1 << 20) + 1), "1048577 bytes; the limit is 1,048,576"),
    ],
)
def test_captions_that_are_no_text(tmp_path, content, reason):
    write(tmp_path, {"a.png": picture(), "a.txt": content, "b.png": picture(), "b.txt": "b"})
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {"b.png": "b"} and len(bad) == 1 and f"{tmp_path / 'a.txt'}" in bad[0] and reason in bad[0]


def test_links_and_pipes_in_a_folder(tmp_path):
    """Links to files are followed, also out of the folder; links to folders are not. Nothing waits for a pipe."""
    write(tmp_path, {"in/a.png": picture(1), "in/a.txt": "a", "out/b.png": picture(2), "out/b.txt": "b"})
    folder = tmp_path / "in"
    for name, target in {
        "link.png": "../out/b.png", "link.txt": "../out/b.txt", "gone.png": "nothing.png", "folder": "../out",
        "loop": ".", "a.png.txt": "nothing.txt",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    for name in ("pipe.png", "waits.txt"):
        os.mkfifo(folder / name)
    write(folder, {"gone.txt": "gone", "pipe.txt": "pipe", "waits.png": picture(3)})
    records = SourceRecords(Folder(folder, ANY), Model(), None)
    said = {}
    for index in range(len(records)):
        try:
            record = records[index]
            said[record.name] = record.text
        except Emu3Error as error:
            said[re.findall(r"(\w+\.\w+)", str(error))[0]] = str(error).split(": ", 1)[1]
    assert said == {
        "a.png": "a", "link.png": "b", "gone.png": "correct the path, or add the file",
        "pipe.png": "it is a pipe or device; give a file", "waits.txt": "it is a pipe or device; give a file",
    }  # fmt: skip


def test_a_caption_with_an_unquoted_comma_is_not_cut(tmp_path):
    write(tmp_path, {"a.png": picture(), "b.png": picture(), "captions.csv": "file,text\na.png,red, round\nb.png,b\n"})
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {"b.png": "b"} and len(bad) == 1
    assert "captions.csv line 2: has 3 fields, but the header has 2: put captions in double quotes" in bad[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Captions.CSV", "file_name,text\na.png,a\n"),
        ("list.tsv", "file_name\ttext\na.png\ta, b\n"),
        ("list.csv", "\n \n\ufeffpath;description\n\na.png;a, b\n"),
        ("list.jsonl", '{"filename": "a.png", "caption": "a"}'),
        ("Metadata.JSONL", '{"image": "a.png", "caption": "a"}'),
    ],
)
def test_spellings_of_lists(tmp_path, name, text):
    write(tmp_path, {"a.png": picture(), name: text})
    expected = {"a.png": "a, b" if name.startswith("list.") and "a, b" in text else "a"}
    assert split(open_source([str(tmp_path / name)], ANY)) == (expected, [])
    if not name.startswith("list"):
        assert split(Folder(tmp_path, ANY)) == (expected, [])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no pictures: give a folder of PNG, JPEG, WebP or other pictures, or of tar or Parquet files"),
        ({"a.txt": "text", "b.md": "text"}, "holds no pictures"),
        ({"a.png": b"x"}, "no picture has a usable caption; the first problem: .*a.png has no caption"),
        ({"a.png": b"x", "metadata.csv": b"file_name,text\na.png,caf\xe9\n"}, r"metadata.csv line 2 is not UTF-8"),
        ({"a.png": b"x", "metadata.csv": 'file_name,text\na.png,"open\n'}, r"metadata.csv line .*not readable as CSV"),
        ({"a.png": b"x", "metadata.csv": ""}, "no column with the pictures' file names"),
        ({"a.png": b"x", "metadata.jsonl": '{"name": 1}'}, "line 1 has no column with the pictures' file names"),
        ({"a.tar": b"", "b.png": b""}, r"holds 'a.tar' and 'b.png': give the .tar files by name"),
    ],
)
def test_folders_without_captioned_pictures(tmp_path, files, reason):
    write(tmp_path, files)
    with pytest.raises(Emu3Error, match=reason):
        open_source([str(tmp_path)], ANY)


def test_a_folder_of_damaged_names(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(7))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("latin")
    write(tmp_path, {"u\u0308.png": picture(8), "\u00fc.txt": "one accent, two spellings"})
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {r"caf\udce9.png": "latin", "u\u0308.png": "one accent, two spellings"} and not bad
    records = SourceRecords(Folder(tmp_path, ANY), Model(), None)
    assert [records[index].to_bytes() for index in range(2)]


def test_an_output_inside_the_folder_is_not_looked_at(tmp_path):
    write(tmp_path, {"a.png": picture(), "a.txt": "a", "data/skipped.txt": "b"})
    assert split(Folder(tmp_path, ANY, leave_out=tmp_path / "data")) == ({"a.png": "a"}, [])
    assert len(Folder(tmp_path, ANY)) == 2
    with pytest.raises(Emu3Error, match="is the source itself: choose another directory for the data"):
        open_source([str(tmp_path)], ANY, output=tmp_path / "data" / "..")


def test_the_digest_of_a_folder_is_that_of_its_content(tmp_path):
    files = {"a.png": picture(1), "a.txt": "a", "b.png": picture(2), "b.txt": "b"}
    first = Folder(write(tmp_path / "first", files), ANY).digest
    moved = write(tmp_path / "second", dict(reversed(files.items())))
    assert Folder(moved, ANY).digest == first
    for change in ({"a.txt": "c"}, {"b.png": picture(3, side=30)}, {"c.png": picture(), "c.txt": "c"}, {"d.png": b""}):
        assert Folder(write(moved, change), ANY).digest not in (first, Folder(tmp_path / "first", ANY).digest)
        write(moved, files)
        first_again = moved / next(iter(change))
        if first_again.name not in files:
            for name in change:
                (moved / name).unlink()
    assert Folder(moved, ANY).digest == first


# ------------------------------------------------------------------------------------------------- conversations


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_conversations(tmp_path):
    write(tmp_path, {"images/coco/1.png": picture(1)})
    objects = [
        {
            "id": "000",
            "image": "coco/1.png",
            "conversations": turns('<image>\nWhat "is" {this}?', "A [dog].", "Sure?", "Yes"),
        },
        {"id": 7, "conversations": turns("Hello", "Hi")},
        {"id": "2", "image": ["coco/1.png"], "conversations": turns("Where\n<image>", "There \\")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(objects, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in objects))
    for name in ("a.json", "a.jsonl"):
        source = open_source([str(tmp_path / name)], ANY, images=tmp_path / "images")
        assert isinstance(source, Conversations) and len(source) == 3
        first, second, third = (source[index] for index in range(3))
        assert [turn.text for turn in first.conversation] == ['What "is" {this}?', "A [dog].", "Sure?", "Yes"]
        assert [turn.role for turn in first.conversation] == ["user", "assistant"] * 2
        assert first.name == "000" and first.medium.path == tmp_path / "images/coco/1.png"
        assert first.medium == third.medium and second.medium is None
        assert [turn.text for turn in third.conversation] == ["Where", "There \\"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"conversations": "hi"}, "conversations is 'hi': it must be a list of turns"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "is not from human or gpt"),
        (
            {"conversations": turns("<image>\nwhat", "this")},
            "a turn contains <image>, but the object has no image field",
        ),
        ({"image": ["a", "b"], "conversations": turns("a", "b")}, "has several pictures"),
        ({"image": ["a"], "video": "b", "conversations": turns("a", "b")}, "has several pictures"),
        ({"image": [3], "conversations": turns("a", "b")}, "the name 3 is not text"),
        ({"image": "a", "conversations": turns("<image> <image>", "b")}, "its turns contain 2 pictures"),
        ({"image": "../a.png", "conversations": turns("a", "b")}, "is not a legal path inside the directory"),
        ({"image": "/a.png", "conversations": turns("a", "b")}, "is not a legal path inside the directory"),
        ({"conversations": turns("a")}, "has 1 turns: it must end with an answer"),
        ({"conversations": turns("a", "b")[::-1]}, "it must be 'user'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "value is 3: it must be text"),
    ],
)
def test_objects_that_are_no_conversations(tmp_path, line, reason):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("a", "b")}, line]))
    source = Conversations(tmp_path / "a.json")
    assert source[0].conversation
    with pytest.raises(Emu3Error) as error:
        source[1]
    assert str(error.value).startswith(f"{tmp_path / 'a.json'} object 1: ") and reason in str(error.value)


def test_where_conversations_have_their_pictures(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("a", "b")}]))
    with pytest.raises(Emu3Error, match=r"gone is not a folder: give the folder that paths"):
        open_source([str(tmp_path / "a.json")], ANY, images=tmp_path / "gone")
    write(tmp_path, {"a.png": picture(), "a.txt": "a"})
    with pytest.raises(Emu3Error, match=r"--images works only with LLaVA's JSON"):
        open_source([str(tmp_path)], ANY, images=tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", '[{"a": 1}', '[{"a": 1}] x', '{"a": [{}]}', '"[{}]"', "[[1]", "]", "}["],
)
def test_lists_that_are_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Emu3Error, match=r"a\.json") as error:
        Conversations(tmp_path / "a.json")
    assert "in LLaVA's format" in str(error.value)


# ---------------------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("name", ["x.tar", "metadata.csv", "metadata.jsonl", "x.json", "x.parquet"])
def test_mutated_files_give_examples_or_one_line(tmp_path, name):
    write(tmp_path, {"a.png": picture(1)})
    file, talk = tmp_path / name, {"image": "a.png", "conversations": turns('<image>\n"q" {[', "a\\")}
    if name.endswith(".tar"):
        write_tar(file, {"a.png": picture(1), "a.txt": "a", "é" * 120 + ".jpg": picture(2), "é" * 120 + ".json": "{}"})
    elif name.endswith(".parquet"):
        write_parquet(file, [{"image": cell(n, "x"), "text": f"t{n}"} for n in range(30)], row_group_size=7)
    else:
        row = {"file_name": "a.png", "text": "x", "n": [1, {"a": 2}]}
        text = {"metadata.csv": 'file_name,text\na.png,"hello, ""you"" there"\r\n', "x.json": json.dumps([talk] * 3)}
        file.write_text(text.get(name, f"{json.dumps(row)}\n" * 2))
    good, mutate = file.read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(mutate.randint(1, 5)):
            place = mutate.randrange(len(data) + 1)
            cut, added = (
                mutate.choice([0, 1, 1, 5, 512]),
                mutate.choice([b"", b"\0", b"\xff", b'"', b"\\", b"7" * 11, good]),
            )
            data[place : place + cut] = added[:512]
        file.write_bytes(data)
        try:
            source = open_source([str(file)], ANY)
            for index in range(min(len(source), 50)):
                try:
                    example = source[index]
                    example.identity()
                    if example.medium is not None:
                        example.medium.load()
                except Emu3Error:
                    pass
        except Emu3Error as error:
            assert name in str(error) or "a.png" in str(error)


# ------------------------------------------------------------------------------------------------------------ records


def test_records_of_a_folder(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (8, 8), (9, 0, 0))
    turned.paste((5, 6, 0), (0, 4, 4, 8))  # bottom left, which orientation 6 shows at the top left
    turned.save(tmp_path / "turned.png", exif=exif)
    write(tmp_path, {"turned.txt": "turned", "broken.png": picture()[:50], "broken.txt": "broken"})
    records = SourceRecords(Folder(tmp_path, ANY), Model(), None)
    np.testing.assert_array_equal(records[1].codes, [[5, 6]])
    assert records[1].text == "turned"
    with pytest.raises(Emu3Error, match=r"^cannot read .*broken\.png"):
        records[0]
    records.check(0)  # before it is read, nothing is known
    write(tmp_path, {"\x1b \n.png": b"no picture", "\x1b \n.txt": "named to move the cursor"})
    with pytest.raises(Emu3Error) as error:
        SourceRecords(Folder(tmp_path, ANY), Model(), None)[0]
    assert (
        str(error.value)
        == rf"{tmp_path}/\x1b .png is not a picture in a known format: give a PNG, JPEG, WebP or the like"
    )


def test_several_sources_that_are_no_shards(tmp_path):
    write(tmp_path, {"a.csv": "x", "b.csv": "x", "c.tar": "", "d.tgz": "x"})
    with pytest.raises(Emu3Error, match="2 sources were given: several sources must all be tar files"):
        open_source([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], ANY)
    with pytest.raises(Emu3Error, match="2 sources were given"):
        open_source([str(tmp_path / "a.csv"), str(tmp_path / "c.tar")], ANY)
    with pytest.raises(Emu3Error, match="is compressed: unpack it"):
        open_source([str(tmp_path / "d.tgz")], ANY)
    with pytest.raises(Emu3Error, match="there is no such file"):
        open_source([str(tmp_path / "gone")], ANY)
    (tmp_path / "e.JPG").touch()
    with pytest.raises(Emu3Error, match=r"e\.JPG is a picture: give the folder that holds it"):
        open_source([str(tmp_path / "e.JPG")], ANY)


def test_packed_names():
    packed = PackedNames()
    names = ["a", "", "\udce9", "日本"]
    for name in names:
        packed.append(name)
    assert len(packed) == 4 and [packed[index] for index in range(4)] == names


# --------------------------------------------------------------------------------------------------------- validation


@pytest.fixture
def coloured(tmp_path):
    """A folder of 60 pictures, and a function that gives the names for validation of a source."""
    for number in range(60):
        write(tmp_path / "in", {f"{number}.png": picture(number), f"{number}.txt": f"colour {number}"})

    def held_out(source, share=0.3, **options) -> set[int]:
        train, validation = divide(SourceRecords(source, Model(), None), share, **options)
        sides = [{int(record[index].codes[0, 0]) for index in range(len(record))} for record in (train, validation)]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(60))
        return sides[1]

    return tmp_path / "in", held_out


def test_the_number_of_threads_is_checked(coloured):
    with pytest.raises(Emu3Error, match="workers is 0: it must be 1 to 1024"):
        divide(SourceRecords(Folder(coloured[0], ANY), Model(), None), 0.3, workers=0)


def test_a_picture_is_always_on_the_same_side(coloured, tmp_path):
    folder, held_out = coloured
    expected = held_out(Folder(folder, ANY))
    assert 5 < len(expected) < 35
    assert held_out(Folder(folder, ANY), workers=1) == expected
    names = list(range(60))
    random.Random(0).shuffle(names)
    renamed = {
        f"{place}{end}": (folder / f"{n}{end}").read_bytes()
        for place, n in enumerate(names)
        for end in (".png", ".txt")
    }
    assert held_out(Folder(write(tmp_path / "renamed", renamed), ANY)) == expected
    assert held_out(Tars([write_tar(tmp_path / "x.tar", renamed)], ANY)) == expected
    lines = [{"image": str(folder / f"{n}.png"), "text": f"{caption} of {n}"} for n in names for caption in "ab"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out(open_source([str(tmp_path / "m.jsonl")], ANY)) == expected  # both captions of a picture
    assert held_out(Folder(folder, ANY), share=0.1) < expected < held_out(Folder(folder, ANY), share=0.6)


@pytest.mark.parametrize(("share", "reason"), [
    (0, "must be a share between 0 and 1"), (1, "must be a share"), (float("nan"), "must be a share"),
    (1e-9, "none of 60 records would be for validation; choose a larger share"),
    (1 - 1e-9, "none of 60 records would be for training; choose a smaller share"),
])  # fmt: skip
def test_shares_that_are_none(coloured, share, reason):
    with pytest.raises(Emu3Error, match=reason):
        divide(SourceRecords(Folder(coloured[0], ANY), Model(), None), share)
