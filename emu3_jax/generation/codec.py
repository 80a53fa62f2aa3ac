"""Encodes pictures and clips to codes and decodes codes, with the vision tokenizer's compiled programs."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from emu3_jax.config import AreaConfig, PictureConfig, VisionConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.tiles import Step, check_tile, tiled_decoder, tiled_encoder
from emu3_jax.media.clips import Clip
from emu3_jax.media.frames import FrameReader, check_resampling
from emu3_jax.media.images import normalise, postprocess, preprocess
from emu3_jax.media.inputs import Media, open_media
from emu3_jax.media.sizes import MAX_AREA, MAX_PIXELS
from emu3_jax.models.vision import Stream, check_codes, make_decoder, make_encoder
from emu3_jax.printable import shown
from emu3_jax.sharding.rules import LOGICAL_AXES, batch_shards

PART_FRAMES = 16  # frames of a clip that the vision tokenizer processes at once


def part_grids(temporal_factor: int) -> int:
    """Number of grids of codes of a clip that the vision tokenizer decodes at once."""
    return max(PART_FRAMES // temporal_factor, 1)


# Most pictures, and most pixels unless one picture has more, that a device decodes at once. On a GPU, a picture of
# 720x720 needs 6 GiB beside the weights.
_PICTURES_AT_ONCE, _PIXELS_AT_ONCE = 16, 2**19


@dataclasses.dataclass(frozen=True)
class Vision:
    """A vision tokenizer in memory: Emu3's or Emu3.5's. Several models may share one. For `fast` see `make_decoder`.

    `config` and `image` decide what it can do. Those of Emu3.5 know no clips, and resize every picture to an area.
    """

    config: VisionTokenizerConfig
    image: PictureConfig
    params: Any
    fast: bool = False

    def clips(self, what: str = "clips") -> VisionConfig:
        """The config of a tokenizer that knows clips. Raises `Emu3Error` for Emu3.5's; `what` begins the message."""
        if not isinstance(self.config, VisionConfig):
            raise Emu3Error(f"{what}: the vision tokenizer of Emu3.5 knows pictures alone; give pictures, or use Emu3")
        return self.config

    def with_area(self, area: int | None, tile: int | None = None) -> "Vision":
        """The same tokenizer, but pictures are resized to `area` pixels; None changes nothing.

        Raises:
            Emu3Error: `area` is not legal, or the tokenizer is Emu3's, which has limits of the area instead.
        """
        if area is None:
            return self
        if not isinstance(self.image, AreaConfig):
            raise Emu3Error(
                f"area is {shown(area)}: this vision tokenizer resizes pictures of other areas than "
                f"{self.image.min_pixels} to {self.image.max_pixels} pixels only, as Emu3 does; leave area out"
            )
        most = MAX_AREA if tile is None else MAX_PIXELS
        if not isinstance(area, int) or not 0 < area <= most:
            raise Emu3Error(f"area is {shown(area)}: it must be a number of pixels from 1 to {most}, such as 518400")
        return dataclasses.replace(self, image=AreaConfig(area))


def encode(
    vision: Vision,
    item: Media,
    independent: bool = False,
    *,
    fps: float | None = None,
    frames: int | None = None,
    tile: int | None = None,
    area: int | None = None,
) -> np.ndarray:
    """Encodes a picture to int32 codes [h, w], or a clip to [t, h, w]; see `Emu3.tokenize`."""
    factor = vision.config.spatial_factor
    check_tile(tile, factor)
    vision = vision.with_area(area, tile)
    media = open_media(item, fps=fps, frames=frames)

    def prepare(frame: np.ndarray) -> np.ndarray:
        with _errors_name(item):
            return preprocess(Image.fromarray(frame), vision.image, factor)

    if isinstance(media, FrameReader):
        with _errors_name(item):
            vision.clips("a clip")
        return _encode_frames(vision, media, prepare, independent, tile)
    with _errors_name(item):
        pixels = preprocess(media, vision.image, factor)
    return np.asarray(_step(vision, "encode", tile=tile)(pixels[None]))[0]


def encode_resized(vision: Vision, pixels: np.ndarray) -> np.ndarray:
    """Encodes uint8 pixels [H, W, 3] of a picture that is already resized, see `images.resize`, to codes [h, w]."""
    return np.asarray(_step(vision, "encode")(normalise(pixels, vision.image)[None]))[0]


