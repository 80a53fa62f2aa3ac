"""The order of records over processes: what each lane reads, mixtures, blocks of shards, and runs that go on."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rows import SPECIAL, numbers, segments

from emu3_jax import Emu3Error
from emu3_jax.data import readers
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.order import BlockOrder, Mixture
from emu3_jax.data.pipeline import training_batches
from emu3_jax.data.prepare import prepare
from emu3_jax.data.records import Record
from emu3_jax.data.sequences import TextOnly, TextToImage
from emu3_jax.data.shards import Codebook, PreparedData
from emu3_jax.text.prompts import CHAT
from emu3_jax.text.tokenizer import Tokenizer

CODEBOOK = Codebook(SPECIAL.visual_count, "0" * 64)
TOTAL = 64  # rows of all hosts in a batch
DIVISORS = [count for count in range(1, TOTAL + 1) if TOTAL % count == 0]


# ------------------------------------------------------------------------------------------------ pure functions


def test_orders_stay_what_they_were():
    """Runs in progress depend on these numbers."""
    order = BlockOrder([3, 2, 4, 1], (3, 1), lanes=3, block=2, keep=4)
    records = [3, 6, 7, 9, 2, 5, 4, 0, 8, 1], [9, 1, 8, 6, 4, 7, 0, 2, 5, 3]
    for epoch, wanted in enumerate(records):
        assert [order.at(10 * epoch + place) for place in range(10)] == [(epoch, record) for record in wanted]
    mixture = Mixture([3, 1, 0.5])
    chosen = ["".join(str(mixture.at(lane, number)[0]) for number in range(18)) for lane in range(3)]
    assert chosen == ["200100100200100100", "001002001001002001", "020010010020010010"]


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    lanes=st.integers(1, 70),
    block=st.integers(1, 20),
    epoch=st.integers(0, 5),
)
def test_each_epoch_has_every_record_once(counts, lanes, block, epoch):
    order, records = BlockOrder(counts, (1, 0), lanes, block, 2), sum(counts)
    found = [order.at(place) for place in range(epoch * records, (epoch + 1) * records)]
    assert {number for number, _ in found} == {epoch}
    assert sorted(record for _, record in found) == list(range(records))


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    lanes=st.integers(1, 64),
    hosts=st.integers(1, 64),
)
def test_weights_hold_in_each_lane_on_each_host_and_in_each_batch(weights, lanes, hosts):
    mixture, steps = Mixture(weights), 50
    chosen = np.array([[mixture.at(lane, step)[0] for lane in range(lanes)] for step in range(steps)])
    wanted = np.asarray(weights) / sum(weights)
    for source, share in enumerate(wanted):
        here = chosen == source
        # A lane: at any step, to the rounding of each split.
        assert (abs(here.cumsum(0) - share * np.arange(1, steps + 1)[:, None]) <= len(weights)).all()
        # Hosts with neighbouring lanes, and the whole batch: the lanes' deviations do not add up.
        for some in (here, *np.array_split(here, min(hosts, lanes), axis=1)):
            assert abs(some.sum() - share * some.size) <= len(weights) * (1 + some.shape[1] / 2)
    # What a lane has taken of a source is counted without gaps.
    for lane in range(min(lanes, 3)):
        taken = [mixture.at(lane, step) for step in range(steps)]
        for source in range(len(weights)):
            earlier = [count for number, count in taken if number == source]
            assert earlier == list(range(len(earlier)))


@given(shards=st.integers(1, 400), hosts=st.integers(1, 64), rows=st.integers(1, 4), block=st.integers(1, 20))
@settings(max_examples=25)
def test_a_host_reads_its_stretch_of_shards(shards, hosts, rows, block):
    """In an epoch: the shards of its share of the records, and at both ends the rest of a block."""
    counts, lanes = [5] * shards, hosts * rows
    order = BlockOrder(counts, (0, 0), lanes, block, lanes)
    touched: list[set[int]] = [set() for _ in range(hosts)]
    for place in range(5 * shards):
        touched[place % lanes // rows].add(order.at(place)[1] // 5)
    assert set().union(*touched) == set(range(shards))
    # A host's places may have one record more in each lane.
    share = (5 * shards / lanes + 1) * rows / 5
    assert max(map(len, touched)) <= share + 2 * block


# ------------------------------------------------------------------------------------------------ batches


class Listed:
    """Records in memory, to be prepared."""

    def __init__(self, records: list[Record]):
        self.records, self.digest = records, repr([record.to_bytes() for record in records])

    def __len__(self):
        return len(self.records)

    def check(self, index):
        pass

    def __getitem__(self, index):
        return self.records[index]


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer.from_files(vocabulary, SPECIAL)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Source, Source]:
    """Pictures of several lengths in twenty shards, texts in three."""
    root, shapes = tmp_path_factory.mktemp("order"), [(2, 3), (3, 2), (1, 4), (4, 4), (5, 2)]
    pictures = [Record(f"p{number}", "caption", np.full(shapes[number % 5], number, np.int32)) for number in range(100)]
    texts = [Record(f"d{number}", "word " * (1 + number % 9)) for number in range(31)]
    prepare(Listed(pictures), root / "pictures", CODEBOOK, shards=20)
    prepare(Listed(texts), root / "texts", CODEBOOK, shards=3)
    return (
        Source(str(root / "pictures"), TextToImage(prompt_dropout=0.5), 2.5),
        Source(str(root / "texts"), TextOnly()),
    )


CASES = {
    "rows": {"packing": 0},
    "packed": {"packing": 3},
    "packed, skips": {"packing": 2, "too_long": "skip", "sequence_length": 26},
    "in memory": {"packing": 2, "in_memory": True},
    "tables": {"packing": 0, "in_memory": True},
}


class Hosts:
    """The batches of several hosts, all in this process. Each has neighbouring rows."""

    def __init__(self, config, tokenizer, count: int, total: int = TOTAL):
        each = total // count
        self.hosts = [
            training_batches(
                config, tokenizer, CHAT, each, process_index=index, process_count=count,
                rows=range(index * each, (index + 1) * each),
            )
            for index in range(count)
        ]  # fmt: skip

    def take(self, count: int) -> list[dict[str, np.ndarray]]:
        """The next batches of all hosts together."""
        found = [list(itertools.islice(host, count)) for host in self.hosts]
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*found, strict=True)
        ]

    def states(self):
        return json.loads(json.dumps([host.get_state() for host in self.hosts]))

    def skipped(self) -> int:
        return sum(host.skipped for host in self.hosts)

    def close(self) -> None:
        for host in self.hosts:
            host.close()


def assert_same(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
@given(before=st.sampled_from(DIVISORS), after=st.sampled_from(DIVISORS), stop_at=st.integers(0, 4))
@settings(max_examples=3)
def test_a_run_goes_on_with_any_number_of_hosts(sources, tokenizer, case, before, after, stop_at):
    """N hosts, then M, read row by row what one host reads."""
    config = DataConfig(sources, **{"sequence_length": 48, "shuffle_shards": 4, **CASES[case]})
    one = Hosts(config, tokenizer, 1)
    wanted = one.take(7)
    first = Hosts(config, tokenizer, before)
    assert_same(first.take(stop_at), wanted[:stop_at])
    second = Hosts(config, tokenizer, after)
    for host in second.hosts:
        host.set_state(*first.states())
    assert second.skipped() == first.skipped()
    assert_same(second.take(7 - stop_at), wanted[stop_at:])
    assert second.skipped() == one.skipped()
    for hosts in (one, first, second):
        hosts.close()


def test_a_mixture_holds_on_every_host(sources, tokenizer):
    hosts = Hosts(DataConfig(sources, 48, packing=0), tokenizer, 8)
    for host in hosts.hosts:  # 8 rows, 28 batches: 224 rows, of which 160 are pictures
        found = segments(itertools.islice(host, 28))
        pictures = sum(bool((segment["tokens"] >= SPECIAL.visual_start).any()) for segment in found)
        assert abs(pictures - 160) <= 4
    hosts.close()


@pytest.mark.parametrize("together", [1, 2, 5])
def test_an_epoch_in_blocks_is_every_record_once(sources, tokenizer, together):
    config = DataConfig(sources[:1], 48, packing=0, shuffle_shards=together)
    hosts = Hosts(config, tokenizer, 2, total=10)
    first, second = numbers(segments(hosts.take(10))), numbers(segments(hosts.take(10)))
    hosts.close()
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def test_hosts_open_the_shards_that_they_read(sources, tokenizer, monkeypatch):
    """Ten hosts with a row each open two of 20 shards in an epoch of ten batches."""
    made = []

    def opened(path):
        made.append(PreparedData(path))
        return made[-1]

    monkeypatch.setattr("emu3_jax.data.pipeline.PreparedData", opened)
    hosts = Hosts(DataConfig(sources[:1], 48, packing=0, shuffle_shards=1), tokenizer, 10, total=10)
    assert not any(data.readers.opened for data in made)
    hosts.take(7)  # up to three more are read ahead
    hosts.close()
    assert [len(data.readers.opened) for data in made] == [2] * 10
    assert set().union(*(data.readers.opened for data in made)) == set(range(20))


def test_few_shards_stay_open(sources, monkeypatch):
    monkeypatch.setattr(readers, "_OPEN", 3)
    data = PreparedData(sources[0].path)
    assert [data[record].name for record in range(0, 100, 3)] == [f"p{record}" for record in range(0, 100, 3)]
    assert len(data.readers._open) == 3 and len(data.readers.opened) == 20


def test_a_position_without_all_rows(sources, tokenizer):
    hosts = Hosts(DataConfig(sources, 48, packing=3), tokenizer, 2, total=8)
    first, second = hosts.states()
    with pytest.raises(Emu3Error, match="the saved position"):
        hosts.hosts[1].set_state(first)
    hosts.hosts[1].set_state(second)
    hosts.close()


def test_a_run_of_the_first_order_goes_on_in_it(sources, tokenizer):
    """With as many processes as before: the order depends on their number."""
    config = DataConfig(sources, 48, packing=3)

    def start(index, count):
        return training_batches(config, tokenizer, CHAT, 2, process_index=index, process_count=count, order=1)

    one = start(1, 2)
    list(itertools.islice(one, 5))
    state = json.loads(json.dumps(one.get_state()))
    assert set(state) == {"pipeline", "position"}
    again = start(1, 2)
    again.set_state(state)
    assert_same(list(itertools.islice(again, 5)), list(itertools.islice(one, 5)))
    other = start(0, 1)
    with pytest.raises(Emu3Error, match="or the number of processes; resume with the same data settings"):
        other.set_state(state)
    for batches in (one, again, other):
        batches.close()
