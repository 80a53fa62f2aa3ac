"""Batches of cropped pictures and clips from manifests, to train and evaluate the vision tokenizer.

The contents and crops of batch i depend only on the seed and i, so a run can resume on any machine. Shapes: B pictures
or clips, T frames, H = W side of the crop in pixels.
"""

import concurrent.futures
import contextlib
import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from emu3_jax.data.epochs import Epochs
from emu3_jax.data.manifest import Manifest
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path, reading
from emu3_jax.media.clips import load_clip
from emu3_jax.media.images import load_image

Batch = dict[str, np.ndarray]

_MAX_BYTES = 2 << 30  # of a batch
_AHEAD = 3  # batches that threads prepare in advance


class PixelData:
    """The pictures and clips of manifests, cropped to one size. Lines of plain text are skipped.

    Attributes:
        stills: files of the pictures.
        clips: files of the clips.
        identity: SHA-256 of everything that determines the batches, except batch sizes and file contents.
    """

    def __init__(
        self, manifests: Sequence[str], size: int, frames: int, *, in_memory: bool, workers: int, seed: int = 0
    ):
        """Reads the manifests.

        Args:
            manifests: paths of manifests.
            size: side of a crop, in pixels.
            frames: number of frames in a cropped clip. Shorter clips repeat their last frame.
            in_memory: read all pictures and clips now, and keep them in memory.
            workers: number of threads that read.
            seed: seed of order and crops.

        Raises:
            Emu3Error: a manifest cannot be read; or, with `in_memory`, a picture cannot be read or is smaller than
                `size`.
        """
        self.stills: list[Path] = []
        self.clips: list[Path] = []
        for name in manifests:
            manifest = Manifest(local_path(name))
            for index in range(len(manifest)):
                entry = manifest[index]
                if entry.image is not None:
                    self.stills.append(entry.image)
                elif entry.clip is not None:
                    self.clips.append(entry.clip)
        self.size, self.frames, self._seed, self._workers = size, frames, seed, workers
        self._held: dict[Path, np.ndarray] = {}
        # The suffix gives stills and clips different orders. Keep it: runs in progress depend on these orders.
        self._epochs = {
            kind: Epochs(len(files), (seed,), suffix=(len(kind),))
            for kind, files in (("stills", self.stills), ("clips", self.clips))
        }
        # Use names of files and of their folders, not full paths: data may move between two runs.
        names = [
            [Path(file.parent.name, file.name).as_posix() for file in files] for files in (self.stills, self.clips)
        ]
        self.identity = hashlib.sha256(repr((names, size, frames, seed)).encode()).hexdigest()
        if in_memory:
            files = [*dict.fromkeys(self.stills), *dict.fromkeys(self.clips)]
            clips = set(self.clips)
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                read = pool.map(lambda file: self._read_clip(file) if file in clips else self._read_still(file), files)
                self._held = dict(zip(files, read, strict=True))
        self._tables = {
            "stills": self._table(self.stills, (size, size, 3)),
            "clips": self._table(self.clips, (frames, size, size, 3)),
        }

    def _table(self, files: list[Path], shape: tuple[int, ...]) -> np.ndarray | None:
        """Puts all files into one array, if they are in memory and need no crop. Returns None otherwise.

        Then a single NumPy operation makes a batch, and the threads that make batches do not hold the interpreter lock
        while the training loop needs it.
        """
        if not files or any(file not in self._held or self._held[file].shape != shape for file in files):
            return None
        table = np.stack([self._held[file] for file in files])
        self._held |= dict(zip(files, table, strict=True))  # views of the table, so no pixel is stored twice
        return table

    def require(self, stills: int, clips: int) -> None:
        """Raises an `Emu3Error` if `stills` > 0 and there are no pictures, or `clips` > 0 and there are no clips."""
        for count, files, kind in ((stills, self.stills, "pictures"), (clips, self.clips, "clips")):
            if count and not files:
                raise Emu3Error(
                    f"the manifests contain no {kind}, but a step needs {count}: add some, or set pixels."
                    f"{'stills' if kind == 'pictures' else 'clips'} to 0"
                )

    def batch(self, number: int, stills: int, clips: int, part: slice = slice(None)) -> Batch:
        """Makes one batch.

        Args:
            number: number of the batch, from 0.
            stills: pictures in the batch, over all processes.
            clips: clips in the batch, over all processes.
            part: the pictures and clips of the batch that this process needs; all by default.

        Returns:
            uint8 `stills` [B, H, W, 3] and `clips` [B, T, H, W, 3]. A kind whose number is 0 is left out.
        """
        batch = {}
        for kind, files, count, load in (
            ("stills", self.stills, stills, self._still),
            ("clips", self.clips, clips, self._clip),
        ):
            if count:
                places = np.arange(number * count, (number + 1) * count)[part]
                (_, chosen), table = self._epochs[kind].at(places), self._tables[kind]
                if table is not None:
                    batch[kind] = table[chosen]
                else:
                    pairs = zip(chosen.tolist(), places.tolist(), strict=True)
                    batch[kind] = np.stack([load(files[file], place) for file, place in pairs])
        return batch

    def batches(self, first: int, stills: int, clips: int, part: slice = slice(None)) -> Generator[Batch, None, None]:
        """Yields batches from number `first` on. Threads prepare them in advance, so close the generator at the end.

        The other arguments are the same as for `batch`.

        Raises:
            Emu3Error: this process's part of a batch needs more than 2 GiB of memory.
        """
        counts = [len(range(count)[part]) for count in (stills, clips)]
        size = (counts[0] + counts[1] * self.frames) * self.size**2 * 3
        if size > _MAX_BYTES:
            raise Emu3Error(
                f"{counts[0]} pictures and {counts[1]} clips of {self.frames} frames, {self.size}x{self.size} pixels, "
                f"need {size / 2**30:.1f} GiB per step and process; the limit is {_MAX_BYTES >> 30} GiB: lower stills, "
                "clips, frames or size of pixels"
            )
        with contextlib.ExitStack() as stack:
            # Each thread makes a whole batch, picture by picture. Several batches are in progress at the same time.
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(min(self._workers, _AHEAD)))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            waiting = [pool.submit(self.batch, first + i, stills, clips, part) for i in range(_AHEAD)]
            while True:
                first += 1
                ready = waiting.pop(0)
                waiting.append(pool.submit(self.batch, first + _AHEAD - 1, stills, clips, part))
                yield ready.result()

    def _still(self, file: Path, index: int) -> np.ndarray:
        held = self._held.get(file)
        return self._crop(self._read_still(file) if held is None else held, np.random.default_rng([self._seed, index]))

    def _clip(self, file: Path, index: int) -> np.ndarray:
        held = self._held.get(file)
        frames = self._read_clip(file) if held is None else held
        rng = np.random.default_rng([self._seed, index, 1])
        if len(frames) < self.frames:
            frames = np.concatenate([frames, np.repeat(frames[-1:], self.frames - len(frames), axis=0)])
        first = int(rng.integers(len(frames) - self.frames + 1))
        return self._crop(frames[first : first + self.frames], rng)

    def _crop(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crops a random square from [..., H, W, 3]."""
        height, width = pixels.shape[-3:-1]
        if height == width == self.size:
            return pixels
        top, left = (int(rng.integers(side - self.size + 1)) for side in (height, width))
        return pixels[..., top : top + self.size, left : left + self.size, :]

    def _read_still(self, file: Path) -> np.ndarray:
        with reading(file):
            image = load_image(file)
        return _scaled(image, self.size, file)

    def _read_clip(self, file: Path) -> np.ndarray:
        with reading(file):
            clip = load_clip(file)
        return np.stack([_scaled(Image.fromarray(frame), self.size, file) for frame in clip.frames])


def _scaled(image: Image.Image, size: int, file: Path) -> np.ndarray:
    """Resizes a picture so that its shorter side has `size` pixels. Returns uint8 [H, W, 3]."""
    shorter = min(image.size)
    if shorter < size:
        raise Emu3Error(
            f"{file} is {image.width}x{image.height} pixels, smaller than a crop of {size}: remove it, or choose a "
            "smaller pixels.size"
        )
    if shorter > size:
        width, height = (max(size, round(side * size / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
