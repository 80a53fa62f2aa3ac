"""Answers and log-likelihoods for lmms-eval and VLMEvalKit, behind base classes with their signatures."""

import abc
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.answers import lmms_eval, vlmevalkit
from emu3_jax.evaluation.answers.core import Answerer, AnswerSettings, Question, cut, fitted
from emu3_jax.generation import log_probs
from emu3_jax.generation.conversation import Showing
from emu3_jax.generation.language import Batching, answer
from emu3_jax.generation.rows import Sampling
from emu3_jax.media.clips import Clip
from emu3_jax.models.decoder import Decoder
from emu3_jax.text.prompts import understanding_prompt

pytestmark = pytest.mark.compiled_quickly

PICTURES = [Image.new("RGB", (24, 24), color) for color in ("red", "green", "blue")]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return emu3_jax.load(tiny_bundle)


@pytest.fixture
def loaded(model, monkeypatch):
    """`load` gives the model in memory."""
    monkeypatch.setattr("emu3_jax.loading.load", lambda *_, **__: model)


def module(monkeypatch, name: str, **contents) -> None:
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


class Lmms(abc.ABC):
    """The part of lmms-eval's `lmms` (0.7.3) that its evaluator uses."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arguments, additional_config=None):
        pairs = dict(one.split("=", 1) for one in arguments.split(",") if one)
        return cls(**pairs, **{name: value for name, value in additional_config.items() if value is not None})


class BaseModel:
    """The part of VLMEvalKit's `BaseModel` that its inference uses."""

    INTERLEAVE = False
    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)


@pytest.fixture
def lmms(loaded, monkeypatch):
    module(monkeypatch, "lmms_eval")
    module(monkeypatch, "lmms_eval.api")
    module(monkeypatch, "lmms_eval.api.model", lmms=Lmms)
    module(monkeypatch, "lmms_eval.api.instance")
    lmms_eval.model_class.cache_clear()
    lmms_eval._pair_class.cache_clear()
    made = lmms_eval.Emu3Jax.create_from_arg_string("pretrained=b", {"batch_size": "2", "device": None})
    made.task_dict = {"colours": {"test": [{"picture": picture, "target": "red"} for picture in PICTURES]}}
    yield made
    lmms_eval.model_class.cache_clear()
    lmms_eval._pair_class.cache_clear()


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


def where(number: int) -> tuple:
    return (lambda doc: [[doc["picture"]]], number, "colours", "test")


