"""Checksums of bundles: every bundle that is written has them, and what differs is named."""

import hashlib
import json
import os
import shutil

import pytest

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.checksums import CHECKSUMS, read_checksums, verify_checksums, write_checksums
from emu3_jax.checkpoints.embedded import DIRECTORY
from emu3_jax.cli.main import main


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A bundle with checksums."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_checksums(copy)
    return copy


def largest(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file):
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_list_is_that_of_sha256sum(bundle):
    sums = read_checksums(bundle / CHECKSUMS)
    files = {f.relative_to(bundle).as_posix() for f in bundle.rglob("*") if f.is_file()} - {CHECKSUMS}
    assert sums.keys() == files
    assert all(hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    verify_checksums(bundle)


def test_a_flipped_bit_is_found_by_verify_and_by_doctor_alone(bundle, tmp_path, capsys):
    file = largest(bundle / "vision")
    flip(file)
    emu3_jax.load(bundle)
    complaint = f"a file of the bundle is damaged, its checksum differs: {file}; copy it"
    for load in (
        lambda: emu3_jax.load(bundle, verify=True),
        lambda: emu3_jax.load(vision=bundle, verify=True),
        lambda: Bundle.open(bundle, verify=True),
    ):
        with pytest.raises(Emu3Error) as error:
            load()
        assert str(error.value).startswith(complaint.removesuffix("; copy it"))
    assert main(["doctor", str(bundle)]) == 2
    assert "error a file of the bundle is damaged, its checksum differs: " in capsys.readouterr().out
    config = tmp_path / "c.py"
    config.write_text(f"""
from emu3_jax.evaluation.config import EvaluateConfig
def config():
    return EvaluateConfig({str(tmp_path / "evaluated")!r}, model={str(bundle)!r}, data={str(tmp_path)!r})
""")
    (tmp_path / "items.jsonl").write_text("")
    (tmp_path / "m.jsonl").write_text('{"text": "a"}\n')
    out = ["-o", str(tmp_path / "out")]
    for command in (
        ["generate", "a", "--model", str(bundle), *out],
        ["tokenize", "x.png", "--model", str(bundle), "-o", str(tmp_path / "out.npz")],
        ["export", str(bundle), "--layout", "upstream", *out],
        ["prepare", str(tmp_path / "m.jsonl"), "--model", str(bundle), *out],
        ["evaluate", str(config)],
    ):
        assert main([*command, "--verify"]) == 2, command
        said = capsys.readouterr()
        assert "its checksum differs" in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.glob("out*"))


def test_what_else_differs(bundle):
    (bundle / "README.md").write_text("mine")  # beside the parts
    (bundle / "decoder" / ".DS_Store").write_text("not mine")
    verify_checksums(bundle)
    shutil.rmtree(bundle / "vision")  # a part may be taken out
    verify_checksums(bundle)
    (bundle / "decoder" / "more").write_text("")
    with pytest.raises(Emu3Error, match=r"is not in its SHA256SUMS, so it came later: \S+decoder/more; copy"):
        verify_checksums(bundle)
    (bundle / "decoder" / "more").unlink()
    config = bundle / "decoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5.0}))
    with pytest.raises(Emu3Error, match=r"checksum differs: \S+decoder/config.json; if you changed it yourself"):
        verify_checksums(bundle)
    config.unlink()
    with pytest.raises(Emu3Error, match=r"is missing: \S+decoder/config.json; copy the bundle again"):
        verify_checksums(bundle)


def test_an_older_bundle_says_what_to_do(tiny_bundle, capsys):
    emu3_jax.load(tiny_bundle)
    with pytest.raises(Emu3Error, match=r"has no SHA256SUMS, .* convert the model again, or load it without"):
        emu3_jax.load(tiny_bundle, verify=True)
    main(["doctor", str(tiny_bundle)])
    assert "warn  the bundle has no SHA256SUMS" in capsys.readouterr().out


def test_every_bundle_that_is_written_has_them(golden_bundle):
    verify_checksums(golden_bundle)
    verify_checksums(DIRECTORY, whole=True)


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "is empty"),
        (b"abc  x\n", "line 1 is not a checksum"),
        (b"0" * 64 + b" x\n", "line 1 is not a checksum"),
        (b"0" * 64 + b"  ../x\n", "is not a legal path inside the directory"),
        (b"0" * 64 + b"  /etc/passwd\n", "is not a legal path inside the directory"),
        (b"0" * 64 + b"  a\x1b[0m\n", "is not a legal path inside the directory"),
        (2 * (b"0" * 64 + b"  a\n"), "line 2 is not a checksum, two spaces and a new name"),
        (b"\xff\n", "is damaged"),
        (b"\n" * 200_000, "200000 lines; the limit is 100,000"),
    ],
)
def test_damaged_lists(bundle, text, reason):
    (bundle / CHECKSUMS).write_bytes(text)
    with pytest.raises(Emu3Error, match=reason):
        verify_checksums(bundle)


def test_links_are_followed_and_circles_end(bundle, tmp_path):
    shutil.move(bundle / "vision", tmp_path / "elsewhere")
    (bundle / "vision").symlink_to(tmp_path / "elsewhere")
    verify_checksums(bundle)
    os.mkfifo(tmp_path / "pipe")
    file = bundle / "tokenizer" / "config.json"
    file.unlink()
    file.symlink_to(tmp_path / "pipe")
    with pytest.raises(Emu3Error, match="it is a pipe or device; give a file"):
        verify_checksums(bundle)
    file.unlink()
    (bundle / "decoder" / "circle").symlink_to(bundle)
    with pytest.raises(Emu3Error, match="circle is a link to a directory that it lies in"):
        verify_checksums(bundle)
