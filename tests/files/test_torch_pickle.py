"""Reader of torch's state dicts: views, refusals of other pickles, damage."""

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from toyfeat.files.torch_pickle import state_dict

# Written by benchmarks/peers/dictionary_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "torch"


class Storage:
    def __init__(self, kind, key="0", size=6):
        self.kind, self.key, self.size = kind, key, size


class Reduced:
    """Object that is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return "storage", obj.kind, obj.key, "cpu", obj.size
        return None


@pytest.fixture
def torch(monkeypatch):
    """Install modules with the names of torch that pickle looks up."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("FloatStorage", "ComplexFloatStorage"):
        setattr(modules["torch"], name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(modules["torch._utils"], name, function)
    modules["torch"]._utils = modules["torch._utils"]
    return modules["torch"]


def write_archive(path, state, protocol=2, **files):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("ae/data.pkl", "w") as stream:
            Pickler(stream, protocol).dump(state)
        for name, content in {"data/0": np.arange(6, dtype="<f4"), **files}.items():
            archive.writestr(f"ae/{name}", bytes(content))
    return path


def tensor(torch, offset=0, shape=(2, 3), strides=(3, 1), extras=(), **storage):
    numbers = Storage(torch.FloatStorage, **storage)
    args = (numbers, offset, shape, strides, False, OrderedDict(), *extras)
    return Reduced(torch._utils._rebuild_tensor_v2, *args)


@pytest.mark.slow
def test_views_of_every_kind_are_what_torch_says_they_are():
    tensors = state_dict(GOLDEN / "views.pt", "reader")
    wanted = np.load(GOLDEN / "views.npz")
    assert set(tensors) == set(wanted)
    for name, value in wanted.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_a_module_s_state_has_its_versions_beside_it():
    tensors = state_dict(GOLDEN / "module.pt", "reader")
    assert {k: v.shape for k, v in tensors.items()} == {"weight": (3, 2), "bias": (3,)}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("legacy.pt", r"reader: wanted a zip archive.*load it with torch and save"),
        ("views.npz", r"wanted one data.pkl in it, got \['float64.npy'"),
        ("tensor.pt", "wanted a dict of tensors, got View"),
        ("object.pt", r"object.pt is not .* asks for torch.nn.modules.linear.Linear"),
    ],
)
def test_other_files_of_torch_are_refused(name, match):
    with pytest.raises(ValueError, match=match):
        state_dict(GOLDEN / name, "reader")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_that_a_pickle_asks_for_is_run(protocol, tmp_path):
    done = tmp_path / "done"
    for call in (
        Reduced(os.mkdir, str(done)),
        Reduced(os.system, f"touch {done}"),
        Reduced(eval, f"open({str(done)!r}, 'w')"),
        Reduced(getattr, OrderedDict, "fromkeys"),
        Reduced(pickle.loads, pickle.dumps(Reduced(os.mkdir, str(done)))),
    ):
        for state in (call, {"weight": call}, {call: 1}, OrderedDict(weight=[call])):
            path = write_archive(tmp_path / "ae.pt", state, protocol)
            with pytest.raises(
                ValueError, match=r"reader: .* it asks for .*only plain"
            ):
                state_dict(path, "reader")
    assert not done.exists()


def test_other_makers_of_tensors_are_refused(torch, tmp_path):
    plain = tensor(torch)
    for state, match in (
        ({"w": Reduced(torch._utils._rebuild_parameter, plain)}, "_rebuild_parameter"),
        ({"w": Storage(torch.ComplexFloatStorage)}, "torch.ComplexFloatStorage"),
        ({"w": Storage("no kind")}, "only storages are read"),
        ({"w": tensor(torch, extras=({"neg": True},))}, "no sound description"),
        ({"w": Storage(torch.FloatStorage)}, "got Storage under 'w'"),
        ({"w": 3}, "got int under 'w'"),
        ({3: plain}, "got View under 3"),
        ([plain], "wanted a dict of tensors, got list"),
    ):
        path = write_archive(tmp_path / "ae.pt", state)
        with pytest.raises(ValueError, match=match):
            state_dict(path, "reader")


@pytest.mark.parametrize(
    ("view", "match"),
    [
        ({"shape": (7,), "strides": (0,)}, "'w' is larger than its storage"),
        ({"shape": (10**12,), "strides": (0,)}, "'w' is larger than its storage"),
        ({"offset": 1}, "'w' is larger than its storage"),
        ({"strides": (4, 1)}, "'w' is larger than its storage"),
        ({"strides": (3, -1), "offset": 2}, "'w' has no sound description"),
        ({"offset": -1}, "'w' has no sound description"),
        ({"offset": 0.0}, "'w' has no sound description"),
        ({"shape": (2,)}, "'w' has no sound description"),
        ({"shape": 6, "strides": 1}, "'w' has no sound description"),
        ({"size": 7}, "'w' has 24 bytes for 7 numbers"),
        ({"size": 10**15, "shape": (10**15,), "strides": (1,)}, "has 24 bytes for"),
        ({"key": "../../secret"}, "no item named 'ae/data/../../secret'"),
    ],
)
def test_a_view_outside_its_storage_is_refused(torch, view, match, tmp_path):
    path = write_archive(tmp_path / "ae.pt", {"w": tensor(torch, **view)})
    with pytest.raises(ValueError, match=f"reader: .*{match}"):
        state_dict(path, "reader")


