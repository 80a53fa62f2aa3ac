"""`prepare --join`: one checked directory of those that hosts prepared apart, and the parts that it refuses."""

import hashlib
import json
import pathlib
import shutil

import pytest
from conftest import GOLDEN
from prepare_entries import Entries

from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.data.joining import join
from emu3_jax.data.prepare import prepare
from emu3_jax.data.shards import Codebook, PreparedData, write_shard

CODEBOOK = Codebook(32768, "0" * 64)


def files(directory: pathlib.Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def parts(tmp_path) -> list[pathlib.Path]:
    """What three hosts without a common disk wrote: 23 entries in 7 shards."""
    for host in range(3):
        outcome = prepare(Entries(), tmp_path / f"part{host}", CODEBOOK, shards=7, host=host, hosts=3)
        assert outcome.index is None
    return [tmp_path / f"part{host}" for host in range(3)]


def test_three_parts_are_what_one_host_writes(tmp_path, parts):
    prepare(Entries(), tmp_path / "whole", CODEBOOK, shards=7)
    before = [files(part) for part in parts]
    (outcome,) = join([parts[2], parts[0], parts[1]], tmp_path / "data").values()
    assert outcome.index == PreparedData(tmp_path / "data").index and outcome.index.records == 23
    assert files(tmp_path / "data") == files(tmp_path / "whole")
    assert [files(part) for part in parts] == before
    (tmp_path / "whole/index.json").unlink()  # a single part gets its index where it is
    join([tmp_path / "whole"], tmp_path / "whole")
    assert files(tmp_path / "data") == files(tmp_path / "whole")


def test_what_was_skipped_is_listed(tmp_path):
    bad = Entries(bad=(3, 20))
    for host in range(2):
        prepare(bad, tmp_path / f"{host}", CODEBOOK, shards=4, on_error="skip", host=host, hosts=2)
    (outcome,) = join([tmp_path / "0", tmp_path / "1"], tmp_path / "data").values()
    assert (outcome.index.records, len(outcome.index.skipped)) == (21, 2)
    assert len((tmp_path / "data/skipped.txt").read_text().splitlines()) == 2
    for host in range(2):
        every = Entries(bad=range(23))
        prepare(every, tmp_path / f"none{host}", CODEBOOK, shards=4, on_error="skip", host=host, hosts=2)
    with pytest.raises(Emu3Error, match=r"^none of 23 records can be used; the first: entry 0 is broken"):
        join([tmp_path / "none0", tmp_path / "none1"], tmp_path / "none")


def edit(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def lost(parts):
    parts.pop(1)


def twice(parts):
    parts.append(parts[0])


def copied(parts):
    name = "shard-00001-of-00007"
    for suffix in ("json", "arrayrecord"):
        shutil.copy(parts[1] / f"{name}.{suffix}", parts[2])


def other_settings(parts):
    shutil.rmtree(parts[1])
    prepare(Entries(), parts[1], Codebook(32768, "1" * 64), shards=7, host=1, hosts=3)


def other_count(parts):
    shutil.rmtree(parts[1])
    prepare(Entries(), parts[1], CODEBOOK, shards=8, host=1, hosts=3)


def cut(parts):
    with open(parts[0] / "shard-00003-of-00007.arrayrecord", "r+b") as file:
        file.truncate(100)


def fewer_records(parts):
    """A shard of the right size whose voucher says too much."""
    edit(parts[0] / "shard-00003-of-00007.json", records=5)


def exchanged(parts):
    """A sound shard of too few records, and a voucher that fits it."""
    file = parts[0] / "shard-00003-of-00007.arrayrecord"
    count, size = write_shard(file, [Entries()[0]])
    edit(file.with_suffix(".json"), records=count, bytes=size)


def renamed(parts):
    """A shard under the number of another one."""
    for suffix in ("json", "arrayrecord"):
        (parts[0] / f"shard-00003-of-00007.{suffix}").rename(parts[0] / f"shard-00001-of-00007.{suffix}")


def older(parts):
    file = parts[2] / "shard-00002-of-00007.json"
    data = json.loads(file.read_text())
    del data["entries"], data["codebook"]
    file.write_text(json.dumps(data))


def no_json(parts):
    (parts[0] / "shard-00003-of-00007.json").write_text("{")


def nothing(parts):
    parts[0].mkdir(exist_ok=True)
    for part in parts:
        shutil.rmtree(part)
        part.mkdir()


def absent(parts):
    parts.append(parts[0] / "none")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lost, r"2 of 7 shards are missing \(1, 4\): give the directories of all hosts, or run"),
        (twice, r"shard 0 is there twice, \S+part0/shard-0\S+ and \S+part0/shard-0\S+: give each part once"),
        (copied, r"shard 1 is there twice, \S+part1/\S+ and \S+part2/\S+: give each part once"),
        (
            other_settings,
            r"part1/shard-00001\S+ was prepared from another source, or with other options or another mod",
        ),
        (other_count, r"part1/shard-00001-of-00008.arrayrecord was prepared from another source, or with other opt"),
        (cut, r"shard-00003-of-00007.arrayrecord has 100 bytes, but its voucher says \d+: copy it again"),
        (fewer_records, r"00003-of-00007.arrayrecord has 4 records and 0 skipped entries, but should have 4 in all, 5"),
        (exchanged, r"00003-of-00007.arrayrecord has 1 record and 0 skipped entries, but should have 4 in all, 1 of"),
        (renamed, r"shard-00001-of-00007.json is damaged \(job or file is not its own\): delete it and run"),
        (older, r"shard-00002-of-00007.json does not say how many entries there are, as version 0.1.0 wrote it"),
        (no_json, r"shard-00003-of-00007.json: .*delete it and run the same emu3-jax prepare again"),
        (nothing, r"part0 has no finished shards: give the directories that emu3-jax prepare wrote"),
        (absent, r"none is no directory: give the directories that emu3-jax prepare wrote on each host"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_that_do_not_fit(tmp_path, parts, change, reason, capsys):
    change(parts)
    command = ["prepare", "--join", *map(str, parts), "-o", str(tmp_path / "data")]
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.startswith("emu3-jax: error: ") and line.count("\n") == 1
    with pytest.raises(Emu3Error, match=reason):
        join(parts, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_last_host_counts_too(tmp_path):
    """On a common disk, no index is written about a shard that has lost records."""
    out = tmp_path / "out"
    prepare(Entries(), out, CODEBOOK, shards=4, host=0, hosts=2)
    file = out / "shard-00002-of-00004.arrayrecord"
    count, size = write_shard(file, [Entries()[0]])
    edit(file.with_suffix(".json"), records=count, bytes=size)
    with pytest.raises(Emu3Error, match=r"00002-of-00004\S+ has 1 record and 0 skipped entries, but should have 6"):
        prepare(Entries(), out, CODEBOOK, shards=4, host=1, hosts=2)
    assert not (out / "index.json").exists()


def test_shards_of_version_0_1_0_are_kept(tmp_path, parts):
    """Prepared again, they are not encoded anew, and can be joined."""
    older(parts)
    entries = Entries()
    prepare(entries, parts[2], CODEBOOK, shards=7, host=2, hosts=3)
    assert entries.made == []
    join(parts, tmp_path / "data")
    assert len(PreparedData(tmp_path / "data")) == 23


def test_the_command_joins_validation_too(golden_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [{"image": str(GOLDEN / "photo.png"), "text": "a photo"}, *({"text": f"plain {n}"} for n in range(7))]
    pathlib.Path("m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["prepare", "m.jsonl", "--model", str(golden_bundle), "--keep-size", "--validation", "0.4", "--quiet"]
    words += ["--shards", "2"]
    for host in range(2):
        assert main([*words, "--host", str(host), "--hosts", "2", "-o", f"part{host}"]) == 0
    assert main([*words, "-o", "whole"]) == 0
    capsys.readouterr()
    assert main(["prepare", "--join", "part0", "part1", "-o", "data"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("data: ") and said[1].startswith("data/validation: ")
    assert files(tmp_path / "data") == files(tmp_path / "whole")
    assert main(["prepare", "--join", "part0", "part1", "-o", "data"]) == 2
    assert "data exists already" in capsys.readouterr().err
    assert main(["prepare", "--join", "part0", "--shards", "2", "-o", "new"]) == 2
    assert "--shards has no effect with --join, which encodes nothing: leave it out" in capsys.readouterr().err
