"""Finds faults of a bundle or a published checkpoint, also faults that raise no error in use, and says what to do."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.checkpoints.bundle import PARTS, Bundle
from emu3_jax.checkpoints.checksums import (
    CHECKSUMS,
    COPY_AGAIN,
    EDITED_REMEDY,
    compare_checksums,
    has_checksums,
)
from emu3_jax.checkpoints.layouts import FLOAT_DTYPES
from emu3_jax.checkpoints.published import Published
from emu3_jax.config import DecoderConfig, SpecialTokens, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.models.quantization import SCALES, is_codes_or_scales
from emu3_jax.printable import one_line
from emu3_jax.progress import Progress
from emu3_jax.text.tokenizer import Tokenizer

OK, WARN, ERROR = "ok", "warn", "error"
_BLOCK = 1 << 24  # number of elements to check at once
# Bits that are all set in NaN and infinity. float8_e4m3fn has NaN alone, whose bits below the sign are all set.
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80, "float8_e4m3fn": 0x7F}
# Versions of transformers that silently drop the pictures of a prompt; 4.51.3 and 5.23.0 are good.
_DROPS_IMAGES = ((4, 52), (5, 23))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sentence about a model. `level` is "ok", "warn" or "error". `remedy` says what to do; it may be empty."""

    level: str
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        # The sentence may contain names and values from foreign files.
        object.__setattr__(self, "what", one_line(self.what))


def doctor(path: str | Path, progress: bool | None = None) -> list[Finding]:
    """Checks a bundle or a published checkpoint: all its weights and, for a bundle, its checksums. It writes nothing.

    Args:
      path: directory to check.
      progress: as in `progress.Progress`.

    Returns:
      The findings, in order.

    Raises:
      Emu3Error: `path` is not a directory. Every other fault is a finding.
    """
    path = local_path(path)
    if not path.is_dir():
        raise Emu3Error(f"{path} is not a directory: give a bundle or a checkpoint directory")
    is_bundle = any((path / part / "config.json").is_file() for part in PARTS)
    findings = list(_examine(_bundle(path, progress) if is_bundle else _published(path), progress))
    return findings + list(_oracle())


@dataclasses.dataclass
class _Patient:
    """The common view of a bundle or a published checkpoint. `arrays` yields each array once."""

    findings: list[Finding]
    decoder: DecoderConfig | None = None
    codes: int | None = None  # of the vision tokenizer, where one is there
    tokenizer: Callable[[], Tokenizer | None] | None = None
    arrays: Iterable[tuple[str, np.ndarray]] | None = None
    dtypes: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    nbytes: int = 0
    checksums: list[Finding] = dataclasses.field(default_factory=list)


def _attempt(findings: list[Finding], action: Callable[[], Any]) -> Any:
    """Returns the result of `action`. An `Emu3Error` becomes a finding, and the result is None."""
    try:
        return action()
    except Emu3Error as error:
        findings.append(Finding(ERROR, str(error)))
        return None


# ------------------------------------------------------------------------------------------------ the two kinds


