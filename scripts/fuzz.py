"""Runs every command on random bad input, and checks that it is handled as promised.

python scripts/fuzz.py [--cases 3000] [--seed N] [--only COMMAND] [--keep DIR]

The promise for every command:

- The exit code is 0 or 2. An error is exactly one line of at most 300 printable characters, without a traceback.
- The command ends within 60 seconds, and needs at most 1 GiB more memory than on valid input.
- It writes no file outside the output, and leaves no partial output.

The script needs the extra `test`, for the tests' vocabulary, and for PyTorch, which makes .bin and .pth files.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from fuzz_inputs import WORDS, damage, make_inputs

SECONDS = 60  # after this time a command counts as hanging; on valid input it takes less than ten
MORE_BYTES = 1 << 30
CASES_PER_WORKER = 150  # then a new worker starts: memory that JAX keeps must not count as a leak

# ------------------------------------------------------------------------------------------------ the worker


def worker() -> None:
    """Reads cases, one JSON object per line, and runs each in this process. Answers with one JSON object per line."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cases, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a command that reads questions from standard input gets none
    from emu3_jax.cli.main import main, set_up_messages

    set_up_messages()
    for line in cases:
        case = json.loads(line)
        os.chdir(case["cwd"])
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
        began = _memory("VmRSS")
        with _into("stdout") as out, _into("stderr") as err:
            try:
                code = main([os.fsdecode(bytes.fromhex(word)) for word in case["argv"]])
            except SystemExit as stop:  # argparse's own errors
                code = stop.code
            except BaseException as error:
                code = f"{type(error).__name__} left main"
        answer = {"code": code, "bytes": _memory("VmHWM") - began, "out": out[0][-2000:], "err": err[0][-4000:]}
        print(json.dumps(answer), file=answers, flush=True)


@contextlib.contextmanager
def _into(name: str):
    """A list whose only entry is the text that the block writes to a standard stream, from Python or compiled code."""
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
    """A process that runs cases. Starts again if it hangs or dies, and after many cases."""

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
                return {"code": "hang" if not ready else "died", "bytes": 0, "out": "", "err": ""}
            line += part
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


# ------------------------------------------------------------------------------------------------ cases

MODEL = ["--model", "bundle", "--quiet"]
PREPARE = [*MODEL, "--area", "576"]
PICTURES = [f"picture.{e}" for e in ("png", "jpg", "webp", "bmp", "gif", "tiff")] + ["turned.jpg"]
CLIPS = [f"clip.{e}" for e in ("webp", "gif", "png", "mp4", "webm", "mkv", "mov")] + ["frames"]
# Words of valid calls for each command. A name in braces stands for a random file of a list.
CALLS: dict[str, list[list[str]]] = {
    "convert": [["upstream/language_model", "upstream/vision_tokenizer"], ["transformers"],
                ["pickled/language_model", "pickled/vision_tokenizer"], ["run"]],
    "quantize": [["bundle", "--quiet"], ["bundle", "--quiet", "--quantize", "fp8"]],
    "export": [["bundle", "--layout", "upstream"], ["bundle", "--layout", "transformers"]],
    "merge": [["bundle", "--adapter", "adapter"], ["bundle", "--adapter", "adapter", "--dtype", "bfloat16"]],
    "doctor": [["bundle"], ["upstream/language_model"], ["transformers"], ["pickled/vision_tokenizer"]],
    "tokenize": [["{picture}", *MODEL], ["{clip}", *MODEL], ["{clip}", *MODEL, "--fps", "6", "--frames", "3"]],
    "detokenize": [["codes.npz", *MODEL], ["packed.npz", *MODEL], ["codes.npz", *MODEL, "--clip-format", "gif"]],
    "generate": [["a dot", *MODEL, "--top-k", "5", "--seed", "1"], 
                 ["a", "b", *MODEL, "--save-tokens", "--ratio", "1:1"],
                 ["a", *MODEL, "--adapter", "adapter", "--quantize", "int8"]],
    "video": [["a dot", *MODEL, "--frames", "4"], ["a", *MODEL, "--extend", "{picture}", "--frames", "4"]],
    "chat": [["{picture}", "--prompt", "what?", "--max-new-tokens", "4", *MODEL],
             ["{clip}", "--prompt", "x", "--frames", "1", "--max-new-tokens", "4", *MODEL]],
    "prepare": [["manifest.jsonl", *PREPARE], ["--features", "features.json", *MODEL],
                ["photos", *PREPARE], ["photos", *PREPARE, "--validation", "0.5"], ["photos/list.csv", *PREPARE],
                ["shard.tar", *PREPARE], ["rows.parquet", *PREPARE], ["talk.json", *PREPARE]],
    "sample": [["prompts.txt", *MODEL, "-n", "2", "--guidance", "1", "3"], ["prompts.txt", *MODEL, "-n", "1", "--png"]],
    "score": [["samples", *MODEL, "--reward", "rewards.py:mean"], ["samples", *MODEL, "--reward", "rewards.py:mean",
              "--name", "mine", "--batch-size", "1"]],
    "pairs": [["samples", "--reward", "scored"], ["samples", "--votes", "votes.csv"]],
    "train": [["train.py", "--quiet"], ["train.py", "--quiet", "--set", "steps=1", "--set", "batch_size=8"]],
    "evaluate": [["evaluate.py", "--quiet"]],
    "plan": [["plan.py", "--topology", "v5e:2x2"]],
    "bench": [["decode", "--preset", "small", "--area", "256", "--steps", "2"],
              ["vision", "--preset", "small", "--size", "16"]],
}  # fmt: skip
OUTPUT = {"tokenize": "out.npz", "doctor": None, "chat": None, "plan": None, "bench": None, "train": None,
          "score": None}  # fmt: skip
