"""The program of a vision tokenizer training run, which `sharding.plan` compiles for a TPU slice."""

import dataclasses

from jax.sharding import Mesh

from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, Slice
from emu3_jax.training.vision_config import VisionTrainConfig
from emu3_jax.training.vision_step import VisionTrainer


def programs(config: VisionTrainConfig, slice_: Slice, rows_per_chip: int | None = None) -> tuple[Mesh, list[Program]]:
    """The program of one training step, on the config's mesh over all chips of the slice.

    Args:
        config: config of the run.
        slice_: TPU slice, from `sharding.plan.tpu_slice`.
        rows_per_chip: if given, replaces `pixels.stills` by `rows_per_chip * chips`.

    Returns:
        The mesh, and a list with the one program.

    Raises:
        Emu3Error: the mesh does not divide the pictures or the clips.
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
