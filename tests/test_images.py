"""Pictures: golden pixels, every mode of file, EXIF orientation, PNG text, and damaged files."""

import io
import os
import pathlib
import resource

import numpy as np
import pytest
from conftest import GOLDEN, golden_json, golden_npz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from emu3_jax.checkpoints.published_config import image_from_published
from emu3_jax.config import ImageConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.media import images
from emu3_jax.media.frames import is_animated
from emu3_jax.media.images import (
    _check_size,
    load_image,
    postprocess,
    preprocess,
    save_png,
    to_rgb,
)

NAMES = list(golden_json("prompts.json")["images"])
CONFIG = image_from_published(golden_json("hf_configs.json")["image_processor"])
CORPUS = pathlib.Path(__file__).parent / "corpus"
RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def _pixel(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize("name", NAMES)
def test_preprocess_equals_reference(name):
    pixels = preprocess(load_image(GOLDEN / f"{name}.png"), CONFIG, 8)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, golden_npz("images.npz")[f"{name}/pixels"][0].transpose(1, 2, 0))


@pytest.mark.parametrize("name", NAMES)
def test_preprocess_converts_what_callers_hand_over(name):
    with Image.open(GOLDEN / f"{name}.png") as image:
        pixels = preprocess(image, CONFIG, 8)
    np.testing.assert_array_equal(pixels, golden_npz("images.npz")[f"{name}/pixels"][0].transpose(1, 2, 0))


def test_preprocess_uses_mean_and_std():
    config = ImageConfig(64, 256, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixels = preprocess(Image.new("RGB", (8, 8), (255, 0, 255)), config, 8)
    np.testing.assert_array_equal(pixels[0, 0], [1.0, -1.0, 0.0])
    np.testing.assert_array_equal(postprocess(pixels, config)[0, 0], [255, 0, 255])


@pytest.mark.parametrize("size, message", [((7, 9), "7x9 pixels is too small"), ((10, 51), "too elongated")])
def test_preprocess_refuses_what_has_no_tokens(size, message):
    with pytest.raises(Emu3Error, match=message):
        preprocess(Image.new("RGB", size), CONFIG, 8)


def test_postprocess_truncates():
    values = np.float32([[[-1.5, -1.0, -0.996], [-0.9921, 0.0, 0.5], [0.9999, 1.0, 7.0]]])
    expected = [[[0, 0, 0], [1, 127, 191], [254, 255, 255]]]
    assert postprocess(values).dtype == np.uint8
    np.testing.assert_array_equal(postprocess(values), expected)
    np.testing.assert_array_equal(postprocess(np.stack([values, values])), [expected, expected])


@pytest.mark.oracle
def test_postprocess_equals_transformers():
    from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

    pixels = np.random.default_rng(0).uniform(-1.1, 1.1, (16, 24, 3)).astype(np.float32)
    processor = Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    theirs = processor.postprocess([pixels.transpose(2, 0, 1)])["pixel_values"][0]
    np.testing.assert_array_equal(postprocess(pixels), np.asarray(theirs))


@given(st.integers(0, 255))
def test_postprocess_stays_within_one_level_of_preprocess(level):
    pixels = preprocess(Image.new("RGB", (8, 8), (level,) * 3), ImageConfig(64, 64), 8)
    assert set(postprocess(pixels).ravel().tolist()) <= {level, max(level - 1, 0)}


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "HSV"])
def test_every_8_bit_mode(mode):
    assert _pixel(to_rgb(Image.new(mode, (8, 8)))) in [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 0), (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("RGBX", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (77, 128, 128), (77, 77, 77)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16B", 257 * 77, (77, 77, 77)),
        ("I;16L", 257 * 77, (77, 77, 77)),
        ("I", 257 * 77, (77, 77, 77)),
        ("I", 65535, (255, 255, 255)),
        ("F", 1.0, (255, 255, 255)),
        ("F", 0.25, (64, 64, 64)),
        ("F", 77.4, (77, 77, 77)),
    ],
)
def test_colours_of_modes(mode, colour, expected):
    assert _pixel(to_rgb(Image.new(mode, (8, 8), colour))) == expected


def test_lab():
    rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (8, 8), (200, 50, 50)), rgb, lab, outputMode="LAB")
    np.testing.assert_allclose(_pixel(to_rgb(image)), (200, 50, 50), atol=2)


@pytest.mark.parametrize("low, high", [(-1000, 2000), (0, 2**31 - 1), (100_000, 100_510)])
def test_integers_beyond_16_bits_are_stretched(low, high):
    values = np.linspace(low, high, 256).reshape(16, 16).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 0], RAMP)


def test_floats_of_any_range_are_stretched():
    values = np.linspace(-2, 300, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 0], RAMP)
    assert _pixel(to_rgb(Image.new("F", (8, 8), -3.0))) == (0, 0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, tmp_path):
    Image.new("F", (8, 8), value).save(tmp_path / "bad.tif")
    with pytest.raises(Emu3Error, match=r"bad\.tif: the picture has values that are not finite"):
        load_image(tmp_path / "bad.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm", "jp2"])