SLOW = ("plan", "bench")  # valid calls compile for long: only arguments are hostile, and mostly refused
OPTIONS = (
    "--set", "--fps", "--frames", "--area", "--seed", "--ratio", "--top-p", "--temperature", "--mesh", "--batch-size",
    "--tile", "--shards", "--workers", "--negative", "--dtype", "--validation", "--text-column", "--images",
    "--guidance", "--margin", "--votes", "--reward", "--name", "--timeout", "--hosts",
)  # fmt: skip
KEPT = ("prepare", "sample", "score", "train")  # after an error, these commands keep the parts that they finished


def make_case(rng: random.Random, base: pathlib.Path, place: pathlib.Path, only: str | None) -> tuple[str, list[str]]:
    """Makes the inputs of a random call in `place`, and returns the command and its words."""
    command = only or rng.choice([c for c in CALLS for _ in range(1 if c in SLOW else 4)])
    words = list(rng.choice(CALLS[command]))
    words = [rng.choice(PICTURES) if w == "{picture}" else rng.choice(CLIPS) if w == "{clip}" else w for w in words]
    output = OUTPUT.get(command, "out")
    words += ["-o", output] if output else []
    arguments_only = command in SLOW or rng.random() < 0.3
    for name in sorted(os.listdir(base)):
        if any(word.split("/")[0] == name for word in words) or name in _needed_by(words):
            (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, place / name)
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    small = [
        p for p in files if p.suffix in (".json", ".jsonl", ".py", ".tiktoken") or p.parent in (place, place / "photos")
    ]
    if not arguments_only and files:
        damage(rng, rng.choice(small if small and rng.random() < 0.7 else files))
    else:
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(words) + 1)
            if rng.random() < 0.7 and at < len(words):
                words[at] = rng.choice(WORDS)
            elif rng.random() < 0.5:
                words.insert(at, rng.choice(WORDS))
            else:
                words += [rng.choice(OPTIONS), rng.choice(WORDS)]
    return command, words


def _needed_by(words: list[str]) -> set[str]:
    needed = {
        "manifest.jsonl": {"picture.png", "clip.webp", "turned.jpg"}, "features.json": {"features"},
        "talk.json": {"picture.png"},
        "train.py": {"bundle", "data"}, "evaluate.py": {"bundle", "items"},
    }  # fmt: skip
    if "rewards.py:mean" in words:
        needed["samples"] = {"rewards.py"}
    return set().union(*(needed.get(word, set()) for word in words))


def judge(command: str, answer: dict, before: set[str], after: set[str], words: list[str], most: int) -> list[str]:
    """The broken parts of the promise, one text each."""
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
    places = set(words) | allowed  # a damaged argument may name another output
    roots = {str(p).split("/")[0] for p in places if p}
    outside = set() if "." in roots else {name for name in new if name.split("/")[0] not in roots}  # "-o ." is here
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
    parser.add_argument("--keep", type=pathlib.Path, help="directory in which to keep the inputs of failed cases")
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
        rng = random.Random(f"{options.seed}/{number}")
        place = directory / "cases" / str(number)
        place.mkdir(parents=True)
        command, words = make_case(rng, base, place, options.only)
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
    """The memory that each command needs on valid input. Exits if a command refuses valid input."""
    most: dict[str, int] = collections.defaultdict(int)
    for command in commands:
        for words in CALLS[command] if command not in SLOW else ():
            place = directory / "valid"
            shutil.copytree(base, place)
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
