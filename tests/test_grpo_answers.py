"""GRPO of answers: the policy is the one that was sampled; it learns; bad manifests and rewards are named."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from grpo_runs import change, job, lines
from PIL import Image
from two_processes import Pair

from emu3_jax import Emu3Error, train
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.data.config import DataConfig
from emu3_jax.generation.log_probs import text_log_probs
from emu3_jax.models.decoder import Decoder
from emu3_jax.preference import rewards as pools
from emu3_jax.preference.answer_rewards import answer_format, answer_length, answer_match
from emu3_jax.preference.grpo import trainer_arrays
from emu3_jax.preference.questions import Question, read_questions
from emu3_jax.preference.rewards import FOR_ANSWERS, AnswerGroup, Reward, RewardPool
from emu3_jax.preference.rollouts import PromptOrder
from emu3_jax.preference.shipped_rewards import SHIPPED
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training import runner
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow, pytest.mark.usefixtures("shared_trainers")]

STEPS, LENGTH, MOST = 7, 96, 6
REWARDS = """
def short(questions, answers):
    return [-len(answer) for answer in answers]

def right(questions, answers, references):
    return [float(len(answer) > len(reference or "")) for answer, reference in zip(answers, references)]

def not_a_number(questions, answers):
    return [float("nan") if "1" in question else float(len(answer)) for question, answer in zip(questions, answers)]

def wrong_count(questions, answers):
    return [1.0]
