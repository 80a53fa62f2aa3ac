"""The figure "people_prompts": what is read, what counts as recognised, and what is refused."""

import json
import types

import jax
import numpy as np
import pytest

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import people_prompts
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.judge import Judge as TrainedJudge
from emu3_jax.evaluation.judge import Network

CONCEPTS = ("cat", "dog", "fox", "hen")


class Judge:
    """Knows `CONCEPTS`, and reads the likelihood of each from the first pixels of a picture."""

    concepts = CONCEPTS

    def __init__(self):
        self.judged = []  # number of pictures of each call

    def logits(self, pictures, batch_size):
        self.judged.append(len(pictures))
        return pictures[:, 0, : len(CONCEPTS), 0].astype(np.float32)


def drawn(*likelihoods):
    """Pictures whose first pixels say how likely each concept is."""
    pictures = np.zeros((len(likelihoods), 8, 8, 3), np.uint8)
    pictures[:, 0, : len(CONCEPTS), 0] = likelihoods
    return pictures


@pytest.fixture
def data(tmp_path):
    lines = [
        {"text": "a cat", "concepts": ["cat"]},
        {"text": "a pet", "concepts": ["cat", "dog", "not in the training"]},
        {"text": "a pirate", "concepts": []},
    ]
    (tmp_path / people_prompts.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = [types.SimpleNamespace(concept=concept, label=f"the {concept}") for concept in CONCEPTS]
    return types.SimpleNamespace(directory=tmp_path, where=lambda *_: items)


def test_a_picture_is_recognised_by_any_concept_that_its_prompt_may_mean(data, monkeypatch):
    judge = Judge()
    monkeypatch.setattr(people_prompts, "judge_of", lambda *_: (judge, np.zeros((4, 8, 8, 3), np.uint8)))
    wrong, pirate = (0, 0, 0, 9), (0, 0, 9, 0)
    made = {1.0: drawn(wrong, (0, 5, 9, 0), pirate), 3.0: drawn((9, 0, 0, 0), (0, 9, 0, 0), pirate)}

    def generate(model, prompts, side, *, guidance, **_):
        assert prompts == ["a cat", "a pet", "a pirate"] and side == (8, 8)
        return made[guidance]

    monkeypatch.setattr(people_prompts, "generate", generate)
    config = EvaluateConfig("out", figures=("people_prompts",), guidance=(1.0, 3.0))
    assert config.needs_items and config.needs_data
    reconstruct = types.SimpleNamespace(digest=lambda: "")
    figures, (section,) = people_prompts.measure(None, data, config, reconstruct, progress=False)
    assert figures == {
        "cases": 3,
        "named": 2,
        "not_named": ["a pirate"],
        "best_guidance": 3.0,
        "guidance": [{"scale": 1.0, "top1": 0.0, "top5": 1.0}, {"scale": 3.0, "top1": 1.0, "top5": 1.0}],
    }
    assert judge.judged == [3, 3]  # once for each picture, whatever its prompt may mean
    cells = [row.cells[0] for row in section.rows]
    assert [cell.right for cell in cells] == [True, True, None]
    assert [cell.caption for cell in cells] == ["judge: the cat", "judge: the dog", "judge: the fox"]


def test_a_rank_is_the_best_of_all_concepts_that_a_prompt_may_mean():
    """With a real judge, the rank from one pass equals the least of the ranks of each concept alone."""
    names = [f"concept {number}" for number in range(12)]
    zeros = np.zeros((1, 16, 16, 3), np.float32)
    params = Network(8, len(names)).init(jax.random.key(0), zeros)["params"]
    judge = TrainedJudge(tuple(names), 8, params, None, 0)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (24, 16, 16, 3), np.uint8)
    known = [sorted(random.choice(12, random.integers(1, 5), replace=False).tolist()) for _ in pictures]
    alone = [judge.ranks(pictures, [name] * len(pictures), 10) for name in names]
    expected = [min(alone[place][number] for place in places) for number, places in enumerate(known)]
    found = people_prompts._ranks(judge.logits(pictures, 10), known)
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) > 3  # the judge does not find all pictures alike


def test_prompts_that_the_judge_does_not_know_are_refused(data, monkeypatch):
    monkeypatch.setattr(people_prompts, "judge_of", lambda *_: (Judge(), np.zeros((4, 8, 8, 3), np.uint8)))
    (data.directory / people_prompts.FILE).write_text('{"text": "a pirate", "concepts": []}\n')
    config = EvaluateConfig("out", figures=("people_prompts",))
    with pytest.raises(Emu3Error, match="no training picture shows what its prompts may mean; build the data again"):
        people_prompts.measure(None, data, config, types.SimpleNamespace(digest=lambda: ""), progress=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "people_prompts.jsonl"),
        ("", "has no prompt"),
        ("[]\n", 'line 1 is not an object with a text "text"'),
        ('{"text": "a cat", "concepts": "cat"}\n', 'line 1 is not an object with a text "text"'),
        ('{"text": "a cat", "concepts": []}\n{"text": 3, "concepts": []}\n', "line 2 is not an object"),
        ("{\n", "line 1"),
    ],
)
def test_malformed_prompts_are_named_by_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / people_prompts.FILE).write_text(content)
    with pytest.raises(Emu3Error) as caught:
        people_prompts.read_prompts(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    if content is not None:
        assert "build the data again" in str(caught.value)
