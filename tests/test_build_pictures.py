"""The larger data set: labels and licences, rasterising what nobody vetted, and what is nearly the same drawing."""

import hashlib
import importlib
import io
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
from emoji_packages import write_package
from PIL import Image, ImageDraw

from emu3_jax.data.manifest import Manifest
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.arrangements import Arrangement
from emu3_jax.evaluation.items import Data
from emu3_jax.evaluation.people_prompts import read_prompts
from emu3_jax.evaluation.relations import TwoShapes

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
HEAD = '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20mm" viewBox="0 0 20 20">'
LICENCE = (
    '<metadata><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/">'
    '<cc:Work><cc:license rdf:resource="{}"/></cc:Work></rdf:RDF></metadata>'
)
FREE = LICENCE.format("http://web.resource.org/cc/PublicDomain")


def svg(body: str, metadata: str = FREE) -> bytes:
    return f"{HEAD.format(width='20mm')}{metadata}{body}</svg>".encode()


@pytest.fixture
def script(monkeypatch):
    """Imports a script or one of its parts by name, as Python finds it when it runs."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("red car", "a red car"),
        ("~french fries", "french fries"),
        ("flag: Japan", "flag of Japan"),
        ("flag: Trinidad & Tobago", "flag of Trinidad and Tobago"),
        ("flag: Netherlands", "flag of the Netherlands"),
        ("orange", "an orange"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("bread", "bread"),
        ("slice of pizza", "a slice of pizza"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("man: red hair", "a man with red hair"),
        ("person lifting weights", "a person lifting weights"),
        ("women holding hands", "women holding hands"),
        ("Santa Claus", "Santa Claus"),
        ("Christmas tree", "a Christmas tree"),
        ("twelve o'clock", "a clock showing twelve o'clock"),
        ("sun", "the sun"),
    ],
)
def test_what_one_says(script, label, said):
    assert script("picture_data.words").phrase(label) == said


def test_things(script):
    words = script("picture_data.words")
    names = {
        "~two gray cats": "cat",
        "cat's head": "cat face",
        "red cup of coffee": "coffee",
        "slice of pizza": "pizza",
        "old wooden chair": "chair",
        "rabbit in a magic hat": "rabbit",
        "~strawberries": "strawberry",
        "flag of Japan": "flag of Japan",
    }
    assert {label: words.thing(label) for label in names} == names
    assert words.coloured("car", "orange") == "an orange car"
    assert words.coloured("~grapes", "red") == "red grapes"
    assert words.named_colour("old red car") == "red" and words.named_colour("car") is None


def test_shipped_labels(script):
    """Each drawing has one label; no name could lead out of a directory."""
    drawings = script("picture_data.drawings")
    words = script("picture_data.words")
    clipart = list(drawings._rows("openclipart"))
    assert len({path for path, _ in clipart}) == len(clipart) > 1_800
    assert all(re.fullmatch(r"[\w.()+@,'/#-]+", path) and "/.." not in path for path, _ in clipart)
    icons = [(name, icon, label) for name, icon, label in drawings._rows("icons")]
    assert {name for name, _, _ in icons} | {"fxemoji", "circle-flags"} == drawings.STYLES.keys()
    labels = [label for *_, label in [*clipart, *icons]]
    assert all(re.fullmatch(r"~?[\w][\w '.()&,-]*", label) and len(label) < 60 for label in labels)
    assert all(words.thing(label) for label in labels)
    assert words.other_names()["automobile"] == ["car"]
    assert all(words.phrase(name) for names in words.other_names().values() for name in names)
    prompts = (SCRIPTS / "picture_data" / "people_prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == len(prompts) == 100
    firefox = dict(drawings._rows("fxemoji"))
    assert len(set(firefox.values())) == len(firefox) and all(re.fullmatch("[0-9a-f-]+", c) for c in firefox.values())


def test_the_main_colour(script):
    main_colour = script("picture_data.colours").main_colour
    for name, rgb in {
        "red": (220, 40, 40),
        "brown": (130, 80, 45),
        "gray": (130, 130, 130),
        "blue": (50, 90, 220),
    }.items():
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, 50, 50), fill=rgb)
        assert main_colour(np.asarray(picture)) == name
    ImageDraw.Draw(picture).rectangle((8, 8, 50, 25), fill=(60, 170, 75))
    assert main_colour(np.asarray(picture)) is None
    assert main_colour(np.full((64, 64, 3), 255, np.uint8)) is None


# ---------------------------------------------------------------------------------------------------------- likeness


def face(mouth: int, left: int = 6, side: int = 64) -> np.ndarray:
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((left, 6, left + 50, 56), fill=(250, 210, 60))
    draw.rectangle((left + 12, 36, left + 38, 36 + mouth), fill=(90, 40, 20))
    draw.ellipse((left + 10, 18, left + 18, 26), fill=(90, 40, 20))
    return np.asarray(picture)


def test_the_same_drawing(script):
    likeness = script("picture_data.likeness")
    shown = likeness.features(np.stack([face(4), face(4, 7), face(4)[:, ::-1], face(16), 255 - face(4)]))
    assert likeness.difference(shown[0], shown[0]) == likeness.difference(shown[0], shown[2]) == 0
    assert likeness.difference(shown[0], shown[1]) < likeness.SAME < likeness.difference(shown[0], shown[3])
    assert likeness.difference(shown[0], shown[3]) < likeness.SAME_OF_ONE_THING
    different = ["a", "b", "c", "d", "e"]
    assert likeness.pairs(shown, different, 5) == [(0, 1), (0, 2), (1, 2)]
    assert likeness.pairs(shown, ["a", "b", "c", "a", "e"], 1) == [(0, 1), (0, 2), (0, 3)]
    assert likeness.groups(6, [(1, 4), (4, 2), (0, 5)]) == [0, 1, 1, 3, 1, 0]


# ------------------------------------------------------------------------------------------------- packages of Debian


def write_deb(cache: pathlib.Path, files: dict[str, bytes], debian, *, name: str = "clip-art"):
    """Writes a package as Debian's tools would, and returns what describes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/openclipart/svg/animals/link.svg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": stream.getvalue()}
    made = debian.DebianPackage(name, "1:2.0-3", "")
    with (cache / made.filename).open("wb") as file:
        file.write(b"!<arch>\n")
        for member, data in members.items():
            file.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    digest = hashlib.sha256((cache / made.filename).read_bytes()).hexdigest()
    return debian.DebianPackage(name, "1:2.0-3", digest)


