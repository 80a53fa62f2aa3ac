"""Files of tensors from strangers: hostile pickles run nothing, headers are read as the safetensors library does."""

import copy
import json
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hostile import damaged, examples, gives_or_refuses, odd
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from emu3_jax.checkpoints.tensors import read_safetensors_header
from emu3_jax.checkpoints.torch_pickle import read_torch_file
from emu3_jax.data.features import FeatureRecords
from emu3_jax.errors import Emu3Error

fuzzed = examples(200)

# ------------------------------------------------------------------------------------------------ pickles, by hand

STORAGE = b"ctorch\nFloatStorage\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def storage(elements: int = 6, key: str = "0") -> bytes:
    return b"(" + text("storage") + STORAGE + text(key) + text("cpu") + f"I{elements}\n".encode() + b"tQ"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(f"I{value}\n".encode() for value in values) + b"t"


def tensor(shape=(6,), strides=(1,), start: int = 0, elements: int = 6) -> bytes:
    return (
        TENSOR
        + b"("
        + storage(elements)
        + f"I{start}\n".encode()
        + numbers(*shape)
        + numbers(*strides)
        + b"\x89Nt"
        + b"R"
    )


def state(value: bytes, before: bytes = b"") -> bytes:
    """A state dict of one entry."""
    return b"\x80\x02" + before + b"}" + text("x") + value + b"s."


PLAIN = state(tensor())


def write(path: pathlib.Path, content: bytes, root: str = "m", method: int = zipfile.ZIP_STORED) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", content)
        archive.writestr(f"{root}/data/0", np.arange(6, dtype=np.float32).tobytes())
    return path


def refused(path: pathlib.Path, reason: str = r"m\.bin|n\.bin") -> None:
    with pytest.raises(Emu3Error, match=reason) as error:
        read_torch_file(path)
    assert len(str(error.value)) <= 300


def feature(folder: pathlib.Path, content: bytes):
    """Reads `content` as the pickle of a feature file."""
    write(folder / "0.pth", content)
    (folder / "list.json").write_text(json.dumps({"prefix": str(folder), "path_list": ["0.pth"]}))
    return FeatureRecords(folder / "list.json", 64)[0]


def test_a_plain_file_is_read(tmp_path):
    (found,) = read_torch_file(write(tmp_path / "m.bin", state(tensor())))
    np.testing.assert_array_equal(found.read(), np.arange(6, dtype=np.float32))