def _bundle(path: Path, progress: bool | None) -> _Patient:
    patient = _Patient([], checksums=list(_checksums(path, progress)))
    bundle = _attempt(patient.findings, lambda: Bundle.open(path))
    if bundle is None:
        return patient
    held = [part for part in PARTS if bundle.has(part)]
    patient.findings.append(Finding(OK, f"a bundle with {', '.join(held)}"))
    for part in PARTS:
        if part not in held:
            what = f"the bundle has no {part} part"
            patient.findings.append(Finding(WARN, what, "fine when another bundle has it; else convert it in as well"))
    if bundle.has("decoder"):
        patient.decoder = bundle.decoder_config
        if bundle.quantize is not None:
            findings = patient.findings
            what = f"the decoder is quantised ({bundle.quantize}): training, merge and export have rounded weights"
            findings.append(Finding(OK, what))
    patient.codes = bundle.vision_config.codebook_size if bundle.has("vision") else None
    if bundle.has("tokenizer"):
        patient.tokenizer = bundle.tokenizer
        patient.findings.append(_template(bundle.template, path.name))
    sound: list[str] = []
    if any(finding.level == ERROR for finding in patient.checksums):
        return patient  # what damaged files say means nothing
    for part in ("decoder", "vision"):
        stored = _attempt(patient.findings, functools.partial(bundle.stored, part)) if bundle.has(part) else None
        if stored:
            sound.append(part)
            # `stored` has compared the dtypes of codes and scales.
            quantised = part == "decoder" and bundle.quantize is not None
            wide = (array for path, array in stored.items() if not (quantised and is_codes_or_scales(path)))
            what = "rest of the decoder" if quantised else part
            patient.dtypes[what] = {np.dtype(array.dtype).name for array in wide}
            patient.nbytes += sum(array.size * array.dtype.itemsize for array in stored.values())
    patient.arrays = (("/".join(path), array) for part in sound for path, array in bundle.stored_arrays(part))
    return patient


def _published(path: Path) -> _Patient:
    patient = _Patient([])
    findings = patient.findings
    source = _attempt(findings, lambda: Published.open(path))
    if source is None:
        return patient
    parts = source.layout.parts
    findings.append(Finding(OK, f"a published checkpoint of the {source.layout.title} layout: {' and '.join(parts)}"))
    vision = _attempt(findings, source.vision_config) if "vision" in parts else None
    if vision is not None:
        patient.codes = vision.codebook_size
        image = _attempt(findings, source.image_config)
        gaps, sentence = source.image_gaps() if image else ([], "")
        if {"image_mean", "image_std"} & {*gaps}:
            remedy = "add them, or copy preprocessor_config.json from where the weights came from"
            findings.append(Finding(WARN, sentence, remedy))
        elif gaps:
            findings.append(Finding(OK, sentence))
    names = ("preprocessor_config.json", "processor_config.json")
    if isinstance(vision, VisionConfig) and not any((path / name).is_file() for name in names):
        what = f"{path} has no preprocessor_config.json: the published picture sizes and means are assumed"
        findings.append(Finding(WARN, what, "copy preprocessor_config.json from where the weights came from"))
    if "decoder" in parts:
        codes = vision.codebook_size if vision else None
        patient.decoder = _attempt(findings, lambda: source.decoder_config(codes))
    if patient.decoder:
        findings += _config_gaps(source, patient.decoder.family)
        patient.tokenizer = functools.partial(source.tokenizer, patient.decoder.tokens)
    complete = all(c is not None for c in ([vision] * ("vision" in parts) + [patient.decoder] * ("decoder" in parts)))
    if complete:
        remedy = f"use the {source.config_file.name} that belongs to these weights, and fetch what is missing"
        findings += [Finding(ERROR, f"weights: {line}", remedy) for line in source.misfits(patient.decoder, vision)]
    floats = [t for t in source.tensors if t.dtype.name in FLOAT_DTYPES]
    prefix = source.layout.vision if "vision" in parts else None
    part_of = {t.name: "decoder" if prefix is None or not t.name.startswith(prefix) else "vision" for t in floats}
    for tensor in floats:
        patient.dtypes.setdefault(part_of[tensor.name], set()).add(tensor.dtype.name)
    patient.nbytes = sum(t.nbytes for t in floats)
    patient.arrays = ((t.name, t.read()) for t in floats)
    return patient


def _config_gaps(source: Published, family: str) -> Iterator[Finding]:
    """Checks fields whose defaults would be used without notice."""
    text = {**source.config, **(source.config.get("text_config") or {})}
    rope = text.get("rope_parameters") or {}
    if "rope_theta" not in text and "rope_theta" not in rope:
        what = f"config.json has no rope_theta: the published {DecoderConfig.rope_theta:.0f} is assumed"
        yield Finding(WARN, what, "add rope_theta if the model was trained with another base")
    if "image_area" not in text and family == "emu3":  # the tasks of Emu3.5 have areas of their own
        what = f"config.json has no image_area: pictures default to {DecoderConfig.image_area} pixels, as Emu3-Gen's do"
        yield Finding(WARN, what, "pass --area 262144 for Stage1, which was trained on 512x512")


