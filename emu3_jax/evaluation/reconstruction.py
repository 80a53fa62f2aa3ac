"""The figure "reconstruction": how much of pictures and clips does the vision tokenizer preserve?"""

import hashlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from emu3_jax.config import AreaConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, choose, in_batches
from emu3_jax.evaluation.page import Cell, Row, Section
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
    data: Data,
    config: EvaluateConfig,
    reconstruct: Reconstructor,
    *,
    skipped: dict[str, str],
    progress: bool | None = None,
) -> tuple[dict[str, Any], list[Section]]:
    """Measures PSNR and SSIM on held-out concepts, and use of the codebook over all pictures and clips.

    Args:
        data: evaluation data.
        config: config of the evaluation.
        reconstruct: the vision tokenizer.
        skipped: gets the reason for each kind of data that cannot be measured.
        progress: as in `progress.Progress`.

    Returns:
        The figures, and the sections of the page.
    """
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
        again = reconstruct(truth)
        pairs = [pixels.reshape(-1, *pixels.shape[-3:]) for pixels in (truth, again)]
        frames = (len(truth), -1)
        psnr = metrics.psnr(*pairs).reshape(frames).mean(axis=1)
        ssim = metrics.ssim(*pairs).reshape(frames).mean(axis=1)
        everything = data.where(kind) + data.where(f"procedural_{kind}")
        everything = choose(everything, config.codebook_cases, config.seed, f"codebook.{name}")
        codes = reconstruct.encode(data.pixels(everything, progress))
        counts = metrics.code_counts(codes, len(total))
        total += counts
        figures[name] = {
            "cases": len(held_out),
            "psnr_db": float(psnr.mean()),
            "ssim": float(ssim.mean()),
            "codebook_cases": len(everything),
            "codebook_use_percent": 100 * float((counts > 0).mean()),
            "perplexity": metrics.perplexity(counts),
        }
        rows = [
            Row(item.caption, (Cell("truth", truth[i]), Cell(f"{psnr[i]:.1f} dB, SSIM {ssim[i]:.3f}", again[i])))
            for i, item in enumerate(held_out[: config.rows])
        ]
        sections.append(Section(f"Reconstruction of {name}", "Concepts that are held out of training.", tuple(rows)))
    if total.any():
        figures["codebook"] = {
            "codes": len(total),
            "counted": int(total.sum()),
            "use_percent": 100 * float((total > 0).mean()),
            "perplexity": metrics.perplexity(total),
        }
    return figures, sections