def encode_end(vision: Vision, frames: np.ndarray, count: int) -> np.ndarray:
    """Encodes the last frames of uint8 [T, H, W, 3] to codes [count, h, w], as a clip of its own, without resizing.

    If there are too few frames, the first frame is repeated.
    """
    wanted = count * vision.clips().temporal_factor
    frames = frames[-wanted:]
    frames = np.concatenate([np.repeat(frames[:1], wanted - len(frames), axis=0), frames])
    return _encode_frames(vision, frames, lambda frame: normalise(frame, vision.image))


def decode(
    vision: Vision,
    codes: np.ndarray,
    independent: bool = False,
    *,
    frames: int | None = None,
    tile: int | None = None,
) -> Image.Image | Clip:
    """Decodes codes [h, w] to a picture, or [t, h, w] to a clip; see `Emu3.detokenize`."""
    config = vision.config
    check_resampling(None, frames)
    check_tile(tile, config.spatial_factor)
    check_codes(codes, config)
    _check_size(codes, config, tile)
    codes = codes.astype(np.int32)
    if codes.ndim == 2:
        return decode_picture(vision, codes, tile=tile)
    factor = vision.clips("codes of a clip").temporal_factor
    size = 1 if independent else part_grids(factor)
    step = _step(vision, "decode", in_parts=len(codes) > size and not independent, tile=tile)
    parts = [np.asarray(step(codes[None, first : first + size]))[0] for first in range(0, len(codes), size)]
    return Clip(np.concatenate([postprocess(part, vision.image) for part in parts])[:frames], defaults.FPS)


def decode_picture(vision: Vision, codes: np.ndarray, *, tile: int | None = None) -> Image.Image:
    """Decodes int32 codes [h, w] to a picture. Raises `Emu3Error` for a code outside the codebook.

    For `tile` see `Emu3.detokenize`.
    """
    return decoding_picture(vision, codes, tile=tile)()


def decoding_picture(vision: Vision, codes: np.ndarray, *, tile: int | None = None) -> Callable[[], Image.Image]:
    """As `decode_picture`, but only asks the device for the pixels. The function returned waits for the picture."""
    check_codes(codes, vision.config)
    pixels = _step(vision, "decode", tile=tile)(codes[None])
    return lambda: Image.fromarray(postprocess(np.asarray(pixels)[0], vision.image))