def call(module: str, name: str, argument: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + argument + b"tR"


MAKE = "import os; os.mkdir('owned')"
ATTACKS = {
    "os.mkdir": call("os", "mkdir", text("owned")),
    "posix.mkdir": call("posix", "mkdir", text("owned")),
    "os.system": call("os", "system", text("mkdir owned")),
    "subprocess": call("subprocess", "check_call", b"]" + text("mkdir") + b"a" + text("owned") + b"a"),
    "builtins.exec": call("builtins", "exec", text(MAKE)),
    "builtins.eval": call("builtins", "eval", text("__import__('os').mkdir('owned')")),
    "__builtin__.eval": call("__builtin__", "eval", text("__import__('os').mkdir('owned')")),
    "runpy": call("runpy", "_run_code", text(MAKE) + b"}"),
    "pickle.loads": call("pickle", "loads", b"C\x1acos\nmkdir\n(X\x05\0\0\0ownedtR."),
    "builtins.getattr": call("builtins", "getattr", b"cos\nmkdir\n"),
    "importlib": call("importlib", "import_module", text("owned")),
    "nt": call("nt", "mkdir", text("owned")),
    "dotted global": b"ccollections\nOrderedDict.__init__.__globals__\n",
    "dotted global of torch": call("torch._utils", "_rebuild_tensor_v2.__globals__", b""),
    "stack global": text("os") + text("mkdir") + b"\x93(" + text("owned") + b"tR",
    "stack global of no texts": b"]]\x93",
    "instance": b"(" + text("owned") + b"ios\nmkdir\n",
    "object": b"(cos\nmkdir\n" + text("owned") + b"o",
    "new object": b"cos\nmkdir\n(" + text("owned") + b"t\x81",
    "new object with keywords": b"cos\nmkdir\n(" + text("owned") + b"t}\x92",
    "extension 1": b"\x82\x01",
    "extension 2": b"\x83\x01\x00",
    "extension 4": b"\x84\x01\x00\x00\x00",
    "build of a function": TENSOR + b"}" + text("__code__") + text("owned") + b"sb",
    "build of a class": STORAGE + b"}" + text("dtype") + text("owned") + b"sb",
    "build with slots": STORAGE + b"N}" + text("dtype") + text("owned") + b"s\x86b",
    "build with a state function": tensor() + b"}" + text("__setstate__") + b"cos\nmkdir\nsb",
    "call of what is no function": STORAGE + b")R",
    "call without a tuple": TENSOR + b"}R",
    "dict made of pairs": call("collections", "OrderedDict", b"]]" + text("a") + b"a" + text("b") + b"aa"),
    "text persistent id": b"Pos.mkdir\n",
    "odd persistent id": b"]Q",
    "persistent id of a call": b"(" + text("storage") + b"cos\nmkdir\n" + text("0") + text("cpu") + b"I6\ntQ",
    "nested persistent id": b"(" + text("storage") + storage() + text("0") + text("cpu") + b"I6\ntQ",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_runs_and_the_next_file_means_the_same(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(write(tmp_path / "m.bin", state(ATTACKS[attack])))
    refused(write(tmp_path / "n.bin", state(tensor(), before=ATTACKS[attack])))
    with pytest.raises(Emu3Error):
        feature(tmp_path, state(ATTACKS[attack]))
    assert not pathlib.Path("owned").exists() and not pathlib.Path(tmp_path.parent, "owned").exists()
    test_a_plain_file_is_read(tmp_path)


def test_a_storage_type_that_was_changed_stays_as_it_was(tmp_path):
    for changes in (b"}" + text("dtype") + text("i1") + b"sb", b"(I1\nI2\ntb", b"Nb"):
        refused(write(tmp_path / "m.bin", state(tensor(), before=STORAGE + changes + b"0")))
    test_a_plain_file_is_read(tmp_path)


# ------------------------------------------------------------------------------------------------ small file, huge work

DOUBLED = b"(" + text("a") + b"t" + b"q\x00" + b"h\x00\x86q\x00" * 60


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (state(b"(" + text("storage") + DOUBLED + b"tQ"), "persistent"),  # 2^60 strings, were they written out
        (state(b"\x8b" + struct.pack("<i", 1000) + b"\xff" * 999 + b"\x7f"), "bits"),
        (state(b"]r" + struct.pack("<I", 1 << 26) + b"0" + tensor()), "POP"),
        (state(tensor((10**9, 10**9), (0, 0))), "larger than its storage"),
        (state(tensor((10**18,), (1,), elements=10**18)), "outside its stored data"),
        (state(tensor((2,) * 65, (0,) * 65)), "impossible"),
        (state(tensor((6,), (1,), start=10**17)), "outside its stored data"),
        (state(b"(" * 200_000), "missing|values"),
        (state(b"]" * 300_000), "not a dict"),
        (b"\x80\x02" + b"N" * 1_100_000 + b".", "instructions"),
        (state(b"]" + b"\x85" * 100_000 + b"q\x00}h\x00Nsb"), "key"),  # hashing it would end the process
        (b"\x80\x04\x95" + b"\xff" * 8 + b".", "damaged|no end"),
        (state(b"\x8d" + struct.pack("<Q", 1 << 60)), "damaged"),
        (b"", "damaged"),
    ],
)  # fmt: skip
def test_a_small_pickle_is_no_huge_work(tmp_path, content, reason):
    refused(write(tmp_path / "m.bin", content), reason)
    with pytest.raises(Emu3Error):
        feature(tmp_path, content)


def test_a_memo_of_a_far_index_takes_no_memory(tmp_path):
    far = b"r" + struct.pack("<I", (1 << 32) - 1)
    (found,) = read_torch_file(
        write(tmp_path / "m.bin", state(tensor(), before=b"]" + far)[:2] + state(tensor() + far)[2:])
    )
    assert found.shape == (6,)


def test_packed_entries_are_refused_before_they_are_unpacked(tmp_path):
    refused(write(tmp_path / "m.bin", state(tensor()), method=zipfile.ZIP_DEFLATED), "is compressed")
    with zipfile.ZipFile(tmp_path / "order.bin", "w") as archive:
        archive.writestr("m/data.pkl", state(tensor()))
        archive.writestr("m/byteorder", bytes(1 << 26), zipfile.ZIP_DEFLATED)
    refused(tmp_path / "order.bin", "is compressed")
    with pytest.raises(Emu3Error, match="is compressed"):
        with zipfile.ZipFile(tmp_path / "0.pth", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m/data.pkl", state(tensor()))
        (tmp_path / "list.json").write_text(json.dumps({"prefix": str(tmp_path), "path_list": ["0.pth"]}))
        FeatureRecords(tmp_path / "list.json", 64)[0]


def test_an_entry_that_claims_to_be_large_is_refused(tmp_path):
    raw = bytearray(write(tmp_path / "m.bin", state(tensor())).read_bytes())
    at = raw.find(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 1 << 31)  # the size of what is unpacked
    (tmp_path / "m.bin").write_bytes(raw)
    refused(tmp_path / "m.bin", "is compressed")


def test_a_directory_of_a_million_entries_is_not_read(tmp_path):
    raw = bytearray(write(tmp_path / "m.bin", state(tensor())).read_bytes())
    raw[-10:-6] = struct.pack("<I", 60_000_000)  # bytes of the directory
    (tmp_path / "m.bin").write_bytes(raw)
    refused(tmp_path / "m.bin", "60000000 bytes of its directory; the limit is 8,388,608")


def test_many_tensors_of_one_storage_are_refused(tmp_path):
    one = text("{}") + tensor()
    many = b"".join(one.replace(text("{}"), text(f"x{i}")) + b"s" for i in range(2000))
    raw = write(tmp_path / "m.bin", b"\x80\x02}" + many + b".")
    found = read_torch_file(raw)  # small ones, fewer bytes than the file
    assert len(found) == 2000
    with zipfile.ZipFile(tmp_path / "n.bin", "w") as archive:
        views = b"".join(text(f"x{i}") + tensor((10**5,), (1,), elements=10**5) + b"s" for i in range(2000))
        archive.writestr("m/data.pkl", b"\x80\x02}" + views + b".")
        archive.writestr("m/data/0", bytes(400_000))
    refused(tmp_path / "n.bin", "800000000 bytes in all tensors")


def test_features_of_strange_arrays(tmp_path):
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\ntC\x01bt"[:-1]
    for content in (
        state(b"cnumpy\ndtype\n(" + text("O8") + b"tR"),
        state(array + b"R"),
        state(array + b"R" + numbers(1, 2) + b"b"),
        b"\x80\x02}" + text("images") + STORAGE + b"s.",
    ):
        with pytest.raises(Emu3Error):
            feature(tmp_path, content)


def test_a_feature_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "0.pth").open("wb") as stream:
        stream.truncate(1 << 33)  # takes no space
    (tmp_path / "list.json").write_text(json.dumps({"prefix": str(tmp_path), "path_list": ["0.pth"]}))
    with pytest.raises(Emu3Error, match="8589934592 bytes; the limit is 67,108,864"):
        FeatureRecords(tmp_path / "list.json", 64)[0]


def test_pipes_and_directories_are_refused(tmp_path):
    os.mkfifo(tmp_path / "m.bin")
    refused(tmp_path / "m.bin", "a pipe or device")
    (tmp_path / "d.bin").mkdir()
    refused(tmp_path / "d.bin", "a directory")
    with pytest.raises(Emu3Error, match="a pipe or device"):
        read_safetensors_header(tmp_path / "m.bin")


def read_all(file: pathlib.Path) -> None:
    """Reads every tensor of a `torch.save` file. Together they are not much more than the file."""
    tensors = read_torch_file(file)
    assert sum(found.nbytes for found in tensors) <= 4 * file.stat().st_size
    for found in tensors:
        found.read()


@fuzzed
@given(st.data())
def test_damaged_torch_files(tmp_path_factory, data):
    file = write(tmp_path_factory.mktemp("torch") / "m.bin", data.draw(st.just(PLAIN) | damaged(PLAIN)))
    file.write_bytes(data.draw(damaged(file.read_bytes()) | st.just(file.read_bytes())))
    gives_or_refuses(lambda: read_all(file))


# What the reference pickles.
FEATURE = pickle.dumps({"name": "n", "texts": "t", "images": np.arange(12).reshape(3, 4)}, 2)


def test_the_feature_that_is_damaged_is_sound_before(tmp_path):
    np.testing.assert_array_equal(feature(tmp_path, FEATURE).codes, np.arange(12).reshape(3, 4))


@fuzzed
@given(content=damaged(FEATURE))
def test_damaged_features(tmp_path_factory, content):
    record = gives_or_refuses(lambda: feature(tmp_path_factory.mktemp("feature"), content))
    assert record is None or record.codes is None or record.codes.size <= len(content)


@fuzzed
@given(prefix=odd, names=odd | st.lists(st.text(max_size=8), max_size=3))
def test_damaged_feature_lists(tmp_path_factory, prefix, names):
    file = tmp_path_factory.mktemp("list") / "list.json"
    file.write_text(json.dumps({"prefix": prefix, "path_list": names}))
    records = gives_or_refuses(lambda: FeatureRecords(file, 64))
    for index in range(len(records or ())):
        gives_or_refuses(lambda index=index: records.check(index))


# ------------------------------------------------------------------------------------------------ safetensors

SOUND = save(
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8), "c": np.zeros((0, 3), np.float16)}
)