def test_a_debian_package(script, tmp_path):
    debian = script("picture_data.debian")
    files = {"./a.svg": b"one", "../../b.svg": b"two", "./c.txt": b"", "./large.svg": b"x" * 100}
    package = write_deb(tmp_path, files, debian)
    assert package.filename == "clip-art_1%3a2.0-3_all.deb"
    path = debian.fetch(package, tmp_path)
    assert list(debian.read_members(path, ".svg", 50)) == [("./a.svg", b"one"), ("../../b.svg", b"two")]
    assert [found.name for found in tmp_path.iterdir()] == [package.filename]  # nothing was unpacked
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Emu3Error, match="checksum"):
        debian.fetch(package, tmp_path)
    for content, message in ((b"none", "no ar archive"), (b"!<arch>\n", "no member data.tar")):
        path.write_bytes(content)
        with pytest.raises(Emu3Error, match=message):
            list(debian.read_members(path, ".svg", 50))


@pytest.mark.parametrize(
    ("apt", "message"),
    [(None, "apt-get is not installed"), ("echo E: no version >&2; exit 100", r"clip=1 failed \(E: no version\)")],
)
def test_apt_trouble(script, tmp_path, monkeypatch, apt, message):
    debian = script("picture_data.debian")
    programs = tmp_path / "programs"
    programs.mkdir()
    if apt:
        (programs / "apt-get").write_text(f"#!/bin/sh\n{apt}\n")
        (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(Emu3Error, match=message) as raised:
        debian.fetch(debian.DebianPackage("clip", "1", ""), tmp_path / "cache")
    assert "put the file clip_1_all.deb" in str(raised.value)


# ------------------------------------------------------------------------------------------------------- rasterising


def test_drawings_that_nobody_vetted(script):
    pytest.importorskip("resvg_py", reason="the extra emoji installs it")
    rasterise = script("picture_data.rasterise")
    blur = '<filter id="f"><feGaussianBlur stdDeviation="8"/></filter>'
    slow = svg(blur + '<rect filter="url(#f)" width="19" height="19"/>' * 4000)
    entities = "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
    bomb = f'<!DOCTYPE svg [<!ENTITY a "<g/>">{entities}]>'.encode() + svg("&j;")
    with rasterise.Rasteriser(seconds=2.0) as rasteriser:
        picture = rasteriser.draw(svg('<rect width="20" height="10" fill="red"/>'))
        assert picture.size == (256, 256) and picture.getpixel((9, 9)) == (255, 0, 0, 255)
        assert rasteriser.draw(svg('<image href="/etc/hostname"/>')) == "contains the element image"
        assert rasteriser.draw(svg("<script>1</script>")) == "contains the element script"
        assert rasteriser.draw(b"x" * (rasterise.LARGEST + 1)) == "larger than the limit"
        assert rasteriser.draw(b"\xff") == "not UTF-8"
        assert rasteriser.draw(b"<svg").startswith("broken drawing")
        assert rasteriser.draw(bomb).startswith("broken drawing")
        assert rasteriser.draw(slow) == "takes more than 2 s"
        assert rasteriser.draw(svg('<rect width="20" height="10"/>')).size == (256, 256)  # by a new process


def test_kinds_of_drawings(script):
    kind_of = script("picture_data.drawings").kind_of
    kinds = {}
    for name, fill, outline in (
        ("clipart", "red", None),
        ("silhouette", "black", None),
        ("line drawing", "white", "black"),
    ):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).ellipse((20, 20, 230, 230), fill=fill, outline=outline, width=5)
        kinds[name] = kind_of(picture)
    assert all(name == kind for name, kind in kinds.items())


