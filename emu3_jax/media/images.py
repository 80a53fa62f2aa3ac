"""Pictures to the vision tokenizer's arrays and back, and their files."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from emu3_jax.config import ImageConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.media.sizes import smart_resize

_DEFAULT_CONFIG = ImageConfig()


def load_image(path: Path) -> Image.Image:
    """Reads a picture of any mode as RGB, turned upright by its EXIF orientation; of several frames, the first.

    Raises:
        Emu3Error: the file is missing, no picture, truncated, or so large that it may be a decompression bomb.
    """
    with open_picture(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright and in RGB.

    Transparency is dropped, not blended, as the reference does. Pictures of more than 8 bits are scaled, where Pillow
    would clip: 16 bits by 1/257, 32-bit integers and floats by the range that their values lie in.

    Raises:
        Emu3Error: a float picture has values that are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    elif image.mode == "La":  # Pillow has no direct way from premultiplied grey
        image = image.convert("LA")
    elif image.mode == "P" and image.has_transparency_data:  # ... and warns on the direct way from these
        image = image.convert("RGBA")
    return image.convert("RGB")


def preprocess(image: Image.Image, config: ImageConfig, factor: int) -> np.ndarray:
    """Pixels for the vision tokenizer, float32 `[H, W, 3]`, in upstream's order of operations to the last bit.

    Resized (bicubic) so that both sides are multiples of `factor` and the area lies within the config's limits, then
    normalised with its mean and standard deviation.

    Raises:
        Emu3Error: the picture is smaller than `factor` or more elongated than 5:1.
    """
    image = to_rgb(image)
    height, width = smart_resize(image.height, image.width, factor, config.min_pixels, config.max_pixels)
    return normalise(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), config)


def normalise(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 pixels `[..., H, W, 3]` to float32, with the config's mean and standard deviation."""
    scaled = (pixels * (1 / 255)).astype(np.float32)  # the product is float64, as in the reference
    return (scaled - np.float32(config.mean)) / np.float32(config.std)


def postprocess(pixels: np.ndarray, config: ImageConfig = _DEFAULT_CONFIG) -> np.ndarray:
    """Undoes the normalisation of `preprocess`: float pixels `[..., H, W, 3]` to uint8, truncated as upstream does."""
    mean = np.float32([-m / s for m, s in zip(config.mean, config.std, strict=True)])
    std = np.float32([1 / s for s in config.std])
    scaled = (np.asarray(pixels, np.float32) - mean) / std * np.float32(255)
    return scaled.clip(0, 255).astype(np.uint8)


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes `image` with `metadata` in PNG text fields, whole or not at all. Keys are Latin-1, values any text.

    Raises:
        Emu3Error: the file cannot be written, for example because the disk is full.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        # An argument that was not UTF-8 carries lone surrogates, which no PNG field can hold.
        info.add_text(key, value.encode("utf-8", "replace").decode())
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


@contextlib.contextmanager
def open_picture(path: Path, wanted: str = "picture") -> Iterator[Image.Image]:
    """Opens a picture or animation lazily; what fails while it is decoded in the `with` block becomes `Emu3Error`.

    `wanted` is what errors call it: "picture", "clip" or "picture or clip".
    """
    try:
        with Image.open(path) as image:
            yield image
    except Emu3Error as error:
        raise Emu3Error(f"{path}: {error}") from error
    except Image.UnidentifiedImageError as error:
        examples = "a PNG, JPEG, WebP or the like" if wanted == "picture" else "a GIF, WebP, PNG, MP4 or WebM file"
        raise Emu3Error(f"{path} is not a {wanted} that can be read: give {examples}") from error
    except Image.DecompressionBombError as error:
        raise Emu3Error(f"{path} is too large ({error}): scale the picture down") from error
    except FileNotFoundError as error:
        raise Emu3Error(f"cannot read {path}: {error.strerror}; give a {wanted} that exists") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Emu3Error(f"cannot read {path}: {reason}; give an undamaged {wanted}") from error


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of Pillow's modes I;16, I and F to uint8, rounded."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Emu3Error("the picture has values that are not finite: write it without NaN and infinity")
    # Files do not say what white is. Where the values fit the usual scales, those hold; else the extremes do.
    for black, white in ((0, 1), (0, 255)) if mode == "F" else ((0, 65535),):
        if black <= low and high <= white:
            break
    else:
        black, white = low, max(high, low + 1)
    return np.round((values - black) * (255 / (white - black))).astype(np.uint8)
