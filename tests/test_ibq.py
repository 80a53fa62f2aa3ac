"""Emu3.5's vision tokenizer against the golden case, and its promises: batches, memory, shapes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import GOLDEN, golden_json, golden_npz
from emu35 import weights
from emu35_vision import CONFIG
from flax import linen as nn
from flax import traverse_util
from PIL import Image

from emu3_jax.benchmarks.vision import run as bench_vision
from emu3_jax.checkpoints import layouts
from emu3_jax.checkpoints.layouts import vision_counters, vision_params
from emu3_jax.config import AreaConfig, IbqConfig, ImageConfig, VisionConfig, vision_tokenizer_from_dict
from emu3_jax.data.sources.folder import Folder
from emu3_jax.data.sources.records import SourceRecords
from emu3_jax.data.sources.tables import Columns
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import Vision, decode, encode, encode_end
from emu3_jax.generation.language import Language
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.clips import Clip
from emu3_jax.media.images import load_image, normalise, postprocess, preprocess, resize
from emu3_jax.models import quantizer, vision_stages
from emu3_jax.models.ibq import IbqTokenizer
from emu3_jax.models.quantizer import codes_of_largest_product
from emu3_jax.models.vision import check_codes, make_decoder, make_encoder, vision_module
from emu3_jax.training.vision_config import PixelConfig, VisionTrainConfig

TINY = IbqConfig(
    codebook_size=64, embed_dim=8, latent_channels=4, resolution=32, base_channels=32, channel_multipliers=(1, 1),
    num_res_blocks=1, attention_resolutions=(16,),
)  # fmt: skip
TOLERANCE = 1e-4  # of latents and pixels; codes are equal


@pytest.fixture(scope="module")
def params():
    state = weights("vq")
    flat = {p.path: p.pack([state[w.name] for w in p.weights]) for p in vision_params(CONFIG)}
    return jax.device_put(traverse_util.unflatten_dict(flat))


@pytest.fixture(scope="module")
def golden():
    return golden_npz("emu35/vision.npz")


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -3, -1)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def init_shapes(config: IbqConfig):
    size = config.spatial_factor
    return jax.eval_shape(IbqTokenizer(config).init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


# ------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("case", ["wide", "tall_pair"])
def test_golden_encode(params, golden, case):
    pixels = channels_last(golden[f"{case}/pixels"])
    latents = jax.jit(lambda p, x: vision_module(CONFIG).apply({"params": p}, x, method="latents"))(params, pixels)
    close(latents, channels_last(golden[f"{case}/latents"]))
    codes = make_encoder(CONFIG)(params, pixels)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, golden[f"{case}/codes"])


@pytest.mark.parametrize("case", ["wide", "tall_pair", "drawn_codes"])
def test_golden_decode(params, golden, case):
    pixels = make_decoder(CONFIG)(params, golden[f"{case}/codes"])
    assert pixels.dtype == jnp.float32
    close(pixels, channels_last(golden[f"{case}/reconstruction"]))


@pytest.mark.parametrize("picture", ["photo", "alpha", "gray", "tall", "large"])
def test_golden_pictures(params, picture):
    """From the file to the codes, at an area of 2304 pixels."""
    golden = {k.split("/")[1]: v for k, v in golden_npz("emu35/images.npz").items() if k.startswith(f"{picture}/")}
    file, image = GOLDEN / "emu35" / f"{picture}.png", AreaConfig(2304)
    np.testing.assert_array_equal(resize(load_image(file), image, CONFIG.spatial_factor), golden["resized"])
    pixels = preprocess(load_image(file), image, CONFIG.spatial_factor)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[0], golden["first_row"].T)  # the first row of all three channels
    vision = Vision(CONFIG, AreaConfig(), params)
    np.testing.assert_array_equal(encode(vision, file, area=2304), golden["codes"])


def test_pixels_become_bytes_as_upstream_rounds():
    """Truncated and clamped; 0.5 lies in the middle of two steps."""
    values = np.float32([-1.2, -1, -0.999, 0, 0.5, 1, 1.3, np.float32(2 * 200.999 / 255 - 1)])
    expected = np.clip((values + np.float32(1)) * np.float32(127.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(postprocess(values, AreaConfig()), expected)
    np.testing.assert_array_equal(expected, [0, 0, 0, 127, 191, 255, 255, 200])
    every = np.arange(256, dtype=np.uint8)
    assert np.abs(postprocess(normalise(every, AreaConfig()), AreaConfig()).astype(int) - every).max() <= 1


def test_full_size_parameters_are_the_manifests():
    manifest = golden_json("emu35/vq.json")
    declared = vision_params(IbqConfig())
    assert {w.name: list(w.shape) for p in declared for w in p.weights} == manifest["shapes"]
    assert not vision_counters(IbqConfig())
    shapes = traverse_util.flatten_dict(nn.unbox(init_shapes(IbqConfig())))
    assert {path: leaf.shape for path, leaf in shapes.items()} == {p.path: p.shape for p in declared}
    assert all(leaf.dtype == jnp.float32 for leaf in shapes.values())
    assert sum(leaf.size for leaf in shapes.values()) == manifest["parameters"] == 455_336_963
    assert layouts.detect_layout(manifest["shapes"]) is layouts.IBQ_VISION


def test_every_weight_names_its_axes():
    legend = {"conv_rows", "conv_columns", "conv_in", "conv_out", "channels", "codes", "code_width"}
    boxes = jax.tree.leaves(init_shapes(TINY), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim and set(box.names) <= legend


# ------------------------------------------------------------------------------------------------ numerics


def test_a_code_has_the_largest_dot_product_and_not_the_least_distance():
    """Against float64, over more positions than a group holds and a codebook that its blocks do not divide."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((3, 7, 11, 5)).astype(np.float32)
    codebook = rng.standard_normal((quantizer.CODE_BLOCK * 2 + 3, 5)).astype(np.float32)
    codebook[-1] *= 3  # long rows win products, not distances
    assert latents[..., 0].size % quantizer.PRODUCT_BLOCK and latents[..., 0].size > quantizer.PRODUCT_BLOCK
    found = jax.jit(codes_of_largest_product)(latents, codebook)
    products = latents.astype(np.float64) @ codebook.T.astype(np.float64)
    np.testing.assert_array_equal(found, products.argmax(-1))
    nearest = ((latents[..., None, :].astype(np.float64) - codebook) ** 2).sum(-1).argmin(-1)
    assert (found != nearest).mean() > 0.3
    assert (np.asarray(found) == len(codebook) - 1).any()


