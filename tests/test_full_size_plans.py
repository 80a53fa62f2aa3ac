"""Plans of the 8 B configs at full size."""

import pytest
from full_size import CONFIGS, EMU3_MATRICES
from markers import libtpu

from emu3_jax.data.sequences import NextFrame
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import plan as generation_plan
from emu3_jax.generation.schedule import clip_schedule
from emu3_jax.sharding import plan
from emu3_jax.training import plan as training_plan
from emu3_jax.training.config import load_config


@libtpu
@pytest.mark.parametrize("name", ["sft_t2i_8b", "sft_i2t_8b", "pretrain_8b"])
def test_full_size_states(name):
    config = load_config(CONFIGS / f"{name}.py")
    slice_ = plan.tpu_slice("v5p:4x4x4")
    _, (step,) = training_plan.programs(config, slice_, rows_per_chip=1)
    weights = plan.chip_bytes(step.arguments["weights"])
    # Float32 over 64 chips, the norms on each; two moments of each weight, and two counts of steps.
    assert weights == 4 * (EMU3_MATRICES // 64 + 65 * 4096)
    assert plan.chip_bytes(step.arguments["optimizer"]) == 2 * weights + 2 * 4
    assert plan.chip_bytes(step.arguments["inputs"]) == 10_240 * (3 * 4 + 1) + 4 + 8
    # 6 FLOPs a weight and token, and attention.
    assert 6 * 7.7e9 < step.flops / (64 * 10_240) < 6 * 10e9


@libtpu
@pytest.mark.parametrize("name", ["lora_t2i_8b", "qlora_t2i_8b", "lora_i2t_8b"])
def test_full_size_adapters(name):
    config = load_config(CONFIGS / f"{name}.py")
    _, (step,) = training_plan.programs(config, plan.tpu_slice("v5e:4x4"))
    assert config.evaluation and config.batch_size == 16
    matrices = EMU3_MATRICES - 2 * 184622 * 4096
    # bfloat16; or 4 bits a weight and a float32 scale for 64. The tables are bfloat16, the norms lie on each chip.
    width = 0.5 + 4 / 64 if config.adapter.base == "nf4" else 2
    tables_and_norms = 2 * (2 * 184622 * 4096 // 16 + 65 * 4096)
    assert plan.chip_bytes(step.arguments["frozen weights"]) == width * matrices // 16 + tables_and_norms
    # The two sides of each layer's four matrices, float32, and two moments of each. Axes of 4096 are split.
    sides = 4 * 4096 // 16 + 48 * 128 + 32 * 128 + 2 * 14336 + 14336
    assert plan.chip_bytes(step.arguments["weights"]) == 4 * 32 * config.adapter.rank * sides
    assert plan.chip_bytes(step.arguments["optimizer"]) == 2 * plan.chip_bytes(step.arguments["weights"]) + 2 * 4


@libtpu
def test_full_size_preference_pairs():
    config = load_config(CONFIGS / "dpo_t2i_8b.py")
    _, (step,) = training_plan.programs(config, plan.tpu_slice("v5e:2x4"))
    # Two rows on each chip, and the reference's log-probability of each.
    assert plan.chip_bytes(step.arguments["inputs"]) == 2 * (8_704 * (3 * 4 + 1) + 4) + 4 + 8
    with pytest.raises(Emu3Error, match=r"batch_size is 16: it must be a multiple of 32, .* split it between pairs"):
        training_plan.programs(config, plan.tpu_slice("v5e:4x4"))
    with pytest.raises(Emu3Error, match=r"--rows-per-chip 3 would split rows that .*: give a multiple of 2"):
        training_plan.programs(config, plan.tpu_slice("v5e:4x4"), rows_per_chip=3)


@libtpu
def test_full_size_clips_in_training():
    """The paper's context: eight chips of a v5p:4x4x8 to a row of 131,072 tokens."""
    config = load_config(CONFIGS / "video_8b.py")
    length = config.data.sequence_length
    assert length == 131_072 <= config.model.decoder.max_positions and config.data.packing
    assert any(isinstance(source.task, NextFrame) for source in config.data.sources)
    mesh, (step,) = training_plan.programs(config, plan.tpu_slice("v5p:4x4x8"))
    assert mesh.size == 128 and mesh.shape["sequence"] == 8 and length % mesh.shape["sequence"] == 0
    weights = plan.chip_bytes(step.arguments["weights"])
    assert weights == 4 * (EMU3_MATRICES // 128 + 65 * 4096)
    assert plan.chip_bytes(step.arguments["optimizer"]) == 2 * weights + 2 * 4
    rows = config.batch_size // mesh.shape["fsdp"]
    assert plan.chip_bytes(step.arguments["inputs"]) == rows * length // 8 * (3 * 4 + 1) + 4 + 8
    # 6 FLOPs a weight and token, and attention, which is two thirds.
    weights = 6 * (EMU3_MATRICES - 184622 * 4096)
    assert step.flops / (config.batch_size * length) == pytest.approx(weights + 12 * 32 * 4096 * (length + 1) / 2)


@libtpu
def test_full_size_clips_in_generation():
    """5 s at 24 frames per second: its steps, and a cache of 131,072 bytes a slot and row over four chips."""
    config = load_config(CONFIGS / "generate_video_8b.py")
    assert config.steps == 124_832 == len(clip_schedule(30, 64, 64))
    assert config.decoder.max_positions == load_config(CONFIGS / "video_8b.py").model.decoder.max_positions
    _, (prefill, decode, growth, pixels) = generation_plan.programs(config, plan.tpu_slice("v5p:2x2x1"))
    assert prefill.name == "prefill of 2 rows of 64 tokens"
    assert decode.name == "decoding step 124832 of 1 clip of 30x64x64 tokens"
    assert growth.name == "growth of the cache to 124992 slots"
    # Of 30 latent frames, four at once. They are decoded after the cache is gone.
    assert (pixels.name, pixels.runs) == ("exact pixels of 4x64x64 codes", 8) and set(pixels.beside) == {"weights"}
    assert plan.chip_bytes(decode.arguments["cache"]) == 2 * 131_072 * 124_992 // 4 + 2 * 4 + 2 * 4
    assert plan.chip_bytes(growth.arguments["cache"]) == 2 * 131_072 * 56 * 2048 // 4 + 2 * 4 + 2 * 4


@libtpu
def test_full_size_int8():
    """Half the weights and the cache of bfloat16, but for the embedding and the scales."""
    config = load_config(CONFIGS / "generate_8b_int8.py")
    _, (_, decode, *_) = generation_plan.programs(config, plan.tpu_slice("v5e:1x1"))
    scales = 32 * (48 * 128 + 4096 + 2 * 14336 + 4096) + 184622
    embedding, norms = 184622 * 4096, 65 * 4096
    assert plan.chip_bytes(decode.arguments["weights"]) == EMU3_MATRICES + embedding + 2 * norms + 4 * scales
    assert plan.chip_bytes(decode.arguments["cache"]) == 2 * 32 * 2 * 8 * 8768 * (128 + 4) + 2 * 4 + 2 * 4


@libtpu
def test_full_size_decoding_fits_v5e_2x4():
    slice_ = plan.tpu_slice("v5e:2x4")
    mesh, (_, decode, *_) = generation_plan.programs(load_config(CONFIGS / "generate_8b.py"), slice_)
    result = plan.compile_plan(slice_, mesh, [decode])
    (decode,) = result["programs"]
    assert result["chips"] == 8 and result["fits"]
    assert decode["bytes"]["weights"] == 2 * (EMU3_MATRICES // 8 + 65 * 4096)
    # One KV head of two rows; starts, lengths.
    assert decode["bytes"]["cache"] == 2 * 32 * 2 * 8768 * 128 * 2 + 2 * 4 + 2 * 4
    # At least the visual rows of the head, cut out once.
    assert decode["bytes"]["temporaries"] > 32768 * 4096 * 2 // 8
    assert decode["total_bytes"] - decode["bytes"]["vision tokenizer"] < 4 * 2**30