def batches_on(
    mesh: Mesh, config: VisionTokenizerConfig, grid: tuple[int, ...], count: int
) -> tuple[int, NamedSharding]:
    """The size and the sharding of the batches in which `decode_pictures` decodes many pictures or clips on a mesh.

    All devices share a batch, but where there are fewer pictures, no more of the axes `sequence` and `tensor` split it
    than there are pictures for.

    Args:
        mesh: the mesh.
        config: config of the vision tokenizer.
        grid: size of each picture or clip in codes, (h, w) or (t, h, w).
        count: number of pictures or clips.
    """
    axes, parts = [*(LOGICAL_AXES["batch"] or ())], batch_shards(mesh)
    for axis in mesh.axis_names:
        if axis not in axes and parts * mesh.shape[axis] <= count:
            axes.append(axis)
            parts *= mesh.shape[axis]
    pixels = math.prod(grid[-2:]) * config.spatial_factor**2
    if isinstance(config, VisionConfig) and len(grid) == 3:
        pixels *= min(PART_FRAMES, grid[0] * config.temporal_factor)  # are decoded at once
    most = min(_PICTURES_AT_ONCE, max(1, _PIXELS_AT_ONCE // pixels))
    return parts * min(most, -(-count // parts)), NamedSharding(mesh, PartitionSpec(tuple(axes)))


def decode_pictures(
    vision: Vision,
    codes: np.ndarray,
    *,
    at_once: int,
    place: NamedSharding | None = None,
    gather: Callable[[Any], Any] | None = None,
) -> np.ndarray:
    """Decodes pictures, or clips, of equal size in batches.

    Devices hold the pixels of two batches at most (or of two parts of clips): the host fetches those of one while the
    devices compute the next.

    Args:
        vision: the vision tokenizer.
        codes: int32 [N, h, w] of pictures, or [N, t, h, w] of clips.
        at_once: number of pictures or clips of a batch. Copies of the last one fill the last batch.
        place: sharding of a batch over a mesh, or None. Each device decodes its share.
        gather: makes an array that all processes can read of a batch of pixels, or None where they are local.

    Returns:
        uint8 [N, H, W, 3], or [N, T, H, W, 3] of clips.

    Raises:
        Emu3Error: a code is outside the codebook, or the tokenizer knows no clips.
    """
    check_codes(codes, vision.config)
    count = len(codes)
    parts: list[tuple[slice, ...]] = [()]  # places of the second axis on
    if codes.ndim == 4:
        size = part_grids(vision.clips("codes of clips").temporal_factor)
        parts = [(slice(start, start + size),) for start in range(0, codes.shape[1], size)]

    def dispatched(step: Step, part: np.ndarray) -> Any:
        placed: Any = part if place is None else jax.make_array_from_callback(part.shape, place, part.__getitem__)
        pixels = step(placed)
        return pixels if gather is None else gather(pixels)

    # Devices keep an array as long as a name holds it, so nothing else may hold these pixels.
    computing: list[Any] = []
    fetched: list[np.ndarray] = []

    def fetch() -> None:
        fetched.append(postprocess(np.asarray(computing.pop(0)), vision.image))

    for first in range(0, count, at_once):
        batch = codes[np.minimum(np.arange(first, first + at_once), count - 1)].astype(np.int32)
        step = _step(vision, "decode", in_parts=len(parts) > 1, place=place)
        for axis in parts:
            computing.append(dispatched(step, batch[:, *axis]))
            if len(computing) > 1:
                fetch()
    fetch()
    whole = [fetched[first : first + len(parts)] for first in range(0, len(fetched), len(parts))]
    return np.concatenate([one[0] if len(one) == 1 else np.concatenate(one, axis=1) for one in whole])[:count]


def _check_size(codes: np.ndarray, config: VisionTokenizerConfig, tile: int | None) -> None:
    """Raises `Emu3Error` for too large frames: a few kilobytes of codes may need more memory than there is."""
    height, width = (side * config.spatial_factor for side in codes.shape[-2:])
    if tile is None and height * width > MAX_AREA:
        raise Emu3Error(f"a frame of {width}x{height} pixels has more than {MAX_AREA:,}: decode it in tiles (tile=512)")


def _encode_frames(
    vision: Vision,
    frames: Iterable[np.ndarray],
    prepare: Callable[[np.ndarray], np.ndarray],
    independent: bool = False,
    tile: int | None = None,
) -> np.ndarray:
    """Encodes frames part by part. `prepare` converts a frame to pixels. Memory holds only the frames of one part."""
    factor = vision.clips().temporal_factor
    step, codes = None, []
    for part, last in _parts(map(prepare, frames), factor if independent else max(PART_FRAMES, factor)):
        if step is None:
            step = _step(vision, "encode", in_parts=not (last or independent), tile=tile)
        part = np.concatenate([part, np.repeat(part[-1:], -len(part) % factor, axis=0)])
        codes.append(np.asarray(step(part[None]))[0])
    return np.concatenate(codes)


def _parts(frames: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields parts of `size` frames (the last part may have fewer), and whether a part is the last."""
    frames = iter(frames)
    first = next(frames, None)
    while first is not None:
        part = np.stack([first, *itertools.islice(frames, size - 1)])
        first = next(frames, None)
        yield part, first is None


def _step(
    vision: Vision,
    method: str,
    *,
    in_parts: bool = False,
    tile: int | None = None,
    place: NamedSharding | None = None,
) -> Step:
    """The function of `method` "encode" or "decode". With `in_parts` it continues from the previous part of a clip.

    `place`: see `make_decoder`, for decoding alone.
    """

    def new_step() -> Step:
        if in_parts:
            return Stream(vision.clips(), vision.params, method, method == "decode" and vision.fast, place)
        make = make_encoder(vision.config) if method == "encode" else make_decoder(vision.config, vision.fast, place)
        return functools.partial(make, vision.params)

    if tile is None:
        return new_step()
    tiled = tiled_encoder if method == "encode" else tiled_decoder
    return tiled(new_step, tile, vision.config.spatial_factor)


@contextlib.contextmanager
def _errors_name(item: Media) -> Iterator[None]:
    """Adds the file's name to errors of the block, if `item` is a file."""
    try:
        yield
    except Emu3Error as error:
        if isinstance(item, str | os.PathLike):
            raise Emu3Error(f"{item}: {error}") from error
        raise
