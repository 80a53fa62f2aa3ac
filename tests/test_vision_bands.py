"""Large pictures are computed in bands of rows on TPUs. The results are those of whole pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu3_jax.config import VisionConfig
from emu3_jax.models import vision_bands, vision_layers
from emu3_jax.models.vision import VisionTokenizer

pytestmark = pytest.mark.compiled_quickly

CONFIG = VisionConfig(
    codebook_size=64, base_channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_stages=(2,)
)
MODEL = VisionTokenizer(CONFIG)


@pytest.fixture(scope="module")
def inputs():
    """Random weights, norms and biases included, and two random pictures of 40x24 pixels."""
    pixels = jax.random.uniform(jax.random.key(1), (2, 40, 24, 3), minval=-1, maxval=1)
    return tiny.vision_params(MODEL, pixels), pixels


def run(params, pixels):
    latents = jax.jit(lambda params, pixels: MODEL.apply(params, pixels, method="latents"))(params, pixels)
    codes = jnp.arange(2 * 10 * 6, dtype=jnp.int32).reshape(2, 10, 6) % CONFIG.codebook_size
    return latents, jax.jit(lambda params, codes: MODEL.apply(params, codes, method="decode"))(params, codes)


@pytest.mark.parametrize("most, largest", [(1, 40), (2**15, 20), (2**30, 1)])
def test_bands_change_nothing(inputs, monkeypatch, most, largest):
    """`largest` is the number of bands where there are most: bands of single rows, of some rows, of all rows."""
    whole = run(*inputs)
    assert np.isfinite(whole[0]).all() and np.isfinite(whole[1]).all()
    bands, rows_of = [], vision_bands._band_rows

    def counted(height, cells, bytes_of_row):
        rows = rows_of(height, cells, bytes_of_row)
        bands.append(height // rows)
        return rows

    monkeypatch.setattr(vision_layers, "in_bands", lambda shape, features: True)
    monkeypatch.setattr(vision_bands, "BAND_BYTES", most)
    monkeypatch.setattr(vision_bands, "_band_rows", counted)
    for found, wanted in zip(run(*inputs), whole, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    blocks = 3 + 2 + 3 * 2 + 2  # of the encoder's stages and middle, and of the decoder's
    assert len(bands) == 2 * blocks + 2  # two convolutions a block, and two upsamplings
    assert max(bands) == largest


def test_only_large_pictures_on_tpus_have_bands(monkeypatch):
    assert not vision_bands.in_bands((1, 720, 720, 256), 256)  # the tests run on CPUs
    monkeypatch.setattr(vision_bands, "target_platform", lambda: "tpu")
    assert vision_bands.in_bands((1, 720, 720, 256), 256) and vision_bands.in_bands((1, 360, 360, 64), 512)
    assert not vision_bands.in_bands((1, 180, 180, 512), 512)


@pytest.mark.parametrize(
    ("height", "cells", "bytes_of_row", "rows"),
    [(720, 90, 720 * 256 * 4, 80), (720, 720, 720 * 256 * 4, 90), (728, 91, 2**30, 8), (12, 1, 2**30, 12)],
)
def test_bands_have_whole_cells(height, cells, bytes_of_row, rows):
    assert vision_bands._band_rows(height, cells, bytes_of_row) == rows
