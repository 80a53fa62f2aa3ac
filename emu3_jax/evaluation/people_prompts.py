"""The figure "people_prompts": does the judge recognise pictures of short prompts, as people write them ("a cat")?

The data's `people_prompts.jsonl`, which scripts/build_pictures.py writes, has a prompt a line, and the concepts that it
may mean. A picture is recognised if the judge names one of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.data.records import check_text
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data
from emu3_jax.evaluation.judge import judge_of
from emu3_jax.evaluation.page import Cell, Curve, Row, Section
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.evaluation.text_to_image import generate
from emu3_jax.foreign import parse_json, read_bytes
from emu3_jax.generation.pipeline import Emu3

FILE = "people_prompts.jsonl"
_MAX_BYTES = 1 << 24  # largest file; a line has about 100 bytes
_BUILD = "build the data again (python scripts/build_pictures.py DIR)"


def read_prompts(directory: Path) -> list[tuple[str, frozenset[str]]]:
    """The prompts of `people_prompts.jsonl` in a data directory, each with the concepts that it may mean.

    Raises:
        Emu3Error: the file is missing, is malformed, or has no prompt.
    """
    file, found = directory / FILE, []
    for number, line in enumerate(read_bytes(file, _MAX_BYTES, _BUILD).splitlines(), start=1):
        where = f"{file} line {number}"
        entry = parse_json(line, where, _BUILD)
        text, concepts = (entry.get("text"), entry.get("concepts")) if isinstance(entry, dict) else (None, None)
        strings = isinstance(concepts, list) and all(isinstance(concept, str) for concept in concepts)
        if not isinstance(text, str) or not strings:
            raise Emu3Error(f'{where} is not an object with a text "text" and a list of names "concepts"; {_BUILD}')
        found.append((check_text(where, text), frozenset(concepts)))
    if not found:
        raise Emu3Error(f"{file} has no prompt; {_BUILD}")
    return found


def measure(
    model: Emu3, data: Data, config: EvaluateConfig, reconstruct: Reconstructor, *, progress: bool | None
) -> tuple[dict[str, Any], list[Section]]:
    """Draws all prompts at each guidance scale, and lets a judge name the pictures. It knows all concepts of training.

    Args:
        model: model to evaluate.
        data: evaluation data.
        config: config of the evaluation. Its `cases` and `groups` do not count here.
        reconstruct: the model's vision tokenizer.
        progress: as in `progress.Progress`.

    Returns:
        The figures, and the sections of the page. `named` is the number of prompts of which the judge knows a concept;
        top1 and top5 are shares of them.

    Raises:
        Emu3Error: as `read_prompts` and `judge_of`; or the judge knows a concept of no prompt.
    """
    prompts = read_prompts(data.directory)
    judge, training = judge_of(data, config.judge, None, reconstruct, reconstruct.digest(), progress)
    known = [[place for place, concept in enumerate(judge.concepts) if concept in meant] for _, meant in prompts]
    named = [number for number, places in enumerate(known) if places]
    if not named:
        raise Emu3Error(f"{data.directory / FILE}: no training picture shows what its prompts may mean; {_BUILD}")
    side, texts = training.shape[1:3], [text for text, _ in prompts]
    curve, pictures, verdicts = [], {}, {}
    for scale in config.guidance:
        drawn = generate(model, texts, side, guidance=scale, config=config, progress=progress)
        logits = judge.logits(drawn, 4 * config.batch_size)
        ranks = _ranks(logits[named], [known[number] for number in named])
        curve.append({"scale": scale, "top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())})
        pictures[scale], verdicts[scale] = drawn, logits.argmax(axis=1)
    best = max(curve, key=lambda point: point["top1"])["scale"]
    figures = {
        "cases": len(prompts),
        "named": len(named),
        "not_named": [texts[number] for number, places in enumerate(known) if not places],
        "best_guidance": best,
        "guidance": curve,
    }
    labels = {item.concept: item.label for item in data.where("picture", "train")}
    rows = [
        Row(text, [Cell(f"judge: {labels[judge.concepts[verdict]]}", picture, verdict in places if places else None)])
        for text, picture, verdict, places in zip(texts, pictures[best], verdicts[best], known, strict=True)
    ]
    lines = {name: tuple(point[name] for point in curve) for name in ("top1", "top5")}
    text = f"Guidance {best:g}. A green frame means that the judge names what the prompt may mean."
    chart = Curve("guidance scale", tuple(point["scale"] for point in curve), lines)
    return figures, [Section("Prompts as people write them", text, tuple(rows), chart)]


def _ranks(logits_nk: np.ndarray, known: list[list[int]]) -> np.ndarray:
    """The rank of the likeliest concept that each picture may show, int64 [N], as `Judge.ranks`.

    Args:
        logits_nk: float32 [N, K], from `Judge.logits`.
        known: for each picture, which of the K concepts it may show: one or more.
    """
    likeliest = np.array([logits[places].max() for logits, places in zip(logits_nk, known, strict=True)])
    return (logits_nk > likeliest[:, None]).sum(axis=1)
