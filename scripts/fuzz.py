"""Runs every command on random hostile input and checks what the project promises of bad input.

python scripts/fuzz.py [--cases 3000] [--seed N] [--only COMMAND] [--keep DIR]

Promised is: exit code 0 or 2, on an error exactly one line of at most 300 printable characters, no traceback, an end
within 60 seconds, no file outside the output, nothing half-written, and at most 1 GiB of memory more than the same
command takes on valid input. Needs the `test` extra (the vocabulary that the tests use, PyTorch for .bin and .pth).
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 60  # for a hang; a command on valid input takes less than ten
MORE_BYTES = 1 << 30
CASES_PER_WORKER = 150  # a worker is started again after so many: memory that JAX keeps must not count as a leak

# ------------------------------------------------------------------------------------------------ the worker


def worker() -> None:
    """Reads cases, one JSON object a line, runs each in this process, and answers likewise."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cases, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a command that asks for questions gets none
    from emu3_jax.cli.main import main, set_up_messages

    set_up_messages()
    for line in cases:
        case = json.loads(line)
        os.chdir(case["cwd"])
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
        began = _memory("VmRSS")
        with _into("stdout") as out, _into("stderr") as err:
            try:
                code = main([os.fsdecode(bytes.fromhex(word)) for word in case["argv"]])
            except SystemExit as stop:  # argparse's own errors
                code = stop.code
            except BaseException as error:
                code = f"{type(error).__name__} left main"
        answer = {"code": code, "bytes": _memory("VmHWM") - began, "out": out[0][-2000:], "err": err[0][-4000:]}
        answer["err_lines"] = err[0].count("\n")
        print(json.dumps(answer), file=answers, flush=True)


@contextlib.contextmanager
def _into(name: str):
    """What the block writes to a standard stream, also beneath Python, as the only entry of a list."""
    stream, text = getattr(sys, name), []
    with tempfile.TemporaryFile() as file:
        stream.flush()
        number = {"stdout": 1, "stderr": 2}[name]
        old = os.dup(number)
        os.dup2(file.fileno(), number)
        try:
            yield text
        finally:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            os.dup2(old, number)
            os.close(old)
            file.seek(0)
            text.append(file.read(1 << 20).decode("utf-8", "replace"))


def _memory(name: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


class Worker:
    """A process that runs cases, started again when it hangs, dies, or has run many."""

    def __init__(self) -> None:
        self.process, self.count = None, 0

    def run(self, argv: list[str], cwd: pathlib.Path) -> dict:
        if self.process is None or self.count >= CASES_PER_WORKER:
            self.stop()
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            self.count = 0
        self.count += 1
        words = [os.fsencode(word).hex() for word in argv]
        self.process.stdin.write(json.dumps({"argv": words, "cwd": str(cwd)}).encode() + b"\n")
        line, deadline = b"", time.monotonic() + SECONDS
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                self.stop()
                return {"code": "hang" if not ready else "died", "bytes": 0, "out": "", "err": "", "err_lines": 0}
            line += part
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


# ------------------------------------------------------------------------------------------------ valid input


def make_inputs(base: pathlib.Path) -> None:
    """Writes one valid input of each kind under `base`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import importlib.util

    import numpy as np
    import tiny_bundle
    from PIL import Image

    from emu3_jax.checkpoints.export import export
    from emu3_jax.cli.main import main
    from emu3_jax.media.clips import save_clip

    package = importlib.util.find_spec("dashscope").submodule_search_locations[0]
    tiny_bundle.write_bundle(base / "bundle", pathlib.Path(package) / "resources" / "qwen.tiktoken")
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (8, 32, 40, 3), np.uint8)
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
    np.savez(base / "codes.npz", a=draw.integers(0, 64, (3, 4), np.int32), b=draw.integers(0, 64, (1, 3, 4), np.int32))
    np.savez_compressed(base / "packed.npz", a=draw.integers(0, 64, (3, 4), np.int32))
    export(base / "bundle", base / "upstream", "upstream", progress=False)
    export(base / "bundle", base / "transformers", "transformers", progress=False)
    _torch_files(base, draw)
    lines = [
        {"image": "picture.png", "text": "a red dot", "name": "dot"},
        {"clip": "clip.webp", "text": "noise"},
        {"text": "only text"},
        {
            "image": "turned.jpg",
            "conversation": [{"role": "user", "text": "what?"}, {"role": "assistant", "text": "x"}],
        },
    ]
    (base / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (base / "pictures.jsonl").write_text("".join(json.dumps({**lines[0], "name": str(n)}) + "\n" for n in range(8)))
    assert main(["prepare", str(base / "pictures.jsonl"), "--model", str(base / "bundle"), "-o", str(base / "data"),
                 "--area", "576", "--quiet"]) == 0  # fmt: skip
    (base / "train.py").write_text(_TRAIN.format(base=base))
    (base / "plan.py").write_text("from emu3_jax.generation.config import GenerateConfig\n\n\ndef config():\n"
                                  "    return GenerateConfig(area=4096)\n")  # fmt: skip
    (base / "evaluate.py").write_text(
        "from emu3_jax.evaluation.config import EvaluateConfig\n\n\ndef config():\n"
        f"    return EvaluateConfig(directory='e', data={str(base / 'data')!r}, cases=1)\n"
    )
    assert main(["train", str(base / "train.py"), "--set", f"directory={base / 'run'}", "--quiet"]) == 0


_TRAIN = """
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config():
    return TrainConfig(
        directory="run", model=ModelConfig(bundle={str(base / "bundle")!r}),
        data=DataConfig(sources=(Source({str(base / "data")!r}, TextToImage()),), sequence_length=96),
        batch_size=8, steps=1, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0), mesh="data=-1",
    )
