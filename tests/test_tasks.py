"""Prompts and settings of Emu3.5's tasks, against what the reference printed."""

import dataclasses

import pytest
from conftest import golden_json

from emu3_jax.cli import interleave
from emu3_jax.config import SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.text.tasks import TASKS, task_prompts
from emu3_jax.text.tokenizer import Tokenizer

TEXT = golden_json("emu35/text.json")
# The configs whose values a task gets.
CONFIGS = {
    "t2i": "example_config_t2i", "x2i": "example_config_x2i", "story": "example_config_visual_narrative",
    "howto": "example_config_visual_guidance", "explore": "config",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Tokenizer.from_files(vocabulary, SpecialTokens(visual_count=131072))


def test_text_and_ids(tokenizer):
    assert tokenizer.vocab_size == TEXT["vocabulary_size"]
    for text, ids in TEXT["encode"]:
        assert tokenizer.encode(text, allow_special=True) == ids
    for ids, text, plain in TEXT["decode"]:
        assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special=True) == plain


@pytest.mark.parametrize("case", TEXT["prompts"], ids=lambda case: f"{case['template'][45:70]}{case['images']}")
def test_golden_prompts(tokenizer, case):
    name = case["template"].split(" for ")[1].split(" task")[0]
    first = case["template"].index("<|IMAGE|>") < case["template"].index("{question}") if case["images"] else False
    more = " Please generate a response with interleaved text and images." if "Please" in case["template"] else ""
    task = dataclasses.replace(TASKS.get(name, TASKS["story"]), name=name, pictures_first=first, more=more)
    pictures = [i for image in case["images"] for i in TEXT["image_strings"][image]]
    found = task_prompts(tokenizer, task, case["question"], pictures)
    assert found.conditional == case["prompt_ids"] and found.unconditional == case["unconditional_ids"]
    assert (found.empty == found.unconditional) == (not pictures)


@pytest.mark.parametrize("name", TASKS)
def test_settings_are_the_reference_configs(name):
    task, config = TASKS[name], TEXT["defaults"][CONFIGS[name]]
    sampling = config["sampling"]
    assert (task.guidance, task.area, task.steps) == (
        config["guidance"],
        config["image_area"],
        config["max_new_tokens"],
    )
    assert (task.text_temperature, task.text_top_k, task.text_top_p) == tuple(
        sampling[f"text_{field}"] for field in ("temperature", "top_k", "top_p")
    )
    assert task.top_k == sampling["image_top_k"]
    assert (sampling["image_top_p"], sampling["image_temperature"]) == (1.0, 1.0)


def test_the_command_offers_all_tasks():
    assert tuple(TASKS) == interleave.TASKS


def test_control_tokens_in_a_question_are_refused(tokenizer):
    with pytest.raises(Emu3Error, match="extra_204"):
        task_prompts(tokenizer, TASKS["story"], "stop <|extra_204|>")
