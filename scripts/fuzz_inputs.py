"""Inputs for scripts/fuzz.py: one valid file of each kind, and hostile files made from them."""

import contextlib
import copy
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile

ROOT = pathlib.Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------ valid input


def make_inputs(base: pathlib.Path) -> None:
    """Writes one valid input of each kind under `base`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import tiny_bundle
    from PIL import Image

    from emu3_jax.checkpoints.export import export
    from emu3_jax.cli.main import main
    from emu3_jax.media.clips import save_clip

    package = importlib.util.find_spec("dashscope").submodule_search_locations[0]
    tiny_bundle.write_bundle(base / "bundle", pathlib.Path(package) / "resources" / "qwen.tiktoken")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 32, 40, 3), np.uint8)
    for ending in ("png", "jpg", "webp", "bmp", "gif", "tiff"):
        Image.fromarray(pixels[0]).save(base / f"picture.{ending}")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels[0]).save(base / "turned.jpg", exif=exif)
    for ending in ("webp", "gif", "png", "mp4", "webm"):
        save_clip(pixels, base / f"clip.{ending}", 12.0)
    for ending in ("mkv", "mov"):
        _remux(base / "clip.mp4", base / f"clip.{ending}")
    (base / "frames").mkdir()
    for number, frame in enumerate(pixels[:3]):
        Image.fromarray(frame).save(base / "frames" / f"{number}.png")
    np.savez(base / "codes.npz", a=rng.integers(0, 64, (3, 4), np.int32), b=rng.integers(0, 64, (1, 3, 4), np.int32))
    np.savez_compressed(base / "packed.npz", a=rng.integers(0, 64, (3, 4), np.int32))
    export(base / "bundle", base / "upstream", "upstream", progress=False)
    export(base / "bundle", base / "transformers", "transformers", progress=False)
    _torch_files(base, rng)
    _adapter(base, rng)
    lines = [
        {"image": "picture.png", "text": "a red dot", "name": "dot"},
        {"clip": "clip.webp", "text": "noise"},
        {"text": "only text"},
        {
            "image": "turned.jpg",
            "conversation": [{"role": "user", "text": "what?"}, {"role": "assistant", "text": "x"}],
        },
    ]
    _sources(base, pixels)
    (base / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (base / "pictures.jsonl").write_text("".join(json.dumps({**lines[0], "name": str(n)}) + "\n" for n in range(8)))
    assert main(["prepare", str(base / "pictures.jsonl"), "--model", str(base / "bundle"), "-o", str(base / "data"),
                 "--area", "576", "--quiet"]) == 0  # fmt: skip
    for name, text in _CONFIGS.items():
        (base / name).write_text(text)
    write_items(base / "items", pixels[0])
    _samples(base)
    with working_in(base):
        assert main(["train", "train.py", "--set", "directory=run", "--quiet"]) == 0


# Paths are relative: calls run in the directory that their inputs are copied to.
_CONFIGS = {
    "train.py": """
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config():
    return TrainConfig(
        directory="run", model=ModelConfig(bundle="bundle"),
        data=DataConfig(sources=(Source("data", TextToImage()),), sequence_length=96),
        batch_size=8, steps=1, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0), mesh="data=-1",
    )
""",
    "plan.py": """
from emu3_jax.generation.config import GenerateConfig


def config():
    return GenerateConfig(area=4096)
""",
    "evaluate.py": """
from emu3_jax.evaluation.config import EvaluateConfig


def config():
    return EvaluateConfig(directory="e", model="bundle", data="items", cases=2, figures=("reconstruction",))
