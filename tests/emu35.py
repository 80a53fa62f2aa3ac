"""The golden case of Emu3.5: its drawn weights, and checkpoints in the published layout."""

import json
import pathlib

import numpy as np
from conftest import drawing, golden_json

SEED = 5


def weights(part: str, steer: bool = False) -> dict[str, np.ndarray]:
    """The state dict of `part` ("lm" or "vq"). With `steer`, the head of the generation runs; see `generate.json`."""
    draw = drawing()
    shapes = golden_json("emu35/state_dict_shapes.json")[part]
    found = {name: draw(name, tuple(shape), SEED) for name, shape in shapes.items()}
    if steer:
        embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"].copy()
        for row, sources in golden_json("emu35/generate.json")["steer"].items():
            head[int(row)] = sum(np.float32(scale) * embedding[source] for source, scale in sources)
        found["lm_head.weight"] = head
    return found


def write_decoder(directory: pathlib.Path, vocabulary: pathlib.Path, steer: bool = False) -> pathlib.Path:
    """Writes the decoder as Emu3.5 publishes it: `config.json`, safetensors and the vocabulary."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(golden_json("emu35/hf_configs.json")["lm"]))
    save_file(weights("lm", steer), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "emu3.tiktoken").write_bytes(vocabulary.read_bytes())
    return directory


def write_checkpoints(root: pathlib.Path, vocabulary: pathlib.Path, steer: bool = False) -> list[pathlib.Path]:
    """Writes decoder and vision tokenizer in two directories, as Emu3.5 publishes them."""
    from emu35_vision import write_vision

    return [write_decoder(root / "lm", vocabulary, steer), write_vision(root / "vq")]


def vision_of_emu35():
    """The golden vision tokenizer in memory."""
    import jax
    from emu35_vision import CONFIG
    from flax import traverse_util

    from emu3_jax.checkpoints.layouts import vision_params
    from emu3_jax.config import AreaConfig
    from emu3_jax.generation.codec import Vision

    state = weights("vq")
    flat = {p.path: p.pack([state[w.name] for w in p.weights]) for p in vision_params(CONFIG)}
    return Vision(CONFIG, AreaConfig(2304), jax.device_put(traverse_util.unflatten_dict(flat)))
