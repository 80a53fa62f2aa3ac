"""`prepare`: the same bytes however the work is done, nothing lost when it is killed, bad input, damaged data."""

import errno
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import GOLDEN, golden_npz
from prepare_entries import Entries

from emu3_jax import Emu3Error
from emu3_jax.checkpoints import embedded
from emu3_jax.cli.main import main
from emu3_jax.data import shards
from emu3_jax.data.prepare import prepare
from emu3_jax.data.records import Record, Turn
from emu3_jax.data.shards import Codebook, Index, PreparedData

CODEBOOK = Codebook(32768, "0" * 64)


def files(directory) -> dict[str, str]:
    """Everything in a directory, with a digest of its bytes."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def run_python(code: str, *arguments, **options) -> subprocess.Popen:
    """Starts a program that can import the tests' helpers."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    return subprocess.Popen(command, text=True, env=environment, **options)


@pytest.fixture
def whole(tmp_path):
    """The result of one uninterrupted run."""
    prepare(Entries(), tmp_path / "whole", CODEBOOK, shards=5, workers=1)
    return files(tmp_path / "whole")


def test_records_come_back_in_their_order(tmp_path):
    outcome = prepare(Entries(), tmp_path / "out", CODEBOOK, shards=5)
    data = PreparedData(tmp_path / "out")
    assert outcome.index == data.index and len(data) == 23 == outcome.index.records
    for index in (22, 0, 7, 8, 15):
        expected = Entries()[index]
        assert (data[index].name, data[index].text) == (expected.name, expected.text)
        np.testing.assert_array_equal(data[index].codes, expected.codes)
    assert json.loads((tmp_path / "out/index.json").read_text())["records"] == 23


@pytest.mark.parametrize("workers", [2, 7])
def test_same_bytes_for_any_number_of_workers(tmp_path, whole, workers):
    prepare(Entries(), tmp_path / "out", CODEBOOK, shards=5, workers=workers)
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_same_bytes_for_any_number_of_hosts(tmp_path, whole, order):
    made = []
    for turn, host in enumerate(order):
        entries = Entries()
        outcome = prepare(entries, tmp_path / "out", CODEBOOK, shards=5, host=host, hosts=3)
        assert (outcome.index is None) == (turn < 2) == (outcome.missing > 0)
        made += entries.made
    assert sorted(made) == list(range(23))  # every host has its own share
    assert files(tmp_path / "out") == whole


def test_more_hosts_than_shards(tmp_path):
    for host in range(3):
        outcome = prepare(Entries(2), tmp_path / "out", CODEBOOK, host=host, hosts=3)
    assert outcome.index.records == 2


