"""Pixels for training and evaluating the vision tokenizer: manifests to batches of crops.

B pictures, T frames, H = W the crop. Which pictures batch i holds, and how they are cropped, is a pure function of the
seed and i, so that a run goes on anywhere.
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
_AHEAD = 3  # batches that are made before they are asked for


class PixelData:
    """The pictures and clips of manifests, as crops of one size; text-only lines are passed over.

    Attributes:
        stills: files of the pictures.
        clips: files of the clips.
        identity: SHA-256 of all that decides the batches, but for their sizes and what the files hold.
    """

    def __init__(
        self, manifests: Sequence[str], size: int, frames: int, *, in_memory: bool, workers: int, seed: int = 0
    ):
        """Reads the manifests, and with `in_memory` the pictures.

        Raises:
            Emu3Error: a manifest or, with `in_memory`, a picture cannot be read or is smaller than `size`.
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
        # The length of the kind's name tells the two orders apart; runs in progress depend on it.
        self._epochs = {
            kind: Epochs(len(files), (seed,), suffix=(len(kind),))
            for kind, files in (("stills", self.stills), ("clips", self.clips))
        }
        # Names in their order, not places: data may move.
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
        """All in one array, where they are held and need no crop: a batch is then one operation, and threads that make
        batches do not keep the interpreter from the loop that trains."""
        if not files or any(file not in self._held or self._held[file].shape != shape for file in files):
            return None
        table = np.stack([self._held[file] for file in files])
        self._held |= dict(zip(files, table, strict=True))  # views: nothing is held twice
        return table

    def require(self, stills: int, clips: int) -> None:
        """Raises `Emu3Error` unless there are pictures where `stills` are asked for, and clips likewise."""
        for count, files, kind in ((stills, self.stills, "pictures"), (clips, self.clips, "clips")):
            if count and not files:
                raise Emu3Error(
                    f"the manifests name no {kind}, and a step wants {count}: add some, or set pixels."
                    f"{'stills' if kind == 'pictures' else 'clips'} to 0"
                )

    def batch(self, number: int, stills: int, clips: int, part: slice = slice(None)) -> Batch:
        """Batch `number`: uint8 `stills` [B, H, W, 3] and `clips` [B, T, H, W, 3], each if asked for.

        Args:
            number: from 0.
            stills: of the batch, over all processes.
            clips: likewise.
            part: every how many-th of either this process wants, and from which on; all by default.
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
        """Batches from `first` on, made by threads before they are asked for; to be closed.

        Raises:
            Emu3Error: this process' part of a batch takes more than 2 GiB of memory.
        """
        counts = [len(range(count)[part]) for count in (stills, clips)]
        size = (counts[0] + counts[1] * self.frames) * self.size**2 * 3
        if size > _MAX_BYTES:
            raise Emu3Error(
                f"{counts[0]} pictures and {counts[1]} clips of {self.frames} frames, {self.size}x{self.size} pixels, "
                f"are {size / 2**30:.1f} GiB a step and process, at most {_MAX_BYTES >> 30} are made: lower stills, "
                "clips, frames or size of pixels"
            )
        with contextlib.ExitStack() as stack:
            # One thread a batch: within it the pictures follow each other, several batches are under way.
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
        """A random square of [..., H, W, 3]."""
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
    """uint8 [H, W, 3], the shorter side `size`."""
    shorter = min(image.size)
    if shorter < size:
        raise Emu3Error(
            f"{file} is {image.width}x{image.height} pixels, smaller than a crop of {size}: take it out, or choose a "
            "smaller pixels.size"
        )
    if shorter > size:
        width, height = (max(size, round(side * size / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
