"""Metrics of a run: TensorBoard's curves, without PyTorch, and on a disk that is full."""

import builtins
import importlib
import logging
import pathlib
import struct
import sys

import pytest

from emu3_jax.training import metrics
from emu3_jax.training.metrics import Metrics, read_metrics, without_torch


def records(file: pathlib.Path) -> int:
    """How many a file of TensorBoard's has: a length of eight bytes, a checksum, so many bytes, a checksum."""
    data, count, place = file.read_bytes(), 0, 0
    while place < len(data):
        place += 16 + struct.unpack_from("<Q", data, place)[0]
        count += 1
    assert place == len(data)
    return count


def test_curves_hold_what_the_metrics_say(tmp_path):
    board = Metrics(tmp_path, 0)
    for step in range(1, 101):
        board.write(step, {"loss": 1.0, "rate": 2.0})
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert records(file) > 200 and len(read_metrics(tmp_path)) == 100  # the first few tell the version


def test_pytorch_is_not_imported_for_curves(monkeypatch):
    """That takes 2 s. What is imported already stays."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    with without_torch():
        importlib.import_module("tensorboardX")
    assert "torch" not in sys.modules
    there = object()
    monkeypatch.setitem(sys.modules, "torch", there)
    with without_torch():
        assert sys.modules["torch"] is there


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="the system has no full device")
def test_curves_on_a_full_disk_end_with_one_warning(tmp_path, monkeypatch, caplog):
    """The thread that writes them must not end: the run would wait for it for ever."""

    def full(path, *arguments, **options):
        return builtins.open("/dev/full" if "tensorboard" in str(path) else path, *arguments, **options)

    monkeypatch.setattr(metrics, "open", full, raising=False)
    with caplog.at_level(logging.WARNING, "emu3_jax"):
        board = Metrics(tmp_path, 0)
        for step in range(1, 101):
            board.write(step, {"loss": 1.0})
        board.close()
    (said,) = caplog.messages
    assert "tensorboard/events" in said and "ends here: No space left on device" in said
    assert len(read_metrics(tmp_path)) == 100
