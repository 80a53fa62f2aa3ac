"""The programs of a decoder training run, which `sharding.plan` compiles for a TPU slice."""

import dataclasses

import jax
from jax.sharding import Mesh

from emu3_jax.errors import Emu3Error
from emu3_jax.generation.vision_plan import PlannedVision, none_published, published_vision
from emu3_jax.media.sizes import generate_size
from emu3_jax.sharding.bounds import Training
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, Slice
from emu3_jax.sharding.rules import batch_shards, use_mesh
from emu3_jax.training.config import SampleConfig, TrainConfig
from emu3_jax.training.flops import step_flops
from emu3_jax.training.grpo_plan import grpo_programs
from emu3_jax.training.step import Trainer
from emu3_jax.training.weights import abstract_inference_params


def programs(config: TrainConfig, slice_: Slice, rows_per_chip: int | None = None) -> tuple[Mesh, list[Program]]:
    """The programs of one training step, on the config's mesh over all chips of the slice.

    With `grpo` these are the programs that draw pictures or answers, then those that compare and update the weights,
    see `training.grpo_plan`. Otherwise there is one, and with `samples` the program of their pixels.

    Args:
        config: config of the run. `model.decoder` must not be None, because planning opens no bundle.
        slice_: TPU slice, from `sharding.plan.tpu_slice`.
        rows_per_chip: if given, replaces `batch_size` by `rows_per_chip * chips * accumulation`.

    Returns:
        The mesh, and the programs in the order of a step.

    Raises:
        Emu3Error: the mesh does not divide the rows or the sequence length, `model.decoder` is None, or GRPO's groups
            do not fit the rows.
    """
    decoder = config.model.decoder
    if decoder is None:
        raise Emu3Error("TrainConfig field model.decoder is None: a plan opens no bundle, so give a DecoderConfig")
    mesh = make_mesh(config.mesh, slice_.devices)
    if rows_per_chip is not None:
        rows = rows_per_chip * mesh.size * config.accumulation
        if config.grpo is not None and rows % (each := config.grpo.n * config.grpo.rows):
            raise Emu3Error(
                f"--rows-per-chip {rows_per_chip} makes a batch of {rows} rows: it must be a multiple of {each}, the "
                f"rows of {config.grpo.n} {config.grpo.noun}s of a prompt"
            )
        config = dataclasses.replace(config, batch_size=rows)
    together = config.together
    shards = batch_shards(mesh) * config.accumulation * together
    if config.batch_size % shards:
        if rows_per_chip is not None:
            raise Emu3Error(
                f"--rows-per-chip {rows_per_chip} would split rows that belong together: give a multiple of {together}"
            )
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
    tokens, frozen_too = config.batch_size * length, bool(config.adapter)
    flops = step_flops(trainer.decoder, tokens, attended, frozen_too, config.visual_only)
    attention = flops - step_flops(trainer.decoder, tokens, 0, frozen_too, config.visual_only)
    name = f"training step of {config.batch_size} rows of {length} tokens"
    step = Program(name, lower, arguments, flops=flops, rates=Training(tokens, attention))
    if config.grpo is not None:
        return mesh, grpo_programs(config, config.grpo, mesh, trainer, step)
    vision = None if config.samples is None else published_vision(decoder)
    if config.samples is None or vision is None:
        return mesh, [step]
    return mesh, _with_samples(config.samples, PlannedVision.of(vision, mesh), trainer, step)


def left_out(config: TrainConfig) -> list[str]:
    """What `programs` leaves out, and why: a line each, empty if nothing is left out."""
    grpo, decoder = config.grpo, config.model.decoder
    assert decoder is not None  # `programs` refuses it
    if grpo is not None and grpo.max_new_tokens is not None:
        return ["the vision tokenizer and the codes of the questions' pictures, because a plan reads no questions"]
    if (grpo is None and config.samples is None) or published_vision(decoder) is not None:
        return []
    drawn = "samples" if grpo is None else f"{grpo.noun}s"
    return [f"the vision tokenizer and the pixels of {drawn}, {none_published(decoder)}"]


def _with_samples(samples: SampleConfig, vision: PlannedVision, trainer: Trainer, step: Program) -> list[Program]:
    """The program of a step, and that of the pixels of a sample. No step itself draws samples.

    The vision tokenizer stays in memory from the first samples on.
    """
    area = trainer.decoder.image_area if samples.area is None else samples.area
    grid = generate_size(samples.ratio, area, vision.config.spatial_factor, name="samples.area")
    state = {name: tree for name, tree in step.arguments.items() if name != "inputs"}
    drawing = {"weights for drawing": abstract_inference_params(trainer.decoder, vision.mesh)}
    pixels = vision.decoding(grid, fast=False, runs=0, beside={**state, **drawing})
    return [dataclasses.replace(step, beside=vision.weights), pixels]
