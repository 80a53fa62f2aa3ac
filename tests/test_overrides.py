"""`--set`: fields of configs changed from the command line."""

import dataclasses
import itertools

import pytest

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import ImageToText, TextToImage
from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from emu3_jax.training.overrides import override

CONFIG = TrainConfig(
    "run", ModelConfig("bundle"), DataConfig((Source("a", TextToImage()), Source("b", TextToImage())), 64), 8, 100
)


def adapter_of(*overrides):
    return override(CONFIG, overrides).adapter


def test_a_config_that_is_absent_is_made():
    assert adapter_of("adapter.rank=8") == Adapter(rank=8)
    assert adapter_of("adapter=Adapter(rank=8)") == adapter_of("adapter=Adapter(8)") == Adapter(rank=8)
    assert adapter_of("adapter=Adapter()") == Adapter()
    assert adapter_of("adapter=Adapter(4, base='nf4', targets=('qkv', 'out'))") == Adapter(
        rank=4, base="nf4", targets=("qkv", "out")
    )
    assert adapter_of("adapter=None") is None
    assert override(CONFIG, ["samples.prompts=('a cat',)"]).samples == SampleConfig(("a cat",))
    assert override(CONFIG, ["model.decoder.max_positions=128"]).model.decoder == DecoderConfig(max_positions=128)


def test_any_order_gives_the_same():
    """Also where a config is given whole and in part, and where fields are legal only together."""
    for overrides, expected in {
        ("adapter=Adapter(alpha=8)", "adapter.rank=4", "adapter.base=nf4"): Adapter(4, 8.0, base="nf4"),
        ("adapter=None", "adapter.rank=4"): Adapter(4),
        ("adapter=Adapter(rank=0)", "adapter.rank=4"): Adapter(4),  # what is replaced is never made
    }.items():
        for order in itertools.permutations(overrides):
            assert adapter_of(*order) == expected
    together = ["batch_size=6", "accumulation=3", "steps=10", "optimizer.warmup_steps=5"]
    for order in itertools.permutations(together):
        changed = override(CONFIG, order)
        assert (changed.batch_size, changed.accumulation, changed.steps) == (6, 3, 10)
        assert changed.optimizer == OptimizerConfig(warmup_steps=5)
    with pytest.raises(Emu3Error, match=r"^--set accumulation=3: .*a divisor of batch_size \(8\)"):
        override(CONFIG, ["accumulation=3"])


def test_the_last_value_of_a_place_counts():
    assert override(CONFIG, ["steps=5", "steps=7", "optimizer.warmup_steps=1"]).steps == 7


def test_sources_are_given_whole():
    changed = override(
        CONFIG, ["evaluation=(('held_out', Source('v', ImageToText(loss='text'))),)", "data.sources.1.path=c"]
    )
    assert changed.evaluation == (("held_out", Source("v", ImageToText(loss="text"))),)
    assert [source.path for source in changed.data.sources] == ["a", "c"]
    assert changed.data.sources[0] is CONFIG.data.sources[0]
    changed = override(CONFIG, ["data.sources=(Source('x', TextToImage()),)", "data.sources.0.weight=2"])
    assert changed.data.sources == (Source("x", TextToImage(), 2.0),)
    assert isinstance(changed.data.sources[0].weight, float)


@dataclasses.dataclass(frozen=True)
class Own:
    """A class of a config file's own, whose annotations cannot be told."""

    inner: "Absent | None" = None  # noqa: F821
    number: int = 1


def test_classes_of_the_config_itself():
    assert override(Own(Own(number=2)), ["inner.number=3", "number=4"]) == Own(Own(number=3), 4)
    assert override(Own(), ["inner=Own(number=5)"]) == Own(Own(number=5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rank=0"], r"--set adapter\.rank=0: Adapter field rank is 0"),
        (["adapter=Adapter(rank=0)"], r"--set adapter=Adapter\(rank=0\): Adapter field rank is 0"),
        (["adapter=Adapter(rnk=1)"], r"--set adapter=Adapter\(rnk=1\): Adapter has no field 'rnk'; did you mean rank"),
        (["adapter=Adapter(1, 2.0, ('qkv',), 'nf4', 5)"], "Adapter has 4 fields, but gets 5 values: remove some"),
        (["adapter=Adapter(rank=1, rank=2)"], "--set adapter=Ad.*: Adapter gets its field rank twice: give it"),
        (["adapter=Adapter(1, rank=2)"], "Adapter gets its field rank twice"),
        (["adapter=Adaptor(rank=1)"], r"adapter is 'Adaptor\(rank=1\)': it must be an Adapter or None"),
        (["adapter=Adapter(rank=open('x'))"], r"adapter is \"Adapter\(rank=open.*: it must be an Adapter or None"),
        (["adapter=Source('a', TextToImage())"], "adapter is Source.*: it must be an Adapter or None"),
        (["adapter.rnk=1"], "--set adapter.rnk=1: Adapter has no field 'rnk'; did you mean rank"),
        (["adapter.rank=65537"], "Adapter field rank is 65537: it must be at most 65,536"),
        (["adapter.alpha=1e7"], "Adapter field alpha is 10000000.0: it must be at most 1,000,000"),
        (["adapter.rank.more=1"], "--set adapter.rank.more=1: 'more' is inside 16, which has no fields"),
        (["samples.every=5"], "--set samples.every=5: SampleConfig needs the field prompts: set it too"),
        (["adapter.rank=4", "adapter.alpha=-1", "steps=7"], r"^--set adapter\.alpha=-1: Adapter field alpha"),
        (
            ["seed=1", "steps=7"],
            r"^--set seed=1 --set steps=7: .* warmup_steps .* less than steps \(7\), .* optimizer.warmup_steps=3",
        ),
        (["model.random=True", "adapter.rank=4", "model.decoder.max_positions=99"], "^--set adapter.rank=4: .*random"),
        (["data.sources.2.path=x"], "--set data.sources.2.path=x: '2' is not an index from 0 to 1"),
        (["steps=5.x"], "steps is '5.x'"),
        (["5=steps", "."], r"^--set \.: write path"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(Emu3Error, match=message):
        override(CONFIG, overrides)
