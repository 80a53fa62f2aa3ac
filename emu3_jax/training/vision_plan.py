"""The program of a run that trains the vision tokenizer, to be compiled for a TPU slice by `sharding.plan`."""

import dataclasses

from jax.sharding import Mesh

from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, Slice
from emu3_jax.training.vision_config import VisionTrainConfig
from emu3_jax.training.vision_step import VisionTrainer


def programs(config: VisionTrainConfig, slice_: Slice, rows_per_chip: int | None = None) -> tuple[Mesh, list[Program]]:
    """One step on the mesh of the config, spread over all chips of the slice.

    Args:
        config: the run.
        slice_: from `sharding.plan.tpu_slice`.
        rows_per_chip: replaces `pixels.stills` by so many pictures for each chip.

    Raises:
        Emu3Error: the config does not fit the chips.
    """
    mesh = make_mesh(config.mesh, slice_.devices)
    if rows_per_chip is not None:
        pixels = dataclasses.replace(config.pixels, stills=rows_per_chip * mesh.size)
        config = dataclasses.replace(config, pixels=pixels)
    trainer = VisionTrainer(config, mesh)
    state, batch = trainer.abstract_state(), trainer.abstract_batch()
    arguments = {
        "weights": (state.params, state.average),
        "optimizer": state.opt_state,
        "codes": (state.used, state.sums),
        "inputs": (batch, state.step, state.key),
    }
    if state.discriminator is not None:
        arguments["discriminator"] = state.discriminator
    p = config.pixels
    name = f"training step of {p.stills} pictures and {p.clips} clips of {p.size}x{p.size} pixels"
    return mesh, [Program(name, lambda: trainer.step.lower(state, batch), arguments)]
