"""Steps of `check_published.py` about files and checkpoints. Each function is one step and runs in its own process.

A step takes a job (a dict) and returns an `Outcome`. It imports what it needs inside the function, so that a step about
files does not start JAX.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu3_jax import progress
from emu3_jax.errors import Emu3Error

# Verdicts of comparisons and steps, from good to bad.
DONE, NOT_COMPARED, EQUAL, AGREES, NOT_RUN, DIFFERS, FAILED = VERDICTS = (
    "done", "not compared", "equal", "agrees", "not run", "differs", "failed",
)  # fmt: skip
SUFFIXES = (".json", ".safetensors", ".bin", ".tiktoken", ".txt")  # suffixes of the files to download
_BLOCK = 1 << 24  # number of bytes to hash or compare at once
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PACKAGES = (
    "emu3-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "pillow", "tiktoken", "huggingface-hub",
)  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """The result of a step.

    Attributes:
        verdict: a verdict from `VERDICTS`; with checks, their worst verdict.
        notes: sentences for the report.
        checks: comparisons, each with what was compared, the verdict and the detail.
        data: data for later steps, which must fit into JSON.
        files: files that the step wrote, relative to the output directory.
        device_peak_bytes: peak of the accelerator's memory in bytes, or None if unknown.
        new_bytes: bytes that the step left on the disk.
    """

    verdict: str = DONE
    notes: list[str] = dataclasses.field(default_factory=list)
    checks: list[dict[str, str]] = dataclasses.field(default_factory=list)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    device_peak_bytes: int | None = None
    new_bytes: int = 0

    def compare(self, what: str, verdict: str, detail: str) -> None:
        """Adds a comparison."""
        self.checks.append({"what": what, "verdict": verdict, "detail": detail})
        self.verdict = max(self.verdict, verdict, key=VERDICTS.index)


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of the installed packages among `packages`."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------------------ machine


def machine(job: Mapping[str, Any]) -> Outcome:
    """Describes JAX's platform, its devices, and the memory of one device in bytes."""
    import jax

    from emu3_jax.compilation import check_backend

    check_backend()
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") or host_memory()
    data = {
        "platform": device.platform,
        "device": device.device_kind,
        "count": jax.local_device_count(),
        "memory_bytes": limit,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_memory_bytes": host_memory(),
        "versions": {"python": platform.python_version(), **installed(_PACKAGES)},
    }
    return Outcome(data=data)


