"""Checks this package on Emu3's published weights, and writes a report that you can paste into an issue.

python scripts/check_published.py OUT

The script downloads BAAI/Emu3-Gen, BAAI/Emu3-Chat and BAAI/Emu3-VisionTokenizer, and BAAI/Emu3-Chat-hf for
transformers. It compares the files' hashes with the hub's hashes, and the tensors with config.json. It converts each
checkpoint, exports it again, and compares the export with the source. If transformers is installed, it also compares
codes of a photograph, logits after two prompts, and the first greedy tokens of a picture and of an answer. Without
transformers these are "not compared". docs/published.md lists the disk space and memory that it needs.

OUT keeps the result of each step. After an error or a kill, run the same command again: it skips finished steps.
Exit codes: 0 all comparisons hold, 1 a step failed or a comparison does not hold (see the report), 2 bad arguments.
"""

import argparse
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from published_plan import MARK, NONE, PHOTO, ROOT, SOURCE, Step, check, choose_dtype, parser, plan, sources
from published_report import public_names, report, source_name
from published_steps import FAILED, NOT_COMPARED, NOT_RUN, VERDICTS, installed

import emu3_jax
from emu3_jax import progress
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import local_path
from emu3_jax.locks import locked
from emu3_jax.printable import one_line


def launch(file: pathlib.Path, environment: Mapping[str, str]) -> tuple[int, int]:
    """Runs the job `file` in a new process. Returns its exit code (negative: a signal) and peak memory in bytes."""
    process = subprocess.Popen([sys.executable, __file__, "--child", str(file)], env={**os.environ, **environment})
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_job(file: pathlib.Path) -> None:
    """Runs the function that a job names, and writes its result or its error to a file beside the job."""
    job = json.loads(file.read_text())
    module, _, function = job.pop("function").partition(":")
    try:
        answer = dataclasses.asdict(getattr(importlib.import_module(module), function)(job))
    except Emu3Error as error:
        answer = {"error": str(error)}
    except Exception as error:  # the report must contain every failure
        traceback.print_exc()
        first = str(error).strip().split("\n", 1)[0]
        answer = {"error": one_line(f"{type(error).__name__}: {first}")}
    file.with_suffix(".answer").write_text(json.dumps(answer))


