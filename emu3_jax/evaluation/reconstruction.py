"""The figure "reconstruction": how much of pictures and clips does the vision tokenizer preserve?"""

import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image

from emu3_jax.config import AreaConfig, ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.comparison import Comparison, Features, picture_files
from emu3_jax.evaluation.config import JUDGE, EvaluateConfig
from emu3_jax.evaluation.functions import PictureFunction
from emu3_jax.evaluation.items import Data, choose, in_batches
from emu3_jax.evaluation.judge import judge_of
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.picture_folder import PictureFolder
from emu3_jax.files import require_outside
from emu3_jax.generation.codec import Vision
from emu3_jax.media.images import postprocess, preprocess
from emu3_jax.models.vision import make_decoder, make_encoder
from emu3_jax.progress import Progress


class Reconstructor:
    """Encodes and decodes arrays of pictures and clips with a vision tokenizer, in batches of one shape."""

    def __init__(self, vision: Vision, batch_size: int, progress: bool | None = None):
        self.vision, self._batch_size, self._progress = vision, batch_size, progress

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes pictures or clips to codes.

        If the number of a clip's frames is no multiple of the temporal factor, its last frame is repeated.

        Args:
            pixels: uint8 [N, H, W, 3] for pictures, [N, T, H, W, 3] for clips.

        Returns:
            int32 [N, h, w] for pictures, [N, t, h, w] for clips.

        Raises:
            Emu3Error: the model would resize pictures of this size, so pixels could not be compared; or these are
                clips, and the vision tokenizer knows pictures alone.
        """
        vision, encode = self.vision, make_encoder(self.vision.config)
        if isinstance(vision.image, AreaConfig):  # Emu3.5's takes pictures of any area: here, of their own
            vision = vision.with_area(pixels.shape[-3] * pixels.shape[-2])
        if pixels.ndim == 5:
            missing = -pixels.shape[1] % vision.clips().temporal_factor
            pixels = np.concatenate([pixels, np.repeat(pixels[:, -1:], missing, axis=1)], axis=1)

        def codes(rows):
            frames = rows.reshape(-1, *rows.shape[-3:])
            seen = np.stack(
                [preprocess(Image.fromarray(f), vision.image, vision.config.spatial_factor) for f in frames]
            )
            if seen.shape != frames.shape:
                (height, width), (rows_seen, columns_seen) = frames.shape[1:3], seen.shape[1:3]
                raise Emu3Error(
                    f"the model resizes pictures of {width}x{height} pixels to {columns_seen}x{rows_seen}, so pixels "
                    "cannot be compared: choose another model, or build the data in a size that it keeps"
                )
            return encode(vision.params, seen.reshape(rows.shape))

        with self._bar("encoding", len(pixels)) as bar:
            return in_batches(codes, pixels, self._rows(pixels), bar)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decodes codes [N, h, w] to pictures uint8 [N, H, W, 3], or [N, t, h, w] to clips [N, T, H, W, 3]."""
        decode, vision = make_decoder(self.vision.config), self.vision

        def pixels(rows):
            return postprocess(np.asarray(decode(vision.params, rows)), vision.image)

        with self._bar("decoding", len(codes)) as bar:
            return in_batches(pixels, codes, self._rows(codes[..., None]), bar)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes and decodes `pixels`. The result has the same shape and dtype."""
        again = self.decode(self.encode(pixels))
        return again[:, : pixels.shape[1]] if pixels.ndim == 5 else again

    def digest(self) -> str:
        """SHA-256 of the vision tokenizer's weights and configs, which identifies it."""
        total = hashlib.sha256(f"{self.vision.config} {self.vision.image}".encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.vision.params):
            total.update(jax.tree_util.keystr(path).encode())
            total.update(np.ascontiguousarray(leaf))
        return total.hexdigest()

    def _rows(self, pixels: np.ndarray) -> int:
        """Rows per batch: fewer clips than pictures, because a clip has several frames."""
        return self._batch_size if pixels.ndim == 4 else max(1, self._batch_size // 8)

    def _bar(self, name: str, total: int) -> Progress:
        return Progress(self._progress, total, "items", name=name)


def measure(
    data: Data | PictureFolder,
    config: EvaluateConfig,
    reconstruct: Reconstructor,
    *,
    skipped: dict[str, str],
    progress: bool | None = None,
) -> tuple[dict[str, Any], list[Section]]:
    """Measures PSNR, SSIM, use of the codebook, and what `config.reconstruction` asks for.

    Of evaluation data: on held-out concepts; the use of the codebook over all pictures and clips. Of a folder of
    pictures: everything on the same pictures.

    Args:
        data: evaluation data, or a folder of pictures.
        config: config of the evaluation.
        reconstruct: the vision tokenizer.
        skipped: gets the reason for each kind of data that cannot be measured.
        progress: as in `progress.Progress`.

    Returns:
        The figures, and the sections of the page.

    Raises:
        Emu3Error: a picture or a user's function fails, or the data do not fit the model or the config.
    """
    if isinstance(data, PictureFolder):
        return _measure_folder(data, config, reconstruct, progress)
    figures, sections = {}, []
    total = np.zeros(reconstruct.vision.config.codebook_size, np.int64)
    for kind, name in (("picture", "pictures"), ("clip", "clips")):
        if kind == "clip" and not isinstance(reconstruct.vision.config, VisionConfig):
            skipped[f"reconstruction.{name}"] = "the vision tokenizer of Emu3.5 knows pictures alone"
            continue
        held_out = choose(data.where(kind, "concept"), config.cases, config.seed, f"reconstruction.{name}")
        if not held_out:
            skipped[f"reconstruction.{name}"] = f"the data has no {name} of held-out concepts"
            continue
        truth = data.pixels(held_out, progress)
        if kind == "picture":
            with picture_files(config.reconstruction, len(truth), truth[0].size // 3) as folder:
                features, pairwise = _functions(config, lambda: _judge_features(data, config, reconstruct, progress))
                again = reconstruct(truth)
                comparison = Comparison(features, pairwise, folder)
                starts = range(0, len(truth), config.batch_size)
                parts = [comparison.add(*(x[i : i + config.batch_size] for x in (truth, again))) for i in starts]
                psnr, ssim = map(np.concatenate, zip(*parts, strict=True))
                compared = comparison.figures(progress)
        else:
            again = reconstruct(truth)
            pairs = [pixels.reshape(-1, *pixels.shape[-3:]) for pixels in (truth, again)]
            psnr, ssim = (
                metric(*pairs).reshape(len(truth), -1).mean(axis=1) for metric in (metrics.psnr, metrics.ssim)
            )
            compared = {"psnr_db": float(psnr.mean()), "ssim": float(ssim.mean())}
        everything = data.where(kind) + data.where(f"procedural_{kind}")
        everything = choose(everything, config.codebook_cases, config.seed, f"codebook.{name}")
        codes = reconstruct.encode(data.pixels(everything, progress))
        counts = metrics.code_counts(codes, len(total))
        total += counts
        figures[name] = {
            "cases": len(held_out),
            **compared,
            "codebook_cases": len(everything),
            "codebook_use_percent": 100 * float((counts > 0).mean()),
            "perplexity": metrics.perplexity(counts),
        }
        shown = list(zip(truth, again, psnr, ssim, strict=True))[: config.rows]
        rows = tuple(_row(item.caption, *case) for item, case in zip(held_out, shown, strict=False))
        sections.append(Section(f"Reconstruction of {name}", "Concepts that are held out of training.", rows))
    if total.any():
        figures["codebook"] = _codebook(total)
    return figures, sections


def _measure_folder(
    data: PictureFolder, config: EvaluateConfig, reconstruct: Reconstructor, progress: bool | None
) -> tuple[dict[str, Any], list[Section]]:
    """`measure` of a folder. One batch of pictures is in memory at a time, and no picture is resized but by `cut`."""

    def no_judge() -> Features:
        raise Emu3Error(
            f"the features of the judge need evaluation data, and {data.directory} is a folder of pictures without "
            "items.jsonl: name your own with --set reconstruction.features=FILE.py:NAME"
        )

    if config.reconstruction.pictures is not None:  # the next run would take them for pictures of the folder
        require_outside(config.reconstruction.pictures, data.directory)
    features, pairwise = _functions(config, no_judge)
    side, vision = config.reconstruction.side, reconstruct.vision
    if side % vision.config.spatial_factor:
        raise Emu3Error(
            f"reconstruction.side is {side}: for this vision tokenizer it must be a multiple of "
            f"{vision.config.spatial_factor}"
        )
    if isinstance(vision.image, ImageConfig):  # limits of what commands read; the network has none
        limits = dataclasses.replace(vision.image, min_pixels=side * side, max_pixels=side * side)
        vision = dataclasses.replace(vision, image=limits)
    quiet = Reconstructor(vision, config.batch_size, progress=False)
    files = choose(data.files, config.cases, config.seed, "reconstruction.folder")
    counts, rows = np.zeros(reconstruct.vision.config.codebook_size, np.int64), []
    with (
        picture_files(config.reconstruction, len(files), side * side) as folder,
        Progress(progress, len(files), "pictures", name="reconstructing") as bar,
        ThreadPoolExecutor() as pool,
    ):
        comparison = Comparison(features, pairwise, folder)
        for start in range(0, len(files), config.batch_size):
            names = files[start : start + config.batch_size]
            truth = np.stack(list(pool.map(lambda name: data.pixels(name, side), names)))
            codes = quiet.encode(truth)
            again = quiet.decode(codes)
            counts += metrics.code_counts(codes, len(counts))
            cases = zip(names, truth, again, *comparison.add(truth, again), strict=True)
            rows += [_row(*case) for case in cases][: config.rows - len(rows)]
            bar.update(len(names))
        figures = {"pictures": {"cases": len(files), "side": side, **comparison.figures(progress)}}
    text = f"Pictures of {data.directory}, cut to {side}x{side} pixels."
    return {**figures, "codebook": _codebook(counts)}, [Section("Reconstruction of pictures", text, tuple(rows))]


def _functions(config: EvaluateConfig, judge: Callable[[], Features]) -> tuple[Features | None, PictureFunction | None]:
    """What `config.reconstruction` names: the features and the metric of pairs. `judge` makes the judge's features."""
    wanted, features = config.reconstruction, None
    if wanted.features == JUDGE:
        features = judge()
    elif wanted.features is not None:
        function = PictureFunction.load(wanted.features, "features", wanted.timeout)
        features = Features(function.name, lambda pictures: function(pictures, dims=2))
    if wanted.pairwise is None:
        return features, None
    return features, PictureFunction.load(wanted.pairwise, "pairwise", wanted.timeout)


def _judge_features(data: Data, config: EvaluateConfig, reconstruct: Reconstructor, progress: bool | None) -> Features:
    """The features of the judge that the figure "text_to_image" uses. Trains it if the data have none."""
    judge, _ = judge_of(data, config.judge, config.groups, reconstruct, reconstruct.digest(), progress)
    return Features(JUDGE, lambda pictures: judge.features(pictures, config.batch_size))


def _codebook(counts: np.ndarray) -> dict[str, Any]:
    return {
        "codes": len(counts),
        "counted": int(counts.sum()),
        "use_percent": 100 * float((counts > 0).mean()),
        "perplexity": metrics.perplexity(counts),
    }


def _row(title: str, truth: np.ndarray, again: np.ndarray, psnr: float, ssim: float) -> Row:
    return Row(title, (Cell("truth", truth), Cell(f"{psnr:.1f} dB, SSIM {ssim:.3f}", again)))
