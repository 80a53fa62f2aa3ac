"""What a run that trains the vision tokenizer says of itself, and its checkpoints as bundles."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from emu3_jax.checkpoints.bundle import LazyArray, read_array, write_part
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.layouts import vision_params
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import read_from
from emu3_jax.files import new_directory
from emu3_jax.printable import shown
from emu3_jax.training.run_directory import Identity, identity_part, newest_checkpoint, read_identity
from emu3_jax.training.vision_config import VisionTrainConfig

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def vision_identity(config: VisionTrainConfig) -> Identity:
    """What `run.json` says of a run."""
    other = {"image": config.image_config.to_dict(), "export_dtype": config.export_dtype}
    return Identity(fixed={"vision": config.vision.to_dict()}, other=other)


def exported(params: Any, dtype: str) -> Any:
    """The parameters as a bundle of `dtype` gives them: rounded to it, in float32."""
    if dtype == "float32":
        return params
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)


def export_vision_run(directory: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
    """Writes the averaged weights of a run's checkpoint as a bundle with `vision/` alone.

    Args:
        directory: of the run.
        target: the bundle; it must not exist.
        step: of the checkpoint; by default the newest.

    Returns:
        The step.

    Raises:
        Emu3Error: no such checkpoint, or one of the places cannot be read or written.
    """
    identity = read_identity(directory)
    parts = {part: identity_part(directory, identity, part) for part in ("vision", "image", "export_dtype")}
    with read_from(directory / "run.json"):
        vision, image = VisionConfig.from_dict(parts["vision"]), ImageConfig.from_dict(parts["image"])
    if parts["export_dtype"] not in _DTYPES:
        raise Emu3Error(
            f"{directory / 'run.json'}: export_dtype is {shown(parts['export_dtype'])}: it must be "
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