@dataclasses.dataclass
class Runner:
    """Runs steps and stores each result as a JSON file. A stored result is reused if its inputs are the same."""

    out: pathlib.Path
    environments: Mapping[str, Mapping[str, str]]  # environment variables of a step's process, by `Step.on`
    machines: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    jobs: Mapping[str, dict[str, Any]] = dataclasses.field(
        default_factory=dict
    )  # jobs that describe the machines, by `Step.on`

    def run(self, step: Step, why: str | None = None) -> dict[str, Any]:
        """Runs a step and returns its result. `why`, if given, is the reason that the step is not compared."""
        result = self._result(step, why)
        self.results[step.name] = result
        return result

    def _result(self, step: Step, why: str | None) -> dict[str, Any]:
        if why:
            return _empty(step, NOT_COMPARED, why)
        absent = [name for name in step.needs if not self._usable(name)]
        if absent:
            return _empty(step, NOT_RUN, f"it needs the step {absent[0]}, which failed or was not run")
        try:
            if step.on:
                self.machine(step.on)
            job = step.job({name: self.results[name]["data"] for name in step.needs})
        except Emu3Error as error:
            return {**_empty(step, FAILED, str(error)), "notes": [], "error": str(error)}
        key = self._key(step, job)
        kept = self._kept(step, key)
        if kept:
            return {**kept, "kept": True}
        start = time.perf_counter()
        answer, peak = self._launch(step.function, job, step.on)
        empty = {**_empty(step, FAILED, answer["error"]), "notes": []} if "error" in answer else {"step": step.name}
        seconds = round(time.perf_counter() - start, 2)
        result = {**empty, **answer, "key": key, "seconds": seconds, "peak_bytes": peak}
        with new_file(self._file(step)) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def machine(self, on: str) -> dict[str, Any]:
        """Describes the device of JAX ("ours") or PyTorch ("reference"). Raises `Emu3Error` if there is none."""
        if on not in self.machines:
            module = "published_steps" if on == "ours" else "published_reference"
            answer, _ = self._launch(f"{module}:machine", self.jobs.get(on, {}), on)
            if "error" in answer:
                raise Emu3Error(answer["error"])
            self.machines[on] = answer["data"]
        return self.machines[on]

    def _usable(self, name: str) -> bool:
        result = self.results.get(name)
        return result is not None and result["verdict"] not in (FAILED, NOT_RUN)

    def _key(self, step: Step, job: Mapping[str, Any]) -> str:
        needs = {name: [self.results[name][field] for field in ("data", "checks")] for name in step.needs}
        made_of = {
            "step": step.name,
            "job": job,
            "needs": needs,
            "code": code_digest(),
            "on": self.machines.get(step.on),
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def _kept(self, step: Step, key: str) -> dict[str, Any] | None:
        """The stored result of an earlier run, if its inputs are the same and all its files still exist."""
        try:
            result = json.loads(self._file(step).read_text())
        except (OSError, ValueError):
            return None
        if result.get("key") != key or result["verdict"] == FAILED:
            return None
        return result if all((self.out / file).exists() for file in result["files"]) else None

    def _file(self, step: Step) -> pathlib.Path:
        return self.out / "results" / f"{step.name.replace(' ', '-')}.json"

    def _launch(self, function: str, job: Mapping[str, Any], on: str) -> tuple[dict[str, Any], int]:
        file = self.out / "job.json"
        answer = file.with_suffix(".answer")
        answer.unlink(missing_ok=True)
        file.write_text(json.dumps({"function": function, **job}))
        try:
            code, peak = launch(file, self.environments.get(on, {}))
            if not answer.is_file():
                reason = f"signal {-code}, perhaps out of memory" if code < 0 else f"exit code {code}"
                return {"error": f"its process ended with {reason}"}, peak
            return json.loads(answer.read_text()), peak
        finally:
            for leftover in (file, answer):
                leftover.unlink(missing_ok=True)


def _empty(step: Step, verdict: str, why: str) -> dict[str, Any]:
    """The result of a step that did not finish."""
    checks = [{"what": what, "verdict": verdict, "detail": why} for what in step.checks]
    return {"step": step.name, "verdict": verdict, "notes": [why], "checks": checks, "data": {}, "files": []}


def code_digest() -> str:
    """A hash of the code and of the packages' versions. Results of another version are not reused."""
    versions = installed(("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "pillow", "torch", "transformers"))
    digest = hashlib.sha256(json.dumps([sys.version, versions]).encode())
    package = pathlib.Path(emu3_jax.__file__).parent
    for file in (*sorted(package.rglob("*.py")), *sorted(pathlib.Path(__file__).parent.glob("*published*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def why_no_oracle(options: argparse.Namespace, step: Step) -> str | None:
    """The reason that a step of the oracle (transformers) cannot run, or None if it can."""
    chosen = options.gen_reference if step.group == "picture" else options.reference
    if chosen == NONE:
        return f"--{'gen-' if step.group == 'picture' else ''}reference is none"
    return None if has_transformers() else "transformers and PyTorch are not installed"


def has_transformers() -> bool:
    """Whether transformers and PyTorch are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("transformers", "torch"))


# ------------------------------------------------------------------------------------------------ the whole


def run(options: argparse.Namespace) -> int:
    """Runs all steps, writes the report, and returns the exit code."""
    check(options)
    out = local_path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", lambda who: f"{out} is in use by {who}: wait until it ends", passing=True):
        (out / MARK).write_text(json.dumps({"of": "check_published.py"}) + "\n")
        (out / "results").mkdir(exist_ok=True)
        (out / "bundles").mkdir(exist_ok=True)
        return _run(options, out)


def _run(options: argparse.Namespace, out: pathlib.Path) -> int:
    environments = {
        "": {"JAX_PLATFORMS": "cpu"},
        "ours": {"JAX_PLATFORMS": options.device} if options.device else {},
        "reference": {"JAX_PLATFORMS": "cpu"},  # so that JAX leaves the accelerator to PyTorch
    }
    runner = Runner(out, environments, jobs={"reference": {"device": options.reference_device}})
    oracle = has_transformers()

    def dtype(parameters: int) -> str:
        sides = ["ours", "reference"] if oracle else ["ours"]
        return choose_dtype(options.dtype, parameters, [runner.machine(side)["memory_bytes"] for side in sides])

    steps = plan(options, dtype, oracle)
    try:
        for number, step in enumerate(steps, start=1):
            print(f"[{number}/{len(steps)}] {step.name}", flush=True)
            why = why_no_oracle(options, step) if step.on == "reference" else None
            print(f"    {_said(runner.run(step, why))}", flush=True)
    finally:
        target = local_path(options.report) if options.report else out / "report.md"
        with new_file(target) as temporary:
            temporary.write_text(_report(options, out, runner, steps))
    print(f"report: {target}")
    bad = [result for result in runner.results.values() if VERDICTS.index(result["verdict"]) >= VERDICTS.index(NOT_RUN)]
    return 1 if bad else 0


def _said(result: Mapping[str, Any]) -> str:
    """The line that is printed for a result."""
    if "error" in result:
        return f"{result['verdict']}: {result['error']}"
    if result.get("kept"):
        return f"{result['verdict']}, reused from an earlier run"
    if result.get("seconds") is None:
        return f"{result['verdict']}: {result['notes'][0]}"
    return f"{result['verdict']}, {result['seconds']} s, peak memory {progress.size(result['peak_bytes'])}"


def _report(options: argparse.Namespace, out: pathlib.Path, runner: Runner, steps: Sequence[Step]) -> str:
    """The report. Steps that an interruption left out are listed as not run."""
    results = [runner.results.get(step.name) or _empty(step, NOT_RUN, "the check was stopped") for step in steps]
    checks = [check for result in results for check in result["checks"]]
    names = {str(local_path(source)): name for name, source in sources(options).items() if os.path.isdir(source)}
    public = public_names({**names, str(out): "OUT", str(local_path(options.photo)): "PHOTO", str(ROOT): "."})
    return report(_facts(options, runner), results, checks, public)


def _facts(options: argparse.Namespace, runner: Runner) -> dict[str, str]:
    """The facts at the head of the report."""
    facts = {
        "checked": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "emu3-jax": installed(["emu3-jax"]).get("emu3-jax", "not installed"),
    }
    commit = _commit()
    if commit:
        facts["emu3-jax"] += f", commit {commit}"
    for name, source in sources(options).items():
        facts[name] = source_name(source) + (" (a local directory)" if os.path.isdir(source) else "")
    for option, source in (("reference", options.reference), ("gen-reference", options.gen_reference)):
        facts.setdefault(option, "the files under test" if source == SOURCE else "none")
    own = pathlib.Path(options.photo).absolute() == PHOTO
    facts["photograph"] = "the repository's (scripts/assets/chelsea.jpg)" if own else "not the repository's"
    ours, theirs = runner.machines.get("ours"), runner.machines.get("reference")
    versions = {"python": sys.version.split()[0], **installed(("jax", "jaxlib", "flax", "numpy", "pillow"))}
    if ours:
        facts["JAX computes on"] = f"{ours['count']} x {ours['device']} ({ours['platform']}), the first of them"
        facts["machine"] = (
            f"{ours['system']}, {ours['processor']}, {ours['cores']} cores, {progress.size(ours['host_memory_bytes'])}"
        )
        versions = ours["versions"]
    if theirs:
        facts["PyTorch computes on"] = theirs["device"]
        versions = {**versions, **theirs["versions"]}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def _commit() -> str:
    """The commit of this checkout, with a + if tracked files were changed. Empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        told = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.strip() + ("+" if changed else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check and returns the exit code. Bad arguments exit with 2."""
    options = parser(__doc__).parse_args(arguments)
    try:
        return run(options)
    except Emu3Error as error:
        print(f"check_published.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check_published.py: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and kills this one
        run_job(pathlib.Path(sys.argv[2]))
        sys.exit()
    sys.exit(main())