# ------------------------------------------------------------------------------------------------ examinations


def _examine(patient: _Patient, progress: bool | None) -> Iterator[Finding]:
    yield from patient.findings
    if patient.decoder is not None:
        yield from _special_tokens(patient.decoder, patient.codes)
    if patient.tokenizer is not None:
        yield from _vocabulary(patient.tokenizer, patient.decoder)
    yield from _dtypes(patient.dtypes)
    if patient.arrays is not None:
        yield from _values(patient.arrays, patient.nbytes, progress)
    yield from patient.checksums


def _template(template: str, name: str) -> Finding:
    if "stage1" in name.lower() and template != "stage1":
        what = f"the prompt template is {template!r}, but the name {name} says Stage1, which was trained without it"
        return Finding(WARN, what, "convert again with --template stage1 if this is Emu3-Stage1")
    return Finding(OK, f"the prompt template is {template!r}")


def _special_tokens(config: DecoderConfig, codes: int | None) -> Iterator[Finding]:
    ids, end = config.tokens.visual_count, config.tokens.visual_end
    if codes not in (None, ids):
        what = f"the decoder has {ids} visual ids, the vision tokenizer {codes} codes"
        yield Finding(ERROR, what, "use the parts of one and the same model")
    if end != config.vocab_size:
        rows = config.vocab_size - end
        yield Finding(OK, f"the embedding has {rows} rows past the visual tokens, whose ids end at {end - 1}")
    if config.vocab_size == DecoderConfig.vocab_size and config.tokens != SpecialTokens():
        names = [field.name for field in dataclasses.fields(SpecialTokens)]
        wrong = [name for name in names if getattr(config.tokens, name) != getattr(SpecialTokens, name)]
        what = f"the ids of {', '.join(wrong)} differ from Emu3's though the vocabulary has its size"
        yield Finding(WARN, what, "take the ids from the published config.json, unless you changed them")


def _vocabulary(read: Callable[[], Tokenizer | None], config: DecoderConfig | None) -> Iterator[Finding]:
    findings: list[Finding] = []
    tokenizer = _attempt(findings, read)
    yield from findings
    if findings:
        return
    if tokenizer is None:
        remedy = "copy emu3.tiktoken (or tokenizer.json) beside config.json and convert again"
        yield Finding(WARN, "there is no vocabulary file: a bundle made of this can neither generate nor chat", remedy)
    elif config is not None and tokenizer.vocab_size > config.vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens, the decoder's embedding {config.vocab_size} rows"
        yield Finding(ERROR, what, "use the vocabulary and the weights of one and the same model")
    else:
        words = f", {len(tokenizer.added)} of them added after training" if tokenizer.added else ""
        yield Finding(OK, f"the vocabulary has {tokenizer.vocab_size} tokens{words}")


def _checksums(path: Path, progress: bool | None) -> Iterator[Finding]:
    if not has_checksums(path):
        what = f"the bundle has no {CHECKSUMS}: a bit that flips in its weights would go unnoticed"
        yield Finding(WARN, what, "convert the model again, which writes them")
        return
    findings: list[Finding] = []
    compared = _attempt(findings, lambda: compare_checksums(path, progress=progress))
    yield from findings
    if compared is None:
        return
    count, different = compared
    for difference in different:
        what = f"a file of the bundle {difference.what}: {path / difference.name}"
        if difference.edited:
            yield Finding(WARN, what, EDITED_REMEDY)
        else:
            yield Finding(ERROR, what, COPY_AGAIN)
            return  # one tells enough
    if not different:
        yield Finding(OK, f"the checksums of all {count} files are right")


