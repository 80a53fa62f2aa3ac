"""The causal 3D VQ against the live transformers `Emu3VQVAE`, small random models of several shapes."""

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from PIL import Image
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from emu3_jax.benchmarks import vision as benchmark
from emu3_jax.checkpoints.layouts import TRANSFORMERS_VISION, vision_params
from emu3_jax.checkpoints.published_config import vision_to_published
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.clips import Clip
from emu3_jax.media.images import postprocess, preprocess
from emu3_jax.models.quantizer import nearest_codes
from emu3_jax.models.vision import VisionTokenizer

pytestmark = pytest.mark.oracle

CONFIGS = {
    "two stages": VisionConfig(
        codebook_size=300, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=2, attention_stages=(1,)
    ),
    "no attention, temporal factor 2": VisionConfig(
        codebook_size=500,
        base_channels=32,
        channel_multipliers=(2, 1, 3),
        num_res_blocks=1,
        attention_stages=(),
        temporal_factor=2,
    ),
}


class Pair:
    """One random model on both sides. Arrays go in and come out channels-last."""

    def __init__(self, config: VisionConfig):
        torch.manual_seed(0)
        self.config = config
        self.torch = Emu3VQVAE(Emu3VQVAEConfig(**vision_to_published(config, "transformers")))
        for name, tensor in self.torch.state_dict().items():  # norms and statistics that do something
            if tensor.ndim == 1 and tensor.is_floating_point():
                positive = name.endswith(("weight", "running_var"))
                tensor.copy_(torch.rand_like(tensor) + 0.5 if positive else 0.3 * torch.randn_like(tensor))
        state = {name: tensor.numpy() for name, tensor in self.torch.state_dict().items()}
        flat = {
            p.path: p.pack([state[TRANSFORMERS_VISION.rename(w, "vision").name] for w in p.weights])
            for p in vision_params(config)
        }
        self.params = traverse_util.unflatten_dict(flat)

    def jax(self, method: str, x: np.ndarray) -> np.ndarray:
        apply = jax.jit(lambda params, x: VisionTokenizer(self.config).apply({"params": params}, x, method=method))
        return np.asarray(apply(self.params, x))

    @torch.no_grad()
    def torch_encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents [B, t, h, w, C] and codes [B, t, h, w]; t is 1 for stills."""
        sizes = torch.tensor([pixels.shape[-3:-1]] * len(pixels))
        output = self.torch.encode(torch.from_numpy(np.moveaxis(pixels, -1, -3).copy()), sizes)
        latents = self.torch.quant_conv(output.last_hidden_state.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
        # `image_tokens` of a clip are cropped along the wrong axes, so its codes come from the quantizer itself.
        codes = self.torch.quantize(latents)
        if pixels.ndim == 4:
            codes = torch.stack(list(output.image_tokens))[:, None]
        return np.moveaxis(latents.numpy(), 2, -1), codes.numpy()

    @torch.no_grad()
    def torch_decode(self, codes: np.ndarray) -> np.ndarray:
        return np.moveaxis(self.torch.decode(torch.from_numpy(codes.astype(np.int64))).numpy(), -3, -1)


def test_independent_pieces_are_those_of_upstreams_script(pair):
    """It cuts a clip into pieces of the temporal factor's frames and encodes them as a batch."""
    f, t = pair.config.spatial_factor, pair.config.temporal_factor
    frames = np.random.default_rng(0).integers(0, 256, (3 * t, 16 * f, 16 * f, 3), np.uint8)
    image = ImageConfig(min_pixels=1)
    model = Emu3("pair", vision=Vision(pair.config, image, pair.params))
    pixels = np.stack([preprocess(Image.fromarray(frame), image, f) for frame in frames])
    _, codes = pair.torch_encode(pixels.reshape(3, t, *pixels.shape[1:]))
    (found,) = model.tokenize([Clip(frames)], independent=True)
    np.testing.assert_array_equal(found, codes[:, 0])
    (whole,) = model.tokenize([Clip(frames)])
    assert (whole[0] == found[0]).all() and (whole[1:] != found[1:]).any()
    (clip,) = model.detokenize([found], independent=True)
    expected = postprocess(pair.torch_decode(codes).reshape(3 * t, *pixels.shape[1:]), image)
    assert np.abs(clip.frames.astype(int) - expected).max() <= 1  # roundings to whole steps


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return Pair(CONFIGS[request.param])


# In units of codes: prime rows and columns, a batch, a clip.
@pytest.mark.parametrize("shape", [(1, 7, 11), (3, 5, 2), (2, 3, 5, 7)], ids=["still", "batch", "clips"])
def test_equals_transformers(pair, shape):
    rng = np.random.default_rng(len(shape))
    *lead, rows, columns = shape
    f, t = pair.config.spatial_factor, pair.config.temporal_factor
    frames = [lead[0], lead[1] * t] if len(lead) == 2 else lead
    pixels = rng.uniform(-1, 1, (*frames, rows * f, columns * f, 3)).astype(np.float32)
    latents, codes = pair.torch_encode(pixels)
    ours = pair.jax("latents", pixels)
    np.testing.assert_allclose(ours, latents, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(nearest_codes(ours, pair.params["quantize"]["embedding"]), codes)
    assert len(np.unique(codes)) > 5  # the codebook is in use, so equality says something
    codes = rng.integers(0, pair.config.codebook_size, shape)
    np.testing.assert_allclose(pair.jax("decode", codes), pair.torch_decode(codes), rtol=0, atol=1e-4)


def test_benchmark_compares_equal_models(monkeypatch):
    monkeypatch.setattr(benchmark, "enable_persistent_cache", lambda: None)
    machine, ours, peer, ratios = benchmark.run(size=16, preset="small", repeat=1, compare="transformers")
    assert machine["picture"] == "16x16" and machine["parameters"] > 1e6
    assert (ours["side"], peer["side"]) == ("emu3_jax", "transformers")
    assert ratios["codes_equal"] == "4/4" and ratios["pixels_relative_difference"] < 1e-4
    assert ratios["encode_ratio"] > 0 and ratios["decode_ratio"] > 0


@pytest.mark.parametrize(("arguments", "message"), [({"size": 20}, "--size is 20"), ({"repeat": 0}, "--repeat is 0")])
def test_benchmark_refuses_bad_arguments(arguments, message):
    with pytest.raises(Emu3Error, match=message):
        next(benchmark.run(preset="small", **arguments))