def with_header(header, body: bytes | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = int.from_bytes(SOUND[:8], "little")
    return len(raw).to_bytes(8, "little") + raw + (SOUND[8 + length :] if body is None else body)


def header_of(raw: bytes) -> dict:
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def the_library_reads(path: pathlib.Path) -> bool:
    try:
        with safe_open(path, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_slice(name).get_shape()
        return True
    except (SafetensorError, OverflowError, ValueError):
        return False


def agrees(path: pathlib.Path) -> bool:
    """Whether we read a file, after a check that the library does too, or does not either."""
    theirs = the_library_reads(path)
    try:
        read_safetensors_header(path)
    except Emu3Error as error:
        # Stricter than the library: dtypes that no Emu3 has, a name that stands twice, more axes than NumPy has.
        assert not theirs or any(what in str(error) for what in ("has dtype", "contains a name twice", "[1, 1, 1"))
        assert len(str(error)) <= 300
        return False
    assert theirs
    return True


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "tensor 'b' overlaps"),
        ({"a": F32, "b": F32}, bytes(8), "tensor 'b' overlaps"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20), "tensor 'b' begins after a gap"),
        ({"a": F32}, bytes(9), "1 bytes belong to no tensor"),
        ({"a": F32}, bytes(7), "truncated: its tensors end 1 bytes past the end"),
        ({"a": {**F32, "shape": [10**9] * 3}}, bytes(8), "its shape needs"),
        ({"a": {**F32, "shape": ["2"]}}, bytes(8), "has shape"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), "has shape"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), "has shape"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), "has shape"),
        ({"a": {**F32, "shape": [1] * 99}}, bytes(4), "has shape"),
        ({"a": {**F32, "data_offsets": [0, 8, 9]}}, bytes(8), "data_offsets"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "has -8 bytes"),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), "has dtype"),
        ({"a": [1]}, bytes(8), "is \\[1\\]"),
        ({"a": F32, "__metadata__": {"x": 1}}, bytes(8), "__metadata__"),
        (b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}", bytes(8), "twice"),
        (b"[1]", bytes(8), "no object"),
        (b"{" + b'"a":{' * 100_000, bytes(8), "nested too deeply|JSON"),
        (b'{"a\x00":1}', bytes(8), "JSON"),
        ({"x" * 10**6: F32, "y": F32}, bytes(8), "overlaps"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path, header, body, reason):
    (tmp_path / "m").write_bytes(with_header(header, body))
    with pytest.raises(Emu3Error, match=reason) as error:
        read_safetensors_header(tmp_path / "m")
    assert len(str(error.value)) <= 300
    agrees(tmp_path / "m")