def _dtypes(dtypes: dict[str, set[str]]) -> Iterator[Finding]:
    for part, found in dtypes.items():
        names = ", ".join(sorted(found))
        if part == "vision" and found != {"float32"}:
            what = f"the vision tokenizer is stored in {names}: rounding changes codes"
            yield Finding(WARN, what, "convert the float32 files that BAAI published")
        elif len(found) > 1:
            what = f"the {part}'s weights mix {names}"
            yield Finding(WARN, what, "convert with --dtype bfloat16, unless the mixture is meant")
        elif "float16" in found:
            what = f"the {part} is stored in float16, which overflows above 65,504; Emu3 was trained in bfloat16"
            yield Finding(WARN, what, "convert the bfloat16 original")
        else:
            yield Finding(OK, f"the {part} is stored in {names}")


def _values(arrays: Iterable[tuple[str, np.ndarray]], nbytes: int, progress: bool | None) -> Iterator[Finding]:
    """Reads each weight once, and yields findings about wrong numbers: NaN, infinity, negative scales, only zeros."""
    not_finite: list[str] = []
    negative: list[str] = []
    zero: list[str] = []
    digests: dict[str, bytes] = {}
    statistics: list[bool] = []
    with Progress(progress, nbytes, "bytes", name="doctor") as bar:
        try:
            for name, array in arrays:
                bits = array.reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))
                blocks = [bits[i : i + _BLOCK] for i in range(0, bits.size, _BLOCK)]
                exponents = bits.dtype.type(_EXPONENTS.get(array.dtype.name, 0))  # none: an integer is finite
                if exponents and any(((block & exponents) == exponents).any() for block in blocks):
                    not_finite.append(name)
                elif name.endswith(SCALES) and (array < 0).any():
                    negative.append(name)
                elif array.ndim > 1 and not any(block.any() for block in blocks):
                    zero.append(name)
                if re.search(r"(embed_tokens\.weight|embed/embedding|lm_head\.weight|head/kernel)$", name):
                    digests[name] = hashlib.blake2b(bits.data).digest()
                if re.search(r"norm[12][./](running_mean|mean)$", name):
                    statistics.append(bool(array.any()))
                if re.search(r"norm[12][./](running_var|var)$", name):
                    statistics.append(bool((array != 1).any()))
                bar.update(array.nbytes)
        except Emu3Error as error:
            yield Finding(ERROR, str(error))
            return
    again = "download or convert the weights again; a training run that diverged writes such weights, too"
    if not_finite:
        yield Finding(ERROR, f"{len(not_finite)} weights hold NaN or infinity, first {not_finite[0]}", again)
    if negative:
        what = f"{len(negative)} arrays of scales hold negative numbers, first {negative[0]}"
        yield Finding(ERROR, what, "quantise the full bundle again")
    if zero:
        what = f"{len(zero)} weights are zero throughout, first {zero[0]}: they were never loaded"
        yield Finding(ERROR, what, again)
    if statistics and not any(statistics):
        what = "the vision tokenizer's batch norms have mean 0 and variance 1 everywhere: never loaded"
        yield Finding(WARN, what, "convert a checkpoint saved with its buffers (running_mean, running_var)")
    if len(digests) == 2 and len(set(digests.values())) == 1:
        what = f"{' and '.join(sorted(digests))} are identical: the head was tied to the embedding by mistake"
        yield Finding(ERROR, what, "save the checkpoint with tie_word_embeddings false; Emu3's head is its own")
    if not (not_finite or negative or zero):
        yield Finding(OK, "all weights are finite and none is zero throughout")


def _oracle() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    low, high = _DROPS_IMAGES
    if low <= numbers < high:
        what = (
            f"transformers {version} is installed: versions from 4.52 up to some before 5.23 silently drop "
            "the pictures of a prompt, so do not compare answers with it"
        )
        yield Finding(WARN, what, "compare with transformers 4.51.3 or 5.23.0")