def test_killed_in_the_middle_of_a_shard(tmp_path, whole):
    out = tmp_path / "out"
    program = """
        import sys, time
        from emu3_jax.data.prepare import prepare
        from emu3_jax.data.shards import Codebook
        from prepare_entries import Entries

        def at(index):
            if index == 11:
                print("here", flush=True)
                time.sleep(600)

        prepare(Entries(at=at), sys.argv[1], Codebook(32768, "0" * 64), shards=5, workers=2)
    """
    process = run_python(program, out, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = files(out)
    assert any(name.startswith(".emu3-tmp-") for name in left)  # half a shard, under another name
    assert not (out / "index.json").exists()
    finished = {name: digest for name, digest in left.items() if not name.startswith(".")}
    assert finished == {name: whole[name] for name in whole if name.startswith(("shard-00000", "shard-00001"))}
    with pytest.raises(Emu3Error, match=r"has no index\.json.*run the same emu3-jax prepare again"):
        PreparedData(out)
    entries = Entries()
    prepare(entries, out, CODEBOOK, shards=5)
    assert sorted(entries.made) == list(range(9, 23))  # two shards of 4 and 5 entries were kept
    assert files(out) == whole


ROUNDS = 8


def test_the_same_job_twice_at_once(tmp_path, whole):
    """In each round two processes begin at the same moment. One of them may be told that the other is at work."""
    program = f"""
        import pathlib, sys, time
        from emu3_jax import Emu3Error
        from emu3_jax.data.prepare import prepare
        from emu3_jax.data.shards import Codebook
        from prepare_entries import Entries

        root, me, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
        for number in range({ROUNDS}):
            (root / f"ready-{{me}}-{{number}}").touch()
            while not (root / f"ready-{{other}}-{{number}}").exists():
                time.sleep(0)
            try:
                prepare(Entries(), root / f"out-{{number}}", Codebook(32768, "0" * 64), shards=5, workers=2)
                print("done")
            except Emu3Error as error:
                print(error)
    """
    pairs = [run_python(program, tmp_path, *names, stdout=subprocess.PIPE) for names in ("ab", "ba")]
    said = [process.communicate(timeout=100)[0].splitlines() for process in pairs]
    assert [process.returncode for process in pairs] == [0, 0]
    for number, lines in enumerate(zip(*said, strict=True)):
        out = tmp_path / f"out-{number}"
        assert "done" in lines
        holders = "|".join(str(process.pid) for process in pairs)
        # The holder's name is not there yet in the first moment.
        busy = rf"{out} is being prepared by (process ({holders}) on \S+|another process): wait for it, stop it, or .*"
        assert all(line == "done" or re.fullmatch(busy, line) for line in lines), lines
        assert files(out) == whole
    assert len(said[0]) == ROUNDS


def test_a_share_is_held_and_the_others_are_free(tmp_path):
    out, inside = tmp_path / "out", []

    def at(index):
        if index == 0:
            with pytest.raises(Emu3Error, match=rf"out is being prepared by process {os.getpid()} on "):
                prepare(Entries(), out, CODEBOOK, shards=5, host=0, hosts=2)
            inside.append(prepare(Entries(), out, CODEBOOK, shards=5, host=1, hosts=2))

    outcome = prepare(Entries(at=at), out, CODEBOOK, shards=5, host=0, hosts=2, workers=1)
    assert inside[0].missing == 3 and outcome.missing == 0
    assert not list(out.glob(".*"))


def test_a_shard_without_its_voucher_or_cut_is_made_again(tmp_path, whole):
    out = tmp_path / "whole"
    (out / "shard-00001-of-00005.json").unlink()
    with (out / "shard-00003-of-00005.arrayrecord").open("r+b") as shard:
        shard.truncate(1000)
    entries = Entries()
    prepare(entries, out, CODEBOOK, shards=5)
    assert sorted(entries.made) == [4, 5, 6, 7, 8, 13, 14, 15, 16, 17]
    assert files(out) == whole


def test_bad_entries_stop_or_are_skipped_and_listed(tmp_path):
    out, bad = tmp_path / "out", (3, 12)
    with pytest.raises(Emu3Error, match="entry 3 is broken"):
        prepare(Entries(bad=bad[:1]), out, CODEBOOK, shards=2)
    assert not out.exists()
    with pytest.raises(Emu3Error, match="entry 12 is broken"):
        prepare(Entries(bad=bad[1:]), out, CODEBOOK, shards=2)
    assert len(list(out.iterdir())) == 2  # the first shard and its voucher are kept
    outcome = prepare(Entries(bad=bad), tmp_path / "new", CODEBOOK, shards=2, on_error="skip")
    assert outcome.index.skipped == ("entry 3 is broken: mend it", "entry 12 is broken: mend it")
    data = PreparedData(tmp_path / "new")
    assert [data[index].name for index in range(len(data))] == [f"n{i}" for i in range(23) if i not in bad]
    with pytest.raises(Emu3Error, match=r"entry 3 is broken.*An earlier run skipped it: correct it and delete"):
        prepare(Entries(bad=bad), tmp_path / "new", CODEBOOK, shards=2)


def test_a_shard_may_be_empty_but_not_all(tmp_path):
    prepare(Entries(4, bad=(0, 1)), tmp_path / "half", CODEBOOK, shards=2, on_error="skip")
    data = PreparedData(tmp_path / "half")
    assert [data[0].name, data[1].name] == ["n2", "n3"]
    index = json.loads((tmp_path / "half/index.json").read_text())
    (tmp_path / "half/index.json").write_text(json.dumps(index | {"records": 0, "shards": index["shards"][:1]}))
    with pytest.raises(Emu3Error, match="holds no records: all 2 entries were skipped"):
        PreparedData(tmp_path / "half")


def test_where_no_entry_can_be_used_only_the_list_of_why_stays(tmp_path):
    """So that the same place takes the entries when they are mended."""
    outcome = prepare(Entries(5, bad=range(5)), tmp_path / "out", CODEBOOK, shards=2, on_error="skip")
    assert outcome.index.records == 0 and len(outcome.index.skipped) == 5
    assert list(files(tmp_path / "out")) == ["skipped.txt"]
    prepare(Entries(5, digest="mended"), tmp_path / "out", CODEBOOK, shards=2, on_error="skip")
    assert len(PreparedData(tmp_path / "out")) == 5 and not (tmp_path / "out/skipped.txt").exists()


@pytest.mark.parametrize(
    ("entries", "codebook", "count"),
    [
        (Entries(digest="e"), CODEBOOK, 5),
        (Entries(), Codebook(32768, "1" * 64), 5),
        (Entries(), CODEBOOK, 4),
    ],
)
def test_another_job_s_directory_is_left_alone(tmp_path, whole, entries, codebook, count):
    with pytest.raises(Emu3Error, match="choose another directory"):
        prepare(entries, tmp_path / "whole", codebook, shards=count)
    assert files(tmp_path / "whole") == whole


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"on_error": "ask"}, "on_error is 'ask'"),
        ({"hosts": 0}, "host is 0 of 0"),
        ({"host": 2, "hosts": 2}, "host is 2 of 2"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 10**9}, "workers is 1000000000: it must be 1 to 1024"),
        ({"shards": 10**9}, "shards is 1000000000: it must be 1 to 23"),
        ({"shards": 0}, "shards is 0: it must be 1 to 23"),
        ({"shards": 24}, "shards is 24"),
    ],
)
def test_bad_arguments(tmp_path, options, reason):
    with pytest.raises(Emu3Error, match=reason):
        prepare(Entries(), tmp_path / "out", CODEBOOK, **options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path, whole):
    """A limit on the size of files fails writes in the same place as a full disk does."""
    program = """
        import resource, signal, sys
        from emu3_jax import Emu3Error
        from emu3_jax.data.prepare import prepare
        from emu3_jax.data.shards import Codebook
        from prepare_entries import Entries

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            prepare(Entries(), sys.argv[1], Codebook(32768, "0" * 64), shards=5)
        except Emu3Error as error:
            print(error)
    """
    out = tmp_path / "out"
    process = run_python(program, out, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, errors = process.communicate(timeout=60)
    assert re.fullmatch(r"cannot write \S+shard-00000-of-00005\.arrayrecord: .*free space or choose.*\n", printed), (
        errors
    )
    assert not out.exists()
    prepare(Entries(), out, CODEBOOK, shards=5)
    assert files(out) == whole


def test_a_disk_that_is_full_when_a_shard_is_vouched_for(tmp_path, whole, monkeypatch):
    write_json, out = shards.write_json, tmp_path / "out"

    def full(file, data):
        if "00001" in file.name:
            with shards.new_file(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(file, data)

    with monkeypatch.context() as patched, pytest.raises(Emu3Error, match="No space left on device; free space"):
        patched.setattr("emu3_jax.data.shard_directory.write_json", full)
        prepare(Entries(), out, CODEBOOK, shards=5)
    prepare(Entries(), out, CODEBOOK, shards=5)
    assert files(out) == whole


def test_damaged_data_is_named(tmp_path, whole):
    out = tmp_path / "whole"
    file = out / "shard-00002-of-00005.arrayrecord"
    contents = bytearray(file.read_bytes())
    contents[300] ^= 1
    file.write_bytes(contents)
    data = PreparedData(out)
    readable = []
    for index in range(23):
        try:
            readable.append(data[index].name)
        except Emu3Error as error:
            assert re.search(rf"{file.name} is damaged \(.*\): delete it and run the same emu3-jax prepare", str(error))
    assert 0 < 23 - len(readable) <= 5 and {"n0", "n22"} <= set(readable)
    file.write_bytes(contents[:-10])
    with pytest.raises(Emu3Error, match=f"{file.name} has 131062 bytes, but index.json says 131072"):
        PreparedData(out)
    file.unlink()
    with pytest.raises(Emu3Error, match=f"{file.name} has 0 bytes"):
        PreparedData(out)


INDEX_HEAD = '{"format": 1, "job": "", "codebook": {"size": 1, "sha256": ""}, "shards": '


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "null", '{"format": 1}', '{"format": 2}', '{"format": 1, "job": "", "codebook": 3}', "[" * 100_000,
        INDEX_HEAD + '{"a": 1}}',
        INDEX_HEAD + '[{"file": "../x", "records": 1, "bytes": 9, "skipped": []}]}',
        INDEX_HEAD + '[{"file": "/etc/passwd", "records": 1, "bytes": 9, "skipped": []}]}',
        INDEX_HEAD + '[{"file": "x", "records": 1e400, "bytes": 9, "skipped": []}]}',
        INDEX_HEAD + '[{"file": "x", "records": 1000000000000, "bytes": 9, "skipped": []}]}',
        INDEX_HEAD + '[{"file": "x", "records": 1, "bytes": 9, "skipped": [5]}]}',
    ],
)  # fmt: skip
def test_damaged_index(tmp_path, whole, text):
    (tmp_path / "whole/index.json").write_text(text)
    with pytest.raises(Emu3Error, match=r"index\.json"):
        Index.read(tmp_path / "whole")


