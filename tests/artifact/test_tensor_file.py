import json
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rarefy.artifact.tensor_file import DTYPES, MAX_HEADER_BYTES, open_tensor_file, write_tensor_file
from rarefy.core.errors import DamagedFileError, PathError


def write_raw(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.uint8),
        "c": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 2), dtype=np.uint16),
        "view": np.arange(8, dtype=np.uint16).reshape(2, 4).T,
    }
    names = {"float32": "F32", "uint8": "U8", "int64": "I64", "uint16": "U16"}
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {name: (names[a.dtype.name], a) for name, a in arrays.items()})
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            assert np.array_equal(file.get_tensor(name), array)
    opened = open_tensor_file(path)
    for name, array in arrays.items():
        assert opened.array(name).shape == array.shape
        assert np.array_equal(opened.array(name), array)
        assert opened.array(name).flags.aligned
        assert array.size == 0 or not opened.array(name).flags.writeable


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [d for name, d in DTYPES.items() if name not in ("BF16", "F8_E4M3", "F8_E5M2")]
    arrays = {str(d): rng.integers(0, 2, (3, 5)).astype(d) for d in dtypes}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"k": "v"})
    opened = open_tensor_file(tmp_path / "x.safetensors")
    assert {name: opened.array(name).dtype for name in arrays} == {name: a.dtype for name, a in arrays.items()}
    assert all(np.array_equal(opened.array(name), array) for name, array in arrays.items())


def test_a_misaligned_tensor_is_copied(tmp_path):
    path = write_raw(
        tmp_path / "x", {"a": entry(0, 1), "b": entry(1, 9, "F32", [2])}, b"\x05" + struct.pack("<ff", 1.5, -2.0)
    )
    array = open_tensor_file(path).array("b")
    assert array.flags.aligned
    assert array.tolist() == [1.5, -2.0]


def test_booleans_are_zero_or_one(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry(0, 3, "BOOL")}, b"\x00\x01\x07")
    assert open_tensor_file(path).array("a").tolist() == [False, True, True]


def test_truncation_names_file_and_sizes(tmp_path):
    path = write_raw(tmp_path / "m.safetensors", {"a": entry(0, 100)}, bytes(60))
    size = path.stat().st_size
    with pytest.raises(DamagedFileError) as caught:
        open_tensor_file(path)
    message = str(caught.value)
    assert "m.safetensors" in message
    assert f"file of {size} bytes" in message
    assert f"allowed: {size + 40} bytes" in message
    assert "truncated" in message


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "JSON"),
        (b"[]", b"", "an object"),
        (b"{", b"", "JSON"),
        (b'{"a": \xff}', b"", "JSON"),
        (b"[" * 100_000, b"", "JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", b"", "JSON"),
        (b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}', b"", "repeats"),
        ({"a": 5}, b"", "dtype, shape and data_offsets"),
        ({"a": {"dtype": "U8", "shape": [0]}}, b"", "dtype, shape and data_offsets"),
        ({"a": {**entry(0, 0), "x": 1}}, b"", "dtype, shape and data_offsets"),
        ({"a": entry(0, 1, "F4")}, b"1", "dtype 'F4'"),
        ({"a": entry(0, 1, None)}, b"1", "dtype None"),
        ({"a": entry(0, 1, "U8", [-1])}, b"1", "shape"),
        ({"a": entry(0, 1, "U8", [1.0])}, b"1", "shape"),
        ({"a": entry(0, 1, "U8", [True])}, b"1", "shape"),
        ({"a": entry(0, 1, "U8", 1)}, b"1", "shape"),
        ({"a": entry(0, 1, "U8", [1] * 40)}, b"1", "shape"),
        ({"a": entry(0, 0, "U8", [0, 2**70])}, b"", "shape"),
        ({"a": entry(0, 1, "U8", [2])}, b"1", "2 bytes"),
        ({"a": entry(0, 3, "F32", [1])}, b"123", "4 bytes"),
        ({"a": {**entry(0, 1), "data_offsets": [1, 0]}}, b"1", "data_offsets"),
        ({"a": {**entry(0, 1), "data_offsets": [0]}}, b"1", "data_offsets"),
        ({"a": {**entry(0, 1), "data_offsets": [-1, 0]}}, b"1", "data_offsets"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", "data begins at byte 1"),
        ({"a": entry(0, 2), "b": entry(0, 2)}, b"12", "data begins at byte 0"),
        ({"a": entry(0, 1), "b": entry(2, 3)}, b"123", "data begins at byte 2"),
        ({"a": entry(1, 2)}, b"12", "data begins at byte 1"),
        ({"a": entry(0, 1)}, b"12", "allowed"),
        ({}, b"1", "allowed"),
        ({"__metadata__": []}, b"", "__metadata__"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ],
)
def test_a_contradictory_header(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(DamagedFileError, match=message) as caught:
        open_tensor_file(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [3, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_the_header_length_is_bounded(tmp_path, length):
    with pytest.raises(DamagedFileError):
        open_tensor_file(write_raw(tmp_path / "x", {}, length=length))


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_length_field(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(DamagedFileError, match=f"file of {size} bytes"):
        open_tensor_file(tmp_path / "x")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PathError, match="No such file"):
        open_tensor_file(tmp_path / "x")
