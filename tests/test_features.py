"""The reference's feature lists, against files that torch wrote, and damaged and hostile ones."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from emu3_jax import Emu3Error
from emu3_jax.data.features import FeatureRecords

pytestmark = pytest.mark.oracle


@pytest.fixture
def features(tmp_path):
    """Writes one feature file as the reference does, and its list; returns the records."""

    def write(data, **options) -> FeatureRecords:
        file = tmp_path / "0.pth"
        file.write_bytes(data) if isinstance(data, bytes) else torch.save(data, file, **options)
        (tmp_path / "train.json").write_text(json.dumps({"prefix": str(tmp_path), "path_list": ["0.pth"]}))
        return FeatureRecords(tmp_path / "train.json", 32768)

    return write


CODES = np.arange(12).reshape(3, 4)


@pytest.mark.parametrize(
    "images",
    [CODES, CODES.T, CODES.astype(np.int32), torch.tensor(CODES), torch.tensor(CODES)[1:]],
    ids=lambda i: type(i),
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_features_are_read(features, images, protocol):
    records = features({"name": "n", "images": images, "texts": "ein Hund"}, pickle_protocol=protocol)
    assert len(records) == 1
    record = records[0]
    assert (record.name, record.text, record.codes.dtype) == ("n", "ein Hund", np.int32)
    np.testing.assert_array_equal(record.codes, np.asarray(images))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"name": "n", "images": CODES, "texts": Attack()}, "refused: its pickle asks for posix.mkdir"),
        ({"name": "n", "images": CODES.astype(np.float32), "texts": "t"}, "pickle is damaged"),
        ({"name": "n", "images": CODES[0], "texts": "t"}, "images is int64 [4]"),
        ({"name": "n", "images": CODES + 40000, "texts": "t"}, "code 40011"),
        ({"name": "n", "images": CODES - 1, "texts": "t"}, "code -1"),
        ({"name": "n", "images": torch.tensor(CODES).T, "texts": "t"}, "a tensor with strides"),
        ({"name": "n", "images": [1], "texts": "t"}, "images is list"),
        ({"name": "n", "images": CODES, "texts": 3}, "texts is 3"),
        ({"name": "n", "images": CODES}, "has no 'texts'"),
        ([1], "holds list"),
        (b"not a zip", "truncated"),
        (pickle.dumps({"name": "n"}), "truncated"),
    ],
)
def test_features_that_are_none(features, tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    records = features(data)
    with pytest.raises(Emu3Error) as error:
        records[0]
    assert reason in str(error.value) and "0.pth" in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_cut_features(features, tmp_path):
    records = features({"name": "n", "images": CODES, "texts": "t"})
    whole = (tmp_path / "0.pth").read_bytes()
    (tmp_path / "0.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Emu3Error, match="truncated"):
        records[0]
    with zipfile.ZipFile(tmp_path / "0.pth", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(Emu3Error, match=r"holds 0 data\.pkl"):
        records[0]
    (tmp_path / "0.pth").unlink()
    with pytest.raises(Emu3Error, match=r"path_list\[0\]: .*does not exist"):
        records.check(0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "as JSON"), ("[]", "must be an object"), ('{"prefix": "", "path_list": []}', "path_list is empty")],
)
def test_lists_that_are_none(tmp_path, text, reason):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(Emu3Error, match=reason):
        FeatureRecords(tmp_path / "l.json", 32768)
    with pytest.raises(Emu3Error, match="cannot read"):
        FeatureRecords(tmp_path / "none.json", 32768)
