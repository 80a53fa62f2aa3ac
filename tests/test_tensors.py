"""Reading and writing safetensors: against safetensors itself, and damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file
from tensor_files import assert_read_back

from emu3_jax.checkpoints.tensors import read_safetensors_header, write_safetensors
from emu3_jax.errors import Emu3Error

ARRAYS = {
    "float": np.random.default_rng(0).standard_normal((5, 7), np.float32),
    "bfloat": np.random.default_rng(1).standard_normal((3, 4, 2)).astype(ml_dtypes.bfloat16),
    "half": np.arange(6, dtype=np.float16),
    "scalar": np.asarray(12, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


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
