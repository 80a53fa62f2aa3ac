"""`emu3-jax plan` of GRPO: the programs of a step, and what lies in memory beside them."""

import dataclasses
import json

import pytest
from full_size import CONFIGS, EMU3_MATRICES
from markers import libtpu

from emu3_jax.cli.main import main
from emu3_jax.config import IbqConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import codec
from emu3_jax.generation.vision_plan import WEIGHTS
from emu3_jax.sharding import plan
from emu3_jax.training import grpo_plan
from emu3_jax.training import plan as training_plan
from emu3_jax.training.config import load_config
from emu3_jax.training.plan import programs

SMALL = """
import tiny
from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig

DECODER = DecoderConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=1, num_heads=4, num_kv_heads=2,
    tokens=tiny.TOKENS,
)

def config():
    return TrainConfig(
        "run", ModelConfig("bundle", DECODER, attention="xla"), DataConfig((), 256, packing=0), 8, 100,
        grpo=GrpoConfig("prompts.txt", "rewards.py:reward", n=4, area=96 * 96),
    )
"""
LAYER = 256 * 12 * 64 + 3 * 256 * 512
TABLES, NORMS = 2 * 512 * 256, 3 * 256
NARROW = 2 * ((LAYER + TABLES) // 4 + NORMS)  # a chip's bfloat16 weights; the norms lie on each
STEPS = 12 * 13 + 3  # of a picture of 96x96 pixels, with line ends
CACHE = 64 * 2 * 2 * 2  # bytes of a slot: two heads' keys and values


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config file of GRPO of a small decoder."""
    file = tmp_path_factory.mktemp("configs") / "grpo.py"
    file.write_text(SMALL)
    return file


def planned(config):
    slice_ = plan.tpu_slice("v5e:2x2")
    return programs(config, slice_)[1]


def per_chip(trees):
    return {name: plan.chip_bytes(tree) for name, tree in trees.items()}


@libtpu
@pytest.mark.slow
def test_the_programs_of_a_step(small, capsys):
    """All weights are trained: their state and the reference lie in memory while the pictures are drawn."""
    code = main(["plan", str(small), "--topology", "v5e:2x2", "--json"])
    result = json.loads(capsys.readouterr().out)
    merge, prefill, decode, reference, update = result["programs"]
    assert code == 0 and result["fits"]
    assert [program["name"] for program in result["programs"]] == [
        "weights for drawing",
        "prefill of 8 rows of 128 tokens",
        "decoding step 156 of 8 pictures of 12x12 tokens",
        "log-probabilities by the reference of 8 rows of 256 tokens",
        "training step of 8 rows of 256 tokens",
    ]
    trained = 4 * ((LAYER + TABLES) // 4 + NORMS)
    optimizer = 2 * trained + 2 * 4
    assert merge["bytes"]["trained weights"] == trained and merge["bytes"]["outputs"] >= NARROW
    for program in (prefill, decode):
        beside = {name: program["bytes"][name] for name in ("trained weights", "optimizer", "reference weights")}
        assert beside == {"trained weights": trained, "optimizer": optimizer, "reference weights": NARROW}
        assert program["bytes"]["weights"] == NARROW
    # Two rows on a chip, with room for the longest prompt that fits in a row with its picture.
    slots = 128 + 192
    assert decode["bytes"]["cache"] == 2 * slots * CACHE + 2 * 4 + 8 * 4
    batch = 2 * 256 * (3 * 4 + 1)
    assert reference["bytes"]["reference weights"] == NARROW and reference["bytes"]["inputs"] == batch
    assert reference["bytes"]["trained weights"] == trained and reference["bytes"]["optimizer"] == optimizer
    assert update["bytes"]["weights"] == trained and update["bytes"]["reference weights"] == NARROW
    # The rewards' advantages and the reference's log-probabilities, the step's number and key.
    assert update["bytes"]["inputs"] == batch + 2 * (4 + 256 * 4) + 4 + 8
    forward = 2 * (LAYER + 8 * 256) * 256 + 4 * 256 * 256 * 257 / 2
    assert update["flops"] == pytest.approx(3 * 2 * forward) and reference["flops"] == pytest.approx(2 * forward)
    for program in result["programs"]:
        assert program["total_bytes"] == sum(program["bytes"].values())
    # All programs run once, the decoding with all its steps.
    others = sum(program["bound"]["seconds"] for program in result["programs"] if program is not decode)
    assert result["least_seconds"] == pytest.approx(others + decode["decoding"]["seconds"])
    assert decode["decoding"]["rows"] == 8 and update["training"]["tokens_per_second_per_chip"] > 0


@libtpu
def test_adapters_are_switched_off_for_the_reference(small):
    config = load_config(small, ["adapter=Adapter(rank=4)", "grpo.iterations=2", "grpo.draw_at_once=4"])
    merge, prefill, decode, reference, old, update = planned(config)
    assert prefill.name == "prefill of 4 rows of 128 tokens" and "of 4 pictures" in decode.name
    assert [program.runs for program in (merge, prefill, decode, reference, old, update)] == [1, 2, 2, 1, 1, 2]
    assert old.name == "log-probabilities by the old policy of 8 rows of 256 tokens"
    sides = per_chip(merge.arguments)
    assert sides["frozen weights"] == NARROW
    for program in (reference, old):
        found = per_chip(program.arguments)
        assert found == {**sides, "inputs": 2 * 256 * (3 * 4 + 1)}
        assert set(program.beside) == {"optimizer"}
    assert set(decode.beside) == {"frozen weights", "adapters", "optimizer"} and not update.beside
    # Log-probabilities of both policies.
    assert per_chip(update.arguments)["inputs"] == 2 * (256 * (3 * 4 + 1 + 2 * 4) + 4) + 4 + 8
    reference.lower()


@libtpu
def test_without_a_reference(small):
    names = [p.name for p in planned(load_config(small, ["grpo.reference=False"]))]
    assert len(names) == 4 and not any("log-probabilities" in name for name in names)


@libtpu
def test_guidance_takes_two_rows(small):
    config = load_config(small, ["grpo.guidance=2.0", "batch_size=16", "accumulation=2"])
    _, prefill, decode, *_ = planned(config)
    assert prefill.name.startswith("prefill of 16 rows") and "of 8 pictures" in decode.name
    # The model without guidance learns from pictures that are drawn with it: one row a picture in the batch.
    unguided = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, guided_policy=False))
    _, prefill, *_, update = planned(unguided)
    assert prefill.name.startswith("prefill of 32 rows") and update.name == "training step of 16 rows of 256 tokens"


@libtpu
@pytest.mark.slow
def test_the_programs_of_a_step_of_answers(small, capsys):
    """Answers need the logits of all ids, when they are drawn and in the update."""
    code = main(["plan", str(small), "--topology", "v5e:2x2", "--set", "grpo.max_new_tokens=40", "--json"])
    result = json.loads(capsys.readouterr().out)
    _, prefill, decode, reference, update = result["programs"]
    assert code == 0 and result["fits"]
    assert [program["name"] for program in result["programs"]] == [
        "weights for drawing",
        "prefill of 8 rows of 256 tokens",
        "decoding step 40 of 8 answers of 40 tokens",
        "log-probabilities by the reference of 8 rows of 256 tokens",
        "training step of 8 rows of 256 tokens",
    ]
    # Questions of up to 216 tokens and answers of 40, each with the padding of its shape.
    slots = 256 + 64
    assert decode["bytes"]["cache"] == 2 * slots * CACHE + 2 * 4 + 8 * 4
    for program in (prefill, decode):
        assert program["bytes"]["reference weights"] == program["bytes"]["weights"] == NARROW
    layer_and_head = LAYER + 512 * 256  # the whole vocabulary
    assert decode["flops"] == pytest.approx(2 * (2 * layer_and_head + 4 * 256 * slots))
    forward = 2 * layer_and_head * 256 + 4 * 256 * 256 * 257 / 2
    assert update["flops"] == pytest.approx(3 * 2 * forward) and reference["flops"] == pytest.approx(2 * forward)


@libtpu
@pytest.mark.parametrize(
    ("mesh", "frames", "most", "name", "runs", "earlier"),
    [
        ("data=4", None, 1, "4 pictures of 12x12", 2, 4),
        ("data=2,tensor=2", None, 1, "4 pictures of 12x12", 2, 4),
        ("data=2,tensor=2", None, 3, "8 pictures of 12x12", 1, 0),  # two on each device
        ("data=2,tensor=2", 8, 1, "4 clips of 2x12x12", 2, 4),
        ("data=2,tensor=2", 20, 1, "4 clips of 4x12x12", 4, 4),  # in two parts each
        ("data=2,tensor=2", 20, 2, "8 clips of 4x12x12", 2, 8),  # at once, but in two parts
    ],
)
def test_pictures_are_planned_to_the_pixels_for_their_reward(
    small, monkeypatch, mesh, frames, most, name, runs, earlier
):
    """With as many pictures at a time as a run decodes: `most` on a device."""
    monkeypatch.setattr(grpo_plan, "published_vision", lambda _: VisionConfig(codebook_size=8, base_channels=32))
    monkeypatch.setattr(codec, "_PIXELS_AT_ONCE", most * min(16, frames or 1) * 96 * 96)
    config = load_config(small, [f"mesh={mesh}", f"grpo.frames={frames}", "data.sequence_length=1024"])
    merge, prefill, decode, *_, pixels, reference, update = planned(config)
    assert (pixels.name, pixels.runs) == (f"exact pixels of {name} codes", runs)
    for program in (merge, prefill, decode, reference, update):
        assert plan.chip_bytes(program.beside[WEIGHTS]) == plan.chip_bytes(pixels.arguments[WEIGHTS]) > 2**20
    # The weights for drawing and the cache are freed before.
    assert {"trained weights", "optimizer", "reference weights"} == set(pixels.beside) - {"earlier pixels"}
    # The host fetches the pixels of a batch, or of a part of it, while the next is decoded.
    made = 1 if frames is None else min(16, frames)
    assert plan.chip_bytes(pixels.beside.get("earlier pixels")) == earlier * made * 96 * 96 * 3 * 4


@libtpu
def test_clips_by_a_vision_tokenizer_that_knows_none_are_refused(small, monkeypatch):
    monkeypatch.setattr(grpo_plan, "published_vision", lambda _: IbqConfig(codebook_size=8))
    with pytest.raises(Emu3Error, match=r"grpo\.frames: .* knows pictures alone; set grpo\.frames=None"):
        planned(load_config(small, ["grpo.frames=8", "data.sequence_length=512"]))


@libtpu
def test_what_a_plan_leaves_out(small):
    config = load_config(small)
    why = "because no published vision tokenizer has 8 codes, as the decoder has visual ids"
    assert training_plan.left_out(config) == [f"the vision tokenizer and the pixels of pictures, {why}"]
    clips = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, frames=8))
    assert training_plan.left_out(clips) == [f"the vision tokenizer and the pixels of clips, {why}"]
    (line,) = training_plan.left_out(load_config(small, ["grpo.max_new_tokens=40"]))
    assert line == "the vision tokenizer and the codes of the questions' pictures, because a plan reads no questions"
    assert not training_plan.left_out(load_config(CONFIGS / "grpo_t2i_8b.py"))


@libtpu
def test_a_large_picture_grows_its_cache(small):
    config = load_config(small, ["grpo.area=147456", "data.sequence_length=2816"])
    _, _, decode, growth, *_ = planned(config)
    assert growth.name == "growth of the cache to 3072 slots"
    assert set(growth.beside) == {*decode.beside, "weights", "inputs"}


@libtpu
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "mesh=fsdp=3"], "does not divide the 4"),
        (["--set", "accumulation=4"], "must be a multiple of 16"),
        (["--rows-per-chip", "1", "--set", "grpo.n=8"], "a batch of 4 rows: it must be a multiple of 8"),
        (["--set", "data.sequence_length=128"], "a picture of 12x12 tokens takes 159 tokens of a row, a row has 128"),
        (["--set", "model.decoder=None"], "model.decoder is None"),
        (["--set", "grpo.max_new_tokens=256"], "an answer takes up to 256 tokens of a row, a row has 256"),
        (["--rows-per-chip", "1", "--set", "grpo.n=8", "--set", "grpo.max_new_tokens=8"], "the rows of 8 answers"),
    ],
)
def test_bad_input(small, capsys, arguments, message):
    assert main(["plan", str(small), "--topology", "v5e:2x2", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


@libtpu
def test_gathered_weights_move_once_a_step(small):
    """Not at each token. The copy is whole on each chip; what is trained stays split."""
    slice_, found = plan.tpu_slice("v5e:2x2"), {}
    for gather in (False, True):
        mesh, (merge, _, decode, *_) = programs(load_config(small, [f"grpo.gather_weights={gather}"]), slice_)
        compiled = plan.compile_plan(slice_, mesh, [merge, decode])["programs"]
        found[gather] = [sum(one["bytes"] for one in program["collectives"]) for program in compiled]
        assert compiled[1]["bytes"]["weights"] == (2 * (LAYER + TABLES + NORMS) if gather else NARROW)
        assert compiled[1]["bytes"]["trained weights"] == 4 * ((LAYER + TABLES) // 4 + NORMS)
    matrices = 2 * (LAYER + TABLES)
    assert found[False][0] == 0 and found[False][1] >= 2 * LAYER
    assert matrices <= found[True][0] <= 1.1 * matrices and found[True][1] < 2**16  # in bfloat16


@libtpu
def test_rows_per_chip(small):
    *_, update = programs(load_config(small), plan.tpu_slice("v5e:2x2"), 3)[1]
    assert update.name == "training step of 12 rows of 256 tokens"


@libtpu
def test_merging_splits_each_matrix_over_the_chips(small):
    """No chip makes a whole matrix, not even where `tensor` splits the last axis: nothing is exchanged."""
    slice_ = plan.tpu_slice("v5e:2x2")
    config = load_config(small, ["adapter=Adapter(rank=4)", "mesh=data=2,tensor=2"])
    mesh, (merge, *_) = programs(config, slice_)
    (merge,) = plan.compile_plan(slice_, mesh, [merge])["programs"]
    assert merge["fits"] and not merge["collectives"] and merge["bytes"]["temporaries"] < 2**20


@libtpu
def test_full_size():
    """The 8 B model on v5e:2x4, where `tensor` splits the weights."""
    sets = ["mesh=tensor=8", "accumulation=64", "grpo.draw_at_once=16"]
    config = load_config(CONFIGS / "grpo_t2i_8b.py", sets)
    mesh, (merge, prefill, decode, growth, pixels, reference, update) = programs(config, plan.tpu_slice("v5e:2x4"))
    assert mesh.shape["tensor"] == 8 and prefill.name == "prefill of 16 rows of 512 tokens"
    weights = 2 * (EMU3_MATRICES // 8 + 65 * 4096)
    assert plan.chip_bytes(decode.arguments["weights"]) == weights
    for program in (decode, growth):
        assert plan.chip_bytes(program.beside["frozen weights"]) == weights
    # A KV head of 16 rows, in each layer.
    assert plan.chip_bytes(decode.arguments["cache"]) == 2 * 32 * 16 * 9216 * 128 * 2 + 16 * 4 + 16 * 4
    assert reference.name == "log-probabilities by the reference of 64 rows of 8704 tokens"
    assert set(update.beside) == {"vision tokenizer"} and 1.0 < plan.chip_bytes(update.beside) / 2**30 < 1.02
    assert set(merge.arguments) == {"frozen weights", "adapters"}
    # A device decodes one picture of 720x720 pixels at a time.
    assert pixels.name == "exact pixels of 8 pictures of 90x90 codes" and pixels.runs == 8
    assert plan.chip_bytes(pixels.beside["earlier pixels"]) == 8 * 720 * 720 * 3 * 4