""",
}


def write_items(directory: pathlib.Path, pixels) -> None:
    """Data for `evaluate`: pictures in the layout of scripts/build_emoji.py."""
    from PIL import Image

    directory.mkdir()
    lines = []
    for number in range(4):
        about = {"name": f"flat-{number}", "file": f"flat-{number}.webp", "kind": "picture", "style": "flat"}
        about |= {"concept": f"1f60{number}", "label": f"face {number}", "group": "objects", "split": "concept"}
        Image.fromarray(pixels[::-1] if number % 2 else pixels).save(directory / about["file"], lossless=True)
        lines.append(about)
    (directory / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextlib.contextmanager
def working_in(directory: pathlib.Path):
    """Within the block, `directory` is the working directory."""
    old = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(old)


def _remux(source: pathlib.Path, target: pathlib.Path) -> None:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def _adapter(base: pathlib.Path, rng) -> None:
    """Writes a LoRA adapter in the format of training."""
    import numpy as np

    from emu3_jax.checkpoints.adapter import write_adapter
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.models.adapters import MATRICES, Adapter

    bundle = Bundle.open(base / "bundle")
    shapes = {
        side.path: side.shape
        for param in bundle.params("decoder")
        if param.path[-1] in MATRICES
        for side in param.low_rank(MATRICES[param.path[-1]].inputs, 2)
    }
    write_adapter(
        base / "adapter", Adapter(rank=2, base="int8"), bundle.decoder_config,
        lambda path: rng.standard_normal(shapes[path]).astype(np.float32), bundle=bundle, step=1,
    )  # fmt: skip


def _sources(base: pathlib.Path, pixels) -> None:
    """The other inputs of `prepare`: a folder, a list of pictures, a tar file, a Parquet file, LLaVA's JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    (base / "photos" / "more").mkdir(parents=True)
    names = ["a.png", "b.png", "c.jpg", "more/d.png"]
    for name, frame in zip(names, pixels, strict=False):
        Image.fromarray(frame).save(base / "photos" / name)
    for name in ("a.png", "c.jpg"):
        (base / "photos" / name).with_suffix(".txt").write_text(f"a photo called {name}\n")
    rows = "".join(f'{name},"of a file, listed"\r\n' for name in names if name not in ("a.png", "c.jpg"))
    for name in ("metadata.csv", "list.csv"):
        (base / "photos" / name).write_text(f"file_name,text\r\n{rows}")
    with tarfile.open(base / "shard.tar", "w") as tar:
        for name in ("a.png", "a.txt", "c.jpg", "c.txt"):
            tar.add(base / "photos" / name, f"folder/{name}")
    data = [{"image": {"bytes": (base / "photos" / name).read_bytes(), "path": name}, "text": name} for name in names]
    pq.write_table(pa.Table.from_pylist(data), base / "rows.parquet", row_group_size=3)
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
    (base / "talk.json").write_text(
        json.dumps([{"id": str(n), "image": "picture.png", "conversations": turns} for n in (0, 1)])
    )


def _samples(base: pathlib.Path) -> None:
    """Samples with rewards, votes on them, and a reward."""
    from drawn_samples import write_samples

    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.cli.main import main
    from emu3_jax.data.encoder import bundle_codebook

    (base / "prompts.txt").write_text("a red dot\n\na blue cat\n")
    write_samples(
        base / "samples", ["a red dot", "a blue cat"], (1.0, 3.0), bundle_codebook(Bundle.open(base / "bundle"))
    )
    (base / "votes.csv").write_text("voter,chosen,rejected\nann,0,1\nbob,000003.png,png/000002.png\n")
    (base / "rewards.py").write_text("def mean(prompts, pictures):\n    return [float(p.mean()) for p in pictures]\n")
    words = ["--reward", f"{base / 'rewards.py'}:mean", "--name", "scored", "--model", str(base / "bundle"), "--quiet"]
    assert main(["score", str(base / "samples"), *words]) == 0


def _torch_files(base: pathlib.Path, rng) -> None:
    import torch
    from safetensors.numpy import load_file

    shutil.copytree(base / "upstream", base / "pickled")
    for file in list((base / "pickled").rglob("*.safetensors")):
        tensors = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
        torch.save(tensors, file.with_name("pytorch_model.bin"))
        file.unlink()
    (base / "features").mkdir()
    codes = rng.integers(0, 64, (3, 4))
    torch.save({"name": "a", "images": codes, "texts": "a dot"}, base / "features" / "0.pth")
    (base / "features.json").write_text(json.dumps({"prefix": "features", "path_list": ["0.pth"]}))


# ------------------------------------------------------------------------------------------------ hostile input

WORDS = [
    "", " ", "-", "--", ".", "..", "/", "~", "0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e9", "1e400", "1" * 400,
    "½", "²", "٣", "True", "None", "[]", "()", "[" * 3000, "{}", "a=b", "*", "%s%n", "$(id)", "`id`", "\n", "\t",
    "\x1b[31mred", "\r",
    "\u202e", "\udced\udca0\udc80",
    "\udcff", "é" * 50, "x" * 300, "a/" * 3000, "../../escaped", "/proc/self/mem", "/dev/zero",
    "/dev/full",
    "gs://b/x", "xyz://bucket/x",
    "http://localhost:1/x", "file:///etc/passwd", "<|extra_200|>", "<|image token|>", "con", "NUL",
    "9" * 19, str(2**31), str(2**63), "0x10", "1_000", "1:0", "0:1", "1e9:1", "-1:1", "tensor=3", "data=-1,fsdp=-1",
    "a" * 5000,    " " * 100_000,
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "9" * 50,
    "../../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "x" * 5000, [], {}, [None], {"a": 1}, [[[]]], ["x"] * 1000,
    "float32",
    "con", [1, 2], [-1, -1], [10**9, 10**9], 10**9, "1", {"": {}},
]  # fmt: skip
_FIELDS_OF_ZIP = 46  # bytes of an entry of a zip file's directory, before its name