def test_a_header_of_many_values_is_not_held(tmp_path):
    raw = b'{"a":[' + b"1," * 5_000_000 + b"1]}"
    (tmp_path / "m").write_bytes(with_header(raw, b""))
    with pytest.raises(Emu3Error, match="values in its JSON; the limit is 4,000,000"):
        read_safetensors_header(tmp_path / "m")


@fuzzed
@given(st.data())
def test_headers_are_read_as_the_library_reads_them(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("header") / "m.safetensors"
    header = copy.deepcopy(header_of(SOUND))
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(header)))
        if not isinstance(header[name], dict) or data.draw(st.booleans()):
            header[name] = data.draw(odd)
        else:
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            small = st.lists(st.integers(0, 30), max_size=3)
            header[name][field] = data.draw(small | st.sampled_from(["F32", "I8", "F64", "U8", "F99"]) | odd)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    body = data.draw(st.sampled_from([None, bytes(28), bytes(29), b""]))
    file.write_bytes(with_header(raw, body))
    agrees(file)


@fuzzed
@given(st.data())
def test_damaged_safetensors(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("bytes") / "m.safetensors"
    raw = data.draw(damaged(SOUND))
    file.write_bytes(raw)
    if agrees(file):
        assert sum(found.nbytes for found in read_safetensors_header(file)) <= len(raw)