# ------------------------------------------------------------------------------------------------------ the whole set

ICON = '<path fill="{}" d="M2 2h{}v{}H2z"/>'
ROUND = '<circle cx="16" cy="16" r="14" fill="#2a2"/><path d="M6 6h9v4H6z"/>'
BIRD = '<circle cx="9" cy="9" r="7" fill="#28c"/><path d="M3 3h9v4H3z"/>'
MOUSE = '<path d="M1 10L10 1L19 10L10 19z" fill="#a62"/><path d="M8 8h4v4H8z" fill="#fff"/>'


@pytest.fixture
def small(script, tmp_path, monkeypatch):
    """Small packages, tables and emoji, and the function that builds from them."""
    pytest.importorskip("resvg_py", reason="the extra emoji installs it")
    build_pictures, debian, drawings = map(script, ("build_pictures", "picture_data.debian", "picture_data.drawings"))
    build_emoji = build_pictures.build_emoji
    cache, tables = tmp_path / "cache", tmp_path / "tables"
    cache.mkdir()
    tables.mkdir()
    names = {"1f431": "cat face", "1f436": "dog face", "1f697": "automobile", "1f1ef-1f1f5": "flag: Japan"}
    messages = {"groups": [{"key": "a", "message": "animals & nature", "order": 0}]}
    messages["groups"].append({"key": "f", "message": "flags", "order": 1})
    messages["subgroups"] = [{"key": "s", "message": "some", "order": 0}]
    data = [
        {"label": label, "hexcode": code.upper(), "group": int("flag" in label), "subgroup": 0}
        for code, label in names.items()
    ]
    files = {"en/data.json": json.dumps(data).encode(), "en/messages.json": json.dumps(messages).encode()}
    labels = write_package(build_emoji, cache, "labels", files)

    def icons(name: str, drawn: dict[str, str]):
        collection = {"width": 32, "height": 32, "icons": {key: {"body": body} for key, body in drawn.items()}}
        return write_package(build_emoji, cache, name, {"icons.json": json.dumps(collection).encode()})

    colours = ("#c22", "#2a2", "#22c", "#a2a")
    sets = {
        "fxemoji": icons("fx", {"cat": ROUND, "dog": ICON.format("#c22", 20, 8), "odd": ROUND}),
        "circle-flags": icons("flags", {"jp": ICON.format("#c22", 9, 25), "en": ROUND, "lang-ja": ROUND}),
        "flat-color-icons": icons("flat", {f"car{n}": ICON.format(c, 24, 3 + 6 * n) for n, c in enumerate(colours)}),
    }
    folder = "./usr/share/openclipart/svg/"
    clipart = {
        "animals/bird": svg(BIRD),
        "animals/birdie": svg(BIRD),
        "animals/mouse": svg(MOUSE),
        "animals/fox": svg(MOUSE, LICENCE.format("http://creativecommons.org/licenses/by-nc/2.0/")),
        "animals/owl": svg(MOUSE, ""),
        "animals/hare": svg("<image/>"),
        "unknown/thing": svg(MOUSE),
    }
    package = write_deb(cache, {f"{folder}{path}.svg": data for path, data in clipart.items()}, debian)
    rows = {
        "fxemoji": ["cat\t1f431", "dog\t1f436", "odd\t2603"],
        "icons": [f"flat-color-icons\tcar{n}\tcar" for n in range(4)],
        "openclipart": [f"{path}\tblue {path.split('/')[1]}" for path in clipart if path != "unknown/thing"],
    }
    rows["openclipart"] += ["animals/link\tlink", "animals/gone\tghost"]
    for name, found in rows.items():
        (tables / f"{name}.tsv").write_text("".join(f"{row}\n" for row in found))
    monkeypatch.setattr(drawings, "TABLES", tables)
    for module in ("stories", "arrangements"):
        monkeypatch.setattr(script(module), "HELD_OUT", 3)

    def emoji(directory: pathlib.Path, cache, *, size: int, sources, **_):
        """Three pictures in place of all emoji. The held-out one is the same drawing as the firefox cat."""
        (directory / "pictures").mkdir(parents=True)
        same = np.asarray(Image.open(io.BytesIO(_png(ROUND, size))).convert("RGB"))
        lines = []
        for code, pixels, split in (
            ("1f431", same, "style"),
            ("1f436", face(3), "train"),
            ("1f697", face(20), "train"),
        ):
            file = f"pictures/{code}.webp"
            Image.fromarray(pixels).save(directory / file, lossless=True)
            lines.append(
                {"name": f"pictures/{code}", "file": file, "kind": "picture", "style": "3d", "concept": code}
                | {"label": names[code], "group": "animals & nature", "split": split}
            )
        (directory / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"items": {}, "manifests": {}}

    monkeypatch.setattr(build_emoji, "build", emoji)
    sources = build_pictures.Sources(build_emoji.Sources(labels=labels), sets, package)
    amounts = build_pictures.Amounts(3, 3, 3, 3)

    def run(name: str, **options):
        return build_pictures.build(tmp_path / name, cache, sources=sources, amounts=amounts, **options)

    return run


