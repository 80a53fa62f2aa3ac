"""`emu3-jax plan`: compiles for TPU slices on this machine, where libtpu is installed."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from full_size import CONFIGS
from markers import libtpu

from emu3_jax.cli.main import main
from emu3_jax.config import EMU35_34B, DecoderConfig, IbqConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import plan as generation_plan
from emu3_jax.generation.config import GenerateConfig
from emu3_jax.generation.schedule import clip_schedule
from emu3_jax.sharding import plan
from emu3_jax.sharding.collectives import Collective, collectives
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.training import plan as training_plan
from emu3_jax.training.config import SampleConfig, load_config

SMALL = """
import tiny
from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.generation.config import GenerateConfig
from emu3_jax.training.config import ModelConfig, SampleConfig, TrainConfig

DECODER = DecoderConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=4, num_kv_heads=2,
    tokens=tiny.TOKENS,
)

def train():
    data = DataConfig((Source("data", TextToImage()),), sequence_length=256)
    return TrainConfig("run", ModelConfig("bundle", DECODER, attention="xla"), data, 4, 100)

def generate():
    return GenerateConfig(DECODER, pictures=2, area=384 * 384, mesh="data=2,tensor=2")
"""

# Why the vision tokenizer is left out where the decoder is `DECODER`.
NONE_PUBLISHED = "because no published vision tokenizer has 8 codes, as the decoder has visual ids"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Config files of a small decoder: `train.py` and `generate.py`."""
    directory = tmp_path_factory.mktemp("configs")
    for name in ("train", "generate"):
        (directory / f"{name}.py").write_text(f"{SMALL}\n\nconfig = {name}\n")
    return directory


@pytest.fixture(scope="module")
def trained(small):
    """The plan of the small training run, as `--json` prints it."""
    return _plan(small / "train.py", "v5e:2x2")


def _plan(config, topology):
    slice_ = plan.tpu_slice(topology)
    loaded = load_config(config)
    programs = generation_plan.programs if isinstance(loaded, GenerateConfig) else training_plan.programs
    return plan.compile_plan(slice_, *programs(loaded, slice_))


@libtpu
def test_train(trained):
    (step,) = trained["programs"]
    assert trained["chips"] == 4 and trained["mesh"]["fsdp"] == 4 and trained["usable_bytes"] == 15.75 * 2**30
    matrices = 3 * (256 * 12 * 64 + 3 * 256 * 512)
    tables, norms = 2 * 512 * 256, 7 * 256
    assert step["bytes"]["weights"] == matrices + tables + 4 * norms  # float32 over 4 chips; the norms on each
    assert step["bytes"]["optimizer"] == 2 * step["bytes"]["weights"] + 2 * 4  # two moments and two counts of steps
    assert step["bytes"]["inputs"] == 256 * (3 * 4 + 1) + 4 + 8
    assert step["fits"] and step["total_bytes"] == sum(step["bytes"].values())
    assert step["spare_bytes"] == trained["usable_bytes"] - step["total_bytes"]
    # The matrices come from all chips in the compute dtype, forward and backward, one layer after the other.
    gathered = sum(c["bytes"] for c in step["collectives"] if c["kind"] in ("all-gather", "all-reduce"))
    assert step["collective_trips_known"] and gathered > 2 * 2 * matrices
    assert step["flops"] == pytest.approx(4 * (6 * (matrices + tables / 2) * 256 + 12 * 3 * 256 * 256 * 257 / 2) / 4)
    # The products of all layers, with what is computed again, and with the masked half of attention.
    again = 2 * matrices * 256 + 12 * 3 * 256 * 256 * 256
    assert step["flops"] < step["costs"]["flops"] <= step["flops"] + again and step["costs"]["kernels"] == 0
    # Gradients and optimiser: weights and moments are read and written.
    assert step["costs"]["read"] > 3 * step["bytes"]["weights"] < step["costs"]["written"]
    sent = sum(c["ici_bytes"] for c in step["costs"]["collectives"])
    assert sent / (2 * 50e9) == pytest.approx(step["bound"]["network_seconds"])
    fast, seconds = step["training"], step["bound"]["seconds"]
    assert fast["tokens_per_second_per_chip"] == pytest.approx(256 / seconds)
    assert fast["mfu"] == pytest.approx(step["flops"] / seconds / 197e12) and fast["mfu"] < 1


