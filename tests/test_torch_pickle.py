"""Reading what torch.save wrote: against torch, and against damaged and hostile files."""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from tensor_files import assert_read_back

from emu3_jax.checkpoints.torch_pickle import read_torch_file
from emu3_jax.errors import Emu3Error

pytestmark = pytest.mark.oracle


def numpy_of(t: torch.Tensor) -> np.ndarray:
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def test_torch_files_are_read_as_torch_wrote_them(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Conv2d(2, 3, 3).state_dict()  # an OrderedDict with _metadata
    state |= {
        "bfloat": torch.randn(3, 5).bfloat16(),
        "half": torch.randn(4).half(),
        "scalar": torch.tensor(7),
        "row of a shared storage": base[2],
        "transposed": base.T,
        "strided": base[1:, ::2],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "empty": torch.zeros(0, 3),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_read_back(read_torch_file(tmp_path / "pytorch_model.bin"), {k: numpy_of(v) for k, v in state.items()})


def test_a_trainers_state_dict_entry_is_found(tmp_path):
    torch.save({"state_dict": {"x": torch.ones(2)}}, tmp_path / "m.bin")
    assert_read_back(read_torch_file(tmp_path / "m.bin"), {"x": np.ones(2, np.float32)})


class Touch:
    """Unpickled by an ordinary reader, it would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"x": torch.ones(2), "y": Touch(trap)}, tmp_path / "m.bin")
    with pytest.raises(Emu3Error, match=r"m\.bin: refused: its pickle asks for \S+, which plain tensors never need"):
        read_torch_file(tmp_path / "m.bin")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["os system", "builtins eval", "torch load", "torch._utils _rebuild_tensor_v3"])
def test_globals_outside_the_list_are_refused_by_name(tmp_path, name):
    module, attribute = name.split()
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("m/data.pkl", f"c{module}\n{attribute}\n(S'x'\ntR.".encode())
    with pytest.raises(Emu3Error, match=f"{module}.{attribute}"):
        read_torch_file(tmp_path / "m.bin")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"x": 1}),
        pickle.dumps(["x"]),
        # A tensor whose storage is a number, and one with more strides than sizes.
        b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI0\n(I1\nt(I1\nttR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI1\ntQI0\n(I1\nt(I1\nI1\nttR.",
        b"(S'storage'\nS'odd'\nS'0'\nS'cpu'\nI1\ntQ.",
    ],
)
def test_damaged_pickles_are_one_line(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("m/data.pkl", content)
    with pytest.raises(Emu3Error, match=r"m\.bin: .*safetensors"):
        read_torch_file(tmp_path / "m.bin")


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    torch.save({"x": torch.ones(6)}, tmp_path / "m.bin")
    with zipfile.ZipFile(tmp_path / "m.bin") as archive, zipfile.ZipFile(tmp_path / "short.bin", "w") as short:
        for info in archive.infolist():
            data = archive.read(info)
            short.writestr(info.filename, data[:-4] if info.filename.endswith("data/0") else data)
    with pytest.raises(Emu3Error, match="tensor 'x' lies outside its stored data"):
        read_torch_file(tmp_path / "short.bin")


def test_truncated_legacy_and_compressed_files_are_refused(tmp_path):
    torch.save({"x": torch.ones(600)}, tmp_path / "m.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-100])
    torch.save({"x": torch.ones(2)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    for name in ("cut.bin", "legacy.bin"):
        with pytest.raises(Emu3Error, match=rf"{name}: truncated, or not saved by torch 1\.6 or newer"):
            read_torch_file(tmp_path / name)
    deflated = zipfile.ZipFile(tmp_path / "zip.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "m.bin") as archive, deflated:
        for info in archive.infolist():
            deflated.writestr(info.filename, archive.read(info))
    with pytest.raises(Emu3Error, match="is compressed"):
        read_torch_file(tmp_path / "zip.bin")
