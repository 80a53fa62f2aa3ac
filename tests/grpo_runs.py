"""What the tests of GRPO on pictures, clips and answers share."""

import dataclasses
import pathlib

import numpy as np

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.generation.log_probs import visual_log_probs
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.preference.grpo import GrpoJob, trainer_arrays
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.metrics import read_metrics

_TIMES = ("seconds", "pictures_per", "clips_per", "answers_per")


def change(config: TrainConfig, directory: pathlib.Path, grpo: dict | None = None, **fields) -> TrainConfig:
    """A config with another directory, other fields of `grpo` and other fields."""
    settings = dataclasses.replace(config.grpo, **(grpo or {}))
    return dataclasses.replace(config, directory=str(directory), grpo=settings, **fields)


def lines(directory: pathlib.Path, group: str = "train") -> list[dict]:
    """The metrics of a run, without times."""
    found = [line for line in read_metrics(directory) if line["group"] == group]
    return [{name: value for name, value in line.items() if not name.startswith((*_TIMES, "group"))} for line in found]


def job(config: TrainConfig) -> GrpoJob:
    """The job of a config. Call it within `use_mesh`."""
    bundle = Bundle.open(config.model.bundle)
    return GrpoJob(config, bundle, bundle.decoder_config, make_mesh(config.mesh))


def compare_policy_with_sampler(config: TrainConfig, prompts: list[str]) -> None:
    """Checks that the log-probabilities of the policy that is trained are those of what was sampled.

    Args:
        config: the config of a run that draws pictures or clips.
        prompts: prompts that fill its batch in turn.
    """
    grpo = config.grpo
    with use_mesh(make_mesh(config.mesh)):
        made = job(config)
        state = made.initial_state()
        made.start(0, None)
        language = made._language(state)
        count = config.batch_size // grpo.rows
        seeds = np.arange(count, dtype=np.uint32)
        drawn = made._artist.draw(language, (prompts * count)[:count], seeds)
        rows = made._artist.batch_rows(drawn, np.ones(count, bool), made._rows.mine, config.data.sequence_length)
        found = made._trainer.policy(state.params, made._frozen, trainer_arrays(made._rows.spread(rows)), True)
        made.close()
    settings = RowSettings.of(
        count, temperature=grpo.temperature, top_k=language.config.tokens.visual_count, top_p=1.0,
        guidance=grpo.guidance, seed=seeds,
    )  # fmt: skip
    ids = [grid.ids[grid.prompt_length :] for grid in drawn.grids]
    wanted = visual_log_probs(language, drawn.rows, ids, settings, batch_size=4)
    for number, one in enumerate(wanted):
        mask = np.roll(rows["loss_mask"][number * grpo.rows], -1)
        measured = np.asarray(found)[number * grpo.rows][mask]
        assert measured.size == drawn.grids[number].codes.size
        np.testing.assert_allclose(measured, one.sampled if grpo.guided_policy else one.model, atol=2e-5)
        if grpo.rows == 2:
            assert not rows["loss_mask"][2 * number + 1].any()