def hostile_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few faults, each of a random kind."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(data)
        at = rng.randrange(size) if size else 0
        if rng.random() < 0.4:
            at = min(at, rng.randrange(200))  # faults in headers do more than faults in data
        kind = rng.randrange(9)
        if kind == 0 and size:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 256)]
        elif kind == 4:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
        elif kind == 5:
            data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice((2**63, 2**40, 2**31, 0, 10**9)))
        elif kind == 6:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 7:
            data = bytearray(rng.choice((b"", b"\0" * 1000, rng.randbytes(100), b"{}", b"[" * 50_000, b"PK\x03\x04")))
        else:
            data[at : at + 16] = rng.randbytes(16)
    return bytes(data)


def hostile_json(rng: random.Random, text: str) -> str:
    """A JSON text with a value or a key replaced, removed or added, or with extremely deep nesting."""
    data = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(("x", "", "../x", "\ud800", *holder))] = copy.deepcopy(rng.choice(VALUES))
        else:
            holder.insert(key, copy.deepcopy(rng.choice(VALUES)))
    text = json.dumps(data)
    if rng.random() < 0.05:
        deep = rng.choice(("[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "1" * 5000, "[1e999]"))
        text = deep if rng.random() < 0.5 else re.sub(r"\d+", lambda _: deep, text, count=1)
    return text


def _places(data):
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield data, key
        yield from _places(value)


def hostile_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a changed JSON header. The length in front of the header is mostly right."""
    length = int.from_bytes(data[:8], "little")
    header = hostile_json(rng, data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, len(header) + 1, len(data) * 2))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def hostile_zip(rng: random.Random, data: bytes) -> bytes:
    """A zip file with members renamed, changed, doubled or compressed, with encryption flags, or with a false size."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content, name = old.read(info), info.filename
            if rng.random() < 0.3:
                content = rng.choice((hostile_bytes(rng, content), _npy(rng), bytes(rng.choice((0, 10**7)))))
            if rng.random() < 0.2:
                name = rng.choice(
                    ("../../escaped.npy", "/tmp/escaped.npy", "a\nb.npy", "file.npy", "x" * 300, "con.npy", name)
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new.writestr(name, content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
                if rng.random() < 0.05:
                    new.writestr(name, content)
    made = bytearray(out.getvalue())
    if rng.random() < 0.3:
        at = made.find(b"PK\x01\x02")
        made[at + rng.randrange(4, _FIELDS_OF_ZIP)] = rng.choice((0, 1, 99, 255))
    return bytes(made)


def _npy(rng: random.Random) -> bytes:
    """An .npy file with a false header."""
    shape = rng.choice(
        ("(3, 4)", "(20000, 20000)", "(1000000000,)", "(-1, 3)", "(2**60,)", "()", "x", "(3, 4" + ",1" * 500 + ")")
    )
    kind = rng.choice(("<i4", "|O", "<f8", "<U1000000000", "V99999999999", "[('a','<i4')]", ">i8", "<i2", "m8"))
    header = (
        f"{{'descr': '{kind}', 'fortran_order': {rng.choice(('False', 'True', '9'))}, 'shape': {shape}, }}".encode()
    )
    header += b" " * rng.choice((0, 10, 100_000)) + b"\n"
    return b"\x93NUMPY" + bytes((rng.choice((1, 2, 3, 9)), 0)) + struct.pack("<I", len(header)) + header + bytes(48)


def hostile_lines(rng: random.Random, text: str) -> str:
    """A manifest with one line changed."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = hostile_json(rng, lines[at]) if rng.random() < 0.8 else rng.choice(WORDS)
    return "\n".join(lines)


def damage(rng: random.Random, file: pathlib.Path) -> None:
    """Replaces a file by a hostile one of its kind."""
    data = file.read_bytes()
    file.unlink()
    how = rng.random()
    if how < 0.03:
        os.mkfifo(file)
        return
    if how < 0.06:
        file.mkdir()
        return
    if how < 0.09:
        file.symlink_to(rng.choice(("/dev/zero", "nowhere", file.name, "/etc/passwd")))
        return
    try:
        if file.suffix == ".json" and how < 0.8:
            data = hostile_json(rng, data.decode()).encode("utf-8", "surrogatepass")
        elif file.suffix == ".jsonl" and how < 0.8:
            data = hostile_lines(rng, data.decode()).encode("utf-8", "surrogatepass")
        elif file.suffix == ".safetensors" and how < 0.7:
            data = hostile_header(rng, data)
        elif file.suffix in (".npz", ".bin", ".pth") and how < 0.7:
            data = hostile_zip(rng, data)
        else:
            data = hostile_bytes(rng, data)
    except (ValueError, zipfile.BadZipFile, IndexError, OverflowError):
        data = hostile_bytes(rng, data)
    file.write_bytes(data)
