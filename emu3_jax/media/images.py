"""Pictures to the vision tokenizer's arrays and back, and their files."""

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from emu3_jax.config import ImageConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import plain_file, reading
from emu3_jax.media.sizes import smart_resize

_DEFAULT_CONFIG = ImageConfig()

# Formats that Pillow decodes by itself. For others it runs programs (EPS), or asks what else is installed.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "ICNS", "TGA"),
    *("PCX", "PSD", "SGI", "DDS", "QOI", "XBM", "XPM"),
)
_PLUGIN_FORMATS = ("HEIF", "JXL")  # HEIF is `pillow-heif`'s; JXL callers may have registered with Pillow
HEIC_SUFFIXES = frozenset((".heic", ".heif"))
_NO_HEIC = "HEIC pictures need pillow-heif, which is not installed: pip install 'emu3-jax[heic]', or convert them"
# Pillow takes four bytes for a pixel of three channels, and conversions hold two pictures at once.
_MOST_PIXELS = 120_000_000  # phones make 108,000,000
_MOST_PIXELS_COSTLY = 50_000_000  # of formats whose decoders hold more copies
_CHEAP_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "PPM")
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
_ROWS = 1 << 20  # pixels that are scaled to 8 bits at once


def load_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Reads a picture of any mode as RGB, turned upright by its EXIF orientation; of several frames, the first.

    Args:
        path: of the file.
        data: its bytes, where it is none of its own: `path` is then what errors call it.

    Raises:
        Emu3Error: the file is missing, no picture, truncated, or so large that it may be a decompression bomb.
    """
    with open_picture(path, data=data) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright and in RGB.

    Transparency is dropped, not blended, as the reference does. Pictures of more than 8 bits are scaled, where Pillow
    would clip: 16 bits by 1/257, 32-bit integers and floats by the range that their values lie in.

    Raises:
        Emu3Error: a float picture has values that are not finite.
    """
    image = upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    elif image.mode == "La":  # Pillow has no direct way from premultiplied grey
        image = image.convert("LA")
    elif image.mode == "P" and image.has_transparency_data:  # ... and warns on the direct way from these
        image = image.convert("RGBA")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """`image` as its EXIF orientation wants it to be shown. EXIF that cannot be read says nothing."""
    image.load()  # some formats have EXIF after the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        method = _TRANSPOSED.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # Pillow's readers of EXIF raise errors of many kinds for damaged files
        method = None
    if method is None:
        return image
    turned = image.transpose(method)
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):  # or it would be turned again
        turned.info.pop(key, None)
    return turned


def on_white(image: Image.Image) -> Image.Image:
    """`image` in RGB, with white behind its transparent parts: what lies hidden under those of a clip is arbitrary."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_rgb(image)


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


def picture_formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names."""
    Image.init()
    _heic_is_read()
    return tuple(name for name in (*_FORMATS, *_PLUGIN_FORMATS) if name in Image.OPEN)


@functools.cache
def _heic_is_read() -> bool:
    """Whether HEIC pictures can be read; the first time, tells Pillow how."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def require_heic(path: Path, pictures: int) -> None:
    """Raises an `Emu3Error` where `path` has HEIC pictures, and nothing that reads them is installed."""
    if pictures and not _heic_is_read():
        raise Emu3Error(f"{path} has {pictures} HEIC pictures. {_NO_HEIC}")


@contextlib.contextmanager
def open_picture(path: Path, wanted: str = "picture", data: bytes | None = None) -> Iterator[Image.Image]:
    """Opens a picture or animation lazily; what fails while it is decoded in the `with` block becomes `Emu3Error`.

    `wanted` is what errors call it: "picture", "clip" or "picture or clip". With `data`, its bytes, nothing is opened
    by the name `path`.
    """
    with reading(path, f"give an undamaged {wanted}"):
        if data is None and Path(path).exists() and not Path(path).is_dir():  # opening it tells these two
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
            raise Emu3Error(f"{path} is not a {wanted} that can be read: give {examples}") from error
        except Image.DecompressionBombError as error:
            raise Emu3Error(f"{path} is too large ({error}): scale the picture down") from error
        except FileNotFoundError as error:
            raise Emu3Error(f"cannot read {path}: {error.strerror}; give a {wanted} that exists") from error
        except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Emu3Error(f"cannot read {path}: {reason}; give an undamaged {wanted}") from error


def _check_size(image: Image.Image) -> None:
    most = _MOST_PIXELS if image.format in _CHEAP_FORMATS else _MOST_PIXELS_COSTLY
    if image.width * image.height > most:
        raise Emu3Error(
            f"it is too large: {image.width}x{image.height} pixels, and at most {most:,} are read as {image.format}; "
            "scale the picture down"
        )


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of Pillow's modes I;16, I and F to uint8, rounded."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Emu3Error("the picture has values that are not finite: write it without NaN and infinity")
    # Files do not say what white is. Where the values fit the usual scales, those hold; else the extremes do.
    for black, white in ((0, 1), (0, 255)) if mode == "F" else ((0, 65535),):
        if black <= low and high <= white:
            break
    else:
        black, white = low, max(high, low + 1)
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _ROWS // values.shape[1])
    for first in range(0, len(values), rows):  # in float64, of which a large picture would fill the memory
        part = values[first : first + rows].astype(np.float64)
        scaled[first : first + rows] = np.round((part - black) * (255 / (white - black)))
    return scaled
