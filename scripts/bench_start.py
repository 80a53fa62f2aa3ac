"""Seconds to the first picture: where they go in the first run of a command and in the second.

    python scripts/bench_start.py [--runs 5] [--python ENV/bin/python] [-- generate "a red apple"]

Each round begins with an empty compilation cache. The first run compiles everything, the second finds it compiled.
Both are whole processes of the installed `emu3-jax`, whose modules pip compiled to bytecode. Prints a table of medians
for `docs/performance.md`. Wall seconds need a quiet machine; CPU seconds (user and system) suffer less from a busy one.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

PHASES = {
    "imports": "imports",
    "loading": "loading the model",
    "tracing": "tracing and lowering",
    "compiling": "compiling, or reading what was compiled",
    "decoding": "decoding: tokens and pixels",
    "rest": "the rest: start and end of Python, the file",
}
CALLS = {  # functions whose time is a phase's, less what is another phase's within
    "emu3_jax.loading": ("load", "loading"),
    "emu3_jax.generation.session": ("run", "decoding"),
    "emu3_jax.generation.codec": ("decode_picture", "decoding"),
}
EVENTS = {  # what JAX says of its own work
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "tracing",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


class Phases:
    """Seconds of the main thread by phase. What is within another phase counts once, for the inner one."""

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._spans: list[tuple[str, float, float]] = []  # closed, none within another

    def add(self, phase: str, start: float, end: float) -> None:
        inner = [span for span in self._spans if span[1] >= start]
        self._spans = [span for span in self._spans if span[1] < start] + [(phase, start, end)]
        self.seconds[phase] += end - start - sum(last - first for _, first, last in inner)

    def watch(self) -> None:
        """Takes the time of imports, and of the functions and events of the other phases once these are imported."""
        import importlib._bootstrap as machinery

        load, depth = machinery._find_and_load, 0

        def find_and_load(name, import_):
            nonlocal depth
            if threading.current_thread() is not threading.main_thread():
                return load(name, import_)
            start, depth = time.perf_counter(), depth + 1
            try:
                return load(name, import_)
            finally:
                depth -= 1
                if name in CALLS and hasattr(sys.modules.get(name), CALLS[name][0]):
                    self._wrap(sys.modules[name], *CALLS[name])
                if name == "jax" and depth == 0:
                    sys.modules["jax.monitoring"].register_event_duration_secs_listener(self._event)
                if depth == 0:
                    self.add("imports", start, time.perf_counter())

        machinery._find_and_load = find_and_load

    def _wrap(self, module, name: str, phase: str) -> None:
        function = getattr(module, name)

        def timed(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.add(phase, start, time.perf_counter())

        setattr(module, name, timed)

    def _event(self, event: str, seconds: float, **_) -> None:
        if event in EVENTS and threading.current_thread() is threading.main_thread():
            now = time.perf_counter()
            self.add(EVENTS[event], now - seconds, now)


def watched(report: str, words: list[str]) -> None:
    """Runs the command in this process, and writes the seconds of its phases to the file `report`."""
    import atexit

    phases = Phases()
    atexit.register(lambda: pathlib.Path(report).write_text(json.dumps(phases.seconds)))
    phases.watch()
    from emu3_jax.__main__ import program

    sys.argv = ["emu3-jax", *words]
    program()


def run(python: str, words: list[str], place: pathlib.Path, environment: dict[str, str]) -> dict[str, float]:
    """One run in a process of its own: seconds of each phase, in all (`wall`), and of the CPUs (`cpu`)."""
    report = place / "phases.json"
    command = [python, __file__, "--watched", str(report), "--", *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    seconds = json.loads(report.read_text())
    seconds["rest"] = wall - sum(seconds.values())
    return {**seconds, "wall": wall, "cpu": usage.ru_utime + usage.ru_stime}


def table(rounds: list[list[dict[str, float]]]) -> str:
    """Markdown: medians of the rounds' first and second runs."""
    runs = list(zip(*rounds, strict=True))
    first, second = ({name: statistics.median(run[name] for run in each) for name in each[0]} for each in runs)
    names = {**PHASES, "wall": "**the whole command**", "cpu": "CPU, user and system"}
    lines = ["| seconds of | first run | second run |", "|---|---|---|"]
    lines += [f"| {text} | {first[name]:.2f} | {second[name]:.2f} |" for name, text in names.items()]
    spread = [f"{min(walls):.2f} to {max(walls):.2f} s" for walls in ([run["wall"] for run in each] for each in runs)]
    lines += ["", f"Medians of {len(rounds)} rounds. The whole command took {spread[0]}, then {spread[1]}."]
    wall, cpu = (second[name] / first[name] for name in ("wall", "cpu"))
    return "\n".join(
        [*lines, f"The second run takes {wall:.0%} of the first one's time, and {cpu:.0%} of its CPU seconds."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="of the environment to try (default: this one)")
    parser.add_argument("--watched", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", metavar="WORD", help='of the command (default: generate "a red apple")')
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}: it must be a whole number >= 1")
    words = options.words or ["generate", "a red apple"]
    if options.watched:
        watched(options.watched, words)
        return
    own = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    python = shutil.which(options.python)
    if python is None:
        parser.error(f"--python is {options.python}: there is no such program")
    python = os.path.abspath(python)  # the runs have another working directory
    rounds = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as directory:
            place = pathlib.Path(directory)
            cached = {**environment, "XDG_CACHE_HOME": str(place / "cache")}
            outputs = ("first", "second")
            rounds.append([run(python, [*words, "-o", name, "--quiet"], place, cached) for name in outputs])
    print(table(rounds))


if __name__ == "__main__":
    main()
