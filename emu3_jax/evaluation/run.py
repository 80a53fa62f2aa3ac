"""A whole evaluation: `evaluate` measures all figures, `write` writes evaluation.json and index.html."""

import json
import os
from pathlib import Path
from typing import Any

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import (
    control,
    image_to_text,
    motion,
    people_prompts,
    reconstruction,
    several_shapes,
    stories,
    text_to_image,
    two_shapes,
)
from emu3_jax.evaluation.config import FIGURES, EvaluateConfig
from emu3_jax.evaluation.items import ITEMS, Data
from emu3_jax.evaluation.page import render
from emu3_jax.evaluation.picture_folder import PictureFolder
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.files import files_into
from emu3_jax.foreign import local_path
from emu3_jax.generation.pipeline import Emu3

FIGURES_FILE, PAGE_FILE = "evaluation.json", "index.html"
_DIGITS = 5


def open_data(config: EvaluateConfig) -> Data | PictureFolder:
    """Opens `config.data`: evaluation data, or a folder of pictures if no figure needs more and it has no items.jsonl.

    Raises:
        Emu3Error: the data cannot be read, or the folder has no pictures.
    """
    if not config.needs_data:
        return Data(None)
    if config.needs_items or (local_path(config.data) / ITEMS).exists():
        return Data(config.data)
    return PictureFolder(config.data)


def evaluate(
    model: Emu3, data: Data | PictureFolder, config: EvaluateConfig, progress: bool | None = None
) -> tuple[dict[str, Any], str]:
    """Measures the figures that `config.figures` names. On the same kind of device, a call gives the same figures.

    Args:
        model: model to evaluate.
        data: evaluation data, or a folder of pictures, as `open_data` returns it.
        config: config of the evaluation.
        progress: True shows progress bars on a terminal and lines in a log, None shows only bars, False nothing.

    Returns:
        The figures as a dict that fits into JSON (shares from 0 to 1), and the HTML of the page.

    Raises:
        Emu3Error: the model lacks a part that a figure needs, or the data does not fit the model.
    """
    reconstruct = Reconstructor(model.vision, config.batch_size, progress)
    quantize = config.quantize
    if set(config.figures) != {"reconstruction"}:
        # Raises an error with a remedy if the bundle has no decoder. A quantised bundle names its own quantisation.
        quantize = model.language.quantize
    figures: dict[str, Any] = {"model": model.name, "data": str(config.data), "seed": config.seed}
    if quantize is not None:
        figures["quantize"] = quantize
    if config.zipar is not None:
        figures["zipar"] = config.zipar
    sections, skipped = [], {}
    options = {"skipped": skipped, "progress": progress}
    for name, measure in {
        "reconstruction": lambda: reconstruction.measure(data, config, reconstruct, **options),
        "text_to_image": lambda: text_to_image.measure(model, data, config, reconstruct, **options),
        "image_to_text": lambda: image_to_text.measure(model, data, config, **options),
        "procedural": lambda: control.measure(model, data, config, reconstruct, **options),
        "motion": lambda: motion.measure(model, data, config, reconstruct, **options),
        "stories": lambda: stories.measure(model, config, progress=progress),
        "two_shapes": lambda: two_shapes.measure(model, config, progress=progress),
        "arrangements": lambda: several_shapes.measure(model, config, progress=progress),
        "people_prompts": lambda: people_prompts.measure(model, data, config, reconstruct, progress=progress),
    }.items():
        if name not in config.figures:
            if name in FIGURES:
                skipped[name] = "not in the config's figures"
            continue
        measured, shown = measure()
        if measured:
            figures[name] = measured
        sections += shown
    figures = _rounded({**figures, "skipped": skipped})
    return figures, render(f"Evaluation of {model.name}", figures, sections)


def write(directory: str | Path, figures: dict[str, Any], page: str, *, replace: bool = True) -> None:
    """Writes both files, or neither.

    Raises:
        Emu3Error: the directory cannot be written, or one of the files exists and `replace` is false.
    """
    with files_into(directory, replace=replace) as temporary:
        # The page may show a path whose name is not valid UTF-8.
        (temporary / FIGURES_FILE).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (temporary / PAGE_FILE).write_text(page, encoding="utf-8", errors="backslashreplace")


def check_directory(directory: str | Path) -> None:
    """Raises `Emu3Error` before the evaluation if `write` could not write to this directory."""
    if storage.is_remote(directory):
        storage.require_directory(storage.place(directory))
        return
    directory = local_path(directory)
    if os.path.lexists(directory) and not directory.is_dir():
        raise Emu3Error(f"{directory} is a file: choose a directory to write to (-o DIR)")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, _DIGITS) if isinstance(value, float) else value
