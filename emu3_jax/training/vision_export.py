"""The identity of a run that trains the vision tokenizer, and the export of its checkpoints as bundles."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.layouts import vision_params
from emu3_jax.checkpoints.parts import LazyArray, read_array, write_part
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import read_from
from emu3_jax.files import new_directory
from emu3_jax.printable import shown
from emu3_jax.training.run_directory import Identity, identity_part, newest_checkpoint, read_identity
from emu3_jax.training.vision_config import VisionTrainConfig

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def vision_identity(config: VisionTrainConfig) -> Identity:
    """The contents of `run.json` for a run of this config."""
    other = {"image": config.image_config.to_dict(), "export_dtype": config.export_dtype}
    return Identity(fixed={"vision": config.vision.to_dict()}, other=other)


def exported(params: Any, dtype: str) -> Any:
    """Rounds parameters to `dtype` and returns them in float32, as loading an exported bundle does."""
    if dtype == "float32":
        return params
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)


def export_vision_run(directory: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
    """Writes the averaged weights of a run's checkpoint as a bundle with only a `vision/` part.

    Args:
        directory: directory of the run.
        target: path of the new bundle. It must not exist.
        step: step of the checkpoint, or None for the newest.

    Returns:
        The step of the exported checkpoint.

    Raises:
        Emu3Error: there is no such checkpoint, the run's directory cannot be read, or `target` cannot be written.
    """
    identity = read_identity(directory)
    parts = {part: identity_part(directory, identity, part) for part in ("vision", "image", "export_dtype")}
    with read_from(directory / "run.json"):
        vision, image = VisionConfig.from_dict(parts["vision"]), ImageConfig.from_dict(parts["image"])
    if parts["export_dtype"] not in _DTYPES:
        raise Emu3Error(
            f"{directory / 'run.json'}: export_dtype is {shown(parts['export_dtype'])}; it must be "
            f"{' or '.join(_DTYPES)}; correct it"
        )
    dtype = _DTYPES[parts["export_dtype"]]
    step, state = newest_checkpoint(directory, step)

    def load(path: tuple[str, ...]) -> np.ndarray:
        return read_array(state, ("average", *path)).astype(dtype)

    arrays = [LazyArray(p.path, p.shape, dtype, functools.partial(load, p.path)) for p in vision_params(vision)]
    config = {"vision": vision.to_dict(), "image": image.to_dict(), "num_batches_tracked": {}}
    with new_directory(target, sum(array.nbytes for array in arrays)) as temporary:
        write_part(temporary / "vision", config, arrays)
        write_checksums(temporary)
    return step