def host_memory() -> int:
    """The size of main memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor() -> str:
    """The processor's name."""
    try:
        told = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = re.findall(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return names[0] if names else platform.processor()


def device_peak() -> int | None:
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


# ------------------------------------------------------------------------------------------------ files


def download(job: Mapping[str, Any]) -> Outcome:
    """Finds a source's directory; downloads a hub id and asks the hub for the hashes of its files."""
    from emu3_jax.checkpoints.hub import fetch, local_source

    source = job["source"]
    directory = fetch(source)
    outcome = Outcome(data={"directory": str(directory), "hub": None})
    if local_source(source) is not None:
        outcome.notes.append("a local directory: nothing was downloaded")
        return outcome
    outcome.new_bytes = sum((directory / name).stat().st_size for name, *_ in listing(directory))
    revision = directory.name if _COMMIT.fullmatch(directory.name) else None
    outcome.notes.append(f"commit {revision or 'unknown'}")
    try:
        outcome.data["hub"] = hub_hashes(source, revision)
    except Exception as error:  # the hub's library and its network libraries raise many classes
        outcome.notes.append(f"the hub gave no hashes ({type(error).__name__})")
    return outcome


def hub_hashes(source: str, revision: str | None) -> dict[str, dict[str, Any]]:
    """Size, and SHA-256 or Git hash, of each file of a repository, from the hub."""
    import huggingface_hub

    told = huggingface_hub.HfApi().model_info(source, revision=revision, files_metadata=True)
    found = {}
    for file in told.siblings or []:
        large = file.lfs.sha256 if file.lfs else None
        found[file.rfilename] = {"bytes": file.size, "sha256": large, "git": None if large else file.blob_id}
    return found


def listing(directory: pathlib.Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time of a checkpoint's files, sorted by name."""
    try:
        entries = [(file.name, file.stat()) for file in directory.iterdir() if file.suffix in SUFFIXES]
    except OSError as error:
        raise Emu3Error(f"cannot read {directory}: {error.strerror}; give another directory") from error
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in entries)


def hash_files(job: Mapping[str, Any]) -> Outcome:
    """Computes the SHA-256 of every file of a checkpoint, and compares it with the hub's."""
    directory, hub = pathlib.Path(job["directory"]), job["hub"]
    outcome, files = Outcome(), []
    for name, size, _ in listing(directory):
        told = (hub or {}).get(name, {})
        sha256, git = digests(directory / name)
        verdict = NOT_COMPARED
        if told.get("sha256") or told.get("git"):
            same = sha256 == told["sha256"] if told["sha256"] else git == told["git"]
            verdict = EQUAL if same and size == told["bytes"] else DIFFERS
        files.append({"name": name, "bytes": size, "sha256": sha256, "hub": verdict})
    outcome.data = {"files": files}
    verdicts = [file["hub"] for file in files]
    if hub is None:
        outcome.compare(f"files of {job['title']} and the hub's hashes", NOT_COMPARED, f"{len(files)} files; no hub")
    else:
        worst = max(verdicts, key=VERDICTS.index, default=NOT_COMPARED)
        detail = f"{verdicts.count(EQUAL)} of {len(files)} files equal"
        bad = [file["name"] for file in files if file["hub"] == DIFFERS]
        outcome.compare(
            f"files of {job['title']} and the hub's hashes",
            worst,
            f"{detail}, other: {', '.join(bad)}" if bad else detail,
        )
    return outcome


def digests(file: pathlib.Path) -> tuple[str, str]:
    """A file's SHA-256 and its Git blob hash."""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    return sha256.hexdigest(), git.hexdigest()


# ------------------------------------------------------------------------------------------------ checkpoints


def shapes(job: Mapping[str, Any]) -> Outcome:
    """Compares a checkpoint's tensors with its config (names, shapes, dtypes), and its config with our defaults.

    Raises:
        Emu3Error: the files are damaged, or the tensors are not those that the config calls for.
    """
    import numpy as np

    from emu3_jax.checkpoints.published import Published
    from emu3_jax.config import DecoderConfig, ImageConfig, VisionConfig

    published = Published.open(pathlib.Path(job["directory"]))
    parts = published.layout.parts
    vision = published.vision_config() if "vision" in parts else None
    decoder = published.decoder_config(vision.codebook_size if vision else None) if "decoder" in parts else None
    faults = published.misfits(decoder, vision)
    if faults:
        raise Emu3Error(f"the tensors do not fit config.json: {'; '.join(faults)}")
    parameters = sum(math.prod(tensor.shape) for tensor in published.tensors)
    stored: dict[str, int] = {}
    for tensor in published.tensors:
        stored[np.dtype(tensor.dtype).name] = stored.get(np.dtype(tensor.dtype).name, 0) + tensor.nbytes
    outcome = Outcome(data={"layout": published.layout.title, "parts": list(parts), "parameters": parameters})
    dtypes = ", ".join(f"{progress.size(nbytes)} in {name}" for name, nbytes in sorted(stored.items()))
    outcome.notes.append(
        f"layout: {published.layout.title}; {len(published.tensors)} tensors, {parameters:,} numbers: {dtypes}"
    )
    for config, known in ((decoder, DecoderConfig()), (vision, VisionConfig())):
        if config is not None:
            outcome.notes.append(_differences(type(known).__name__, config, known))
    if vision is not None:
        outcome.notes.append(_differences("ImageConfig", published.image_config(), ImageConfig()))
    outcome.compare(f"tensors of {job['title']} and its config.json", EQUAL, f"{len(published.tensors)} tensors fit")
    for other in job["others"]:
        _compare_sources(outcome, published, job["title"], Published.open(pathlib.Path(other["directory"])), other)
    return outcome


def _differences(name: str, config: Any, known: Any) -> str:
    """A sentence about the fields of a published config that differ from this package's defaults."""
    pairs = [
        f"{field.name} {getattr(config, field.name)!r} (here {getattr(known, field.name)!r})"
        for field in dataclasses.fields(config)
        if field.name != "dtype" and getattr(config, field.name) != getattr(known, field.name)
    ]
    return f"{name}: {'equal to the defaults of this package' if not pairs else 'differs in ' + ', '.join(pairs)}"


def _compare_sources(outcome: Outcome, one: Any, title: str, other: Any, job: Mapping[str, Any]) -> None:
    """Adds a comparison of the weights that are in both checkpoints."""
    for part in one.layout.parts:
        if part in other.layout.parts and part in job["parts"]:
            _compare_part(outcome, one, other, part, f"{title} and in {job['title']}")


def _compare_part(outcome: Outcome, one: Any, other: Any, part: str, where: str) -> None:
    differing, count, nbytes = _compare_tensors(one, other, part)
    outcome.compare(
        f"weights of the {part} in {where}",
        DIFFERS if differing else EQUAL,
        f"{count - len(differing)} of {count} tensors equal bit for bit, {progress.size(nbytes)}"
        + (f", first difference: {differing[0]}" if differing else ""),
    )


def _compare_tensors(one: Any, other: Any, part: str) -> tuple[list[str], int, int]:
    """Compares a part of two open checkpoints. Returns the differing tensors, the number of tensors and their bytes."""
    differing, count, nbytes = [], 0, 0
    for weight in _weights(one, part):
        pair = [source.tensors_of([weight], part) for source in (one, other)]
        if not pair[0] and not pair[1]:
            continue  # a counter that neither has
        count += 1
        if not pair[0] or not pair[1]:
            differing.append(f"{weight.name} (absent in one)")
            continue
        (first,), (second,) = pair
        nbytes += first.nbytes
        if first.dtype != second.dtype:
            differing.append(f"{weight.name} ({first.dtype} and {second.dtype})")
        elif not _same_bits(first, second):
            differing.append(weight.name)
    return differing, count, nbytes


def _same_bits(first: Any, second: Any) -> bool:
    """Whether two tensors of one dtype have equal bits. Shapes may differ: a linear layer may be stored as kernel."""
    import numpy as np

    one, other = (tensor.read().reshape(-1).view(np.uint8) for tensor in (first, second))
    starts = range(0, max(len(one), len(other)), _BLOCK)
    return len(one) == len(other) and all((one[i : i + _BLOCK] == other[i : i + _BLOCK]).all() for i in starts)


def _weights(published: Any, part: str) -> Iterator[Any]:
    """Upstream's weights of a part, including counters of batch norms."""
    from emu3_jax.checkpoints import layouts

    if part == "vision":
        config = published.vision_config()
        yield from (weight for param in layouts.vision_params(config) for weight in param.weights)
        yield from layouts.vision_counters(config)
    else:
        codes = published.vision_config().codebook_size if "vision" in published.layout.parts else None
        config = published.decoder_config(codes)
        yield from (weight for param in layouts.decoder_params(config) for weight in param.weights)


def convert_source(job: Mapping[str, Any]) -> Outcome:
    """Converts a checkpoint to a bundle, and checks every weight of the bundle as `emu3-jax doctor` does."""
    from emu3_jax.checkpoints.convert import convert
    from emu3_jax.checkpoints.doctor import ERROR, WARN, doctor

    bundle = pathlib.Path(job["bundle"])
    if bundle.exists():
        shutil.rmtree(bundle)  # left by an earlier run with another source or version
    convert([job["directory"]], bundle, template="stage1" if "stage1" in job["source"].lower() else "chat")
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    outcome = Outcome(data={"bundle": str(bundle)}, files=[f"{bundle.parent.name}/{bundle.name}"], new_bytes=size)
    for finding in doctor(bundle):
        # Here each part has its own bundle, so missing parts are no fault.
        if finding.level in (ERROR, WARN) and not re.fullmatch(r"the bundle has no \w+ part", finding.what):
            outcome.notes.append(f"doctor, {finding.level}: {finding.what}: {finding.remedy}")
            if finding.level == ERROR:
                outcome.verdict = FAILED
    if outcome.verdict == DONE:
        outcome.notes.append("doctor: all weights are finite and none is zero throughout")
    return outcome


def export_bundle(job: Mapping[str, Any]) -> Outcome:
    """Exports a bundle to its original layout, compares each tensor with the source, and deletes the export."""
    from emu3_jax.checkpoints.export import export
    from emu3_jax.checkpoints.published import Published

    source = Published.open(pathlib.Path(job["directory"]))
    layout = "upstream" if source.layout.title.startswith("upstream") else "transformers"
    target = pathlib.Path(job["target"])
    if target.exists():
        shutil.rmtree(target)
    outcome = Outcome()
    try:
        export(job["bundle"], target, layout)
        back = Published.open(target)
        if source.layout == back.layout:
            names, found = ({tensor.name for tensor in one.tensors} for one in (source, back))
            lost = sorted(name for name in names ^ found if not name.endswith("rotary_emb.inv_freq"))
            if lost:
                outcome.compare(f"names of {job['title']} and of its export", DIFFERS, f"{len(lost)}, first {lost[0]}")
        for part in source.layout.parts:
            _compare_part(outcome, source, back, part, f"{job['title']} and in its export")
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return outcome