@libtpu
def test_guesses_of_several_tokens_save_steps_at_most(small):
    config = load_config(small / "generate.py", ["parallel=8", "decoder.num_layers=1"])
    slice_ = plan.tpu_slice("v5e:2x2")
    mesh, (_, decode, *_) = generation_plan.programs(config, slice_)
    result = plan.compile_plan(slice_, mesh, [decode])
    made = result["programs"][0]["decoding"]
    sizes = len(decode.rates.passes)
    assert 48 * 49 // 8 <= made["steps"] < 48 * 49 // 8 + sizes and made["window"] == 8
    assert "of 2 pictures, if all guesses are right: " in "\n".join(plan.describe(result))


@libtpu
def test_the_report_says_how_fast_at_most(trained):
    text = "\n".join(plan.describe(trained))
    assert "  least time " in text and "tokens per second and chip, MFU" in text
    assert text.endswith("Least times are bounds from the chip's peaks. Nothing was run.\nfits")


@libtpu
def test_generate(small, capsys):
    code = main(["plan", str(small / "generate.py"), "--topology", "v5e:2x2", "--json"])
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert code == 0 and result["fits"] and "compiled in" in shown.err
    line = f"the vision tokenizer and the pixels of pictures, {NONE_PUBLISHED}; set `vision`"
    assert result["left_out"] == [line]
    assert "\n".join(plan.describe(result)).endswith(f"\nleft out: {line}\nfits")
    prefill, decode, growth = result["programs"]
    # A prompt of 64 tokens and 48 x 49 more, in whole buckets; 4 rows over 2 chips, 2 KV heads over the other 2.
    starts_lengths = 2 * 4 + 4 * 4
    assert decode["bytes"]["cache"] == 2 * 3 * (4 // 2) * (2 // 2) * 2624 * 64 * 2 + starts_lengths
    assert prefill["bytes"]["weights"] == decode["bytes"]["weights"] == growth["bytes"]["weights"]
    assert growth["bytes"]["outputs"] >= decode["bytes"]["cache"] > growth["bytes"]["cache"]
    # The cache is donated: a step makes no second one.
    assert decode["bytes"]["outputs"] < 2**20
    assert all(program["fits"] for program in result["programs"])
    # A step moves at least the cache. The weights of this small decoder may stay on the chip from step to step.
    step, found = decode["step_costs"], decode["bound"]
    assert decode["bytes"]["cache"] < step["read"] + step["written"] < decode["total_bytes"]
    assert found["seconds"] == max(found[f"{by}_seconds"] for by in ("memory", "compute", "network"))
    made = decode["decoding"]
    assert (made["rows"], made["steps"]) == (2, 48 * 49) and made["seconds_each"] == made["seconds"] / 2
    assert made["seconds"] < 48 * 49 * found["seconds"] + 2 * 1e-3
    assert made["per_minute_per_chip"] == pytest.approx(60 * 2 / made["seconds"] / 4)
    assert result["least_seconds"] == pytest.approx(
        prefill["bound"]["seconds"] + made["seconds"] + growth["bound"]["seconds"]
    )
    assert "decoding" not in prefill and prefill["step_costs"] is None and prefill["bound"]["seconds"] > 0


@libtpu
def test_collectives_do_not_grow_with_the_data_axis(small):
    """Twice as many chips and rows: each chip exchanges as many bytes, by whatever collectives XLA takes for sums."""
    found = []
    for topology, data in (("v5e:2x4", 2), ("v5e:4x4", 4)):
        config = load_config(small / "train.py", [f"mesh=data={data},fsdp=4", "model.decoder.num_layers=1"])
        slice_ = plan.tpu_slice(topology)
        (step,) = plan.compile_plan(slice_, *training_plan.programs(config, slice_, rows_per_chip=1))["programs"]
        assert step["name"] == f"training step of {4 * data} rows of 256 tokens"
        found.append(sum(c["bytes"] for c in step["costs"]["collectives"]))
    assert found[0] == found[1]


@libtpu
def test_context_parallelism(small, trained):
    """Two devices to a row: each holds half of its tokens, and trades them for heads in every layer."""
    slice_ = plan.tpu_slice("v5e:2x2")
    config = load_config(small / "train.py", ["mesh=fsdp=2,sequence=2", "batch_size=2"])
    (step,) = plan.compile_plan(slice_, *training_plan.programs(config, slice_))["programs"]
    (whole,) = trained["programs"]
    assert step["fits"] and step["name"] == "training step of 2 rows of 256 tokens"
    for name in ("weights", "optimizer"):  # over all four chips, as without
        assert step["bytes"][name] == whole["bytes"][name]
    assert step["bytes"]["inputs"] == 128 * (3 * 4 + 1) + 4 + 8
    assert step["flops"] == pytest.approx(whole["flops"] / 2)
    # Queries, keys and values out, the result back: 4 + 2 + 2 + 4 heads of a chip's 128 tokens, in each layer forward,
    # again for the backward pass, and back. The embedding's exchange is there without.
    traded, without = (sum(c["bytes"] for c in p["collectives"] if c["kind"] == "all-to-all") for p in (step, whole))
    assert traded - without == 3 * 3 * 128 * (4 + 2 + 2 + 4) * 64 * 2


@libtpu
@pytest.mark.parametrize(("layout", "steps"), [("lines", 3 * (12 * 13 + 1) + 2), ("flat", 3 * (12 * 12 + 1) + 2)])
def test_clips(small, layout, steps):
    """Nine frames are three of latents, the last of them filled up; the plan names its steps and holds their cache."""
    config = load_config(small / "generate.py", ["frames=9", "area=9216", f"decoder.clip_layout={layout}"])
    assert config.grid == (3, 12, 12) and len(clip_schedule(*config.grid, layout)) == config.steps == steps
    _, (_, decode) = generation_plan.programs(config, plan.tpu_slice("v5e:2x2"))
    assert decode.name == f"decoding step {steps} of 2 clips of 3x12x12 tokens"
    slots = 64 + -(-steps // 64) * 64
    assert plan.chip_bytes(decode.arguments["cache"]) == 2 * 3 * (4 // 2) * (2 // 2) * slots * 64 * 2 + 2 * 4 + 4 * 4
    one = dataclasses.replace(config, pictures=1, mesh="tensor=2")
    assert f"step {steps} of 1 clip of" in generation_plan.programs(one, plan.tpu_slice("v5e:2x2"))[1][1].name


@libtpu
def test_quantised(small):
    """int8 codes and float32 scales, of weights and cache; the program compiles."""
    slice_ = plan.tpu_slice("v5e:2x2")
    config = load_config(small / "generate.py", ["quantize=int8", "decoder.num_layers=1"])
    mesh, (_, decode, *_) = generation_plan.programs(config, slice_)
    (decode,) = plan.compile_plan(slice_, mesh, [decode])["programs"]
    assert decode["fits"] and decode["bytes"]["cache"] == 2 * (4 // 2) * (2 // 2) * 2624 * (64 + 4) + 2 * 4 + 4 * 4
    codes = (256 * 12 * 64 + 3 * 256 * 512) // 2 + 512 * 256 // 2  # over two chips; tables by their width
    scales = 4 * ((8 * 64 + 2 * 512) // 2 + 256 + 256 + 512)  # qkv and gate_up over two chips; out, down, head on each
    assert decode["bytes"]["weights"] == codes + scales + 2 * (512 * 256 // 2 + 3 * 256)


@libtpu
def test_the_kernel_for_tpus_reads_what_is_in_use(small):
    """Its cache does not grow, and a pass reads blocks of 512 slots instead of all 2,624."""
    config = load_config(small / "generate.py", ["kernels=pallas-tpu"])
    _, (_, decode) = generation_plan.programs(config, plan.tpu_slice("v5e:2x2"))
    slots, passes = zip(*decode.rates.passes, strict=True)
    assert slots == (512, 1024, 1536, 2048, 2560, 2624)
    assert passes == (448, 512, 512, 512, 48 * 49 - 448 - 3 * 512, 0)


@libtpu
def test_out_of_memory_is_a_plan(small, capsys):
    code = main(["plan", str(small / "train.py"), "--topology", "v5e:2x2", "--hbm-limit", "0.001"])
    shown = capsys.readouterr()
    assert code == 1 and "does not fit, by" in shown.out and shown.out.endswith("does not fit\n")
    assert "Traceback" not in shown.err


def test_what_xla_says_about_memory():
    says = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (34.63G) exceeds"
    )
    assert plan._wanted(says) == int(34.63 * 2**30)
    assert plan._wanted("INTERNAL: Mosaic failed") is None


@libtpu
@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ("train", ["v5q:4x4"], "topology 'v5q:4x4' is unknown"),
        ("train", ["v5p:4x4"], "three sides"),
        ("train", ["v5e:3x3"], "topology 'v5e:3x3' is not legal"),
        ("train", ["v7x:2x2x1"], "tpu7x:2x2x1"),
        ("train", ["tpu7x:2x2"], "topology 'tpu7x:2x2' is unknown"),
        ("train", ["v6e:16x32"], "has 512 chips: the largest v6e slice has 256"),
        ("generate", ["v5e:2x4", "--set", "mesh=tensor=8"], "axis 'kv_heads', which mesh tensor=8 does not divide"),
        (
            "generate",
            ["v5e:2x4", "--set", "mesh=tensor=8", "--set", "quantize=int8"],
            "set tensor to one of 1, 2",
        ),
        (
            "train",
            [
                "v5e:2x2",
                "--set",
                "mesh=tensor=2,fsdp=2",
                "--set",
                "model.decoder.intermediate_size=192",
                "--set",
                "adapter=Adapter(rank=4,base='int8')",
            ],
            "down_scale has size 3 along its axis 'mlp', which mesh tensor=2 does not divide",
        ),
        ("train", ["v5e:2x2", "--hbm-limit", "17"], "the most is 15.75 GiB"),
        ("train", ["v5e:2x2", "--set", "mesh=fsdp=3"], "does not divide the 4"),
        ("train", ["v5e:2x4", "--set", "mesh=tensor=8"], "weight params/layers/attention/out has size 2"),
        (
            "train",
            ["v5e:2x2", "--set", "batch_size=6"],
            "must be a multiple of 4, because the mesh and accumulation split it",
        ),
        ("train", ["v5e:2x2", "--set", "mesh=sequence=4", "--set", "data.sequence_length=1022"], "sequence_length"),
        ("train", ["v5e:2x2", "--set", "model.decoder=None"], "model.decoder is None"),
        ("train", ["v5e:2x2", "--rows-per-chip", "0"], "--rows-per-chip is 0"),
        ("train", ["v5e:2x2", "--slices", "0"], "0 slices cannot be planned"),
        ("train", ["v5e:2x2", "--slices", "2", "--set", "mesh=fsdp=8"], "mesh fsdp=8 has data=1 for 2 slices"),
        ("generate", ["v5e:2x2", "--rows-per-chip", "1"], "set `pictures`"),
        ("generate", ["v5e:2x2", "--set", "area=4000000"], "positions"),
        ("generate", ["v5e:2x2", "--set", "frames=1000000000"], "choose fewer frames, a smaller area or prompt_tokens"),
    ],
)
def test_bad_input(small, capsys, config, arguments, message):
    assert main(["plan", str(small / f"{config}.py"), "--topology", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


@libtpu
@pytest.mark.parametrize(
    ("topology", "sizes", "extent"),
    [("v6e:4x4", "fsdp=2,tensor=8", [4, 2, 1]), ("v5p:8x16x16", "data=32,fsdp=64", [4, 16, 1])],
)
def test_axes_may_share_a_side_of_a_slice(topology, sizes, extent):
    """No product of sides is 8 or 64. The chips of such an axis still make a block."""
    mesh = make_mesh(sizes, plan.tpu_slice(topology).devices)
    groups = mesh.devices.reshape(-1, int(sizes.rpartition("=")[2]))
    assert len(set(mesh.devices.flat)) == mesh.size
    for group in groups:
        coordinates = np.array([device.coords for device in group])
        assert (np.ptp(coordinates, axis=0) + 1).tolist() == extent


def test_without_libtpu(small, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", str(small / "train.py"), "--topology", "v5e:2x2"]) == 2
    assert "pip install 'emu3-jax[tpu]'" in capsys.readouterr().err


def test_collectives_of_a_scan():
    """On CPU devices XLA writes the same text, with the trips of loops."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x):
        def body(total, _):
            return jax.lax.psum(total, "x") * 0.1, None

        total, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.all_gather(total, "x", tiled=True)

    spec = jax.sharding.PartitionSpec
    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec("x"), out_specs=spec(), check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct((8, 32), "float32")).compile().as_text()
    assert collectives(text) == (
        [
            Collective("all-gather", 1, 8 * 32 * 4, 7 * 32 * 4, 0),
            Collective("all-reduce", 5, 5 * 32 * 4, 5 * 2 * 7 * 32 * 4 // 8, 0),
        ],
        True,
    )


@libtpu
def test_the_grammar_of_emu35_is_planned_too():
    decoder = DecoderConfig(
        hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_width=16, intermediate_size=64, qk_norm=True,
        vocab_size=EMU35_34B.vocab_size, max_positions=1024, image_area=128 * 128, tokens=EMU35_34B.tokens,
        family="emu3.5",
    )  # fmt: skip
    slice_ = plan.tpu_slice("v5e:2x2")
    for parallel in ("off", 4):
        config = GenerateConfig(decoder, mesh="tensor=2,data=2", parallel=parallel)
        mesh, (*_, step, grammar, _) = generation_plan.programs(config, slice_)
        step, grammar = plan.compile_plan(slice_, mesh, [step, grammar])["programs"]
        assert step["name"].startswith("decoding step") and grammar["name"].startswith("grammar of a step")
        assert (
            grammar["runs"] == 0 and grammar["total_bytes"] < 2**22 and grammar["xla_flops"] < step["xla_flops"] / 100
        )


@libtpu
@pytest.mark.parametrize("parallel", ["off", 4])
def test_rows_of_texts_and_pictures(small, parallel):
    """Two rows with two contexts each; a pass of one token settles one token of each row."""
    config = load_config(small / "generate.py", ["interleave=200", f"parallel={parallel}", "decoder.num_layers=1"])
    slice_ = plan.tpu_slice("v5e:2x2")
    mesh, (prefill, decode, *_) = generation_plan.programs(config, slice_)
    assert prefill.name == "prefill of 4 rows of 64 tokens" and "of 2 rows of texts and pictures" in decode.name
    slots = 64 + 256 + (64 if parallel != "off" else 0)
    assert plan.chip_bytes(decode.arguments["cache"]) == 2 * (4 // 2) * (2 // 2) * slots * 64 * 2 + 2 * 4 + 2 * 4 * 2
    (step,) = plan.compile_plan(slice_, mesh, [decode])["programs"]
    assert step["fits"] and step["step_costs"]["flops"] > 0
    assert ("decoding" in step) == (parallel == "off")
    if parallel == "off":
        assert (step["decoding"]["noun"], step["decoding"]["rows"], step["decoding"]["steps"]) == ("row", 2, 200)


@libtpu
def test_pictures_are_planned_to_their_pixels(small):
    """Two pictures of 8x8 codes, one after the other, on every device."""
    config = load_config(small / "generate.py", ["area=4096"])
    vision = VisionConfig(
        codebook_size=8, base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_stages=()
    )
    slice_ = plan.tpu_slice("v5e:2x2")
    _, without = generation_plan.programs(config, slice_)  # there is no published tokenizer of 8 codes
    config = dataclasses.replace(config, vision=vision, fast_pixels=True, area=64)  # a code has one pixel
    mesh, (*decoding, pixels) = generation_plan.programs(config, slice_)
    assert [program.name for program in decoding] == [program.name for program in without]
    weights = plan.chip_bytes(pixels.arguments["vision tokenizer"])
    assert all(plan.chip_bytes(program.beside["vision tokenizer"]) == weights for program in decoding)
    assert pixels.name == "fast pixels of 8x8 codes" and set(pixels.beside) == {"weights"}  # the cache is freed
    found = plan.compile_plan(slice_, mesh, [pixels])
    (program,) = found["programs"]
    assert "fast pixels of 8x8 codes, per chip, 2 runs:" in plan.describe(found)
    assert program["runs"] == 2 and found["least_seconds"] == 2 * program["bound"]["seconds"] > 0
    assert program["bytes"]["vision tokenizer"] == weights and program["bytes"]["outputs"] >= 8 * 8 * 3 * 4


@libtpu
def test_answers_begin_with_the_codes_of_a_picture(small):
    vision = VisionConfig(codebook_size=8, base_channels=32)
    config = dataclasses.replace(load_config(small / "generate.py"), vision=vision, area=128 * 128)
    answers = dataclasses.replace(config, max_new_tokens=40)
    _, (codes, prefill, decode, *_) = generation_plan.programs(answers, plan.tpu_slice("v5e:2x2"))
    assert codes.name == "codes of a picture of 128x128 pixels" and codes.runs == 2
    assert decode.name == "decoding step 40 of 2 answers of 40 tokens" and set(codes.beside) == {"weights"}
    assert prefill.name == "prefill of 2 rows of 384 tokens"  # 64, and 16 x 17 of the picture
    longer = dataclasses.replace(answers, max_new_tokens=800, kernels="pallas-tpu")
    _, (_, _, decode, *growth) = generation_plan.programs(longer, plan.tpu_slice("v5e:2x2"))
    assert decode.rates.passes[0][0] == 512 and not growth  # the kernel reads blocks that are in use
    _, (*_, pixels) = generation_plan.programs(dataclasses.replace(config, interleave=200), plan.tpu_slice("v5e:2x2"))
    assert pixels.runs == 0 and set(pixels.beside) == {"weights", "cache"}  # rows go on while pixels are decoded


@libtpu
def test_samples_of_training_are_planned_to_their_pixels():
    config = load_config(CONFIGS / "sft_t2i_8b.py")
    sampled = dataclasses.replace(config, samples=SampleConfig(("a fox",)))
    _, (step, pixels) = training_plan.programs(sampled, plan.tpu_slice("v5e:8x8"))
    assert set(step.beside) == {"vision tokenizer"} and 1.0 < plan.chip_bytes(step.beside) / 2**30 < 1.02
    assert pixels.name == "exact pixels of 90x90 codes" and pixels.runs == 0
    assert set(pixels.beside) == {"weights", "optimizer", "weights for drawing"}


def test_what_a_plan_leaves_out(small):
    config = load_config(small / "generate.py", ["max_new_tokens=40"])
    line = f"the vision tokenizer and the codes of pictures, {NONE_PUBLISHED}; set `vision`"
    assert generation_plan.left_out(config) == [line]
    assert not generation_plan.left_out(dataclasses.replace(config, vision=VisionConfig(codebook_size=8)))
    assert not generation_plan.left_out(GenerateConfig())
    config = load_config(small / "train.py")
    assert not training_plan.left_out(config)  # such a run decodes nothing
    sampled = dataclasses.replace(config, samples=SampleConfig(("a fox",)))
    assert training_plan.left_out(sampled) == [f"the vision tokenizer and the pixels of samples, {NONE_PUBLISHED}"]


def test_generate_config_is_validated():
    assert GenerateConfig().grid == (90, 90)
    for field, value in {
        "pictures": 0,
        "frames": 0,
        "temporal_factor": 2.5,
        "prompt_tokens": 2000,
        "guidance": -1.0,
        "decoder": 8,
        "ratio": "9:1",
        "quantize": "int4",
        "interleave": 0,
        "max_new_tokens": 0,
        "vision": 8,
        "fast_pixels": 1,
    }.items():
        with pytest.raises(Emu3Error, match=field.split("_")[0]):
            dataclasses.replace(GenerateConfig(), **{field: value})
    legal = "choose a smaller max_new_tokens, a smaller area or prompt_tokens"
    with pytest.raises(Emu3Error, match=f"an answer of 9999 tokens take 18256 positions, .*: {legal}"):
        GenerateConfig(max_new_tokens=9999)


def test_the_vision_tokenizer_of_a_config_belongs_to_the_decoder():
    with pytest.raises(Emu3Error, match="vision has codebook_size 64, the decoder has 32768 visual ids: "):
        GenerateConfig(vision=VisionConfig(codebook_size=64))
    with pytest.raises(Emu3Error, match="field frames is 8: it must be None, because `vision` knows no clips"):
        GenerateConfig(vision=IbqConfig(codebook_size=32768), frames=8)
    with pytest.raises(Emu3Error, match="field temporal_factor is 4: it must be 2, as in `vision`"):
        GenerateConfig(vision=VisionConfig(temporal_factor=2), frames=8)
    assert GenerateConfig(vision=VisionConfig(channel_multipliers=(1, 1, 1, 1, 1))).grid == (45, 45)