def test_of_equal_products_the_first_code_counts():
    codebook = np.zeros((300, 2), np.float32)
    codebook[[17, 280]] = 1
    np.testing.assert_array_equal(codes_of_largest_product(np.ones((1, 2), np.float32), codebook), [17])
    # Negative products must not lose to the rows that fill up the last block.
    np.testing.assert_array_equal(codes_of_largest_product(-np.ones((1, 2), np.float32), codebook[[17] * 300]), [0])


def test_a_large_batch_equals_its_pictures(monkeypatch):
    """Groups of pictures, one after the other."""
    params = jax.jit(IbqTokenizer(TINY).init)(jax.random.key(1), jnp.zeros((1, 2, 2, 3)))["params"]
    params = nn.unbox(params)
    pixels = jax.random.uniform(jax.random.key(2), (6, 16, 8, 3), minval=-1)

    def both(pixels):
        model = IbqTokenizer(TINY)
        codes = model.apply({"params": params}, pixels, method="encode")
        return codes, model.apply({"params": params}, codes, method="decode")

    whole, drawn = jax.jit(both)(pixels)
    monkeypatch.setattr(vision_stages, "PIXELS_PER_STEP", 2 * 16 * 8)
    parts = jax.jit(lambda x: both(x))
    assert "while" in parts.lower(pixels).as_text()
    codes, again = parts(pixels)
    np.testing.assert_array_equal(codes, whole)
    close(again, drawn)


# ------------------------------------------------------------------------------------------------ config and errors