def test_file_formats(tmp_path, suffix):
    Image.fromarray(COLOURS).save(tmp_path / f"x.{suffix}")
    image = load_image(tmp_path / f"x.{suffix}")
    assert (image.mode, image.size) == ("RGB", (16, 16))
    if suffix in ("png", "bmp", "tif", "ppm"):
        np.testing.assert_array_equal(np.asarray(image), COLOURS)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_files(tmp_path, suffix):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / f"x.{suffix}"))[..., 0], RAMP)


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255, 7])])
def test_palette_with_transparency_keeps_its_colours(tmp_path, transparency):
    palette = Image.fromarray(COLOURS).quantize(16)
    palette.save(tmp_path / "x.png", transparency=transparency)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "x.png")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    upright.paste((0, 0, 255), (16, 8, 24, 16))
    stored = upright
    # What the camera stored is what the tag's transformation takes back to upright.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation in inverse:
        stored = upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **options)
    image = load_image(tmp_path / f"x.{suffix}")
    np.testing.assert_allclose(np.asarray(image, int), np.asarray(upright, int), atol=8 if suffix == "jpg" else 0)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image))  # turned once, not twice


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_malformed_exif_is_ignored(suffix):
    file = CORPUS / f"exif_bad_header.{suffix}"
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
        if suffix != "jpg":  # of which Pillow passes it over since version 13
            with pytest.raises(SyntaxError):
                image.getexif()
    np.testing.assert_array_equal(np.asarray(load_image(file)), expected)
    assert not is_animated(file)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # which the command line does not show
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0"]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_any_exif_leaves_the_picture(tmp_path, suffix, exif):
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(COLOURS).save(tmp_path / f"a.{suffix}", **options)
    Image.fromarray(COLOURS).save(tmp_path / f"b.{suffix}", exif=exif, **options)
    plain, other = (np.asarray(load_image(tmp_path / f"{name}.{suffix}")) for name in "ab")
    np.testing.assert_array_equal(plain, other)


# Files


def text_fields(path):
    with Image.open(path) as image:
        return image.text


def test_png_metadata_round_trip(tmp_path):
    metadata = {
        "prompt": "日本語 🦄 naïve\nsecond line",
        "seed": "7",
        "size": "90*90",
        "empty": "",
        "long": "ab" * 5000,
    }
    save_png(Image.fromarray(COLOURS), tmp_path / "x.png", metadata)
    assert text_fields(tmp_path / "x.png") == metadata
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "x.png")), COLOURS)
    assert os.listdir(tmp_path) == ["x.png"]


def test_png_metadata_of_an_argument_that_is_not_utf8(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", {"prompt": "a\udcffb"})
    assert text_fields(tmp_path / "x.png") == {"prompt": "a?b"}


def test_full_disk_leaves_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "x.png").write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(Emu3Error, match=r"cannot write .*x\.png: File too large; free space"):
            save_png(Image.fromarray(noise), tmp_path / "x.png", {"a": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"before"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_file(tmp_path / "x") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == []


def test_unwritable_places(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "x.png", tmp_path / "folder"):
        with pytest.raises(Emu3Error, match=f"cannot write {path}: "):
            save_png(Image.new("RGB", (8, 8)), path, {})
    assert os.listdir(tmp_path) == ["folder"]


def _encoded(suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm", "avif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    data = _encoded(suffix)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Emu3Error) as error:
        load_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"not a picture\n", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"P6 9999999 99999999 255\n"]
)
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(Emu3Error, match=r"x\.png"):
        load_image(tmp_path / "x.png")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(Emu3Error, match=r"cannot read .*absent\.png: No such file or directory"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(Emu3Error, match="Is a directory"):
        load_image(tmp_path)


def test_pipes_and_devices_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name in ("x.png", "zero.png"):
        with pytest.raises(Emu3Error, match=f"cannot read .*{name}: it is a pipe or device"):
            load_image(tmp_path / name)


def test_formats_that_run_programs_are_not_read(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript."""
    Image.fromarray(COLOURS).save(tmp_path / "x.eps")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.eps").read_bytes())
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    for name in ("x.eps", "x.png"):
        with pytest.raises(Emu3Error, match=f"{name} is not a picture in a known format"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("suffix, most", [("png", 120_000_000), ("webp", 50_000_000)])
def test_pictures_too_large_for_memory(tmp_path, suffix, most):
    """By the header, before there are pixels."""
    Image.new("L", (64, 64)).save(tmp_path / f"x.{suffix}", lossless=True)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        image._size = (most // 1000, 1000)
        _check_size(image)
        image._size = (most // 1000 + 1, 1000)
        with pytest.raises(Emu3Error, match=f"the limit for {suffix.upper()} is {most:,}: scale"):
            _check_size(image)


def test_grey_values_are_scaled_in_parts(monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (37, 53)).astype(np.uint16)
    whole = np.asarray(to_rgb(Image.fromarray(values)))
    monkeypatch.setattr(images, "_ROWS", 100)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(values))), whole)
    np.testing.assert_array_equal(whole[..., 0], np.round(values * (255 / 65535)).astype(np.uint8))


def test_decompression_bomb(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(Emu3Error, match=r"bomb\.png is too large .* scale the picture down"):
        load_image(tmp_path / "bomb.png")


@given(
    position=st.floats(0, 0.999), byte=st.integers(0, 255), suffix=st.sampled_from(["png", "jpg", "gif", "webp", "tif"])
)
def test_damaged_bytes_give_a_picture_or_an_error(tmp_path_factory, position, byte, suffix):
    data = bytearray(_encoded(suffix))
    data[int(position * len(data))] = byte
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(data)
    try:
        assert load_image(path).mode == "RGB"
    except Emu3Error as error:
        assert str(path) in str(error)
