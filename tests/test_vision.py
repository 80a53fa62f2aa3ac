"""The causal 3D VQ against the golden case, and its promises: causality, the still shortcut, bounded memory, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_json, golden_npz, reference_weights
from flax import linen as nn
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from emu3_jax.checkpoints.layouts import vision_counters, vision_params
from emu3_jax.checkpoints.published_config import vision_from_published
from emu3_jax.config import VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models import vision, vision_layers, vision_stages
from emu3_jax.models.quantizer import Quantizer, nearest_codes
from emu3_jax.models.vision import Stream, VisionTokenizer, check_codes, make_decoder, make_encoder

pytestmark = pytest.mark.slow

CONFIG = vision_from_published(golden_json("hf_configs.json")["vq"])
TINY = VisionConfig(
    codebook_size=64, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_stages=(1,)
)
TOLERANCE = 1e-4  # of latents and pixels; codes are equal


@pytest.fixture(scope="module")
def params():
    state = reference_weights("vq")
    flat = {p.path: p.pack([state[w.name] for w in p.weights]) for p in vision_params(CONFIG)}
    return jax.device_put(traverse_util.unflatten_dict(flat))


@pytest.fixture(scope="module")
def golden():
    return golden_npz("vision.npz")


@jax.jit
def latents_of(params, pixels):
    return VisionTokenizer(CONFIG).apply({"params": params}, pixels, method="latents")


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -3, -1)


def close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def init_shapes(config: VisionConfig):
    size = config.spatial_factor
    pixels = jnp.zeros((1, size, size, config.in_channels))
    return jax.eval_shape(VisionTokenizer(config).init, jax.random.key(0), pixels)["params"]


# ------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("case", ["image", "image_batch", "video"])
def test_golden_encode(params, golden, case):
    pixels = channels_last(golden[f"{case}/pixels"])
    close(latents_of(params, pixels), channels_last(golden[f"{case}/latents"]))
    codes = make_encoder(CONFIG)(params, pixels)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, golden[f"{case}/codes"])


@pytest.mark.parametrize("case", ["image", "image_batch", "video", "image_codes", "video_codes"])
def test_golden_decode(params, golden, case):
    pixels = make_decoder(CONFIG)(params, golden[f"{case}/codes"])
    assert pixels.dtype == jnp.float32
    close(pixels, channels_last(golden[f"{case}/reconstruction"]))


@pytest.mark.parametrize("picture", ["photo", "tall", "alpha", "gray", "palette"])
def test_golden_pictures(params, picture):
    images = golden_npz("images.npz")
    codes = make_encoder(CONFIG)(params, channels_last(images[f"{picture}/pixels"]))
    np.testing.assert_array_equal(codes, images[f"{picture}/codes"])


def test_full_size_parameters_are_the_published_ones():
    manifest = {name: tuple(shape) for name, shape in golden_json("manifest/upstream.json")["vision_tokenizer"].items()}
    config = VisionConfig()
    declared = vision_params(config)
    assert {w.name: w.shape for p in declared for w in p.weights} | {
        w.name: w.shape for w in vision_counters(config)
    } == manifest
    shapes = traverse_util.flatten_dict(nn.unbox(init_shapes(config)))
    assert {path: leaf.shape for path, leaf in shapes.items()} == {p.path: p.shape for p in declared}
    assert all(leaf.dtype == jnp.float32 for leaf in shapes.values())


def test_every_weight_names_its_axes():
    legend = {"conv_time", "conv_rows", "conv_columns", "conv_in", "conv_out", "channels", "codes", "code_width"}
    boxes = jax.tree.leaves(init_shapes(TINY), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim and set(box.names) <= legend


def test_codebook_is_drawn_as_upstream_draws_it():
    variables = nn.unbox(Quantizer(512, 4).init(jax.random.key(0), jnp.zeros((1, 4))))
    codebook = variables["params"]["embedding"]
    assert abs(codebook).max() <= 1 / 512 and codebook.std() == pytest.approx(1 / 512 / 3**0.5, rel=0.05)


# ------------------------------------------------------------------------------------------------ numerics


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("case", ["image", "video"])
def test_golden_cases_in_pairs_of_tf32(params, golden, case, monkeypatch):
    """What GPUs compute: each operand in two parts that TF32 holds, whose products float32 holds."""
    monkeypatch.setattr(vision_layers, "takes_tf32", lambda: True)
    encode, decode = (
        jax.jit(lambda params, x, method=method: VisionTokenizer(CONFIG).apply({"params": params}, x, method=method))
        for method in ("encode", "decode")
    )
    codes = golden[f"{case}/codes"]
    np.testing.assert_array_equal(encode(params, channels_last(golden[f"{case}/pixels"])), codes)
    close(decode(params, codes), channels_last(golden[f"{case}/reconstruction"]))


def test_pairs_of_tf32_are_as_good_as_float32():
    """Against float64: the error of the sum of both orders of magnitude, and of single TF32 beside it."""
    x, kernel = (jax.random.normal(jax.random.key(len(shape)), shape) for shape in ((16, 16, 64), (3, 3, 64, 8)))
    parts = [[np.asarray(part, np.float64) for part in vision_layers._tf32_parts(array)] for array in (x, kernel)]
    for array, (high, low) in zip((x, kernel), parts, strict=True):
        assert (np.asarray(jax.lax.reduce_precision(high.astype(np.float32), 8, 10)) == high).all()
        assert np.abs(high + low - np.asarray(array, np.float64)).max() < 2**-22 * np.abs(array).max()

    def product(x, kernel):  # of one output pixel
        return np.einsum("ijc,ijco->o", x[:3, :3], kernel)

    exact = product(np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    (high, low), (kernel_high, kernel_low) = parts
    found = product(high, kernel_high) + product(high, kernel_low) + product(low, kernel_high)
    assert np.abs(found - exact).max() < 1e-5 < np.abs(product(high, kernel_high) - exact).max()


def products_of(function, *arguments) -> list:
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]


def test_convolutions_are_pairs_on_gpus_alone(monkeypatch):
    variables = {"params": nn.unbox(init_shapes(TINY))}
    codes = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)

    def convolutions(**kwargs):
        decode = make_decoder(TINY, **kwargs).__wrapped__
        found = products_of(lambda *args: decode(*args), variables["params"], codes)  # not one that JAX has seen
        return [e.params["precision"] for e in found if e.primitive.name == "conv_general_dilated"]

    plain, fast = convolutions(), convolutions(fast=True)
    highest, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
    assert set(plain) == {(highest, highest)} and set(fast) == {(default, default)} and len(fast) == len(plain)
    monkeypatch.setattr(vision_layers, "takes_tf32", lambda: True)
    assert convolutions() == [(default, default)] * 3 * len(plain) and convolutions(fast=True) == fast


def test_every_product_is_float32_at_highest_precision():
    variables = {"params": nn.unbox(init_shapes(TINY))}
    clip = jax.ShapeDtypeStruct((1, 4, 8, 8, 3), jnp.float32)
    products = products_of(VisionTokenizer(TINY).apply, variables, clip)
    assert len(products) > 50
    for product in products:
        precision = product.params["precision"]
        assert set(precision) == {jax.lax.Precision.HIGHEST}, product
        assert {v.aval.dtype for v in (*product.invars, *product.outvars)} == {jnp.dtype("float32")}


def test_a_still_equals_the_clip_that_repeats_it(params, golden):
    still = channels_last(golden["image/pixels"])
    clip = np.repeat(still[:, None], CONFIG.temporal_factor, axis=1)
    close(latents_of(params, still), latents_of(params, clip), 1e-6)
    codes = golden["image/codes"]
    decode = make_decoder(CONFIG)
    close(decode(params, codes), decode(params, codes[:, None])[:, 0], 1e-6)


def test_no_latent_sees_a_later_frame(params, golden):
    clip = channels_last(golden["video/pixels"])
    changed = clip.copy()
    changed[:, 4:] *= -1
    before, after = latents_of(params, clip), latents_of(params, changed)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert not np.array_equal(before[:, 1], after[:, 1])


def test_no_frame_sees_a_later_code(params, golden):
    codes = golden["video/codes"]
    changed = codes.copy()
    changed[:, 1:] = 7
    before, after = (make_decoder(CONFIG)(params, c) for c in (codes, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.array_equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_clip_in_parts_equals_the_whole(params, size):
    clip = np.random.default_rng(0).uniform(-1, 1, (2, 20, 16, 24, 3)).astype(np.float32)  # no multiple of 8 or 16
    codes = np.asarray(make_encoder(CONFIG)(params, clip))
    encode, decode = (Stream(CONFIG, params, method) for method in ("encode", "decode"))
    found = [np.asarray(encode(clip[:, first : first + size])) for first in range(0, 20, size)]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), codes)
    assert (np.asarray(make_encoder(CONFIG)(params, clip[:, 16:])) != codes[:, 4:]).any()  # the past does matter
    size //= CONFIG.temporal_factor
    pixels = [np.asarray(decode(codes[:, first : first + size])) for first in range(0, 5, size)]
    close(np.concatenate(pixels, axis=1), make_decoder(CONFIG)(params, codes))


def test_parts_take_the_memory_of_a_short_clip():
    """What any number of frames takes is what 16 take, and the past."""
    params = nn.unbox(init_shapes(TINY))
    part = jax.ShapeDtypeStruct((1, 16, 64, 64, 3), jnp.float32)
    step = vision._make_step(TINY, "encode", False, "cpu")
    past = jax.eval_shape(step, params, {}, part)[1]

    def size(function, *arguments):
        memory = function.lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    assert size(step, params, past, part) < 1.2 * size(make_encoder(TINY), params, part)


def test_frames_in_groups_equal_frames_together(params, golden, monkeypatch):
    codes = golden["video_codes/codes"]  # 24 frames of 32x32
    clip = channels_last(golden["video/pixels"])  # 8 frames of 32x48
    monkeypatch.setattr(vision_stages, "PIXELS_PER_STEP", 5 * 32 * 48)  # groups of 4 frames, and of 6
    model = VisionTokenizer(CONFIG)
    grouped = jax.jit(lambda params, x: model.apply({"params": params}, x, method="latents"))(params, clip)
    close(grouped, channels_last(golden["video/latents"]))
    pixels = jax.jit(lambda params, x: model.apply({"params": params}, x, method="decode"))(params, codes)
    close(pixels, channels_last(golden["video_codes/reconstruction"]))


def test_attention_in_blocks_equals_attention_at_once(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 35, 8))
    expected = vision_layers.spatial_attention(q, k, v)
    monkeypatch.setattr(vision_layers, "MAX_SCORES", 2 * 35 * 8)  # 5 blocks of 7
    close(vision_layers.spatial_attention(q, k, v), expected, 1e-6)
    monkeypatch.setattr(vision_layers, "MAX_SCORES", 2 * 35 * 12)  # 3 blocks of 12, the last one padded
    close(vision_layers.spatial_attention(q, k, v), expected, 1e-6)


@pytest.mark.parametrize(("positions", "codes"), [(131, 1000), (64, 256), (1, 7)])
def test_nearest_code_is_the_nearest(positions, codes):
    rng = np.random.default_rng(positions)
    latents, codebook = rng.standard_normal((positions, 4), np.float32), rng.standard_normal((codes, 4), np.float32)
    distance = ((latents[:, None].astype(np.float64) - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(nearest_codes(latents, codebook), distance.argmin(-1))


def test_of_equally_near_codes_the_first_wins():
    codebook = np.tile(np.random.default_rng(0).standard_normal((300, 4), np.float32), (3, 1))
    np.testing.assert_array_equal(nearest_codes(codebook, codebook), np.tile(np.arange(300), 3))


# ------------------------------------------------------------------------------------------------ memory


def temporary_bytes(function, *shapes) -> int:
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_code_search_never_holds_positions_by_codes():
    positions, codes = 16384, 32768
    assert temporary_bytes(nearest_codes, floats(positions, 4), floats(codes, 4)) < positions * codes * 4 // 1000


def test_attention_never_holds_positions_by_positions():
    positions = 128 * 128
    qkv = [floats(1, positions, 32)] * 3
    assert temporary_bytes(vision_layers.spatial_attention, *qkv) < positions**2 * 4 // 4


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_long_clips_need_no_more_memory_than_short_ones(method):
    config = dataclasses.replace(TINY, channel_multipliers=(1, 1, 1, 1), attention_stages=())
    variables = {"params": nn.unbox(init_shapes(config))}

    def bytes_for(frames):
        clip = floats(1, frames, 512, 512, 3)
        codes = jax.ShapeDtypeStruct((1, frames // 4, 64, 64), jnp.int32)
        return temporary_bytes(
            lambda variables, x: VisionTokenizer(config).apply(variables, x, method=method),
            variables,
            clip if method == "encode" else codes,
        )

    one_activation = 512 * 512 * 32 * 4  # of one frame; only the latents grow, 1/512 of it per frame
    assert bytes_for(32) - bytes_for(8) < one_activation / 2 < bytes_for(8)


def test_compiles_once_per_shape(params, golden):
    codes = golden["image/codes"]
    make_decoder(CONFIG)(params, codes)
    programs = make_decoder(CONFIG)._cache_size()
    make_decoder(VisionConfig.from_dict(CONFIG.to_dict()))(params, codes + 1)
    assert make_decoder(CONFIG)._cache_size() == programs


def test_programs_for_tpus_are_their_own_and_compile_with_less_effort(monkeypatch):
    here = make_encoder(TINY), make_decoder(TINY)
    monkeypatch.setattr(vision, "target_platform", lambda: "tpu")
    there = make_encoder(TINY), make_decoder(TINY)
    assert not set(here) & set(there) and there == (make_encoder(TINY), make_decoder(TINY))
    variables, pixels = nn.unbox(init_shapes(TINY)), jax.ShapeDtypeStruct((1, 2, 2, 3), jnp.float32)
    codes = jax.eval_shape(there[0], variables, pixels)  # `bench vision` asks for shapes, too
    for function, x in zip(there, (pixels, codes), strict=True):
        with pytest.raises(ValueError, match="exec_time_optimization_effort"):  # JAX's words for a nested function
            jax.eval_shape(lambda *arguments, function=function: function(*arguments), variables, x)
    monkeypatch.undo()
    assert here == (make_encoder(TINY), make_decoder(TINY))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 8, 3), "pixels have shape"),
        ((1, 8, 8, 4), "pixels have shape"),
        ((1, 12, 8, 3), r"H .12. and W .8. must be multiples of"),
        ((1, 0, 8, 3), "no axis may be 0"),
        ((1, 6, 8, 8, 3), "repeat the last frame 2 times"),
    ],
)
def test_bad_pixels(shape, message):
    with pytest.raises(Emu3Error, match=message):
        jax.eval_shape(lambda x: VisionTokenizer(CONFIG).apply({}, x, method="encode"), floats(*shape))


def test_bad_rank_of_codes():
    with pytest.raises(Emu3Error, match=r"codes have shape \(8, 8\)"):
        VisionTokenizer(CONFIG).apply({}, jnp.zeros((8, 8), jnp.int32), method="decode")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[0, 32768]]), r"code 32768 at \[0, 1\] is outside the codebook: codes must be from 0 to 32767"),
        (np.array([[-1, 0]]), "code -1"),
        (np.zeros((2, 2)), "dtype float64"),
        (np.zeros((0, 2), int), "at least one code"),
        (np.zeros(4, int), "rows, columns"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(Emu3Error, match=message):
        check_codes(codes, CONFIG)


def test_good_codes():
    check_codes(np.array([[0, 32767]], np.uint16), CONFIG)
