"""Readers of pictures, clips and codes on thousands of damaged files: a result or one line, and nothing else."""

import functools
import io
import pathlib
import zipfile

import av
import numpy as np
import pytest
from hostile import damaged, examples, gives_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emu3_jax.media.clips import load_clip
from emu3_jax.media.codes import MAX_BYTES, load_codes
from emu3_jax.media.frames import open_clip
from emu3_jax.media.images import load_image
from emu3_jax.media.inputs import open_media

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
CORPUS = pathlib.Path(__file__).parent / "corpus"
FRAMES = 3000  # of a damaged clip are looked at, no more: it may truly be long


# ------------------------------------------------------------------------------------------------ pictures


@functools.cache
def picture_bytes(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image, exif, stream = Image.fromarray(pixels), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    if kind in ("GIF", "PNG", "WEBP"):
        options |= {"save_all": True, "append_images": [Image.fromarray(pixels[::-1])] * 2, "duration": [20, 40, 60]}
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "AVIF", "QOI"]
)
@examples(120)
@given(data=st.data())
def test_damaged_pictures(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(data.draw(damaged(picture_bytes(kind))))

    def read():
        media = open_media(path)
        assert isinstance(media, Image.Image) or all(frame.dtype == np.uint8 for frame in _first(media))

    gives_or_refuses(read)
    gives_or_refuses(lambda: load_image(path))


def _first(reader):
    for number, frame in enumerate(reader):
        if number == FRAMES:
            return
        yield frame


HEADS = (
    *(b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8X", b"\xff\xd8\xff\xe1", b"II*\0\x08\0\0\0"),
    *(b"BM", b"P6 ", b"8BPS", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0\0\1\0"),
)


@examples(150)
@given(head=st.sampled_from(HEADS), content=st.binary(max_size=200))
def test_beginnings_of_pictures(tmp_path_factory, head, content):
    path = tmp_path_factory.getbasetemp() / "beginning.png"
    path.write_bytes(head + content)
    gives_or_refuses(lambda: load_image(path))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
@examples(60)
@given(durations=st.lists(st.integers(0, 70000), min_size=3, max_size=3), fps=st.none() | st.floats(allow_nan=True),
       frames=st.none() | st.integers())  # fmt: skip
def test_durations_and_rates(tmp_path_factory, kind, durations, fps, frames):
    path = tmp_path_factory.getbasetemp() / f"timed.{kind.lower()}"
    images = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 90, 180)]
    try:
        images[0].save(path, kind, save_all=True, append_images=images[1:], duration=durations)
    except ValueError:  # more than the format holds
        return
    gives_or_refuses(lambda: list(_first(open_clip(path, fps=fps, frames=frames))))


# ------------------------------------------------------------------------------------------------ videos


@functools.cache
def video_bytes(kind: str) -> bytes:
    form, codec, pix_fmt = {
        "mp4": ("mp4", "libx264", "yuv420p"),
        "mov": ("mov", "qtrle", "argb"),
        "webm": ("webm", "libvpx-vp9", "yuva420p"),
        "mkv": ("matroska", "ffv1", "yuv420p"),
        "avi": ("avi", "mpeg4", "yuv420p"),
    }[kind]
    stream = io.BytesIO()
    with av.open(stream, "w", format=form) as container:
        video = container.add_stream(codec, rate=12)
        video.width, video.height, video.pix_fmt = 32, 32, pix_fmt
        for level in range(0, 250, 60):
            container.mux(
                video.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24"))
            )
        container.mux(video.encode())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "mkv", "avi"])
@examples(120)
@given(data=st.data(), fps=st.sampled_from([None, None, 5.0, 100.0]))
def test_damaged_videos(tmp_path_factory, kind, data, fps):
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(data.draw(damaged(video_bytes(kind))))
    gives_or_refuses(lambda: list(_first(open_clip(path, fps=fps))))


@pytest.mark.parametrize(
    "name", sorted(file.name for file in CORPUS.iterdir() if file.suffix in (".mp4", ".mov", ".gif"))
)
@examples(30)
@given(data=st.data())
def test_damaged_files_of_the_corpus(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / f"again{pathlib.Path(name).suffix}"
    path.write_bytes(data.draw(damaged((CORPUS / name).read_bytes())))
    gives_or_refuses(lambda: load_clip(path, fps=12.0, frames=100))


# ------------------------------------------------------------------------------------------------ codes


def check_codes_file(path) -> None:
    def read():
        arrays = load_codes(path)
        assert sum(array.nbytes for array in arrays.values()) <= MAX_BYTES
        for name, array in arrays.items():
            assert "/" not in name and name.isprintable() and array.dtype.kind in "iu" and array.ndim in (2, 3)

    gives_or_refuses(read)


@functools.cache
def codes_bytes(compressed: bool) -> bytes:
    stream = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(stream, a=np.arange(12, dtype=np.int32).reshape(3, 4), clip=np.zeros((2, 3, 4), np.int64))
    return stream.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@examples(200)
@given(data=st.data())
def test_damaged_codes(tmp_path_factory, compressed, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(data.draw(damaged(codes_bytes(compressed))))
    check_codes_file(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
NAMES = st.text(max_size=12) | st.sampled_from(["a", "A", "../a", "/a", "a/b", "con", "\x1b[2J"])
SIDES = st.lists(st.integers(-1, 2**40), max_size=4).map(tuple) | st.tuples(st.integers(1, 4), st.integers(1, 4))


@examples(200)
@given(
    names=st.lists(NAMES, min_size=1, max_size=3),
    descr=st.sampled_from(["<i4", ">i8", "|u1", "|O", "<f4", "S5", "V9"]) | VALUES,
    shape=SIDES | VALUES,
    order=st.booleans() | VALUES,
    version=st.integers(0, 4),
    data=st.binary(max_size=70),
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_headers_of_codes(tmp_path_factory, names, descr, shape, order, version, data):
    path = tmp_path_factory.getbasetemp() / "headers.npz"
    header = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode("utf-8", "replace") + b"\n"
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            try:
                archive.writestr(f"{name}.npy", b"\x93NUMPY" + bytes([version, 0]) + length + header + data)
            except (UnicodeEncodeError, ValueError, IndexError):  # no zip has such a name
                return
    check_codes_file(path)