def direct(model, prompt, text) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether it is greedy, from all logits of one pass without padding."""
    language = model.language
    tokens = jnp.asarray([[*prompt, *text]])
    logits = jax.jit(Decoder(language.config).apply)({"params": language.params}, tokens)[0]
    rows = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1].astype(jnp.float32)), np.float64)
    return sum(row[token] for row, token in zip(rows, text, strict=True)), rows.argmax(-1).tolist() == list(text)


def prompt_of(model, text: str, *media) -> list[int]:
    language = model.language
    codes = [model.tokenize([item])[0] for item in media]
    return understanding_prompt(language.tokenizer, language.config.tokens, language.templates, text, codes)


def test_log_probs_are_those_of_a_direct_computation(model, monkeypatch):
    monkeypatch.setattr(log_probs, "_LOGITS", 20)  # several chunks of positions
    questions = [Question("What is it", lambda: PICTURES[:1])] * 2 + [Question("Why"), Question("Why")]
    texts = [" red", "a longer answer than the others", "no", " red"]
    found = Answerer(model, batch_size=4).log_probs(questions, texts)
    for question, text, one in zip(questions, texts, found, strict=True):
        prompt = prompt_of(model, question.text, *question.media())
        log_prob, likeliest = direct(model, prompt, model.language.tokenizer.encode(text))
        assert one.log_prob == pytest.approx(log_prob, abs=1e-3) and one.greedy == likeliest
    # What the model generates is greedy. Ids are compared, because a text may have other ids than those it was made of.
    language, prompt = model.language, prompt_of(model, "What is it", PICTURES[0])
    (ids,) = answer(language, [prompt], Sampling(0.0, guidance=1.0), max_new_tokens=4, batching=Batching(1))
    (one,) = log_probs.text_log_probs(language, [prompt], [ids.tolist()], batch_size=4)
    assert one.greedy


def test_clips_are_shown_as_frames(model):
    clip = Clip(np.stack([np.asarray(picture) for picture in PICTURES]))
    answerer = Answerer(model, batch_size=4, showing=Showing("images", frames=2))
    questions = [Question("What", lambda: [clip]), Question("What", lambda: [PICTURES[0], PICTURES[2]])]
    first, second = answerer.log_probs(questions, [" red", " red"])
    assert first.log_prob == pytest.approx(second.log_prob, abs=1e-5)


def test_lmms_eval_generates_in_the_order_of_requests(model, lmms):
    given = [SHORT, {**SHORT, "do_sample": False, "temperature": 0.7, "num_beams": 1}, {**SHORT, "until": "\n\n"}]
    requests = [request("Which colour", arguments, *where(i)) for i, arguments in enumerate(given)]
    found = lmms.generate_until([*requests, request("Which of them is it, and why", SHORT, *where(0))])
    expected = model.chat(PICTURES, "Which colour", **SHORT)
    assert found[:3] == [expected[0], expected[1], cut(expected[2], ["\n\n"])]
    assert found[3] == model.chat([PICTURES[0]], "Which of them is it, and why", **SHORT)[0]
    drawn = lmms.generate_until([request("Which colour", {**SHORT, "temperature": 1.5, "top_p": 0.9}, *where(0))] * 2)
    assert drawn == model.chat(PICTURES[:1] * 2, "Which colour", temperature=1.5, top_p=0.9, **SHORT)
    assert drawn[0] != drawn[1]  # each has its own seed


def test_lmms_eval_scores_texts_and_choices(model, lmms):
    targets = [lambda doc: doc["target"], "red", " blue"]
    found = lmms.loglikelihood([request("Which colour", target, *where(1)) for target in targets])
    prompt, encode = prompt_of(model, "Which colour", PICTURES[1]), model.language.tokenizer.encode
    expected = [direct(model, prompt, encode(text))[0] for text in ("red", "red", " blue")]
    # lmms-eval takes the choice with the smallest value, so choices get the negative.
    np.testing.assert_allclose([value for value, _ in found], [expected[0], -expected[1], -expected[2]], atol=1e-3)
    lmms._choices = "log-prob"
    ((value, _),) = lmms.loglikelihood([request("", "red")])  # without context, for mutual information
    assert value == pytest.approx(direct(model, prompt_of(model, ""), encode("red"))[0], abs=1e-3)


def test_the_registry_of_lmms_eval_gets_a_model_that_it_accepts(lmms, monkeypatch):
    module(monkeypatch, "lmms_eval.models")
    module(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=types.SimpleNamespace)
    made = lmms_eval.manifest()
    name, _, last = made.simple_class_path.rpartition(".")
    found = getattr(sys.modules[name], last)
    assert made.model_id == "emu3_jax" and issubclass(found, Lmms) and found.is_simple and type(lmms) is found


def test_results_of_loglikelihood_stay_pairs_where_lmms_eval_makes_texts(monkeypatch, lmms):
    class GenerationResult:
        def __init__(self, text, token_counts=None):
            self.text, self.token_counts = text, token_counts

    module(monkeypatch, "lmms_eval.api.instance", GenerationResult=GenerationResult)
    lmms_eval._pair_class.cache_clear()
    pair = lmms_eval._pair_class()((-1.5, True))
    assert pair == (-1.5, True) and isinstance(pair, GenerationResult) and pair.text == (-1.5, True)


def test_vlmevalkit_shows_all_pictures_before_the_texts(model, loaded, monkeypatch, tmp_path):
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
    models: dict = {}
    module(monkeypatch, "vlmeval")
    module(monkeypatch, "vlmeval.vlm")
    module(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    module(monkeypatch, "vlmeval.config", supported_VLM=models)
    vlmevalkit.model_class.cache_clear()
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom vlmeval.config import supported_VLM\nsupported_VLM['argv'] = sys.argv[1:]\n")
    code = vlmevalkit.main(["--model-args", '{"generation": {"max_new_tokens": 6}}', str(script), "--data", "MME"])
    assert code == 0 and models["argv"] == ["--model", "emu3-jax", "--data", "MME"]
    assert isinstance(models["emu3-jax"], functools.partial)  # run.py reads its keywords
    made = models["emu3-jax"]()
    vlmevalkit.model_class.cache_clear()
    assert isinstance(made, BaseModel) and not made.use_custom_prompt("MME")
    message = [
        {"type": "text", "value": "Which"}, {"type": "image", "value": str(tmp_path / "0.png")},
        {"type": "text", "value": "is it"}, {"type": "image", "value": str(tmp_path / "1.png")},
    ]  # fmt: skip
    assert made.generate(message, "MME") == model.chat([PICTURES[:2]], "Which\nis it", **SHORT)[0]
    with pytest.raises(Emu3Error, match="data set MME: a message has no text"):
        made.generate(message[1:2], "MME")
    with pytest.raises(Emu3Error, match=r"data set MME: .*absent.png"):
        made.generate([*message, {"type": "image", "value": "absent.png"}], "MME")


def test_settings_are_those_of_transformers_names():
    assert AnswerSettings.of({"until": ["\n\n", ""], "top_p": None, "max_new_tokens": 16}) == AnswerSettings(
        16, ("\n\n",)
    )
    assert AnswerSettings.of({"do_sample": True, "temperature": 0.5, "top_k": 0}).temperature == 0.5
    assert cut("a. b; c", [";", ". "]) == "a" and cut("a", ["b"]) == "a"


def test_elongated_pictures_get_bars():
    picture = Image.new("RGB", (101, 10), "white")
    padded = fitted(picture)
    assert padded.size == (101, 21) and padded.getpixel((0, 0)) == (0, 0, 0) and padded.getpixel((0, 10)) == (255,) * 3
    assert fitted(Image.new("RGB", (50, 10))).size == (50, 10)


@pytest.mark.parametrize(
    "arguments, line",
    [
        ({"choices": "best"}, "choices is 'best': it must be one of loss, log-prob"),
        ({"pretrain": "b"}, "model_args has 'pretrain', which emu3_jax does not know"),
        ({"batch_size": "auto"}, "batch_size is 'auto': it must be a whole number >= 1"),
    ],
)
def test_bad_arguments_of_lmms_eval(lmms, arguments, line):
    with pytest.raises(Emu3Error, match=line):
        type(lmms)(**arguments)


def test_bad_requests_are_named(lmms, monkeypatch):
    place = "task colours, test, document 1: "
    lmms.task_dict["colours"]["test"][1]["picture"] = {"array": []}  # a sound
    with pytest.raises(Emu3Error, match=place + ".* is no picture or clip"):
        lmms.generate_until([request("Which", SHORT, *where(1))])
    lmms.task_dict["colours"]["test"][1]["picture"] = PICTURES[1]
    with pytest.raises(Emu3Error, match=place + ".*control token|" + place + ".*special token"):
        lmms.generate_until([request("<|image start|>", SHORT, *where(1))])
    with pytest.raises(Emu3Error, match=place + "pictures and question take .* positions"):
        lmms.generate_until([request("Which", SHORT, *where(0)), request("long " * 300, SHORT, *where(1))])
    with pytest.raises(Emu3Error, match=place + "the continuation is empty"):
        lmms.loglikelihood([request("Which", "", *where(1))])
    with pytest.raises(Emu3Error, match=place + "prompt and continuation take .* positions"):
        lmms.loglikelihood([request("Which", "long " * 300, *where(1))])
    with pytest.raises(Emu3Error, match="num_beams is 3: there is no beam search"):
        lmms.generate_until([request("Which", {"num_beams": 3}, *where(1))])
    with pytest.raises(Emu3Error, match="tasks of several rounds"):
        lmms.generate_until_multi_round([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Emu3Error, match="lmms-eval runs in several processes"):
        type(lmms)()


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["absent.py"], "absent.py is no file: give run.py"),
        (["--model-args", "{", __file__], "--model-args is no JSON"),
        (["--model-args", '{"model": "b"}', __file__], "give a JSON object, and the bundle as --model"),
        ([__file__], "VLMEvalKit cannot be imported"),
    ],
)
def test_bad_command_lines_of_vlmevalkit(monkeypatch, capsys, arguments, line):
    monkeypatch.setitem(sys.modules, "vlmeval.config", None)
    assert vlmevalkit.main(arguments) == 2
    assert line in capsys.readouterr().err
