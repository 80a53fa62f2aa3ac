"""Small random Emu3 checkpoints in the published layouts, written with the live transformers classes."""

import base64
import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import Emu3Config, Emu3ForCausalLM, Emu3ForConditionalGeneration, Emu3TextConfig

from emu3_jax.config import SpecialTokens
from emu3_jax.text.tokenizer import special_tokens

CODES = 64
RANKS = 256
TOKENS = special_tokens(RANKS, CODES)
TEXT = {
    "vocab_size": TOKENS.visual_end,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": TOKENS.pad,
    "bos_token_id": TOKENS.bos,
    "eos_token_id": TOKENS.eos,
}
VISION = {
    "codebook_size": CODES,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "hidden_size": 64,
}
VOCABULARY_MAP = {
    "<image>": RANKS + 3,
    "<|extra_200|>": TOKENS.eol,
    **{f"<|visual token {code:06d}|>": TOKENS.visual_start + code for code in range(CODES)},
}


@functools.cache
def model() -> Emu3ForConditionalGeneration:
    """A transformers model of which every weight and buffer is drawn."""
    torch.manual_seed(0)
    config = Emu3Config(text_config=TEXT, vq_config=VISION, vocabulary_map=VOCABULARY_MAP)
    made = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(len(name))
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            else:
                value.normal_(1.0 if value.ndim == 1 and name.endswith("weight") else 0.0, 0.2)
    return made


def transformers_5(directory: Path) -> Path:
    """The whole model under the names of transformers 5, with a vocabulary."""
    model().save_pretrained(directory, save_original_format=False)
    write_vocabulary(directory / "emu3.tiktoken")
    return directory


def transformers_4(directory: Path) -> Path:
    """As transformers 5 saves by default: the names of transformers 4. The decoder is in bfloat16."""
    model().save_pretrained(directory)
    file = directory / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.startswith("text_model."):
            weights[name] = weights[name].astype(ml_dtypes.bfloat16)
    save_file(weights, file)
    write_vocabulary(directory / "emu3.tiktoken")
    return directory


def standalone_decoder(directory: Path) -> Path:
    """What transformers' Emu3ForCausalLM saves; its config cannot say another codebook size than the published one."""
    torch.manual_seed(0)
    vocab_size = TOKENS.visual_start + SpecialTokens.visual_count
    Emu3ForCausalLM(Emu3TextConfig(**TEXT | {"vocab_size": vocab_size})).save_pretrained(directory)
    return directory


def standalone_vision(directory: Path) -> Path:
    """What transformers' Emu3VQVAE saves."""
    model().model.vqmodel.save_pretrained(directory)
    return directory


def bin_shards(directory: Path) -> Path:
    """The whole model in two torch.save files and their index."""
    transformers_5(directory)
    (directory / "model.safetensors").unlink()
    state = model().state_dict()
    names = list(state)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def pad_vocabulary(weights: dict[str, np.ndarray], rows: int) -> None:
    """What `resize_token_embeddings` makes of a checkpoint's tensors: new rows at the end, of the others' mean."""
    for name in weights:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            mean = weights[name].mean(0, keepdims=True)
            weights[name] = np.concatenate([weights[name], np.repeat(mean, rows, 0)])


def write_vocabulary(file: Path) -> None:
    """The smallest vocabulary there is: the 256 bytes."""
    file.write_text("".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(RANKS)))


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, by safetensors and torch themselves."""
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    for file in directory.glob("*.bin"):
        found |= {name: value.numpy() for name, value in torch.load(file, weights_only=True).items()}
    return found


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name
