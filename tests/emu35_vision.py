"""The vision tokenizer of the golden case of Emu3.5: its config, and its checkpoint in the published forms."""

import json
import pathlib

from conftest import golden_json
from emu35 import weights

from emu3_jax.config import IbqConfig

CONFIG = IbqConfig(embed_dim=32, latent_channels=32, base_channels=32, num_res_blocks=1)  # `vq` of hf_configs.json


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


def write_vision(directory: pathlib.Path) -> pathlib.Path:
    """Writes the vision tokenizer as Emu3.5 publishes it: `model.safetensors` and `config.json`."""
    from safetensors.numpy import save_file

    directory.mkdir()
    save_file(weights("vq"), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(golden_json("emu35/hf_configs.json")["vq_flat"]))
    return directory