def test_codes_of_another_tokenizer_are_refused(tmp_path, whole):
    data = PreparedData(tmp_path / "whole")
    data.require_codebook(32768)
    data.require_codebook(32768, "0" * 64)
    with pytest.raises(Emu3Error, match="codebook of 32768 codes, but the model has 8192"):
        data.require_codebook(8192)
    with pytest.raises(Emu3Error, match="another vision tokenizer"):
        data.require_codebook(32768, "1" * 64)


def test_a_codebook_is_known_by_its_vectors():
    vectors = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    assert Codebook.of(vectors) == Codebook.of(np.asfortranarray(vectors))
    assert Codebook.of(vectors) != Codebook.of(vectors[::-1])
    assert Codebook.of(vectors).size == 8


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command(golden_bundle, golden_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "text": "What"}, {"role": "assistant", "text": "A pattern."}]
    lines = [
        {"image": str(GOLDEN / "photo.png"), "text": "a photo"},
        {"image": str(GOLDEN / "palette.png"), "text": "", "conversation": talk, "name": "p"},
        {"image": "missing.png", "text": "x"},
        {"text": "plain"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("prepare", "m.jsonl", "--model", golden_bundle, "--keep-size", "--shards", 2, "--quiet", "-o")
    assert run(*command, "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("emu3-jax: error: m.jsonl line 3: missing.png does not exist") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(*command, "out", "--on-error", "skip") == 0
    assert capsys.readouterr().out.splitlines()[1] == "out: 3 records in 2 shards, 1 skipped, listed in out/skipped.txt"
    data, golden = PreparedData(tmp_path / "out"), golden_npz("images.npz")
    np.testing.assert_array_equal(data[0].codes, golden["photo/codes"][0])
    np.testing.assert_array_equal(data[1].codes, golden["palette/codes"][0])
    assert data[1].name == "p" and data[1].conversation == (Turn("user", "What"), Turn("assistant", "A pattern."))
    assert data[2].codes is None and data[2].text == "plain"
    embedding = golden_model.vision.params["quantize"]["embedding"]
    data.require_codebook(32768, Codebook.of(np.asarray(embedding)).sha256)
    assert run(*command, "hosts", "--on-error", "skip", "--host", 1, "--hosts", 2) == 0
    assert capsys.readouterr().out == "hosts: 1 shard of other hosts is not written yet\n"
    assert run(*command, "hosts", "--on-error", "skip", "--host", 0, "--hosts", 2, "--workers", 1) == 0
    assert files(tmp_path / "hosts") == files(tmp_path / "out")


@pytest.mark.oracle
def test_the_reference_s_data_is_imported(golden_bundle, tmp_path, capsys):
    import torch

    codes = golden_npz("train.npz")["codes"]
    torch.save({"name": "n", "images": codes, "texts": "a shiba inu"}, tmp_path / "n.pth")
    (tmp_path / "train.json").write_text(json.dumps({"prefix": str(tmp_path), "path_list": ["n.pth"]}))
    arguments = ("prepare", "--features", tmp_path / "train.json", "--model", golden_bundle, "-o", tmp_path / "out")
    assert run(*arguments) == 0
    record = PreparedData(tmp_path / "out")[0]
    np.testing.assert_array_equal(record.codes, codes)
    assert isinstance(record, Record) and record.text == "a shiba inu"


def test_the_command_s_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedded, "DIRECTORY", tmp_path / "none")
    (tmp_path / "m.jsonl").write_text('{"text": "a"}\n')
    assert run("prepare", tmp_path / "m.jsonl", "-o", tmp_path / "out") == 2
    assert "no model was given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("prepare", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
