"""A training run by GRPO: in each step the model draws samples, a reward judges them, and the model learns from that.

`training.loop.train` runs the `GrpoJob`. `training.grpo` has the formulas; `rollouts` draws pictures and clips,
`answering` draws answers.
"""

import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation.language import Language
from emu3_jax.generation.rows import repeat
from emu3_jax.preference.answering import Answerer
from emu3_jax.preference.questions import Question, QuestionFile, read_questions
from emu3_jax.preference.rewards import FOR_ANSWERS, SHIPPED, Reward, RewardPool
from emu3_jax.preference.rollouts import Artist, PromptOrder, Rollouts, rewards_of
from emu3_jax.preference.scoring import judge_settings
from emu3_jax.preference.shipped_rewards import MOVING_EXAMPLE, STILL_EXAMPLE, describes_scene
from emu3_jax.printable import printable, shown
from emu3_jax.text.prompt_files import PromptFile, read_prompts
from emu3_jax.training import grpo
from emu3_jax.training.decoder_job import DecoderJob
from emu3_jax.training.examples import example_prompt
from emu3_jax.training.grpo_config import GrpoConfig
from emu3_jax.training.runner import Batch, Evaluation
from emu3_jax.training.step import BATCH_DTYPES, TrainState
from emu3_jax.training.summary import counted
from emu3_jax.training.weights import abstract_inference_params

_log = logging.getLogger("emu3_jax")
_ATTEMPTS = 3  # how often a step takes further prompts if the reward fails for all of them
_NAMED = 3  # most prompts without rewards that a step names, on each process