"""
TURNS = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": "blue"}]
LINES = [
    {"text": "what 0?", "image": "pictures/red.png", "answer": "a red one"},
    {"text": "what 1?"},
    {"image": "pictures/blue.png", "conversation": TURNS},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("answers")
    (directory / "pictures").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (24, 24), colour).save(directory / f"pictures/{colour}.png")
    (directory / "rewards.py").write_text(REWARDS)
    write(directory / "questions.jsonl", LINES)
    (directory / "questions.txt").write_text("what 1?\nwhat is it?\n")
    return directory


def write(file: pathlib.Path, lines: list) -> pathlib.Path:
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture(scope="module")
def base(tiny_bundle, folder) -> TrainConfig:
    return TrainConfig(
        directory="",
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig((), LENGTH, packing=0),
        batch_size=64,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-2, final_learning_rate=3e-2, warmup_steps=1, weight_decay=0.0),
        grpo=GrpoConfig(
            f"{folder}/questions.jsonl", f"{folder}/rewards.py:short", n=32, max_new_tokens=MOST, temperature=0.2
        ),
        mesh="fsdp=1",
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(change(base, directory, {"held_out": base.grpo.prompts}, evaluate_every=STEPS), progress=False)
    return directory


def test_it_learns_the_reward(whole):
    found = lines(whole)
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + found[0]["reward_spread"]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[-1]["kl"] > 0.01
    assert found[0]["answers"] == 64 and found[0]["targets"] == 64 * found[0]["answer_tokens"]
    assert found[0]["cut_off"] > 0.5
    (evaluated,) = lines(whole, "evaluation/held_out")
    assert evaluated["reward"] > rewards[0]


def test_a_stopped_run_resumes_exactly(base, whole, tmp_path, monkeypatch):
    config = change(base, tmp_path / "run", {"held_out": base.grpo.prompts}, evaluate_every=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(runner._Loop, "_stopping", lambda at, _: at.step == 3)
        assert train(config, progress=False).step == 3
    train(config, progress=False)
    assert lines(tmp_path / "run") == lines(whole)


@pytest.mark.multiprocess
def test_two_processes_draw_and_learn_as_one(base, whole, tmp_path):
    config = change(
        base, tmp_path / "run", {"held_out": base.grpo.prompts}, mesh="fsdp=2,tensor=2", accumulation=2, steps=2
    )
    names = {"config": "ModelConfig, OptimizerConfig, TrainConfig", "grpo_config": "GrpoConfig"}
    imports = [f"from emu3_jax.training.{module} import {name}" for module, name in names.items()]
    imports.append("from emu3_jax.data.config import DataConfig")
    file = tmp_path / "config.py"
    file.write_text("\n".join([*imports, f"def config():\n    return {config!r}\n"]))
    Pair("train", file).succeed()
    for found, wanted in zip(lines(tmp_path / "run"), lines(whole)[:2], strict=True):
        assert found == {name: pytest.approx(value, rel=1e-4, abs=2e-5) for name, value in wanted.items()}


# ------------------------------------------------------------------------------------------------ the policy


@pytest.mark.parametrize(("temperature", "average"), [(1.0, "length"), (0.7, "sequence")])
def test_the_policy_is_the_one_that_was_sampled(base, folder, tmp_path, temperature, average):
    """At temperature 1 it equals `text_log_probs`; at others, what the decoder's logits give. EOS counts as drawn."""
    config = change(base, tmp_path, {"temperature": temperature, "average": average, "n": 8}, batch_size=16)
    bundle, mesh = Bundle.open(config.model.bundle), make_mesh(config.mesh)
    with use_mesh(mesh):
        made = job(config)
        state = made.initial_state()
        made.start(0, None)
        # A larger weight of EOS, so that some answers end.
        eos = bundle.decoder_config.tokens.eos
        head = state.params["head"]["kernel"]
        state = dataclasses.replace(state, params={**state.params, "head": {"kernel": head.at[eos].set(3 * head[eos])}})
        language, questions = made._language(state), read_questions(config.grpo.prompts).prompts
        asked = (questions * config.batch_size)[: config.batch_size]
        drawn = made._artist.draw(language, asked, np.arange(config.batch_size, dtype=np.uint32))
        kept = np.arange(config.batch_size) != 1
        rows = made._artist.batch_rows(drawn, kept, made._rows.mine, LENGTH)
        policy = np.asarray(
            made._trainer.policy(state.params, made._frozen, trainer_arrays(made._rows.spread(rows)), True)
        )
        totals = made._trainer.objective.totals(rows)
        made.close()
    ended = [eos in ids for ids in drawn.ids]
    assert any(ended) and not all(ended) and drawn.cut == ended.count(False)
    assert all(
        list(ids).index(eos) == len(ids) - 1 if end else len(ids) == MOST
        for ids, end in zip(drawn.ids, ended, strict=True)
    )
    assert not rows["loss_mask"][1].any()
    if average == "length":
        assert float(totals[0]) == (config.batch_size - 1) * MOST
    whole = text_log_probs(language, drawn.prompts, drawn.ids, batch_size=8)
    for number in np.flatnonzero(kept):
        prompt, ids = drawn.prompts[number], drawn.ids[number]
        np.testing.assert_array_equal(rows["tokens"][number, -len(prompt) - len(ids) :], [*prompt, *ids])
        logits = decoder_logits(language, [*prompt, *ids])[len(prompt) - 1 : -1] / temperature
        keys = [jax.random.fold_in(jax.random.key(number), step) for step in range(len(ids))]
        assert [int(jax.random.categorical(key, row)) for key, row in zip(keys, logits, strict=True)] == list(ids)
        measured = policy[number][np.roll(rows["loss_mask"][number], -1)]
        wanted = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(ids)), ids]
        np.testing.assert_allclose(measured, wanted, atol=2e-5)
        if temperature == 1:
            assert measured.sum() == pytest.approx(whole[number].log_prob, abs=2e-5 * len(ids))


def decoder_logits(language, ids) -> jax.Array:
    """float32 [S, V], by the decoder without a cache."""
    tokens = np.zeros((1, LENGTH), np.int32)  # one shape, so that one program serves all
    tokens[0, : len(ids)] = ids
    return whole_logits(language.params, tokens, language.config)[0, : len(ids)]


