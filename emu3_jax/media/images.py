"""Reads and writes picture files, and converts pictures to the vision tokenizer's arrays and back."""

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from emu3_jax.config import AreaConfig, ImageConfig, PictureConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import plain_file, reading
from emu3_jax.media.sizes import area_resize, smart_resize

_DEFAULT_CONFIG = ImageConfig()

# Formats that Pillow decodes by itself. For other formats it may run external programs, as for EPS.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "ICNS", "TGA"),
    *("PCX", "PSD", "SGI", "DDS", "QOI", "XBM", "XPM"),
)
_PLUGIN_FORMATS = ("HEIF", "JXL")  # `pillow-heif` adds HEIF; callers may have added JXL to Pillow
HEIC_SUFFIXES = frozenset((".heic", ".heif"))
_NO_HEIC = "HEIC pictures need pillow-heif, which is not installed: pip install 'emu3-jax[heic]', or convert them"
# Limits on memory. Pillow needs four bytes for a pixel of three channels, and conversions hold two pictures at once.
_MOST_PIXELS = 120_000_000  # cameras of phones have up to 108,000,000
_MOST_PIXELS_COSTLY = 50_000_000  # for formats whose decoders hold more copies
_CHEAP_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "PPM")
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the operation for each value of EXIF's orientation
_ROWS = 1 << 20  # pixels that `_to_8_bits` converts at once


def load_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Reads a picture as RGB, and rotates it as its EXIF orientation says. Of an animated file, reads the first frame.

    Args:
        path: the file.
        data: contents of the picture, if it is not a file of its own. Then `path` only names it in errors.

    Raises:
        Emu3Error: the file is missing, not a picture, truncated, or so large that it may be a decompression bomb.
    """
    with open_picture(path, data=data) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB, and rotates it as its EXIF orientation says.

    Transparency is dropped without blending, as in the reference. Values of more than 8 bits are scaled, while Pillow
    would clip them: 16-bit values by 1/257, other integers and floats by the range of the picture's values.

    Raises:
        Emu3Error: a float picture has values that are not finite.
    """
    image = upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    elif image.mode == "La":  # Pillow cannot convert premultiplied grey directly
        image = image.convert("LA")
    elif image.mode == "P" and image.has_transparency_data:  # Pillow would warn about a direct conversion
        image = image.convert("RGBA")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Rotates and mirrors a picture as its EXIF orientation says. Unreadable EXIF data is ignored."""
    image.load()  # some formats store EXIF after the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        method = _TRANSPOSED.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # Pillow raises errors of many kinds for damaged EXIF data
        method = None
    if method is None:
        return image
    turned = image.transpose(method)
    # Remove the orientation, or the next reader would rotate the picture again.
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        turned.info.pop(key, None)
    return turned


def on_white(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB on a white background. In clips, hidden colours of transparent parts are arbitrary."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_rgb(image)


def preprocess(image: Image.Image, config: PictureConfig, factor: int) -> np.ndarray:
    """Converts a picture to pixels for the vision tokenizer. The result equals upstream's bit for bit.

    The picture is resized (bicubic) to the size from `smart_resize` (Emu3) or `area_resize` (Emu3.5), and normalised.

    Args:
        image: the picture.
        config: Emu3's limits of the area, mean and standard deviation; or Emu3.5's area.
        factor: pixels per code along each side; both sides become multiples of it.

    Returns:
        float32 `[H, W, 3]`.

    Raises:
        Emu3Error: Emu3: a side is shorter than `factor`, or the picture is more elongated than 5:1. Emu3.5: a side
            would be shorter than half of `factor`.
    """
    return normalise(np.asarray(resize(to_rgb(image), config, factor)), config)


def resize(image: Image.Image, config: PictureConfig, factor: int) -> Image.Image:
    """The first half of `preprocess`: resizes an RGB picture."""
    if isinstance(config, AreaConfig):
        height, width = area_resize(image.height, image.width, factor, config.area)
    else:
        height, width = smart_resize(image.height, image.width, factor, config.min_pixels, config.max_pixels)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def normalise(pixels: np.ndarray, config: PictureConfig) -> np.ndarray:
    """Normalises uint8 pixels `[..., H, W, 3]` to float32: to the config's mean and deviation, or to -1..1 (Emu3.5)."""
    if isinstance(config, AreaConfig):
        return (pixels / 127.5 - 1).astype(np.float32)  # in float64, as the reference does
    scaled = (pixels * (1 / 255)).astype(np.float32)  # multiply in float64, as the reference does
    return (scaled - np.float32(config.mean)) / np.float32(config.std)


