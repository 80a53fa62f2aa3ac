"""The program of a training run, to be compiled for a TPU slice by `sharding.plan`."""

import dataclasses

import jax
from jax.sharding import Mesh

from emu3_jax.errors import Emu3Error
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, Slice
from emu3_jax.sharding.rules import batch_shards, use_mesh
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.flops import step_flops
from emu3_jax.training.step import Trainer


def programs(config: TrainConfig, slice_: Slice, rows_per_chip: int | None = None) -> tuple[Mesh, list[Program]]:
    """One step on the mesh of the config, spread over all chips of the slice.

    Args:
        config: `model.decoder` must be given: no bundle is opened.
        slice_: from `sharding.plan.tpu_slice`.
        rows_per_chip: replaces `batch_size` by so many rows for each chip, counted before `accumulation`.

    Raises:
        Emu3Error: the config does not fit the chips.
    """
    decoder = config.model.decoder
    if decoder is None:
        raise Emu3Error("TrainConfig field model.decoder is None: a plan opens no bundle, so name the decoder's shapes")
    mesh = make_mesh(config.mesh, slice_.devices)
    if rows_per_chip is not None:
        config = dataclasses.replace(config, batch_size=rows_per_chip * mesh.size * config.accumulation)
    shards = batch_shards(mesh) * config.accumulation
    if config.batch_size % shards:
        raise Emu3Error(
            f"TrainConfig field batch_size is {config.batch_size}: the mesh and accumulation split it into {shards} "
            "parts, so it must be a multiple of that; or give --rows-per-chip"
        )
    length, parts = config.data.sequence_length, mesh.shape["sequence"]
    if length % parts:
        raise Emu3Error(
            f"data field sequence_length is {length}: mesh sequence={parts} splits it, so it must be a multiple of that"
        )
    trainer = Trainer(config, decoder, mesh)
    state, frozen, batch = trainer.abstract_state(), trainer.abstract_frozen(), trainer.abstract_batch()

    def lower() -> jax.stages.Lowered:
        with use_mesh(mesh):
            return trainer.step.lower(state, frozen, batch)

    arguments = {"weights": state.params, "optimizer": state.opt_state, "inputs": (batch, state.step, state.key)}
    if config.adapter:
        arguments = {"frozen weights": frozen, **arguments}
    attended = config.batch_size * length * (length + 1) / 2
    flops = step_flops(trainer.decoder, config.batch_size * length, attended, frozen=bool(config.adapter))
    name = f"training step of {config.batch_size} rows of {length} tokens"
    return mesh, [Program(name, lower, arguments, flops=flops)]
