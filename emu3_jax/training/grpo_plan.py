"""The programs of a step of GRPO, which `sharding.plan` compiles for a TPU slice."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from emu3_jax.config import DecoderConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.config import GenerateConfig
from emu3_jax.generation.plan import PlannedSession
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.vision_plan import PlannedVision, published_vision
from emu3_jax.sharding.plan import Program
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.flops import step_flops
from emu3_jax.training.grpo_config import GrpoConfig
from emu3_jax.training.step import BATCH_DTYPES, Trainer
from emu3_jax.training.weights import abstract_inference_params, make_inference_params


def grpo_programs(
    config: TrainConfig, grpo: GrpoConfig, mesh: Mesh, trainer: Trainer, update: Program
) -> list[Program]:
    """The programs of a step: weights for drawing, drawing, the log-probabilities of other policies, and the update.

    The largest caches belong to the longest prompt that fits in a row. Every reward of pictures gets their pixels, so
    the published vision tokenizer that belongs to the decoder is planned, too, if there is one. The reward itself runs
    in processes of the host.

    Args:
        config: config of the run.
        grpo: its field `grpo`.
        mesh: the mesh.
        trainer: the trainer of this config on this mesh.
        update: the program of an update. Its arguments are the state, the frozen weights and a batch.

    Raises:
        Emu3Error: a picture or an answer does not fit in a row; or there are clips, which the vision tokenizer does not
            know.
    """
    decoder = trainer.decoder
    state, frozen = trainer.abstract_state(), trainer.abstract_frozen()
    trained = {"adapters" if config.adapter else "trained weights": state.params}
    if config.adapter:
        trained = {"frozen weights": frozen, **trained}
    known = published_vision(decoder) if grpo.max_new_tokens is None else None
    if grpo.frames is not None and known is not None and not isinstance(known, VisionConfig):
        raise Emu3Error("grpo.frames: the vision tokenizer of Emu3.5 knows pictures alone; set grpo.frames=None")
    vision = None if known is None else PlannedVision.of(known, mesh)
    tokenizer = {} if vision is None else vision.weights
    held = {"optimizer": state.opt_state, **tokenizer}
    reference: dict[str, Any] = {}
    if grpo.reference and not config.adapter:
        reference = {"reference weights": trainer.abstract_reference()}

    merge = make_inference_params(decoder, config.adapter, mesh, gathered=grpo.gather_weights)
    merged = abstract_inference_params(decoder, mesh, gathered=grpo.gather_weights)

    def lower_merge() -> jax.stages.Lowered:
        with use_mesh(mesh):
            return merge.lower(state.params, frozen)

    drawn = config.batch_size // grpo.rows
    seen = []
    if grpo.max_new_tokens is None:
        pictures = _pictures(config, grpo, decoder)
        sampling = Sampling(grpo.temperature, decoder.tokens.visual_count, 1.0, grpo.guidance)
        session = PlannedSession.of_grids(pictures, mesh, merged, sampling)
        if vision is not None:
            others = {**trained, "optimizer": state.opt_state, **reference}
            seen = [vision.decoding_for_rewards(pictures.grid, drawn, others)]
    else:
        session = _answers(config, grpo, decoder, mesh, merged)
    whole = config.adapter is None
    passes = []
    if grpo.reference:
        weights, others = (reference, trained) if whole else (trained, {})
        passes.append(_policy(config, trainer, mesh, "reference", weights, {**others, **held}, adapters=whole))
    if grpo.iterations > 1:
        passes.append(_policy(config, trainer, mesh, "old policy", trained, {**held, **reference}, adapters=True))
    draws = -(-drawn // grpo.at_once(drawn))
    drawing = session.programs(beside={**trained, **held, **reference})
    return [
        Program("weights for drawing", lower_merge, trained, beside={**held, **reference}),
        *(dataclasses.replace(program, runs=draws) for program in drawing),
        *seen,
        *passes,
        dataclasses.replace(update, beside={**tokenizer, **reference}, runs=grpo.iterations),
    ]


def _pictures(config: TrainConfig, grpo: GrpoConfig, decoder: DecoderConfig) -> GenerateConfig:
    """The pictures or clips that `preference.rollouts` draws at once, with the longest prompts that fit."""
    pictures = config.batch_size // grpo.rows
    one = GenerateConfig(
        decoder, pictures=grpo.at_once(pictures), frames=grpo.frames, ratio=grpo.ratio, area=grpo.area,
        guidance=grpo.guidance, prompt_tokens=1, parallel=grpo.parallel, kernels="auto",
    )  # fmt: skip
    room = _room(config, decoder)
    if one.steps >= room:
        raise Emu3Error(
            f"a {grpo.noun} of {'x'.join(map(str, one.grid))} tokens takes {one.steps} tokens of a row, a row has "
            f"{room}: raise data.sequence_length, or lower {'' if grpo.frames is None else 'grpo.frames or '}grpo.area"
        )
    return dataclasses.replace(one, prompt_tokens=room - one.steps)


def _answers(config: TrainConfig, grpo: GrpoConfig, decoder: DecoderConfig, mesh: Mesh, params: Any) -> PlannedSession:
    """The session that draws answers, as `preference.answering` does, with the longest questions that fit in a row."""
    assert grpo.max_new_tokens is not None
    room = _room(config, decoder)
    if grpo.max_new_tokens >= room:
        raise Emu3Error(
            f"an answer takes up to {grpo.max_new_tokens} tokens of a row, a row has {room}: raise "
            "data.sequence_length, or lower grpo.max_new_tokens"
        )
    return PlannedSession.of_answers(
        decoder, mesh, params, Sampling(grpo.temperature, decoder.vocab_size, 1.0, 1.0),
        count=grpo.at_once(config.batch_size), prompt_tokens=room - grpo.max_new_tokens,
        max_new_tokens=grpo.max_new_tokens, parallel=grpo.parallel,
    )  # fmt: skip


def _room(config: TrainConfig, decoder: DecoderConfig) -> int:
    """Tokens that a prompt and what is drawn for it may take together."""
    return min(config.data.sequence_length, decoder.max_positions)


def _policy(
    config: TrainConfig,
    trainer: Trainer,
    mesh: Mesh,
    name: str,
    weights: dict[str, Any],
    beside: dict[str, Any],
    adapters: bool,
) -> Program:
    """The program that computes the log-probabilities of all rows. `weights`: the trained ones last."""
    batch = {key: array for key, array in trainer.abstract_batch().items() if key in BATCH_DTYPES}
    *_, params = weights.values()
    frozen = trainer.abstract_frozen()

    def lower() -> jax.stages.Lowered:
        with use_mesh(mesh):
            return trainer.policy.lower(params, frozen, batch, adapters)

    rows, length = config.batch_size, config.data.sequence_length
    # The three parts of a step of all weights are one forward pass and two of the same size backward.
    attended = rows * length * (length + 1) / 2
    flops = step_flops(trainer.decoder, rows * length, attended, visual_only=config.visual_only) / 3
    title = f"log-probabilities by the {name} of {rows} rows of {length} tokens"
    return Program(title, lower, {**weights, "inputs": batch}, beside=beside, flops=flops)