@functools.partial(jax.jit, static_argnums=2)
def whole_logits(params, tokens, config) -> jax.Array:
    hidden = Decoder(config).apply({"params": params}, tokens, method=Decoder.hidden)
    return Decoder(config).apply({"params": params}, hidden, method=Decoder.logits)


# ------------------------------------------------------------------------------------------------ questions


def test_questions_are_read(folder):
    found = read_questions(f"{folder}/questions.jsonl")
    red, blue = (folder / f"pictures/{colour}.png" for colour in ("red", "blue"))
    assert found.prompts == [
        Question("what 0?", red, "a red one"),
        Question("what 1?"),
        Question("what is it?", blue, "blue"),
    ]
    assert found.prompts[0].identity == ["what 0?", "pictures/red.png", "a red one"] and found.place(2).endswith(
        "line 3"
    )
    assert read_questions(f"{folder}/questions.txt").prompts == [Question("what 1?"), Question("what is it?")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x", "anser": "y"}, "unknown field 'anser': legal fields are image, .*, answer"),
        ({"text": "x", "answer": 3}, "answer is 3: it must be text"),
        ({"image": "pictures/red.png", "text": ""}, "has no question: write it as text"),
        ({"clip": "a.webp", "text": "x"}, "has a clip: GRPO asks about one picture or none"),
        ({"document": [{"text": "x"}]}, "has a document"),
        ({"conversation": TURNS, "answer": "x"}, "has conversation beside text or answer"),
        ({"conversation": TURNS * 2}, "the conversation has 4 turns: GRPO asks one question"),
        (
            {"text": "x", "image": "https://host/red.png"},
            "'https://host/red.png': https:// addresses are not supported",
        ),
        ([1], r"\[1\] is not an object"),
    ],
)
def test_bad_lines_are_named(folder, line, message):
    file = write(folder / "bad.jsonl", [{"text": "what 1?"}, line])
    with pytest.raises(Emu3Error, match=f"bad.jsonl line 2: {message}"):
        read_questions(str(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "<|image start|>"}, ".*control token"),
        ({"text": "x", "image": "pictures/no.png"}, "cannot read .*no.png"),
        ({"text": "x", "image": "small.png"}, r".*small.png.*too small"),
        ({"text": "many words " * 20}, r"the question and its answer take up to \d+ tokens, there is room for 96"),
    ],
)
def test_questions_that_do_not_fit_the_model_are_named(base, folder, tmp_path, line, message):
    Image.new("RGB", (4, 4)).save(folder / "small.png")
    file = write(folder / "bad.jsonl", [{"text": "what 1?"}, line])
    with pytest.raises(Emu3Error, match=f"bad.jsonl line 2: {message}"):
        train(change(base, tmp_path / "run", {"prompts": str(file)}), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_match_needs_answers(base, tmp_path):
    message = "questions.jsonl line 2: it has no answer, which the reward answer_match needs"
    with pytest.raises(Emu3Error, match=message):
        train(change(base, tmp_path / "run", {"reward": "answer_match"}), progress=False)


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number from 1 to .*, or None for pictures"),
        ({"guidance": 2.0}, "guidance is 2.0: it must be 1 where max_new_tokens is set"),
        ({"n": 5}, "batch_size is 64: it must be a multiple of 5: 5 answers per prompt"),
        (
            {"reward": "procedural"},
            "reward is 'procedural': it must be FILE.py:NAME, or answer_length or answer_format",
        ),
        ({"reward": "answer_length"}, "answer_words is None: it must be a number of words where"),
        ({"area": 7}, "grpo.area is 7: it must be a number of pixels from 256 to"),
        ({"reward": "answer_format"}, "answer_pattern is '': it must be a regular expression where"),
        ({"answer_pattern": "(" * 2}, r"answer_pattern is '\(\(': it must be a regular expression of Python \(missing"),
    ],
)
def test_bad_configs(base, tmp_path, grpo, message):
    with pytest.raises(Emu3Error, match=message):
        train(change(base, tmp_path / "run", grpo), progress=False)
    assert not (tmp_path / "run").exists()


