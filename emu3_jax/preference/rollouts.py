"""Rollouts of GRPO: pictures or clips that the present model draws for prompts, as pixels and as rows of a batch.

`answering` draws answers instead.

The model draws on the mesh that it is trained on. All processes draw all pictures together, and each makes the rows of
its own share of the batch.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emu3_jax import distributed
from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.fields import is_whole
from emu3_jax.generation.codec import Vision, batches_on, decode_pictures
from emu3_jax.generation.language import Batching, GeneratedGrid, Grid, Language, generate_grids, grid_rows
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass
from emu3_jax.generation.session_rows import Row
from emu3_jax.media.sizes import generate_size
from emu3_jax.preference.questions import Question, QuestionFile
from emu3_jax.preference.rewards import AnswerGroup, AnyGroup, Group, RewardPool
from emu3_jax.text.prompt_files import PromptFile
from emu3_jax.training.grpo_config import GrpoConfig


class PromptOrder:
    """An iterator over the prompts of each step, whose position can be saved. Each epoch has another order.

    Attributes:
        skipped: always 0. No prompt is left out.
    """

    skipped = 0

    def __init__(self, prompts: PromptFile | QuestionFile, groups: int, n: int, seed: int):
        """
        Args:
            prompts: the prompts.
            groups: number of prompts of a step.
            n: number of samples per prompt.
            seed: seed of the orders and of the samples.
        """
        self._count, self._groups, self._n, self._seed = len(prompts.prompts), groups, n, seed
        each = [one.identity if isinstance(one, Question) else one for one in prompts.prompts]
        identity = json.dumps([each, groups, n, seed]).encode()
        self._identity = hashlib.sha256(identity).hexdigest()
        self._order = functools.lru_cache(2)(self._permutation)  # a step may lie in two epochs
        self._taken = 0  # steps

    def __next__(self) -> dict[str, np.ndarray]:
        """The numbers of the prompts of a step, int32 [groups], and the seeds of its samples, uint32 [groups * n]."""
        first = self._taken * self._groups
        numbers = [
            self._order(place // self._count)[place % self._count] for place in range(first, first + self._groups)
        ]
        rng = np.random.default_rng([self._seed, 1, self._taken])
        seeds = rng.integers(0, 2**32, self._groups * self._n, dtype=np.uint32)
        self._taken += 1
        return {"prompts": np.asarray(numbers, np.int32), "seeds": seeds}

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(self._count)

    def get_state(self) -> dict[str, Any]:
        """The position after the last step, as JSON values."""
        return {"prompts": self._identity, "steps": self._taken}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position from `get_state`.

        Raises:
            Emu3Error: the position belongs to other prompts or settings.
        """
        if not isinstance(state, Mapping) or state.get("prompts") != self._identity:
            raise Emu3Error(
                "the saved position belongs to other prompts: their file, batch size, n or seed differ; resume with "
                "the same ones, or start a new run"
            )
        if not is_whole(state.get("steps"), 0):
            raise Emu3Error("the saved position is damaged: delete this checkpoint to resume from the previous one")
        self._taken = state["steps"]

    def close(self) -> None:
        """Does nothing: there are no threads."""