class GrpoJob(DecoderJob):
    """The `Job` that trains the decoder by GRPO. Make and use it within `use_mesh(mesh)`."""

    _pool: RewardPool | None = None
    _reference: Any = None  # parameters of the reference, where there is no adapter

    def __init__(self, *arguments: Any, **named: Any):
        """Arguments: those of `DecoderJob`."""
        super().__init__(*arguments, **named)
        settings = self._grpo
        self._held_out = self._read(settings.held_out) if settings.held_out else None
        self._artist = self._rollouts()
        language = Language(self._trainer.decoder, None, self._tokenizer, self._templates, self._mesh)
        for prompts in (self._prompts, self._held_out):
            if prompts is not None:
                self._artist.check(language, prompts, self._config.data.sequence_length)
        self._reward = self._parse_reward()
        if self._held_out is not None:
            self.cadence = dataclasses.replace(self.cadence, evaluate_every=self._config.evaluate_every)

    @property
    def _grpo(self) -> GrpoConfig:
        assert self._config.grpo is not None  # `train` chooses this job for it
        return self._config.grpo

    @property
    def _answers(self) -> bool:
        """Whether the model draws answers. Otherwise it draws pictures or clips."""
        return self._grpo.max_new_tokens is not None

    def _rollouts(self) -> Rollouts:
        if self._answers:
            return Answerer(self._grpo, lambda: self._vision, self._mesh)
        return Artist(self._grpo, self._vision, self._mesh)

    def _read(self, path: str) -> PromptFile | QuestionFile:
        if self._answers:
            return read_questions(path)
        prompts = read_prompts(path)
        if self._grpo.reward == "procedural":
            check_scenes(prompts, self._grpo.frames)
        return prompts

    def _parse_reward(self) -> Reward:
        """The reward with all settings but those of the judge."""
        config = self._grpo
        settings: dict[str, Any] = {}
        if config.reward == "answer_length":
            settings = {"words": config.answer_words}
        elif config.reward == "answer_format":
            settings = {"pattern": config.answer_pattern}
        return Reward.parse(config.reward, settings=settings, shipped=FOR_ANSWERS if self._answers else SHIPPED)

    def _open_batches(self) -> PromptOrder:
        self._prompts: PromptFile | QuestionFile = self._read(self._grpo.prompts)
        return PromptOrder(self._prompts, self._groups, self._grpo.n, self._config.seed)

    @property
    def _groups(self) -> int:
        """Number of prompts of a step."""
        return self._config.batch_size // (self._grpo.n * self._grpo.rows)

    def close(self) -> None:
        super().close()
        if self._pool is not None:
            self._pool.close()

    # -------------------------------------------------------------------------------------------- for people

    def _row_groups(self) -> str:
        return f" ({counted(self._groups, 'prompt')} with {self._grpo.n} {self._grpo.noun}s each)"

    def _describe_data(self) -> list[str]:
        lines = [f"prompts: {counted(len(self._prompts.prompts), 'prompt')} in {printable(self._prompts.name)}"]
        lines.append(f"reward: {self._reward.name}, by {counted(self._grpo.workers, 'worker')}")
        if self._held_out is not None:
            count = counted(len(self._held_out.prompts), "prompt")
            lines.append(f"evaluation every {self._config.evaluate_every:,} steps: held_out ({count})")
        return lines

    def _further_memory(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if self._config.adapter is None and self._compares:
            parts["reference"] = self._trainer.abstract_reference()
        if self._grpo.gather_weights:
            parts["weights for drawing"] = abstract_inference_params(self._trainer.decoder, self._mesh, gathered=True)
        return parts

    def _example(self, options: str) -> str | None:
        first = self._prompts.prompts[0]
        if not isinstance(first, Question):
            if self._grpo.frames is not None:
                return f"emu3-jax video {example_prompt(first)} {options} -o out/clips"
            return f"emu3-jax generate {example_prompt(first)} {options} -o out/pictures"
        asked = next((one for one in self._prompts.prompts if isinstance(one, Question) and one.image), None)
        if asked is None:  # chat needs a picture
            return None
        return (
            f"emu3-jax chat {shlex.quote(printable(str(asked.image)))} --prompt {example_prompt(asked.text)} {options}"
        )

    def report(self, figures: dict[str, float], seconds: float) -> tuple[dict[str, float], str]:
        line = {name: value for name, value in figures.items() if name not in ("tokens", "attended")}
        # Steps do not overlap, so the job's own clock is exact. The runner's also counts what lies between two steps.
        seconds = sum(line[f"seconds_{part}"] for part in ("drawing", "rewards", "update"))
        things = f"{self._grpo.noun}s"
        line |= {"seconds": seconds, f"{things}_per_minute": 60 * self._groups * self._grpo.n / seconds}
        notes = [self._trainer.objective.note(line)]
        if self._answers:
            notes.append(f"{line['answer_tokens']:.1f} tokens an answer")
        notes.append(f"{line[f'{things}_per_minute']:,.0f} {things}/min")
        notes.append(f"{line['seconds_drawing'] / seconds:.0%} of the time in drawing")
        if failed := line["failed"]:
            notes.append(f"{counted(int(failed), 'prompt')} without rewards")
        return line, ", ".join(notes)

    # -------------------------------------------------------------------------------------------- start

    def start(self, step: int, positions: Sequence[Any] | None) -> None:
        super().start(step, positions)
        settings, reward = self._grpo, self._reward
        if settings.reward == "judge":
            found = judge_settings(settings.judge_data, self._vision, progress=self._progress)
            reward = Reward.parse(settings.reward, settings=found)
        # Calls are small enough that each worker gets one.
        groups = -(-self._groups // jax.process_count())
        most = settings.n * -(-groups // settings.workers)
        self._pool = RewardPool(
            reward,
            workers=settings.workers,
            timeout=settings.timeout,
            batch_size=min(settings.pictures_per_call, most),
        )
        self._pool.start()  # a reward that cannot be loaded must fail before anything is drawn

    def _set_positions(self, positions: Sequence[Any]) -> None:
        self._batches.set_state(positions[0])  # all processes know the prompts of all, and save the same

    def _references(self) -> list[np.ndarray | None]:
        if self._config.adapter is None:
            places = self._trainer.state_shardings.params
            self._reference = jax.jit(self._narrow, out_shardings=places, donate_argnums=0)(self._load_params())
        return [None]

    def _narrow(self, params: Any) -> Any:
        """The parameters in the compute dtype, in which the decoder uses them."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self._config.model.dtype)), params)

    # -------------------------------------------------------------------------------------------- steps

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        settings = self._grpo
        drawing = rewarding = 0.0
        failed = 0
        for _ in range(_ATTEMPTS):
            began = time.perf_counter()
            prompts = [self._prompts.prompts[number] for number in batch["prompts"]]
            drawn = self._artist.draw(self._language(state), repeat(prompts, settings.n), batch["seeds"])
            samples = self._artist.samples(drawn)
            seen = time.perf_counter()
            rewards, reason = self._rewards(prompts, samples, settings.n)
            drawing, rewarding = drawing + seen - began, rewarding + time.perf_counter() - seen
            kept = np.isfinite(rewards).all(axis=1)
            failed += int((~kept).sum())
            if kept.any():
                break
            batch = self.next_batch()  # there is nothing to learn from these prompts
        else:
            raise Emu3Error(self._no_rewards(f"{_ATTEMPTS} times in a row for all prompts of a step", reason))
        judged = time.perf_counter()
        real = np.where(kept[:, None], rewards, 0)
        advantages = np.asarray(grpo.advantages(jnp.asarray(real), normalise=settings.normalise))
        mine = list(self._rows.mine)
        rows = self._artist.batch_rows(drawn, np.repeat(kept, settings.n), mine, self._config.data.sequence_length)
        rows["advantage"] = np.repeat(advantages.reshape(-1), settings.rows)[mine]
        state, found = jax.block_until_ready(self._updates(state, self._rows.spread(rows)))
        figures: dict[str, Any] = found | self._artist.figures(drawn)
        level = kept & (rewards == rewards[:, :1]).all(axis=1)
        return state, figures | {
            "reward": float(rewards[kept].mean()),
            "reward_spread": float(rewards[kept].std(axis=1, ddof=1).mean()),
            "reward_best": float(rewards[kept].max(axis=1).mean()),
            "level": int(level.sum()),
            "failed": failed,
            "seconds_drawing": drawing,
            "seconds_rewards": rewarding,
            "seconds_update": time.perf_counter() - judged,
        }

    def _updates(self, state: TrainState, rows: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        """Updates the weights `iterations` times on the same samples."""
        trainer, arrays = self._trainer, trainer_arrays(rows)
        if self._compares:
            whole = self._config.adapter is None
            params, frozen = (self._reference, {}) if whole else (state.params, self._frozen)
            rows["reference"] = trainer.policy(params, frozen, arrays, whole)
        if self._grpo.iterations > 1:
            rows["old"] = trainer.policy(state.params, self._frozen, arrays, True)
        figures: dict[str, jax.Array] = {}
        for _ in range(self._grpo.iterations):
            state, figures = self._update(state, rows)
        return state, figures

    def _rewards(
        self, prompts: Sequence[str | Question], samples: np.ndarray | Sequence[str], n: int
    ) -> tuple[np.ndarray, str]:
        """float32 [prompts, n], NaN where the reward failed; and the reason of the first failure, if there was one.

        Names some of the prompts without rewards.
        """
        assert self._pool is not None
        rewards, reasons = rewards_of(self._pool, prompts, samples, n)
        for number, reason in list(reasons.items())[:_NAMED]:
            prompt = prompts[number]
            text = shown(prompt.text if isinstance(prompt, Question) else prompt)
            _log.warning("reward %s, prompt %s: %s; skipped", self._reward.name, text, reason)
        if len(reasons) > _NAMED:
            _log.warning("reward %s: %s more skipped", self._reward.name, counted(len(reasons) - _NAMED, "prompt"))
        return rewards, next(iter(reasons.values()), "")

    def _no_rewards(self, how: str, reason: str) -> str:
        reason = reason or "see the lines of the other processes"
        return (
            f"the reward {self._reward.name} failed {how} ({reason}); earlier checkpoints are kept; correct the "
            "reward, then run again"
        )

    # -------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, state: TrainState) -> Iterator[Evaluation]:
        if self._held_out is None:
            return
        prompts = self._held_out.prompts
        seeds = np.arange(len(prompts), dtype=np.uint32)
        samples = self._artist.samples(self._artist.draw(self._language(state), prompts, seeds))
        rewards, reason = self._rewards(prompts, samples, 1)
        kept = rewards[np.isfinite(rewards)]
        if not kept.size:
            raise Emu3Error(self._no_rewards("for all prompts of an evaluation", reason))
        figures = {"reward": float(kept.mean()), "best": float((kept == 1).mean()), "failed": len(prompts) - len(kept)}
        yield Evaluation("held_out", figures, f"reward {figures['reward']:.4f}")


def trainer_arrays(rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of a batch that every objective reads."""
    return {name: rows[name] for name in BATCH_DTYPES}


def check_scenes(prompts: PromptFile, frames: int | None) -> None:
    """Raises `Emu3Error` for a prompt that the reward `procedural` cannot score, which would fail in every step.

    Args:
        prompts: the prompts.
        frames: number of frames of the clips that are drawn, or None for pictures.
    """
    moving = frames is not None
    for number, prompt in enumerate(prompts.prompts):
        if describes_scene(prompt, moving=moving):
            continue
        found, example = "no scene that the reward procedural reads", MOVING_EXAMPLE if moving else STILL_EXAMPLE
        remedy = "choose another reward"
        if describes_scene(prompt, moving=not moving):
            found = "a still scene, but the run draws clips" if moving else "a moving scene, but the run draws pictures"
            remedy = "set grpo.frames=None" if moving else "set grpo.frames=8"
        raise Emu3Error(
            f"{prompts.place(number)}: the prompt {shown(prompt)} describes {found}: write one such as {example!r}, "
            f"or {remedy}"
        )