def test_other_answers_do_not_resume(folder):
    file = write(folder / "changed.jsonl", LINES)
    position = PromptOrder(read_questions(str(file)), 2, 4, 0).get_state()
    PromptOrder(read_questions(str(file)), 2, 4, 0).set_state(position)
    write(file, [LINES[0] | {"answer": "another"}, *LINES[1:]])
    with pytest.raises(Emu3Error, match="the saved position belongs to other prompts"):
        PromptOrder(read_questions(str(file)), 2, 4, 0).set_state(position)


# ------------------------------------------------------------------------------------------------ rewards


def test_text_alone_needs_no_vision_tokenizer(base, folder, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("vision"))
    model = dataclasses.replace(base.model, bundle=str(tmp_path / "bundle"))
    grpo = {"prompts": f"{folder}/questions.txt", "reward": "answer_length", "answer_words": 1}
    train(change(base, tmp_path / "run", grpo, model=model, steps=2), progress=False)
    assert 0 <= lines(tmp_path / "run")[0]["reward"] <= 1


def test_questions_without_rewards_are_skipped(base, folder, tmp_path, caplog):
    settings = {"reward": f"{folder}/rewards.py:not_a_number", "pictures_per_call": 32}
    train(change(base, tmp_path / "run", settings, steps=3), progress=False)
    found = lines(tmp_path / "run")
    assert sum(line["failed"] for line in found) >= 2 and {line["answers"] for line in found} <= {32, 64}
    assert "reward not_a_number, prompt 'what 1?': it returned nan for answer 0 of the prompt" in caplog.text


def test_a_reward_that_always_fails_ends_the_run(base, folder, tmp_path):
    config = change(base, tmp_path / "run", {"reward": f"{folder}/rewards.py:wrong_count"}, steps=3)
    with pytest.raises(Emu3Error, match=r"reward wrong_count failed 3 times .*it returned 1 numbers for 32 answers"):
        train(config, progress=False)


def test_workers_get_answers_and_references(folder):
    groups = [AnswerGroup("a", ["xx", "x\ud7ff\n"], "x"), AnswerGroup("b", ["", "y"], None)]
    for reward, wanted in (
        (f"{folder}/rewards.py:short", [-2, -3, 0, -1]),
        (f"{folder}/rewards.py:right", [1, 1, 0, 1]),
    ):
        with RewardPool(Reward.parse(reward)) as pool:
            assert np.concatenate([one.rewards for one in pool.score(groups)]).tolist() == wanted
    match = Reward.parse("answer_match", shipped=FOR_ANSWERS)
    with RewardPool(match) as pool:
        first, second = pool.score(groups)
    assert first.rewards.tolist() == [0, 0] and second.reason == "ValueError: the question 'b' has no reference answer"


def test_an_expression_without_end_is_stopped():
    reward = Reward.parse("answer_format", settings={"pattern": "(a+)+b"}, shipped=FOR_ANSWERS)
    with RewardPool(reward, timeout=1.0) as pool:
        slow, good = pool.score([AnswerGroup("q", ["a" * 50], None), AnswerGroup("q", [" aab\n", "aa"], None)])
    assert slow.reason == "it took longer than 1 s" and good.rewards.tolist() == [1, 0]


def test_shipped_rewards():
    assert answer_length(2)([""] * 5, ["", "one two", "one two three", "1 2 3 4", "1 2 3 4 5"]) == [1, 1, 0.5, 0, 0]
    assert answer_format("[0-9]+")([""] * 3, ["12", " 12\n", "12 apples"]) == [1, 1, 0]
    assert answer_match([""] * 4, ["A  Red\none!", "a red one", "red", "."], ["a red one."] * 3 + [""]) == [1, 1, 0, 1]
    assert set(FOR_ANSWERS) | set(pools.SHIPPED) == set(SHIPPED)