class Rollouts(Protocol):
    """Draws the samples of one config. `Artist` draws pictures or clips, `answering.Answerer` answers to questions.

    What `draw` returns is for the other methods.
    """

    def check(self, language: Language, prompts: Any, length: int) -> None:
        """Raises `Emu3Error` for a prompt that is not legal, or whose sample does not fit into a row of `length`."""

    def draw(self, language: Language, prompts: Any, seeds: np.ndarray) -> Any:
        """Draws one sample for each prompt. `seeds`: uint32 [samples]."""

    def samples(self, drawn: Any) -> Any:
        """The samples as the reward gets them: uint8 [N, H, W, 3] or [N, T, H, W, 3], or N texts."""

    def figures(self, drawn: Any) -> dict[str, float]:
        """Further metrics of a step."""

    def batch_rows(self, drawn: Any, kept: np.ndarray, mine: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """The rows `mine` of a training batch, see `objectives.Groups`. `kept`: bool [N], which samples count."""


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures or clips that the model drew.

    Attributes:
        rows: the rows of the session.
        grids: what was generated for each.
    """

    rows: Sequence[Row]
    grids: Sequence[GeneratedGrid]


class Artist:
    """Draws the pictures or clips of one config."""

    def __init__(self, config: GrpoConfig, vision: Vision, mesh: Mesh):
        self._config, self._vision, self._mesh = config, vision, mesh
        self._replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def check(self, language: Language, prompts: PromptFile, length: int) -> None:
        """Raises `Emu3Error` for a prompt that is not legal, or whose picture does not fit into a row of `length`.

        Also for clips by a vision tokenizer that knows none, and for a ratio that the reward cannot score.
        """
        noun, less = self._config.noun, "" if self._config.frames is None else "grpo.frames or "
        grids = self._grids(language, prompts.prompts)
        height, width = grids[0].size[-2:]
        if self._config.reward == "procedural" and height != width:
            raise Emu3Error(
                f"grpo.ratio is {self._config.ratio}, and the reward procedural reads square {noun}s alone: set it "
                "to 1:1, or choose another reward"
            )
        for number, grid in enumerate(grids):
            try:
                (row,) = grid_rows(language, [grid])
            except RowError as error:
                raise Emu3Error(f"{prompts.place(number)}: {error.reason}") from error
            except Emu3Error as error:
                raise Emu3Error(f"{prompts.place(number)}: {error}") from error
            tokens = max(len(row.prompt), len(row.negative or ())) + len(row.schedule)
            if tokens > length:
                raise Emu3Error(
                    f"{prompts.place(number)}: the prompt and its {noun} take {tokens} tokens, a row has {length}: "
                    f"shorten the prompt, raise data.sequence_length, or lower {less}grpo.area"
                )

    def draw(self, language: Language, prompts: Sequence[str], seeds: np.ndarray) -> Drawn:
        """Draws one picture or clip for each prompt.

        Args:
            language: the model.
            prompts: a prompt for each picture.
            seeds: uint32 [pictures].
        """
        config, count = self._config, len(prompts)
        grids = self._grids(language, prompts)
        settings = RowSettings.of(
            count, temperature=config.temperature, top_k=language.config.tokens.visual_count, top_p=1.0,
            guidance=config.guidance, seed=seeds,
        )  # fmt: skip
        batching = Batching(config.at_once(count), False, parallel=config.parallel)
        made = generate_grids(language, grids, settings, batching=batching)
        return Drawn(grid_rows(language, grids), made)

    def _grids(self, language: Language, prompts: Sequence[str]) -> list[Grid]:
        config = self._config
        area = language.config.image_area if config.area is None else config.area
        size: tuple[int, ...] = generate_size(config.ratio, area, self._vision.config.spatial_factor, name="grpo.area")
        if config.frames is not None:
            size = (-(-config.frames // self._vision.clips("grpo.frames").temporal_factor), *size)
        return [Grid(prompt, "", size) for prompt in prompts]

    def figures(self, _: Drawn) -> dict[str, float]:
        """Further metrics of a step: none."""
        return {}

    def samples(self, drawn: Drawn) -> np.ndarray:
        """The pictures, uint8 [N, H, W, 3], or clips, [N, frames, H, W, 3], that the reward gets.

        Devices share the decoding.
        """
        codes = np.stack([grid.codes for grid in drawn.grids])
        at_once, place = batches_on(self._mesh, self._vision.config, codes.shape[1:], len(codes))
        pixels = decode_pictures(self._vision, codes, at_once=at_once, place=place, gather=self._replicate)
        return pixels if self._config.frames is None else pixels[:, : self._config.frames]

    def batch_rows(self, drawn: Drawn, kept: np.ndarray, mine: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """The rows of a training batch, see `objectives.Groups`.

        Pictures end at the last column, so that both rows of a picture have it at the same columns.

        Args:
            drawn: the pictures.
            kept: bool [N], which pictures count.
            mine: numbers of the rows to make.
            length: tokens of a row.
        """

        def made(number: int) -> tuple[Sequence[int], np.ndarray, np.ndarray]:
            picture, second = divmod(number, self._config.rows)
            row, grid = drawn.rows[picture], drawn.grids[picture]
            prompt = row.negative if second else row.prompt
            assert prompt is not None
            mask = (row.schedule == TokenClass.VISUAL) & (not second and kept[picture])
            return prompt, grid.ids[grid.prompt_length :], mask

        return right_aligned(map(made, mine), len(mine), length)


def right_aligned(
    rows: Iterable[tuple[Sequence[int], np.ndarray, np.ndarray]], count: int, length: int
) -> dict[str, np.ndarray]:
    """The arrays of a training batch, [count, length] each, of sequences that end at the last column.

    Args:
        rows: the ids of each row's prompt; the ids that follow it, int32 [T]; and which of them count, bool [T].
        count: number of rows.
        length: tokens of a row.
    """
    shape = (count, length)
    found = {
        "tokens": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }
    for place, (prompt, ids, mask) in enumerate(rows):
        whole = np.concatenate([np.asarray(prompt, np.int32), ids])
        columns = slice(length - len(whole), length)
        found["tokens"][place, columns] = whole
        found["segment_ids"][place, columns] = 1
        found["positions"][place, columns] = np.arange(len(whole))
        found["loss_mask"][place, length - len(ids) :] = mask
    return found


def rewards_of(
    pool: RewardPool, prompts: Sequence[str | Question], samples: np.ndarray | Sequence[str], n: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Rewards of pictures, clips or answers. The processes of a run share the prompts.

    Args:
        pool: computes the rewards.
        prompts: the prompt of each group: a text for pictures and clips, a question for answers.
        samples: pictures uint8 [len(prompts) * n, H, W, 3], clips [len(prompts) * n, T, H, W, 3], or as many answers,
            grouped by prompt.
        n: number of samples per prompt.

    Returns:
        float32 [len(prompts), n] on every process, NaN in groups without rewards; and the reason for each of these
        groups that this process tried.
    """
    index, count = jax.process_index(), jax.process_count()
    mine = range(index, len(prompts), count)
    found = np.full((len(prompts), n), np.nan, np.float32)
    reasons = {}
    groups = (_group(prompts[number], samples[number * n : (number + 1) * n]) for number in mine)
    for number, scored in zip(mine, pool.score(groups), strict=True):
        if scored.rewards is None:
            reasons[number] = scored.reason
        else:
            found[number] = scored.rewards
    shared = distributed.gather(found)  # [processes, prompts, n]
    return np.stack([shared[number % count, number] for number in range(len(prompts))]), reasons


def _group(prompt: str | Question, samples: Any) -> AnyGroup:
    if isinstance(prompt, Question):
        return AnswerGroup(prompt.text, list(samples), prompt.answer)
    return Group(prompt, list(samples))