def test_the_config_comes_back_and_old_bundles_stay_readable():
    config = IbqConfig(resolution=64, attention_resolutions=[8, 4])
    assert config.attention_stages == (3, 4)
    assert vision_tokenizer_from_dict(config.to_dict()) == config
    assert vision_tokenizer_from_dict(VisionConfig().to_dict()) == VisionConfig()
    assert "kind" not in VisionConfig().to_dict()  # older versions still read Emu3's
    with pytest.raises(Emu3Error, match=r'field kind is .other.: it must be "ibq"'):
        vision_tokenizer_from_dict({"kind": "other"})
    with pytest.raises(Emu3Error, match="unknown IbqConfig field"):
        vision_tokenizer_from_dict({"kind": "ibq", "temporal_factor": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"base_channels": 48}, "a multiple of 32"),
        ({"channel_multipliers": ()}, "1 to 8 stages"),
        ({"attention_resolutions": (0,)}, "attention_resolutions"),
        ({"resolution": True}, "resolution"),
        ({"num_res_blocks": 65}, "at most 64"),
    ],
)
def test_illegal_configs(change, message):
    with pytest.raises(Emu3Error, match=message):
        IbqConfig(**change)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16, 3), (1, 16, 17, 3), (0, 16, 16, 3), (1, 16, 16, 4)])
def test_illegal_pixels(shape):
    with pytest.raises(Emu3Error, match="pixels have shape"):
        jax.eval_shape(IbqTokenizer(TINY).init, jax.random.key(0), jnp.zeros(shape))


def test_illegal_codes():
    with pytest.raises(Emu3Error, match="outside the codebook: codes must be from 0 to 63"):
        check_codes(np.array([[64]]), TINY)
    with pytest.raises(Emu3Error, match=r"Emu3\.5 has no clips"):
        jax.eval_shape(make_decoder(TINY), {}, jnp.zeros((1, 1, 2, 2), jnp.int32))


@pytest.mark.parametrize("area", [0, -5, 1 << 23, 1.5, "big"])
def test_illegal_areas(area):
    with pytest.raises(Emu3Error, match=r"it must be a number of pixels from 1 to 4194304"):
        Vision(TINY, AreaConfig(), {}).with_area(area)
    with pytest.raises(Emu3Error, match="leave area out"):
        Vision(VisionConfig(), ImageConfig(), {}).with_area(area)


def test_what_is_not_supported():
    """Training of this tokenizer, and a comparison with a class that transformers lacks."""
    with pytest.raises(Emu3Error, match=r"field vision is .*Emu3\.5's vision tokenizer cannot be trained here"):
        VisionTrainConfig("run", TINY, PixelConfig(manifests=("a.jsonl",), size=16), steps=10)
    with pytest.raises(Emu3Error, match=r"transformers has no class for Emu3\.5's vision"):
        next(bench_vision(preset="455m", compare="transformers"))


def test_preparing_data_resizes_once(monkeypatch, tmp_path):
    """The area of `prepare` is that of the picture preprocessing. Emu3's resizes a second time."""
    asked = []
    monkeypatch.setattr(
        Emu3, "tokenize", lambda self, media, **given: asked.append((media[0].size, given)) or [np.zeros((1, 1), int)]
    )
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a text")
    for vision in (Vision(TINY, AreaConfig(), {}), Vision(VisionConfig(), ImageConfig(), {})):
        records = SourceRecords(Folder(tmp_path, Columns()), Emu3("model", vision=vision), 3200)
        assert records[0].text == "a text"
    assert asked == [((40, 20), {"area": 3200}), ((80, 40), {})]


def test_clips_are_refused():
    """Emu3.5's tokenizer knows pictures alone: one line, wherever a clip reaches it."""
    vision = Vision(TINY, AreaConfig(), {})
    clip = np.zeros((4, 16, 16, 3), np.uint8)
    for act in (
        lambda: encode(vision, Clip(clip)),
        lambda: decode(vision, np.zeros((1, 2, 2), np.int32)),
        lambda: encode_end(vision, clip, 1),
        lambda: Emu3("model", Language(tiny.CONFIG, {}, None, None), vision).generate_clips("a", frames=4),
    ):
        with pytest.raises(Emu3Error, match=r"Emu3\.5 knows pictures alone"):
            act()
