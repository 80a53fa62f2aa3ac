"""The figure "people_prompts": what is read, what counts as recognised, and what is refused."""

import json
import types

import numpy as np
import pytest

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import people_prompts
from emu3_jax.evaluation.config import EvaluateConfig

CONCEPTS = ("cat", "dog", "fox", "hen")


class Judge:
    """Knows `CONCEPTS`, and reads the likelihood of each from the first pixels of a picture."""

    concepts = CONCEPTS

    def _likelihoods(self, pictures):
        return pictures[:, 0, : len(CONCEPTS), 0].astype(int)

    def ranks(self, pictures, concepts, batch_size):
        found = self._likelihoods(pictures)
        truth = found[np.arange(len(found)), [CONCEPTS.index(concept) for concept in concepts]]
        return (found > truth[:, None]).sum(axis=1)

    def verdicts(self, pictures, batch_size):
        return [CONCEPTS[place] for place in self._likelihoods(pictures).argmax(axis=1)]


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
    monkeypatch.setattr(people_prompts, "judge_of", lambda *_: (Judge(), np.zeros((4, 8, 8, 3), np.uint8)))
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
    cells = [row.cells[0] for row in section.rows]
    assert [cell.right for cell in cells] == [True, True, None]
    assert [cell.caption for cell in cells] == ["judge: the cat", "judge: the dog", "judge: the fox"]


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
