"""The vision tokenizer of the golden case of Emu3.5: its weights, and its checkpoint in every published form."""

import importlib.util
import json
import pathlib

import numpy as np
from conftest import GOLDEN, golden_json

from emu3_jax.config import IbqConfig

SEED = 5
CONFIG = IbqConfig(
    embed_dim=32, latent_channels=32, base_channels=32, num_res_blocks=1
)  # `vq` of hf_configs.json; published_config's reading is compared with it


def weights() -> dict[str, np.ndarray]:
    """The state dict, under upstream's PyTorch names."""
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = golden_json("emu35/state_dict_shapes.json")["vq"]
    return {name: module.reference_weight(name, tuple(shape), SEED) for name, shape in shapes.items()}


def yaml_text() -> str:
    """`config.yaml` of the released checkpoint: the keyword form, with a nested `ddconfig`."""
    config = golden_json("emu35/hf_configs.json")["vq"]
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {inner}: {json.dumps(v)}" for inner, v in value.items())]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def write_safetensors(directory: pathlib.Path) -> pathlib.Path:
    """`model.safetensors` and `config.json`."""
    from safetensors.numpy import save_file

    directory.mkdir()
    save_file(weights(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(golden_json("emu35/hf_configs.json")["vq_flat"]))
    return directory
