"""Pictures and clips to codes and back: files of any length in bounded memory, resampling, and tiles."""

import dataclasses
import functools
import gc
import itertools
import tracemalloc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedded_side import embedded_side
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import emu3_jax
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.procedural import all_stills, rasterise_still
from emu3_jax.generation import codec
from emu3_jax.generation.codec import Vision, decode, encode
from emu3_jax.generation.tiles import _spans, check_tile, tiled_decoder, tiled_encoder
from emu3_jax.media.clips import Clip, load_clip, resample, save_clip
from emu3_jax.media.frames import FrameReader
from emu3_jax.models.vision import VisionTokenizer, make_decoder, make_encoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh

pytestmark = pytest.mark.compiled_quickly

CONFIG = VisionConfig(
    codebook_size=64, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_stages=()
)  # 2 pixels to a code


@pytest.fixture(scope="module")
def vision():
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        # Weights that keep the size of what passes, and a codebook as wide as the latents: many codes are used.
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 1
        return (rng.standard_normal(leaf.shape) / fan_in**0.5).astype(np.float32)

    init = jax.eval_shape(VisionTokenizer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    params = jax.tree_util.tree_map_with_path(draw, nn.unbox(init["params"]))
    return Vision(CONFIG, ImageConfig(min_pixels=16, max_pixels=2**20), jax.device_put(params))


def moving(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Noise that moves right, and every frame its own brightness."""
    noise = np.random.default_rng(0).integers(0, 200, (height // 4, width // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(noise, 2 * i, axis=1) + np.uint8(i % 50) for i in range(count)])


def write(path, frames):
    """An animated file or video by its ending, else a folder."""
    if path.suffix:
        save_clip(frames, path, 10.0)
        return path
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{number}.png", compress_level=0)
    return path


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["x", "x.webp", "x.mp4"])
@pytest.mark.parametrize("count", [1, 16, 36])
def test_codes_of_a_file_are_those_of_the_loaded_clip(vision, tmp_path, name, count):
    path = write(tmp_path / name, moving(count))
    if name == "x.webp" and count == 1:
        assert encode(vision, path).shape == (8, 12)  # one frame is a picture
        return
    codes = encode(vision, path)
    assert codes.shape == (-(-count // 4), 8, 12) and codes.dtype == np.int32
    np.testing.assert_array_equal(codes, encode(vision, load_clip(path)))
    if count == 36:
        assert len({frame.tobytes() for frame in codes}) > 5  # the clip does move


@pytest.mark.parametrize("options", [{"fps": 4.0}, {"fps": 20.0, "frames": 15}, {"frames": 32}])
def test_clips_are_resampled(vision, tmp_path, options):
    clip = Clip(moving(12), 10.0)
    expected = encode(vision, resample(clip, **options))
    np.testing.assert_array_equal(encode(vision, clip, **options), expected)
    np.testing.assert_array_equal(encode(vision, write(tmp_path / "x.webp", clip.frames), **options), expected)
    picture = Image.fromarray(clip.frames[0])
    np.testing.assert_array_equal(encode(vision, picture, **options), encode(vision, picture))


def test_no_more_frames_are_held_than_pass_together(vision, monkeypatch):
    class Frame(np.ndarray):
        """An array that weak references may point to."""

    alive, most = weakref.WeakSet(), 0

    def read():
        nonlocal most
        for frame in moving(70):
            frame = frame.copy().view(Frame)
            alive.add(Alive(frame))
            yield frame

    class Alive:
        def __init__(self, frame):
            self.frame = weakref.ref(frame)
            frame.kept_by = self

    prepare = codec.preprocess

    def counting(picture, *rest):
        nonlocal most
        most = max(most, len(alive))
        return prepare(picture, *rest)

    monkeypatch.setattr(codec, "open_media", lambda item, **_: FrameReader(10.0, None, read))
    monkeypatch.setattr(codec, "preprocess", counting)
    assert encode(vision, "any").shape == (18, 8, 12)
    assert 0 < most <= 2  # the others have been resized


def test_large_frames_need_tiles(vision):
    """Codes of a few kilobytes, compressed, can stand for them."""
    factor = vision.config.spatial_factor
    codes = np.zeros((2048 // factor, 2048 // factor + 1), np.int32)
    with pytest.raises(Emu3Error, match=rf"a frame of {2048 + factor}x2048 pixels .*4,194,304: decode it in tiles"):
        decode(vision, codes)


@pytest.mark.parametrize("name", ["x", "x.gif"])
def test_long_files_take_the_memory_of_short_ones(vision, tmp_path, name):
    short, long = (write(tmp_path / f"{count}{name}", moving(count, 32, 32)) for count in (32, 96))

    def peak(path) -> int:
        encode(vision, path)
        gc.collect()  # both measurements begin alike: what waits for the collector counts as memory
        tracemalloc.start()
        try:
            encode(vision, path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The least of three, because memory is counted over all threads, also those that other tests left.
    least_long, least_short = (min(peak(path) for _ in range(3)) for path in (long, short))
    assert least_long < 1.2 * least_short


def test_what_was_filled_up_is_cut_off(vision):
    codes = np.arange(2 * 8 * 12).reshape(2, 8, 12) % 64
    whole = decode(vision, codes)
    assert len(whole.frames) == 8
    np.testing.assert_array_equal(decode(vision, codes, frames=6).frames, whole.frames[:6])
    assert len(decode(vision, codes, frames=20).frames) == 8
    with pytest.raises(Emu3Error, match="frames is 0"):
        decode(vision, codes, frames=0)


def test_errors_name_the_file(vision, tmp_path):
    path = write(tmp_path / "x.webp", moving(3, 4, 24))
    with pytest.raises(Emu3Error, match=r"x\.webp: a picture of 24x4 pixels is too elongated"):
        encode(vision, path)
    with pytest.raises(Emu3Error, match=r"^a picture of 24x4 pixels is too elongated"):
        encode(vision, load_clip(path))
    with pytest.raises(Emu3Error, match="fps is -1"):
        encode(vision, path, fps=-1)


# ------------------------------------------------------------------------------------------------ tiles


@given(st.integers(1, 200), st.integers(4, 60))
def test_tiles_cover_a_side(length, tile):
    spans = _spans(length, tile)
    assert [first for _, _, first, _ in spans] == [0, *(last for *_, last in spans[:-1])] and spans[-1][3] == length
    for index, (start, end, first, last) in enumerate(spans):
        assert 0 <= start <= first < last <= end <= length and end - start == min(tile, length)
        context = tile // 4 // 2  # at least so much beyond what is kept
        assert index == 0 or first - start >= context
        assert index == len(spans) - 1 or end - last >= context
    assert len(spans) == 1 or (len(spans) - 2) * (tile - tile // 4) < length - tile  # no more than needed


@given(st.integers(1, 40), st.integers(1, 40), st.integers(4, 12))
def test_tiles_of_what_sees_one_code_alone_are_the_whole(height, width, tile):
    rng = np.random.default_rng(height)
    codes = rng.integers(0, 100, (1, 2, height, width))

    def draw(codes):
        return codes.repeat(8, -2).repeat(8, -1)[..., None] * np.ones(3, np.float32)

    def see(pixels):
        return pixels[..., ::8, ::8, 0].astype(int)

    np.testing.assert_array_equal(tiled_encoder(lambda: see, 8 * tile, 8)(draw(codes)), codes)
    np.testing.assert_allclose(tiled_decoder(lambda: draw, 8 * tile, 8)(codes), draw(codes), rtol=1e-5)


def test_tiles_meet_without_a_seam():
    """Neighbours that differ by 100 fade into each other: no step is larger than the slope of the overlap."""
    bright = itertools.count()

    def new_step():
        level = 100 * (next(bright) % 2)
        return lambda codes: np.full(
            (*codes.shape[:-2], 8 * codes.shape[-2], 8 * codes.shape[-1], 3), level, np.float32
        )

    pixels = tiled_decoder(new_step, 64, 8)(np.zeros((1, 8, 14), int))
    assert pixels.shape == (1, 64, 112, 3) and pixels.min() == 0 and pixels.max() == 100
    assert 0 < np.abs(np.diff(pixels, axis=-2)).max() <= 100 / 16 + 1e-4


@pytest.mark.parametrize("tile", [24, 32])
def test_a_tile_as_large_as_the_frame_is_the_frame(vision, tile):
    for item in (moving(1)[0], moving(16), moving(32)):
        codes = encode(vision, item)
        np.testing.assert_array_equal(encode(vision, item, tile=tile), codes)
        whole, tiled = decode(vision, codes), decode(vision, codes, tile=tile)
        np.testing.assert_array_equal(*(np.asarray(x.frames if codes.ndim == 3 else x) for x in (whole, tiled)))


def test_a_batch_of_clips_is_decoded_as_each_alone(vision):
    for latents in (2, codec.PART_FRAMES // CONFIG.temporal_factor + 1):  # at once, and in parts
        codes = np.random.default_rng(latents).integers(0, CONFIG.codebook_size, (3, latents, 4, 6))
        found = codec.decode_pictures(vision, codes, at_once=2)
        for one, clip in zip(codes, found, strict=True):
            alone = decode(vision, one).frames
            assert clip.shape == alone.shape
            # Rows of a batch may add up in another order: at most the last step of rounding to uint8 differs.
            assert np.abs(clip.astype(int) - alone).max() <= 1


@pytest.mark.parametrize(("shape", "pieces"), [((9, 4, 6), 5), ((9, 2, 4, 6), 5), ((5, 9, 4, 6), 9)])
def test_devices_hold_the_pixels_of_two_batches_at_most(vision, monkeypatch, shape, pieces):
    """Of pictures, of clips at once, and in parts. The devices compute a batch while the host fetches the last one."""
    codes = np.random.default_rng(0).integers(0, CONFIG.codebook_size, shape)
    wanted = codec.decode_pictures(vision, codes, at_once=2)
    events, held, before = [], [], {id(array) for array in jax.live_arrays()}
    convert = codec.postprocess

    def gather(pixels):
        found = jax.jit(jnp.copy)(pixels)
        alive = [array for array in jax.live_arrays() if id(array) not in before and array.shape[-1] == 3]
        held.append(len(alive) - 1)  # `pixels` goes after this call
        events.append("dispatch")
        return found

    def postprocess(*arguments):
        events.append("fetch")
        return convert(*arguments)

    monkeypatch.setattr(codec, "postprocess", postprocess)
    np.testing.assert_array_equal(codec.decode_pictures(vision, codes, at_once=2, gather=gather), wanted)
    assert held == [1] + [2] * (pieces - 1)
    assert events == ["dispatch", *["dispatch", "fetch"] * (pieces - 1), "fetch"]


@pytest.mark.parametrize("shape", [(8, 4, 6), (4, 2, 4, 6), (4, 5, 4, 6)])
def test_devices_share_the_decoding(vision, shape):
    """Of pictures, of clips at once, and in parts: each device computes its own only, and nothing is exchanged."""
    mesh = make_mesh("data=2,tensor=2", jax.devices()[:4])
    codes = np.random.default_rng(0).integers(0, CONFIG.codebook_size, shape).astype(np.int32)
    at_once, place = codec.batches_on(mesh, CONFIG, shape[1:], len(codes))
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(vision.params, whole)
    with use_mesh(mesh):
        shared = codec.decode_pictures(
            dataclasses.replace(vision, params=params), codes, at_once=at_once, place=place,
            gather=jax.jit(lambda pixels: pixels, out_shardings=whole),
        )  # fmt: skip
        step = codec._step(
            dataclasses.replace(vision, params=params), "decode", in_parts=shape[1:2] == (5,), place=place
        )
        part = jax.ShapeDtypeStruct((at_once, *shape[1:]), np.int32, sharding=place)
        lower = step.lower if shape[1:2] == (5,) else functools.partial(step.func.lower, params)
        text = lower(part).compile().as_text()
    alone = codec.decode_pictures(vision, codes, at_once=1)
    assert shared.shape == alone.shape and np.abs(shared.astype(int) - alone).max() <= 1
    assert not any(f" {kind}" in text for kind in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))


def test_the_batches_of_a_mesh():
    """Pictures of 64x64 pixels, up to 16 on a device; axes that no picture is left for do not split them."""
    mesh = make_mesh("data=2,sequence=2,tensor=2", jax.devices()[:8])
    split = {
        count: (size, place.spec)
        for count in (1, 3, 4, 8, 200)
        for size, place in [codec.batches_on(mesh, CONFIG, (32, 32), count)]
    }
    rows = ("data", "fsdp")
    assert split == {
        1: (2, PartitionSpec(rows)),
        3: (4, PartitionSpec(rows)),
        4: (4, PartitionSpec((*rows, "sequence"))),
        8: (8, PartitionSpec((*rows, "sequence", "tensor"))),
        200: (8 * 16, PartitionSpec((*rows, "sequence", "tensor"))),
    }
    side = 720 // CONFIG.spatial_factor
    assert codec.batches_on(mesh, CONFIG, (side, side), 200)[0] == 8  # a large picture alone
    assert codec.batches_on(mesh, CONFIG, (2, 128, 128), 200)[0] == 8 * 1


@pytest.mark.slow
def test_tiles_of_a_clip_in_parts_equal_those_of_the_whole(vision, monkeypatch):
    """Each tile has a past of its own."""
    clip = moving(32, 24, 16)
    codes = encode(vision, clip, tile=16)
    pixels = decode(vision, codes, tile=16).frames
    assert codes.shape == (8, 12, 8) and pixels.shape == clip.shape
    alone = encode(vision, clip, tile=16, independent=True)
    monkeypatch.setattr(codec, "PART_FRAMES", 32)
    np.testing.assert_array_equal(encode(vision, clip, tile=16), codes)
    np.testing.assert_allclose(decode(vision, codes, tile=16).frames, pixels.astype(float), atol=1)  # of 255
    assert (alone != codes).any()


def test_the_largest_program_is_a_tiles(vision, monkeypatch):
    shapes = {"encode": set(), "decode": set()}

    def spy(make, method):
        def made(*arguments):
            def step(params, x):
                shapes[method].add(np.shape(x))
                return make(*arguments)(params, x)

            return step

        return made

    monkeypatch.setattr(codec, "make_encoder", spy(make_encoder, "encode"))
    monkeypatch.setattr(codec, "make_decoder", spy(make_decoder, "decode"))
    for height, width in ((20, 20), (40, 32)):
        codes = encode(vision, moving(1, height, width)[0], tile=16)
        assert codes.shape == (height // 2, width // 2)
        assert decode(vision, codes, tile=16).size == (width, height)
    assert shapes == {"encode": {(1, 16, 16, 3)}, "decode": {(1, 8, 8)}}


@pytest.mark.slow
def test_tiles_of_the_embedded_model_are_near_the_whole():
    """Of a picture four times as large as those that it was trained on."""
    model, side = emu3_jax.load().vision, 2 * embedded_side()
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, min_pixels=64, max_pixels=2**20))
    tile = 3 * side // 4

    def error(picture, other):
        return np.abs(np.asarray(picture, float) - np.asarray(other, float)).mean()

    for still in list(all_stills())[100::700]:
        picture = rasterise_still(still, side)
        codes = encode(model, picture)
        whole = decode(model, codes)
        assert 0 < error(decode(model, codes, tile=tile), whole) < 5  # of 255
        tiled = encode(model, picture, tile=tile)
        assert tiled.shape == codes.shape and (tiled != codes).any()
        assert error(decode(model, tiled), picture) < 1.5 * error(whole, picture)


@pytest.mark.parametrize("tile", [0, -16, 6, 17, 16.0, "16"])
def test_tiles_that_are_none(vision, tile):
    for call in (
        lambda: encode(vision, moving(1)[0], tile=tile),
        lambda: decode(vision, np.zeros((4, 4), int), tile=tile),
    ):
        with pytest.raises(Emu3Error, match="it must be a multiple of 2 pixels, and at least 8"):
            call()
    check_tile(None, 2)
