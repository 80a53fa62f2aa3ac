"""Documents from a manifest to a model that writes them: prepare, train, interleave, evaluate."""

import json

import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax.cli.main import main
from emu3_jax.data.pipeline import DataConfig, Source, training_batches
from emu3_jax.data.sequences import Interleaved
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.generation.pieces import Document

pytestmark = pytest.mark.compiled_quickly

CONFIG = """
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import Interleaved
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config():
    return TrainConfig(
        directory={directory!r},
        model=ModelConfig({model!r}, dtype="float32"),
        data=DataConfig((Source({data!r}, Interleaved(prompt_dropout=0.2)),), sequence_length=160, packing=2),
        batch_size=4,
        steps=150,
        mesh="fsdp=1",
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10, clip_norm=1.0),
    )
"""
SIDES = ((24, 24), (16, 24))  # height and width in pixels
STORY = [("text", "A dog."), ("picture", (3, 3)), ("text", "It barks."), ("picture", (2, 3))]


@pytest.fixture(scope="module")
def trained(tiny_bundle, tmp_path_factory):
    """A story, an edit and a page without roles, and the tiny model after it has learnt them by heart."""
    root = tmp_path_factory.mktemp("stories")
    for number, (height, width) in enumerate(SIDES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    answer = [{"role": "assistant", "text": "A dog."}, {"role": "assistant", "image": "0.png"},
              {"role": "assistant", "text": "It barks."}, {"role": "assistant", "image": "1.png"}]  # fmt: skip
    lines = [
        [{"role": "user", "text": "a story"}, *answer],
        [{"role": "user", "image": "0.png"}, {"role": "user", "text": "wider"}, answer[3]],
        [{"text": "A dog."}, {"image": "0.png"}],
    ]
    (root / "m.jsonl").write_text("".join(json.dumps({"document": line}) + "\n" for line in lines))
    data, model = str(root / "data"), str(tiny_bundle)
    assert main(["prepare", str(root / "m.jsonl"), "--model", model, "--keep-size", "-o", data, "--quiet"]) == 0
    (root / "config.py").write_text(CONFIG.format(directory=str(root / "run"), model=model, data=data))
    assert main(["train", str(root / "config.py"), "--quiet"]) == 0
    return root


@pytest.fixture(scope="module")
def model(trained):
    return emu3_jax.load(trained / "run" / "model", dtype="float32")


def shapes(document: Document) -> list[tuple[str, object]]:
    return [(one.kind, one.text or one.codes.shape) for one in document.pieces]


def test_the_model_decides_when_to_draw(trained, model):
    """It writes BOI, the sizes, the codes and EOS by itself, as the documents have them."""
    options = {"guidance": 1.0, "temperature": 0, "text_temperature": 0}
    story, edit = model.interleave(["a story", "wider"], [[], [trained / "0.png"]], **options)
    assert shapes(story) == STORY and story.ended
    assert shapes(edit) == [("picture", (2, 3))] and edit.ended
    for piece, number in ((story.pieces[1], 0), (story.pieces[3], 1), (edit.pieces[0], 1)):
        np.testing.assert_array_equal(piece.codes, model.tokenize([trained / f"{number}.png"])[0])
    (guided,) = model.interleave("a story", **(options | {"guidance": 1.5}))
    assert shapes(guided) == STORY


def test_the_command_writes_the_story(trained, tmp_path):
    options = ["--model", str(trained / "run" / "model"), "--dtype", "float32", "--greedy", "--guidance", "1"]
    assert main(["interleave", "a story", *options, "-o", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / "000.md").read_text() == "A dog.\n\n![](000_0.png)\n\nIt barks.\n\n![](000_1.png)\n"


def test_documents_are_packed(trained, model):
    """Rows of several documents, each a segment of its own."""
    source = Source(str(trained / "data"), Interleaved(prompt_dropout=0.0))
    language = model.language
    batches = training_batches(DataConfig((source,), 320, packing=2), language.tokenizer, language.templates, 2)
    batch = next(batches)
    batches.close()
    assert batch["segment_ids"].max() > 2
    found = {
        row[ids == segment].tobytes()
        for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True)
        for segment in range(1, ids.max() + 1)
    }
    assert len(found) == 3  # three documents
    assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


def test_evaluation(trained, tmp_path, capsys):
    """The tiny model's stories are wrong, and count as such."""
    config = EvaluateConfig(
        directory=str(tmp_path / "out"), model=str(trained / "run" / "model"), figures=("stories",), cases=2, rows=1,
        data=str(tmp_path / "none"), procedural_guidance=1.0,
    )  # fmt: skip
    (tmp_path / "c.py").write_text(
        "from emu3_jax.evaluation.config import EvaluateConfig, JudgeConfig, ReconstructionConfig\n\n"
        f"def config():\n    return {config!r}\n"
    )
    assert main(["evaluate", str(tmp_path / "c.py"), "--quiet"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["stories"]) == ["free", "told", "edits"] and "data" not in figures["skipped"]
    for of in figures["stories"].values():
        assert of["cases"] == 2 and of["all_right"] == 0 and 0 <= of["texts_right"] <= 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Stories: edits" in page and page.count('<div class="row">') == 3