def test_numbers_of_either_byte_order_are_read(torch, tmp_path):
    state = {"w": tensor(torch, shape=(3, 2), strides=(1, 3))}
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3).T
    little = write_archive(tmp_path / "a.pt", state, byteorder=b"little")
    np.testing.assert_array_equal(state_dict(little, "reader")["w"], wanted)
    swapped = {"byteorder": b"big", "data/0": np.arange(6, dtype=">f4")}
    big = write_archive(tmp_path / "b.pt", state, **swapped)
    np.testing.assert_array_equal(state_dict(big, "reader")["w"], wanted)
    other = write_archive(tmp_path / "c.pt", state, byteorder=b"littlelittle")
    with pytest.raises(ValueError, match="byte order little or big, got littlelittle"):
        state_dict(other, "reader")


def test_a_damaged_file_is_named(tmp_path):
    content = (GOLDEN / "views.pt").read_bytes()
    path = tmp_path / "ae.pt"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"reader: wanted a zip archive"):
        state_dict(path, "reader")
    start = content.index(b"\x80\x02}")
    path.write_bytes(content[:start] + b"\x80\x02." + content[start + 3 :])
    with pytest.raises(ValueError, match=r"ae\.pt is not a state dict"):
        state_dict(path, "reader")


def doubled(times):
    """Opcodes of a tuple of two tuples of two tuples ..., in a few bytes each."""
    steps = (b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(times))
    return b")q\x00" + b"".join(steps)


NESTED = b")" + b"\x85" * 1000


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        # Python's own unpickler crashes where it hashes what is nested deep.
        (b"})" + b"\x85" * 200_000 + b"K\x01s.", "got int under a tuple"),
        (b"}X\x01\0\0\0w" + NESTED + b"s.", "got tuple under 'w'"),
        (NESTED + b".", "wanted a dict of tensors, got tuple"),
        (NESTED + b"Q.", "asks for another object, and only storages"),
        (b"}" * 1000 + b".", "damaged at byte"),
        (b"}" + b"(" * 1000 + b".", None),
        # It never ends to hash or to print what is shared often enough.
        (b"}(" + doubled(60) + b"K\x01u.", "got tuple under a tuple"),
        (doubled(60) + b"Q.", "asks for another object, and only storages"),
        # Counts are those of the file, whatever it claims.
        (b"}r\xff\xff\xff\x7f.", None),
        (b"X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f.", "bytes in a bytes8"),
        (b"\x8b\xff\xff\xff\x7f1.", "not enough data"),
        (b"I" + b"9" * 100_000 + b"\n.", "100000 digits"),
        (b"}" * 2**18 + b".", "wanted at most 262144 bytes of data.pkl"),
        # Long names are cut.
        (b"}X\0\0\1\0" + b"a" * 2**16 + b"K\x01s.", "under 'a{80}\\.\\.\\.'"),
        (b"c" + b"a" * 2**16 + b"\nb\n.", "asks for a{80}\\.\\.\\., and only plain"),
    ],
)
def test_no_pickle_crashes_or_fills_the_memory(opcodes, match, tmp_path):
    path = tmp_path / "ae.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ae/data.pkl", b"\x80\x02" + opcodes)
    if match is None:
        assert state_dict(path, "reader") == {}
        return
    with pytest.raises(ValueError, match=f"reader: .*{match}") as caught:
        state_dict(path, "reader")
    assert len(str(caught.value)) < 1000


def test_tensors_may_share_a_storage_but_not_make_much_of_it(torch, tmp_path):
    views = {f"w{i}": tensor(torch, shape=(3,), strides=(2,)) for i in range(16)}
    arrays = state_dict(write_archive(tmp_path / "ae.pt", views), "reader")
    for array in arrays.values():
        np.testing.assert_array_equal(array, [0, 2, 4])
    views["w16"] = views["w0"]
    # Claims about this storage or another do not make up for it.
    views = {
        "claim": tensor(torch, shape=(0,), strides=(1,), size=10**9),
        **views,
        "other": tensor(torch, key="1", size=10**9),
    }
    with pytest.raises(ValueError, match=r"have 51 numbers of one storage, .* 6"):
        state_dict(write_archive(tmp_path / "ae.pt", views), "reader")


def test_archives_that_zipfile_cannot_judge_are_named(torch, tmp_path):
    path = write_archive(tmp_path / "ae.pt", {"w": tensor(torch)})
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    # A locator of the large format's directory, which says that there are two disks.
    locator = b"PK\x06\x07" + bytes(12) + b"\2\0\0\0"
    path.write_bytes(bytes(content[:end]) + locator + bytes(content[end:]))
    with pytest.raises(ValueError, match=r"ae\.pt is not a state .* multiple disks"):
        state_dict(path, "reader")
