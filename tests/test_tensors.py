"""Reading and writing checkpoint files: against safetensors and torch, and against damaged and hostile files."""

import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from emu3_jax.checkpoints.tensors import read_json, read_safetensors_header, write_safetensors
from emu3_jax.checkpoints.torch_pickle import read_torch_file
from emu3_jax.errors import Emu3Error

ARRAYS = {
    "float": np.random.default_rng(0).standard_normal((5, 7), np.float32),
    "bfloat": np.random.default_rng(1).standard_normal((3, 4, 2)).astype(ml_dtypes.bfloat16),
    "half": np.arange(6, dtype=np.float16),
    "scalar": np.asarray(12, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_read_back(tensors, arrays):
    assert {t.name for t in tensors} == set(arrays)
    for t in tensors:
        expected = arrays[t.name]
        assert (t.shape, t.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(t.read(), expected)


def test_safetensors_are_read_as_safetensors_wrote_them(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_read_back(read_safetensors_header(tmp_path / "a.safetensors"), ARRAYS)


def test_safetensors_reads_what_is_written(tmp_path):
    entries = [(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    write_safetensors(tmp_path / "a.safetensors", entries, iter(ARRAYS.values()))
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype


def test_writing_another_array_than_promised_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="promised"):
        write_safetensors(tmp_path / "a", [("x", (2,), np.dtype(np.float32))], [np.zeros(3, np.float32)])


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, len(save(ARRAYS)) - 1))
def test_a_truncated_safetensors_file_is_named(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("cut") / "model.safetensors"
    file.write_bytes(save(ARRAYS)[:cut])
    with pytest.raises(Emu3Error, match=r"model\.safetensors: .*(truncated|not a whole|damaged)"):
        read_safetensors_header(file)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'x' has 4 bytes, its shape needs 8"),
        ({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, "dtype F8_E4M3; legal are"),
        ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, "damaged safetensors header"),
        ([1], "damaged safetensors header"),
    ],
)
def test_a_wrong_header_is_named(tmp_path, header, complaint):
    raw = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(Emu3Error, match=complaint):
        read_safetensors_header(tmp_path / "m")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    save_file({"x": ARRAYS["float"]}, tmp_path / "m")
    (found,) = read_safetensors_header(tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-1])
    with pytest.raises(Emu3Error, match=r"ends inside tensor 'x': the file is truncated"):
        found.read()


def test_json_that_is_none(tmp_path):
    (tmp_path / "c.json").write_text("[1")
    with pytest.raises(Emu3Error, match=r"c\.json: not readable as JSON"):
        read_json(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(Emu3Error, match="a JSON list, not an object"):
        read_json(tmp_path / "c.json")
    with pytest.raises(Emu3Error, match=r"d\.json: not found"):
        read_json(tmp_path / "d.json")


# ------------------------------------------------------------------------------------------------ torch.save


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
