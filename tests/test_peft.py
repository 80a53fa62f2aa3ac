"""Adapters exchanged with the PEFT library, on live transformers models: the same logits, the same greedy tokens."""

import copy
import dataclasses
import json
import pathlib
import shutil

import checkpoint_cases as cases
import numpy as np
import peft
import pytest
import tiny
import torch
from PIL import Image
from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration, GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList, PrefixConstrainedLogitsProcessor

import emu3_jax
from emu3_jax.checkpoints.adapter import SavedAdapter, write_adapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.export import export
from emu3_jax.checkpoints.merged import load_merged
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.generation import session
from emu3_jax.generation.schedule import SAMPLED_VISUAL, forced_ids, image_schedule
from emu3_jax.models.adapters import MATRICES, Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.loop import train

pytestmark = pytest.mark.oracle

# PEFT 0.21 asks transformers 5.23 by a name that is going out.
old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = np.random.default_rng(0).integers(0, cases.TOKENS.visual_end, (2, 17)).astype(np.int32)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """The live model, converted; its pictures may be small."""
    root = tmp_path_factory.mktemp("peft")
    source = cases.transformers_5(root / "torch")
    (source / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 64, "max_pixels": 4096}))
    return convert([source], root / "bundle", progress=False)


@pytest.fixture(scope="module")
def decoder_alone(bundle, tmp_path_factory) -> tuple[Emu3ForCausalLM, Bundle]:
    """The bundle without its vision tokenizer, and the live class that it is exported for."""
    root = tmp_path_factory.mktemp("peft")
    shutil.copytree(bundle.path, root / "bundle", ignore=shutil.ignore_patterns("vision"))
    export(root / "bundle", root / "torch", "transformers", progress=False)
    return Emu3ForCausalLM.from_pretrained(root / "torch").eval(), Bundle.open(root / "bundle")


def assert_same_logits(model: torch.nn.Module, bundle: Bundle, adapter: pathlib.Path) -> None:
    """As closely as the oracle of unadapted models; and the adapter does something."""
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()
    config = dataclasses.replace(bundle.decoder_config, dtype="float32")
    merged = load_merged(bundle, SavedAdapter.open(adapter, bundle), None, "float32")
    found, plain = (
        np.asarray(tiny.forward(params, TOKENS, None, config)[0])
        for params in (merged, bundle.load_decoder(dtype="float32"))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)
    assert np.abs(found - plain).max() > 0.1


def write_random(target: pathlib.Path, adapter: Adapter, bundle: Bundle) -> None:
    """An adapter as training writes it, of random numbers."""
    draw, config = np.random.default_rng(1), bundle.decoder_config
    shapes = {
        side.path: side.shape
        for param in bundle.params("decoder")
        if param.path[-1] in MATRICES
        for side in param.low_rank(MATRICES[param.path[-1]].inputs, adapter.rank)
    }
    write_adapter(
        target,
        adapter,
        config,
        lambda path: 0.1 * draw.standard_normal(shapes[path], np.float32),
        bundle=bundle,
        step=1,
    )


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("targets", [tuple(MATRICES), ("qkv", "down")])
@old_name
def test_peft_loads_our_adapter(bundle, tmp_path, targets):
    write_random(tmp_path / "adapter", Adapter(rank=4, alpha=6.0, targets=targets, base="float32"), bundle)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(cases.model()), tmp_path / "adapter").eval()
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == 2 * sum({"qkv": 3, "gate_up": 2}.get(name, 1) for name in targets)
    assert_same_logits(model, bundle, tmp_path / "adapter")
    # PEFT writes what it read, bit for bit.
    model.save_pretrained(tmp_path / "again")
    first, second = (cases.tensors_of(tmp_path / name) for name in ("adapter", "again"))
    cases.assert_same_bits(second, first)


@old_name
def test_peft_loads_our_adapter_of_a_decoder_alone(decoder_alone, tmp_path):
    model, bundle = decoder_alone
    write_random(tmp_path / "adapter", Adapter(rank=4, alpha=6.0, base="float32"), bundle)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    assert_same_logits(model, bundle, tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*MODEL\.layers.*\.(q|k|v|o|gate|up|down)_proj"},
        {
            "target_modules": r".*MODEL\.layers.*\.(q|v|up)_proj",
            "use_rslora": True,
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "up_proj": 5},
        },
        {"target_modules": r".*MODEL\.layers\.1.*\.(k|gate)_proj", "lora_alpha": 3},
    ],
)  # fmt: skip
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "decoder alone"])
@old_name
def test_we_load_pefts_adapter(bundle, decoder_alone, tmp_path, settings, alone):
    model, bundle = decoder_alone if alone else (cases.model(), bundle)
    # The vision tokenizer has modules of such names too.
    targets = settings["target_modules"].replace("MODEL", "model" if alone else "text_model")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **{**settings, "target_modules": targets})
    model = peft.get_peft_model(copy.deepcopy(model), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_logits(model, bundle, tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------ from photos on


@pytest.mark.slow
@old_name
def test_photos_to_transformers(bundle, tmp_path, monkeypatch):
    """Photos, LoRA, merged, exported: the live classes draw the same greedy tokens. So does PEFT with the adapter."""
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(2)
    for name in ("red", "green", "blue"):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name} noise")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "photos", "--model", str(bundle.path), "-o", "data", "--area", "256", "--quiet"]) == 0
    config = TrainConfig(
        directory="run",
        model=ModelConfig(str(bundle.path), dtype="float32"),
        data=DataConfig((Source("data", TextToImage()),), sequence_length=96),
        batch_size=2,
        steps=3,
        adapter=Adapter(rank=4, base="float32"),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0),
        mesh="fsdp=1",
    )
    train(config, progress=False)
    assert main(["convert", "run", "-o", "adapter", "--adapter-only"]) == 0
    assert main(["export", "run/model", "-o", "torch", "--layout", "transformers", "--quiet"]) == 0

    language = emu3_jax.load("run/model").language
    before = emu3_jax.load(bundle.path, dtype="float32").language
    special = language.config.tokens
    prompt = [special.bos, *b"a red noise", special.boi, *b"3*5", special.img]
    schedule = image_schedule(3, 5)
    row, settings = session.Row(prompt, schedule, None), tiny.settings(1, temperature=0.0)
    (ours,), (plain,) = (session.run(x.params, x.config, [row], settings).ids for x in (language, before))
    assert not np.array_equal(ours, plain)

    forced, visual = forced_ids(schedule, special), list(range(special.visual_start, special.visual_end))

    def legal(_, ids):
        step = ids.shape[0] - len(prompt)
        return visual if forced[step] == SAMPLED_VISUAL else [int(forced[step])]

    options = GenerationConfig(
        do_sample=False, max_new_tokens=len(schedule), eos_token_id=special.eos, pad_token_id=special.pad
    )
    ids = torch.tensor([prompt])
    exported = Emu3ForConditionalGeneration.from_pretrained("torch").eval()
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(cases.model()), "adapter").eval()
    for model in (exported, adapted):
        processors = LogitsProcessorList([PrefixConstrainedLogitsProcessor(legal, num_beams=1)])
        theirs = model.generate(
            input_ids=ids, generation_config=options, attention_mask=torch.ones_like(ids), logits_processor=processors
        )
        np.testing.assert_array_equal(theirs[0, len(prompt) :].numpy(), ours)
