"""Compares true pictures with their reconstructions, batch by batch, so that no folder must fit into memory."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.config import ReconstructionConfig
from emu3_jax.evaluation.functions import PictureFunction
from emu3_jax.files import new_directory
from emu3_jax.printable import counted

TRUE, RECONSTRUCTED = "true", "reconstructed"  # the two folders of PNG files
_BYTES = 2  # of a PNG file of a photograph, per pixel


class Features(NamedTuple):
    """A function of pictures uint8 [N, H, W, 3] that returns float [N, D], and its name in the figures."""

    name: str
    call: Callable[[np.ndarray], np.ndarray]


class Comparison:
    """PSNR and SSIM, and what the config asks for: the Fréchet distance, the metric of pairs, and the PNG files."""

    def __init__(self, features: Features | None, pairwise: PictureFunction | None, folder: Path | None):
        """
        Args:
            features: for the Fréchet distance; None leaves it out.
            pairwise: gets true pictures and reconstructions and returns a number for each pair; None leaves it out.
            folder: an empty directory that gets the PNG files; None writes none.
        """
        self._features, self._pairwise, self._folder = features, pairwise, folder
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in ("psnr", "ssim", "pairs", TRUE, RECONSTRUCTED)}
        self._count = 0
        if folder is not None:
            for name in (TRUE, RECONSTRUCTED):
                (folder / name).mkdir()

    def add(self, true: np.ndarray, again: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes a batch.

        Args:
            true: the pictures, uint8 [N, H, W, 3].
            again: their reconstructions, of the same shape.

        Returns:
            PSNR in dB and SSIM of each picture, float64 [N] each.

        Raises:
            Emu3Error: a user's function fails or returns something wrong, or a file cannot be written.
        """
        with ThreadPoolExecutor() as pool:  # NumPy and zlib leave the interpreter lock
            ssim = np.concatenate(list(pool.map(metrics.ssim, _singles(true), _singles(again))))
            if self._folder is not None:
                for name, pictures in ((TRUE, true), (RECONSTRUCTED, again)):
                    files = [self._folder / name / f"{self._count + i:06}.png" for i in range(len(pictures))]
                    list(pool.map(_save, pictures, files))
        psnr = metrics.psnr(true, again)
        self._rows["psnr"].append(psnr)
        self._rows["ssim"].append(ssim)
        if self._features is not None:
            for name, pictures in ((TRUE, true), (RECONSTRUCTED, again)):
                found = self._features.call(pictures)
                if found.shape[1] != (width := (self._rows[TRUE] or [found])[0].shape[1]):
                    raise Emu3Error(
                        f"the features {self._features.name} have {found.shape[1]} numbers for a picture, and {width} "
                        "for an earlier one: return as many for every picture"
                    )
                self._rows[name].append(found)
        if self._pairwise is not None:
            self._rows["pairs"].append(self._pairwise(true, again, dims=1))
        self._count += len(true)
        return psnr, ssim

    def figures(self, progress: bool | None = None) -> dict[str, Any]:
        """The figures over all batches. Says so where there are too few pictures for the Fréchet distance."""
        figures: dict[str, Any] = {
            "psnr_db": float(np.concatenate(self._rows["psnr"]).mean()),
            "ssim": float(np.concatenate(self._rows["ssim"]).mean()),
        }
        if self._features is not None:
            true, again = (np.concatenate(self._rows[name]) for name in (TRUE, RECONSTRUCTED))
            distance = metrics.frechet_distance(true, again)
            count, width = true.shape
            figures["frechet_distance"] = {
                "features": self._features.name, "distance": distance, "pictures": count, "dimensions": width,
                "full_rank": count > width,
            }  # fmt: skip
            if count <= width and progress is not False:
                print(
                    f"emu3-jax: the covariances of {width} features of {counted(count, 'picture')} are not of full "
                    "rank: compare this Fréchet distance only with distances of as many pictures",
                    file=sys.stderr,
                )
        if self._pairwise is not None:
            figures["pairwise"] = {self._pairwise.name: float(np.concatenate(self._rows["pairs"]).mean())}
        return figures


@contextlib.contextmanager
def picture_files(config: ReconstructionConfig, count: int, pixels: int) -> Iterator[Path | None]:
    """Yields a temporary directory for the PNG files, which becomes `config.pictures`; or None if none are wanted.

    Args:
        config: says where the files go.
        count: number of pictures.
        pixels: pixels of a picture.

    Raises:
        Emu3Error: the directory exists, cannot be written, or its disk has too little space.
    """
    if config.pictures is None:
        yield None
        return
    with new_directory(config.pictures, 2 * count * pixels * _BYTES) as folder:
        yield folder


def _singles(pictures: np.ndarray) -> list[np.ndarray]:
    return [pictures[i : i + 1] for i in range(len(pictures))]


def _save(pixels: np.ndarray, file: Path) -> None:
    Image.fromarray(pixels).save(file, format="PNG")  # the whole directory is temporary, see `picture_files`