def postprocess(pixels: np.ndarray, config: PictureConfig = _DEFAULT_CONFIG) -> np.ndarray:
    """Reverts the normalisation of `preprocess`: float pixels `[..., H, W, 3]` to uint8, truncated as in upstream."""
    if isinstance(config, AreaConfig):
        return ((np.asarray(pixels, np.float32) + np.float32(1)) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    mean = np.float32([-m / s for m, s in zip(config.mean, config.std, strict=True)])
    std = np.float32([1 / s for s in config.std])
    scaled = (np.asarray(pixels, np.float32) - mean) / std * np.float32(255)
    return scaled.clip(0, 255).astype(np.uint8)


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a PNG file, all or nothing.

    Args:
        image: the picture.
        path: the file; an existing one is replaced.
        metadata: PNG text fields. Keys must be Latin-1; values may be any text.

    Raises:
        Emu3Error: the file cannot be written, for example because the disk is full.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        # A command-line argument that is not UTF-8 contains unpaired surrogates, which PNG fields cannot hold.
        info.add_text(key, value.encode("utf-8", "replace").decode())
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read."""
    Image.init()
    _heic_is_read()
    return tuple(name for name in (*_FORMATS, *_PLUGIN_FORMATS) if name in Image.OPEN)


@functools.cache
def _heic_is_read() -> bool:
    """Whether HEIC pictures can be read. The first call adds the format to Pillow."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def require_heic(path: Path, pictures: int) -> None:
    """Raises an `Emu3Error` if `path` holds HEIC pictures and pillow-heif is not installed.

    Args:
        path: the folder or file.
        pictures: number of HEIC pictures in it.
    """
    if pictures and not _heic_is_read():
        raise Emu3Error(f"{path} has {pictures} HEIC pictures. {_NO_HEIC}")


@contextlib.contextmanager
def open_picture(path: Path, wanted: str = "picture", data: bytes | None = None) -> Iterator[Image.Image]:
    """Opens a picture or animation without decoding it. Any error in the `with` block becomes an `Emu3Error`.

    Args:
        path: the file.
        wanted: name of the expected kind in errors: "picture", "clip" or "picture or clip".
        data: contents of the picture, if it is not a file of its own. Then `path` only names it in errors.

    Raises:
        Emu3Error: the file is missing, too large, damaged, or not a picture in a known format.
    """
    with reading(path, f"give an undamaged {wanted}"):
        if data is None and Path(path).exists() and not Path(path).is_dir():  # `Image.open` reports these two cases
            plain_file(path)
        try:
            with Image.open(path if data is None else io.BytesIO(data), formats=picture_formats()) as image:
                _check_size(image)
                yield image
        except Emu3Error as error:
            raise Emu3Error(f"{path}: {error}") from error
        except Image.UnidentifiedImageError as error:
            if Path(path).suffix.lower() in HEIC_SUFFIXES and not _heic_is_read():
                raise Emu3Error(f"cannot read {path}: {_NO_HEIC}") from error
            examples = "a PNG, JPEG, WebP or the like" if wanted == "picture" else "a GIF, WebP, PNG, MP4 or WebM file"
            raise Emu3Error(f"{path} is not a {wanted} in a known format: give {examples}") from error
        except Image.DecompressionBombError as error:
            raise Emu3Error(f"{path} is too large ({error}): scale the picture down") from error
        except FileNotFoundError as error:
            raise Emu3Error(f"cannot read {path}: {error.strerror}; give a {wanted} that exists") from error
        except Exception as error:  # Pillow raises errors of many kinds for damaged files
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Emu3Error(f"cannot read {path}: {reason}; give an undamaged {wanted}") from error


def _check_size(image: Image.Image) -> None:
    most = _MOST_PIXELS if image.format in _CHEAP_FORMATS else _MOST_PIXELS_COSTLY
    if image.width * image.height > most:
        raise Emu3Error(
            f"it is too large: {image.width}x{image.height} pixels; the limit for {image.format} is {most:,}: "
            "scale the picture down"
        )


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Converts grey values of Pillow's modes I;16, I and F to uint8, with rounding."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Emu3Error("the picture has values that are not finite: write it without NaN and infinity")
    # Files do not store the value of white. Use a common scale that contains all values, or else the values' range.
    for black, white in ((0, 1), (0, 255)) if mode == "F" else ((0, 65535),):
        if black <= low and high <= white:
            break
    else:
        black, white = low, max(high, low + 1)
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _ROWS // values.shape[1])
    for first in range(0, len(values), rows):  # in blocks: float64 values of a large picture would fill the memory
        part = values[first : first + rows].astype(np.float64)
        scaled[first : first + rows] = np.round((part - black) * (255 / (white - black)))
    return scaled
