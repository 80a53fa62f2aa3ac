"""The builder of the embedded model's data: splits keep apart what looks alike, and manifests load and repeat."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
from emoji_packages import ANIMALS, GROUPS, write_sources
from PIL import Image

from emu3_jax.data.manifest import Manifest
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import procedural
from emu3_jax.media.clips import load_clip

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def builder(monkeypatch):
    """The script, found as Python finds it when it runs."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import build_emoji

    return build_emoji


@pytest.fixture
def sources(builder, tmp_path):
    """A cache of small packages, and what the builder is to take from it."""
    pytest.importorskip("resvg_py", reason="the extra emoji installs it")
    (tmp_path / "cache").mkdir()
    return write_sources(builder, tmp_path / "cache")


@pytest.fixture
def build(builder, sources, tmp_path):
    scenes = (list(procedural.all_stills())[::31], list(procedural.all_clips())[::97])

    def run(name: str = "data", seed: int = 3):  # a seed that holds out some of the few concepts
        cache = tmp_path / "cache"
        return builder.build(tmp_path / name, cache, sources=sources, scenes=scenes, size=32, seed=seed)

    return run


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(directory: pathlib.Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_build(build, tmp_path):
    summary = build()
    data = tmp_path / "data"
    items = lines(data / "items.jsonl")
    assert len({item["name"] for item in items}) == len(items)
    for item in items:
        if item["kind"].endswith("clip"):
            assert load_clip(data / item["file"]).frames.shape == (8, 32, 32, 3)
        else:
            with Image.open(data / item["file"]) as image:
                assert (image.size, image.mode) == ((32, 32), "RGB")
                assert item["style"] == "procedural" or image.getpixel((31, 0)) == (255, 255, 255)
        views = [data / view for view in (item["file"], *item.get("views", ()), *item.get("closeups", ()))]
        shown = item["kind"] == "picture" and item["split"] == "train" and item["group"] == GROUPS[3]
        assert len(views) == (12 if shown else 1)
        assert (len({view.read_bytes() for view in views}) > 1) == shown
    kinds = {kind: row["all"] for kind, row in summary["items"].items()}
    pictures = {"picture 3d": 41, "picture flat": 40, "picture noto": 41, "picture vintage": 41, "picture twemoji": 41}
    assert kinds == pictures | {"clip animated": 12, "procedural_picture procedural": 47} | {
        "procedural_clip procedural": 18
    }
    assert summary["unused"] == {
        "does not move": {"count": 1, "names": [f"animated/{ANIMALS[20]}"]},
        "no label": {"count": 1, "names": ["3d/1f999"]},
        "second picture of its codepoint": {"count": 1, "names": [f"animated/{ANIMALS[0]}"]},
        "skin tone": {"count": 1, "names": ["3d/1f3c3-1f3fb-200d-2642"]},
    } | {reason: names for reason, names in summary["unused"].items() if reason.startswith("broken drawing")}
    assert [n["names"] for r, n in summary["unused"].items() if r.startswith("broken")] == [["flat/1f3c3-200d-2642"]]
    assert "Microsoft" in (data / "NOTICE").read_text()
    assert load_clip(data / "clips" / f"{ANIMALS[0]}.webp").fps == pytest.approx(8 / 0.64)


def _texts(line: dict) -> list[str]:
    return [turn["text"] for turn in line["conversation"]]


def test_manifests(build, tmp_path):
    summary = build()
    data = tmp_path / "data"
    items = {item["name"]: item for item in lines(data / "items.jsonl")}
    splits = {}
    for name, count in summary["manifests"].items():
        assert len(lines(data / f"{name}.jsonl")) == count
        if count:
            manifest = Manifest(data / f"{name}.jsonl")
            entries = [manifest[index] for index in range(len(manifest))]
            assert len({entry.name for entry in entries}) == count
            assert all(path.exists() for entry in entries for path in (entry.image, entry.clip) if path)
            named = [items.get(entry.name.split("#")[0]) for entry in entries]
            splits[name] = {item["split"] for item in named if item}
            if name.startswith(("t2i", "i2t")):
                assert {item["group"] for item in named} <= {GROUPS[3], "procedural"}
    assert {name: split for name, split in splits.items() if "heldout" not in name} == {
        "vision_train": {"train"},
        "t2i_train": {"train"},
        "t2i_upright": {"train"},
        "i2t_train": {"train"},
        "i2t_closeups": {"train"},
        "clip_train": {"train"},
        "clip_questions": {"train"},
        "text_train": set(),
    }
    assert splits["i2t_heldout_style"] == {"style"}
    assert splits["i2t_heldout_concept"] == splits["vision_heldout"] == {"concept"}
    train = [item for item in items.values() if item["kind"] == "picture" and item["split"] == "train"]
    first = next(item for item in train if item["group"] == GROUPS[3])
    texts = [line["text"] for line in lines(data / "t2i_train.jsonl") if line["name"].startswith(first["name"] + "#")]
    assert texts.count(f"{first['style']} emoji of {first['label']}") == 3
    assert texts[-2:] == [f"emoji of {first['label']}", first["label"]]
    assert first["label"].startswith("beast's")
    assert set(texts[3].split(", ")[1:]) <= {"pet", "fur", "tail"}
    seen = [line["image"] for line in lines(data / "t2i_train.jsonl") if line["name"].startswith(first["name"] + "#")]
    assert set(seen) == {first["file"], *first["views"]}
    upright = [line for line in lines(data / "t2i_upright.jsonl") if line["name"].startswith(first["name"] + "#")]
    assert [line["text"] for line in upright] == texts
    assert {line["image"] for line in upright} == {first["file"]}
    close = [line for line in lines(data / "i2t_closeups.jsonl") if line["name"].startswith(first["name"] + "#")]
    assert [line["image"] for line in close] == [file for file in first["closeups"] for _ in range(3)]
    asked = [line for line in lines(data / "i2t_train.jsonl") if line["image"] == first["views"][0]]
    assert [line["conversation"][1]["text"] for line in asked] == [texts[0], first["group"], first["style"]]
    moving = next(item for item in items.values() if item["kind"] == "procedural_clip" and item["split"] == "train")
    about = [line for line in lines(data / "clip_questions.jsonl") if line["clip"] == moving["file"]]
    pairs = [dict(zip(turns[::2], turns[1::2], strict=True)) for turns in (_texts(line) for line in about)]
    assert pairs[0] == pairs[1] and list(pairs[0]) != list(pairs[1])
    assert pairs[0] == {
        "Describe the clip.": moving["label"],
        "What colour is the shape?": moving["colour"],
        "What shape is this?": moving["shape"],
        "What does the shape do?": moving["motion"],
    }
    held = {item["label"] for item in items.values() if item["split"] == "concept"}
    assert held
    assert not any(line["text"].split(":")[0].split(".")[0] in held for line in lines(data / "text_train.jsonl"))


def test_splits_keep_apart_what_looks_alike(build, tmp_path):
    build()
    items = lines(tmp_path / "data" / "items.jsonl")
    pictures = {(item["concept"], item["style"]): item["split"] for item in items if item["kind"] == "picture"}
    held = {concept for (concept, _), split in pictures.items() if split == "style"}
    assert held
    for concept in held:
        assert pictures[concept, "3d"] == pictures[concept, "flat"]
        assert sum(pictures[concept, style] == "train" for style in ("3d", "flat", "noto", "vintage", "twemoji")) >= 2
    for item in items:
        if item["kind"] == "clip":
            assert item["split"] == pictures[item["concept"], "3d"]
    for kind, last in (("procedural_picture", "position"), ("procedural_clip", "motion")):
        triples = {}
        for item in items:
            if item["kind"] == kind:
                triples.setdefault((item["colour"], item["shape"], item[last]), set()).add(item["split"])
        assert all(len(splits) == 1 for splits in triples.values())


@pytest.mark.slow
def test_the_same_bytes_again(build, tmp_path):
    build("once")
    build("again")
    assert digests(tmp_path / "once") == digests(tmp_path / "again")
    build("other", seed=1)
    assert digests(tmp_path / "once") != digests(tmp_path / "other")


def test_siblings_and_shares(builder):
    from emoji_data import concepts

    def concept(codepoint: str):
        return concepts.Concept(codepoint, "", (), "", "")

    runners = ["1f3c3", "1f3c3-200d-2640", "1f3c3-200d-2642", "1f3c3-200d-2640-200d-27a1"]
    farmers = ["1f468-200d-1f33e", "1f469-200d-1f33e", "1f9d1-200d-1f33e"]
    clocks = [f"1f5{number:02x}" for number in range(0x50, 0x68)]
    for siblings in (runners, farmers, clocks):
        assert len({concept(codepoint).family for codepoint in siblings}) == 1
    assert concept("1f5fb").family == "1f5fb"
    assert concept("1f568").family == "1f568"
    many = [concept(f"{number:x}") for number in range(0x2600, 0x4600)]
    assert np.mean([concepts.is_held_out(c, 0) for c in many]) == pytest.approx(0.05, abs=0.01)
    alike = {"3d": {"3d", "flat"}, "flat": {"3d", "flat"}, "noto": {"noto"}, "vintage": {"vintage"}}
    alike["twemoji"] = {"twemoji"}
    shares = [len(concepts.held_out_styles(c, alike, 0)) / 5 for c in many]
    assert np.mean(shares) == pytest.approx(0.09, abs=0.01)
    everything = {style: set(concepts.STYLES) for style in concepts.STYLES}
    assert not any(concepts.held_out_styles(c, everything, 0) for c in many)


def test_styles_are_compared_at_one_size(builder):
    """Else the splits would depend on the size of the pictures."""
    large = np.arange(64 * 64 * 3, dtype=np.int64).astype(np.uint8).reshape(64, 64, 3)
    assert builder._to_compare(large).shape == (32, 32, 3)
    assert np.array_equal(builder._to_compare(large[:32, :32]), large[:32, :32])


def test_an_existing_directory_is_refused(builder, tmp_path, capsys):
    assert builder.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path} exists already")
    assert message.count("\n") == 1


def test_a_damaged_package_is_refused(build, sources, tmp_path):
    path = tmp_path / "cache" / sources.labels.filename
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(Emu3Error, match="checksum"):
        build()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("npm", "message"),
    [(None, "npm is not installed"), ("echo no such package >&2; exit 1", r"npm pack a@1 failed \(no such package\)")],
)
def test_npm_trouble(builder, tmp_path, monkeypatch, npm, message):
    programs = tmp_path / "programs"
    programs.mkdir()
    if npm:
        (programs / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(Emu3Error, match=message):
        builder.fetch(builder.Package("a", "1", ""), tmp_path / "cache")
