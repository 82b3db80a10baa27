"""Files in the format of torch: written, read back, and unpickled by Python."""

import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from toyfeat.files.torch_pickle import saved_dict
from toyfeat.files.torch_writing import save_dict

STATE = {
    "J": {3: np.arange(6, dtype=np.float16).reshape(2, 3), 10: np.zeros((0, 2))},
    "w": np.arange(4, dtype=np.int64)[::2],
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "n_prompts": 2**40,
    "layers": [3, 10],
    "metadata": {"model": "größer", "share": 0.25, "raw": True, "revision": None},
}


class Unpickler(pickle.Unpickler):
    """Python's own unpickler, with torch's functions in numpy."""

    def __init__(self, archive):
        super().__init__(archive.open("archive/data.pkl"))
        self.archive = archive

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild,
            ("torch", "HalfStorage"): "<f2",
            ("torch", "FloatStorage"): "<f4",
            ("torch", "DoubleStorage"): "<f8",
            ("torch", "LongStorage"): "<i8",
        }
        return known[module, name]

    def persistent_load(self, pid):
        name, dtype, key, device, size = pid
        assert (name, device) == ("storage", "cpu")
        data = np.frombuffer(self.archive.read(f"archive/data/{key}"), dtype)
        assert len(data) == size
        return data

    def rebuild(self, storage, offset, shape, strides, grad, hooks):
        assert (offset, grad, hooks) == (0, False, OrderedDict())
        steps = [storage.itemsize * step for step in strides]
        return np.lib.stride_tricks.as_strided(storage, shape, steps)


def assert_same(got, wanted):
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key, value in wanted.items():
            assert_same(got[key], value)
    elif isinstance(wanted, np.ndarray):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    else:
        assert got == wanted
        assert type(got) is type(wanted)


def test_python_s_own_unpickler_reads_what_is_written(tmp_path):
    save_dict(tmp_path / "lens.pt", STATE, "writer")
    with zipfile.ZipFile(tmp_path / "lens.pt") as archive:
        assert_same(Unpickler(archive).load(), STATE)
        assert archive.read("archive/version") == b"3\n"
        assert archive.testzip() is None


def test_the_reader_gives_back_what_is_written(tmp_path):
    save_dict(tmp_path / "lens.pt", STATE, "writer")
    contents = saved_dict(tmp_path / "lens.pt", "reader")
    assert_same(contents.tensors["J", 3], STATE["J"][3])
    assert_same(contents.tensors["J", 10], STATE["J"][10])
    assert_same(contents.tensors["columns",], STATE["columns"])
    assert contents.values["n_prompts",] == 2**40
    assert contents.values["layers",] == [3, 10]
    metadata = {key[1]: x for key, x in contents.values.items() if len(key) == 2}
    assert metadata == STATE["metadata"]


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.zeros(2, complex), np.array(["a"]), b"bytes"]
)
def test_other_values_are_refused_and_nothing_is_written(value, tmp_path):
    with pytest.raises(TypeError, match=r"writer: a file of torch holds.*; convert it"):
        save_dict(tmp_path / "lens.pt", {"a": np.zeros(2), "b": {1: value}}, "writer")
    assert not list(tmp_path.iterdir())


def nested(opcodes, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + opcodes + b".")
    return path


def test_dicts_that_share_each_other_end(tmp_path):
    """A thousand keys have the same dict of a thousand keys."""

    def keys(num, value):
        return b"".join(b"M" + i.to_bytes(2, "little") + value for i in range(num))

    inner = b"}q\x00(" + keys(1000, b"N") + b"u"
    outer = b"}(K\x00" + inner + keys(1000, b"h\x00") + b"u"
    path = nested(outer, path=tmp_path / "a.pt")
    with pytest.raises(ValueError, match="wanted at most 16384 tensors and values"):
        saved_dict(path, "reader")
    cyclic = nested(b"}q\x00(K\x00h\x00u", path=tmp_path / "b.pt")
    with pytest.raises(ValueError, match="got dict under '0/0/0'"):
        saved_dict(cyclic, "reader")
    negative = nested(b"}(J\xff\xff\xff\xffNu", path=tmp_path / "c.pt")
    with pytest.raises(ValueError, match="under -1"):
        saved_dict(negative, "reader")