def _png(body: str, size: int) -> bytes:
    import resvg_py

    white = '<rect width="32" height="32" fill="white"/>'
    whole = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{white}{body}</svg>'
    return bytes(resvg_py.svg_to_bytes(svg_string=whole, width=size))


def test_the_whole_set(small, tmp_path):
    summary = small("data")
    data = tmp_path / "data"
    items = [json.loads(line) for line in (data / "items.jsonl").read_text().splitlines()]
    found = {item.get("drawing", item["name"]): item for item in items}
    assert summary["unused"] == {
        "contains the element image": ["clipart/animals/hare"],
        "no drawing or label of this name": ["firefox/odd", "round/en"],
        "not in the package, a link, or larger than the limit": ["clipart/animals/gone", "clipart/animals/link"],
        "not marked as public domain": ["clipart/animals/fox", "clipart/animals/owl"],
    }
    assert found["firefox/cat"]["split"] == "style"  # as the same drawing among the emoji
    assert found["clipart/animals/bird"]["split"] == found["clipart/animals/birdie"]["split"]
    assert found["round/jp"]["phrase"] == "flag of Japan" and found["round/jp"]["group"] == "flags"
    assert found["flat icon/car0"]["concept"] == "1f697" and found["flat icon/car0"]["colour"] == "red"
    assert found["clipart/animals/mouse"]["caption"] == "clipart of a blue mouse"
    assert found["clipart/animals/mouse"]["file"] == "pictures/clipart/blue-mouse-1.webp"
    for item in items:
        files = [item["file"], *item["views"], *item["closeups"]]
        assert len(files) == (7 if item["source"] != "emoji" and item["split"] == "train" else 1)
        for file in files:
            with Image.open(data / file) as picture:
                assert (picture.size, picture.mode) == ((64, 64), "RGB")
    data_set = {item.name: item for item in Data(data).items}
    assert data_set["pictures/clipart/blue-mouse-1"].caption == "clipart of a blue mouse"
    assert data_set["emoji/pictures/1f436"].caption == "3d emoji of dog face"
    splits = {item["name"]: item["split"] for item in items}
    for name, count in summary["manifests"].items():
        if count:
            manifest = Manifest(data / f"{name}.jsonl")
            assert len(manifest) == count
            wanted = "concept" if name.endswith("concept") else "style" if "heldout" in name else "train"
            assert {splits[manifest[i].name.split("#")[0]] for i in range(count)} == {wanted}
    text = (data / "prompts_train.jsonl").read_text()
    assert '"a car"' in text and '"a red car"' in text and '"flat icon of a car"' in text
    meant = dict(read_prompts(data))
    assert len(meant) == 100 and meant["a red car"] == {"1f697"} and meant["pizza"] == set()
    for manifest in ("two_shapes/train", "arrangements/train", "arrangements/heldout", "stories/edits_train"):
        assert len(Manifest(data / f"{manifest}.jsonl")) == 3
    prompts = (data / "scene_prompts.txt").read_text().splitlines()
    assert 2 < len(prompts) <= 6 and TwoShapes.parse(prompts[0]) and Arrangement.parse(prompts[-1])
    with Image.open(next((data / "stories" / "pictures").iterdir())) as picture:
        assert picture.size == (64, 64)
    assert "public domain" in (data / "NOTICE").read_text() and not list(data.rglob("*passwd*"))


@pytest.mark.parametrize("size", [16, 40, 272])
def test_wrong_sizes_are_refused(small, tmp_path, size):
    with pytest.raises(Emu3Error, match=f"size is {size}: it must be a multiple of 16 from 64 to 256"):
        small("data", size=size)
    assert not (tmp_path / "data").exists()


def test_an_existing_directory_is_refused(script, tmp_path, capsys):
    assert script("build_pictures").main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} exists already")
