"""The program of a decoder training run, which `sharding.plan` compiles for a TPU slice."""

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
    """The program of one training step, on the config's mesh over all chips of the slice.

    Args:
        config: config of the run. `model.decoder` must not be None, because planning opens no bundle.
        slice_: TPU slice, from `sharding.plan.tpu_slice`.
        rows_per_chip: if given, replaces `batch_size` by `rows_per_chip * chips * accumulation`.

    Returns:
        The mesh, and a list with the one program.

    Raises:
        Emu3Error: the mesh does not divide the rows or the sequence length, or `model.decoder` is None.
    """
    decoder = config.model.decoder
    if decoder is None:
        raise Emu3Error("TrainConfig field model.decoder is None: a plan opens no bundle, so give a DecoderConfig")
    mesh = make_mesh(config.mesh, slice_.devices)
    if rows_per_chip is not None:
        config = dataclasses.replace(config, batch_size=rows_per_chip * mesh.size * config.accumulation)
    together = config.together
    shards = batch_shards(mesh) * config.accumulation * together
    if config.batch_size % shards:
        between = "" if together == 1 else " between pairs" if config.data.pairs else " between pictures of two rows"
        raise Emu3Error(
            f"TrainConfig field batch_size is {config.batch_size}: it must be a multiple of {shards}, because the mesh "
            f"and accumulation split it{between}; or give --rows-per-chip"
        )
    length, parts = config.data.sequence_length, mesh.shape["sequence"]
    if length % parts:
        raise Emu3Error(
            f"DataConfig field sequence_length is {length}: it must be a multiple of {parts}, because mesh "
            f"sequence={parts} splits it"
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