""".replace('{str(base / "bundle")!r}', "'{base}/bundle'").replace('{str(base / "data")!r}', "'{base}/data'")


def _remux(source: pathlib.Path, target: pathlib.Path) -> None:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def _torch_files(base: pathlib.Path, draw) -> None:
    import torch
    from safetensors.numpy import load_file

    shutil.copytree(base / "upstream", base / "pickled")
    for file in list((base / "pickled").rglob("*.safetensors")):
        tensors = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
        torch.save(tensors, file.with_name("pytorch_model.bin"))
        file.unlink()
    (base / "features").mkdir()
    codes = draw.integers(0, 64, (3, 4))
    torch.save({"name": "a", "images": codes, "texts": "a dot"}, base / "features" / "0.pth")
    (base / "features.json").write_text(json.dumps({"prefix": str(base / "features"), "path_list": ["0.pth"]}))


# ------------------------------------------------------------------------------------------------ hostile input

WORDS = [
    "", " ", "-", "--", ".", "..", "/", "~", "0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e9", "1e400", "1" * 400,
    "½", "²", "٣", "True", "None", "[]", "()", "[" * 3000, "{}", "a=b", "*", "%s%n", "$(id)", "`id`", "\n", "\t",
    "\x1b[31mred", "\r",
    "\u202e", "\udced\udca0\udc80",
    "\udcff", "é" * 50, "x" * 300, "a/" * 3000, "../../escaped", "/proc/self/mem", "/dev/zero",
    "/dev/full",
    "gs://bucket/x", "http://localhost:1/x", "file:///etc/passwd", "<|extra_200|>", "<|image token|>", "con", "NUL",
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


def hostile_bytes(draw: random.Random, data: bytes) -> bytes:
    """`data` with a few faults, each of a random kind."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        size = len(data)
        at = draw.randrange(size) if size else 0
        if draw.random() < 0.4:
            at = min(at, draw.randrange(200))  # headers decide more than data do
        kind = draw.randrange(9)
        if kind == 0 and size:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randrange(1, 256)]
        elif kind == 4:
            data[at : at + 4] = draw.choice(
                (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f")
            )
        elif kind == 5:
            data[at : at + 8] = struct.pack(draw.choice("<>") + "Q", draw.choice((2**63, 2**40, 2**31, 0, 10**9)))
        elif kind == 6:
            data[at:at] = draw.randbytes(draw.randrange(1, 64))
        elif kind == 7:
            data = bytearray(draw.choice((b"", b"\0" * 1000, draw.randbytes(100), b"{}", b"[" * 50_000, b"PK\x03\x04")))
        else:
            data[at : at + 16] = draw.randbytes(16)
    return bytes(data)


def hostile_json(draw: random.Random, text: str) -> str:
    """A JSON text with a value or a key replaced, removed or added, or as deep as it can be."""
    data = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            break
        holder, key = draw.choice(places)
        kind = draw.randrange(5)
        if kind <= 2:
            holder[key] = draw.choice(VALUES)
        elif kind == 3:
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw.choice(("x", "", "../x", "\ud800", *holder))] = draw.choice(VALUES)
        else:
            holder.insert(key, draw.choice(VALUES))
    text = json.dumps(data)
    if draw.random() < 0.05:
        deep = draw.choice(("[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "1" * 5000, "[1e999]"))
        text = deep if draw.random() < 0.5 else re.sub(r"\d+", lambda _: deep, text, count=1)
    return text


def _places(data):
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield data, key
        yield from _places(value)


def hostile_header(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is changed as JSON; the length in front is right, or not."""
    length = int.from_bytes(data[:8], "little")
    header = hostile_json(draw, data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    said = len(header) if draw.random() < 0.9 else draw.choice((0, 2**63, len(header) + 1, len(data) * 2))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def hostile_zip(draw: random.Random, data: bytes) -> bytes:
    """A zip file with members renamed, changed, doubled, packed, encrypted by their flags, or of a false size."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content, name = old.read(info), info.filename
            if draw.random() < 0.3:
                content = draw.choice((hostile_bytes(draw, content), _npy(draw), bytes(draw.choice((0, 10**7)))))
            if draw.random() < 0.2:
                name = draw.choice(
                    ("../../escaped.npy", "/tmp/escaped.npy", "a\nb.npy", "file.npy", "x" * 300, "con.npy", name)
                )
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new.writestr(name, content, draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
                if draw.random() < 0.05:
                    new.writestr(name, content)
    made = bytearray(out.getvalue())
    if draw.random() < 0.3:
        at = made.find(b"PK\x01\x02")
        made[at + draw.randrange(4, _FIELDS_OF_ZIP)] = draw.choice((0, 1, 99, 255))
    return bytes(made)


def _npy(draw: random.Random) -> bytes:
    """An .npy file whose header lies."""
    shape = draw.choice(
        ("(3, 4)", "(20000, 20000)", "(1000000000,)", "(-1, 3)", "(2**60,)", "()", "x", "(3, 4" + ",1" * 500 + ")")
    )
    kind = draw.choice(("<i4", "|O", "<f8", "<U1000000000", "V99999999999", "[('a','<i4')]", ">i8", "<i2", "m8"))
    header = (
        f"{{'descr': '{kind}', 'fortran_order': {draw.choice(('False', 'True', '9'))}, 'shape': {shape}, }}".encode()
    )
    header += b" " * draw.choice((0, 10, 100_000)) + b"\n"
    return b"\x93NUMPY" + bytes((draw.choice((1, 2, 3, 9)), 0)) + struct.pack("<I", len(header)) + header + bytes(48)


def hostile_lines(draw: random.Random, text: str) -> str:
    """A manifest with one line changed."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = hostile_json(draw, lines[at]) if draw.random() < 0.8 else draw.choice(WORDS)
    return "\n".join(lines)


def damage(draw: random.Random, file: pathlib.Path) -> None:
    """Replaces a file by a hostile one of its kind."""
    data = file.read_bytes()
    file.unlink()
    how = draw.random()
    if how < 0.03:
        os.mkfifo(file)
        return
    if how < 0.06:
        file.mkdir()
        return
    if how < 0.09:
        file.symlink_to(draw.choice(("/dev/zero", "nowhere", file.name, "/etc/passwd")))
        return
    try:
        if file.suffix == ".json" and how < 0.8:
            data = hostile_json(draw, data.decode()).encode("utf-8", "surrogatepass")
        elif file.suffix == ".jsonl" and how < 0.8:
            data = hostile_lines(draw, data.decode()).encode("utf-8", "surrogatepass")
        elif file.suffix == ".safetensors" and how < 0.7:
            data = hostile_header(draw, data)
        elif file.suffix in (".npz", ".bin", ".pth") and how < 0.7:
            data = hostile_zip(draw, data)
        else:
            data = hostile_bytes(draw, data)
    except (ValueError, zipfile.BadZipFile, IndexError, OverflowError):
        data = hostile_bytes(draw, data)
    file.write_bytes(data)


# ------------------------------------------------------------------------------------------------ cases

MODEL = ["--model", "bundle", "--quiet"]
PICTURES = [f"picture.{e}" for e in ("png", "jpg", "webp", "bmp", "gif", "tiff")] + ["turned.jpg"]
CLIPS = [f"clip.{e}" for e in ("webp", "gif", "png", "mp4", "webm", "mkv", "mov")] + ["frames"]
# For each command: words of valid calls, in which a name in braces is drawn from a list, and the inputs to damage.
CALLS: dict[str, list[list[str]]] = {
    "convert": [["upstream/language_model", "upstream/vision_tokenizer"], ["transformers"],
                ["pickled/language_model", "pickled/vision_tokenizer"], ["run"]],
    "export": [["bundle", "--layout", "upstream"], ["bundle", "--layout", "transformers"]],
    "doctor": [["bundle"], ["upstream/language_model"], ["transformers"], ["pickled/vision_tokenizer"]],
    "tokenize": [["{picture}", *MODEL], ["{clip}", *MODEL], ["{clip}", *MODEL, "--fps", "6", "--frames", "3"]],
    "detokenize": [["codes.npz", *MODEL], ["packed.npz", *MODEL], ["codes.npz", *MODEL, "--clip-format", "gif"]],
    "generate": [["a dot", *MODEL, "--top-k", "5", "--seed", "1"], 
                 ["a", "b", *MODEL, "--save-tokens", "--ratio", "1:1"]],
    "video": [["a dot", *MODEL, "--frames", "4"], ["a", *MODEL, "--extend", "{picture}", "--frames", "4"]],
    "chat": [["{picture}", "--prompt", "what?", "--max-new-tokens", "4", *MODEL],
             ["{clip}", "--prompt", "x", "--frames", "1", "--max-new-tokens", "4", *MODEL]],
    "prepare": [["manifest.jsonl", *MODEL, "--area", "576"], ["--features", "features.json", *MODEL]],
    "train": [["train.py", "--quiet"], ["train.py", "--quiet", "--set", "steps=1", "--set", "batch_size=8"]],
    "evaluate": [["evaluate.py", "--quiet"]],
    "plan": [["plan.py", "--topology", "v5e:2x2"]],
    "bench": [["decode", "--preset", "small", "--area", "256", "--steps", "2"],
              ["vision", "--preset", "small", "--size", "16"]],
}  # fmt: skip
OUTPUT = {"tokenize": "out.npz", "doctor": None, "chat": None, "plan": None, "bench": None, "train": None}
SLOW = ("plan", "bench")  # their valid calls compile for long: there only arguments are hostile, and mostly refused
OPTIONS = (
    "--set", "--fps", "--frames", "--area", "--seed", "--ratio", "--top-p", "--temperature", "--mesh", "--batch-size",
    "--tile", "--shards", "--workers", "--negative", "--dtype",
)  # fmt: skip
KEPT = ("prepare", "train")  # what was finished before an error stays


def make_case(draw: random.Random, base: pathlib.Path, place: pathlib.Path, only: str | None) -> tuple[str, list[str]]:
    """Makes the inputs of a random call in `place`, and returns the command and its words."""
    command = only or draw.choice([c for c in CALLS for _ in range(1 if c in SLOW else 4)])
    words = list(draw.choice(CALLS[command]))
    words = [draw.choice(PICTURES) if w == "{picture}" else draw.choice(CLIPS) if w == "{clip}" else w for w in words]
    output = OUTPUT.get(command, "out")
    words += ["-o", output] if output else []
    arguments_only = command in SLOW or draw.random() < 0.3
    for name in sorted(os.listdir(base)):
        if any(word.split("/")[0] == name for word in words) or name in _needed_by(words):
            (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, place / name)
    if command in ("train", "evaluate"):
        file = place / words[0]
        file.write_text(file.read_text().replace(str(base), str(place)))
    if (place / "features.json").exists():
        (place / "features.json").write_text((place / "features.json").read_text().replace(str(base), str(place)))
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    small = [p for p in files if p.suffix in (".json", ".jsonl", ".py", ".tiktoken") or p.parent == place]
    if not arguments_only and files:
        damage(draw, draw.choice(small if small and draw.random() < 0.7 else files))
    else:
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(len(words) + 1)
            if draw.random() < 0.7 and at < len(words):
                words[at] = draw.choice(WORDS)
            elif draw.random() < 0.5:
                words.insert(at, draw.choice(WORDS))
            else:
                words += [draw.choice(OPTIONS), draw.choice(WORDS)]
    return command, words


def _needed_by(words: list[str]) -> set[str]:
    needed = {
        "manifest.jsonl": {"picture.png", "clip.webp", "turned.jpg"}, "features.json": {"features"},
        "train.py": {"bundle", "data"}, "evaluate.py": {"data"},
    }  # fmt: skip
    return set().union(*(needed.get(word, set()) for word in words))


def judge(command: str, answer: dict, before: set[str], after: set[str], words: list[str], most: int) -> list[str]:
    """What of the promise was broken."""
    faults, code, err = [], answer["code"], answer["err"]
    if code not in (0, 2) and not (command == "plan" and code == 1):
        faults.append(f"exit code {code}")
    if "Traceback" in err:
        faults.append("traceback: " + err.strip().splitlines()[-1][:150])
    if code == 2 and command != "doctor":
        lines = [line for line in err.splitlines() if not line.startswith("emu3-jax: warning: ")]
        if len(lines) != 1 or ": error: " not in lines[0]:
            faults.append(f"{len(lines)} lines on standard error")
        elif len(lines[0]) > 330 or not lines[0].isprintable():
            faults.append("error line too long or not printable")
    if answer["bytes"] > most:
        faults.append(f"{answer['bytes'] >> 20} MiB of memory")
    new = {name for name in after - before}
    allowed = {OUTPUT.get(command, "out")} | ({"run", "e"} if command in ("train", "evaluate") else set())
    places = set(words) | allowed  # an output may have been named anew
    outside = {name for name in new if name.split("/")[0] not in {str(p).split("/")[0] for p in places if p}}
    if outside:
        faults.append(f"files outside the output: {sorted(outside)[:3]}")
    if code != 0 and command not in KEPT and new:
        faults.append(f"left after an error: {sorted(new)[:3]}")
    if any(".emu3-tmp-" in name for name in new):
        faults.append("a temporary file stayed")
    return faults


def listing(place: pathlib.Path) -> set[str]:
    return {str(p.relative_to(place)) for p in place.rglob("*")}


def around(place: pathlib.Path) -> set[str]:
    return set(os.listdir(place.parent)) | {f"/tmp/{n}" for n in os.listdir("/tmp") if "escaped" in n}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(CALLS))
    parser.add_argument("--keep", type=pathlib.Path, help="keep the inputs of cases that failed here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as directory:
        return fuzz(options, pathlib.Path(directory))


def fuzz(options: argparse.Namespace, directory: pathlib.Path) -> int:
    base = directory / "base"
    base.mkdir()
    make_inputs(base)
    process = Worker()
    most = (
        {} if options.only in SLOW else valid(process, base, directory, [options.only] if options.only else list(CALLS))
    )
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for number in range(options.cases):
        draw = random.Random(f"{options.seed}/{number}")
        place = directory / "cases" / str(number)
        place.mkdir(parents=True)
        command, words = make_case(draw, base, place, options.only)
        before, beside = listing(place), around(place)
        answer = process.run([command, *words], place)
        faults = judge(command, answer, before, listing(place), words, most.get(command, 0) + MORE_BYTES)
        if around(place) != beside:
            faults.append(f"files outside: {sorted(around(place) - beside)[:3]}")
        counts[command]["cases"] += 1
        counts[command][f"exit code {answer['code']}"] += 1
        if faults:
            counts[command]["faults"] += 1
            print(
                f"case {number}: {command} {' '.join(repr(w[:60]) for w in words)}\n    {'; '.join(faults)}", flush=True
            )
            if options.keep:
                shutil.copytree(place, options.keep / str(number), symlinks=True, ignore=_pipes)
                (options.keep / f"{number}.json").write_text(
                    json.dumps({"words": [command, *words], **answer}, indent=1)
                )
        shutil.rmtree(place)
    process.stop()
    for command, count in sorted(counts.items()):
        print(f"{command}: {', '.join(f'{what} {n}' for what, n in sorted(count.items()))}")
    total = sum(count["faults"] for count in counts.values())
    print(f"{options.cases} cases, seed {options.seed}: {total} broke the promise")
    return 1 if total else 0


def _pipes(directory: str, names: list[str]) -> list[str]:
    """Names that cannot be copied."""
    return [name for name in names if not (pathlib.Path(directory, name).is_symlink()
                                           or pathlib.Path(directory, name).is_file()
                                           or pathlib.Path(directory, name).is_dir())]  # fmt: skip


def valid(process: Worker, base: pathlib.Path, directory: pathlib.Path, commands: list[str]) -> dict[str, int]:
    """The memory that each command takes on valid input; all of it must be accepted."""
    most: dict[str, int] = collections.defaultdict(int)
    for command in commands:
        for words in CALLS[command] if command not in (*SLOW, "evaluate") else ():
            place = directory / "valid"
            shutil.copytree(base, place)
            (place / "train.py").write_text((base / "train.py").read_text().replace(str(base), str(place)))
            (place / "features.json").write_text((base / "features.json").read_text().replace(str(base), str(place)))
            words = [w.replace("{picture}", "picture.png").replace("{clip}", "clip.mp4") for w in words]
            words += ["-o", OUTPUT.get(command, "out")] if OUTPUT.get(command, "out") else []
            answer = process.run([command, *words], place)
            if answer["code"] not in (0, 2 if command == "doctor" else 0):
                raise SystemExit(f"{command} {words}: valid input was refused: {answer['err']}")
            most[command] = max(most[command], answer["bytes"])
            shutil.rmtree(place)
    return most


if __name__ == "__main__":
    sys.exit(main())
