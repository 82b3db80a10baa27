"""Archives and arrays that claim more than they have."""

import io
import zipfile

import jax
import numpy as np
import pytest

from toyfeat.checkpoint import load_tree, save_tree
from toyfeat.files.archives import array_from_npy, open_archive


def npy(value, old=b"", new=b""):
    """An array in NumPy's format, with other bytes in its header."""
    stream = io.BytesIO()
    np.save(stream, value)
    content = stream.getvalue()
    assert old in content
    return content.replace(old, new)


def archive_of(members, packed=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 4), np.uint8),
        np.float16(2.5),
        np.arange(3, dtype=">i4"),
    ],
)
def test_arrays_are_those_of_numpy(value):
    array = array_from_npy(npy(value))
    assert array.dtype == value.dtype
    assert array.shape == np.shape(value)
    np.testing.assert_array_equal(array, value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy(np.ones(3), b"(3,)", b"(4,)"), "wanted 32 bytes of float64.4., got 24"),
        (npy(np.ones(3), b"(3,), ", b"(99999999999,), "), "wanted 799999999992 bytes"),
        (npy(np.ones(3), b"(3,)", b"(2,)"), "wanted 16 bytes of float64.2., got 24"),
        (npy(np.ones(3), b"<f8", b"|O8"), "wanted 24|Object arrays cannot be loaded"),
        (npy(np.ones(3), b"NUMPY\x01", b"NUMPY\x09"), "got \\(9, 0\\)"),
        (b"", "EOF|magic"),
    ],
)
def test_an_array_that_claims_another_size_is_refused(content, match):
    with pytest.raises(ValueError, match=match):
        array_from_npy(content)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_compressed_members_are_refused_unread(packed):
    stream = archive_of({"small": b"1", "zeros": bytes(2**24)}, packed)
    assert len(stream.getvalue()) < 2**16
    with pytest.raises(ValueError, match="without compression, got 'small' compr"):
        open_archive(stream)


def test_members_that_overlap_are_refused():
    # A directory that lists the one member a hundred times, under the same name.
    content = archive_of({"zeros": bytes(2**16)}).getvalue()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    counts = np.array([100, 100], "<u2").tobytes()
    size = np.array([100 * (end - start)], "<u4").tobytes()
    tail = content[end : end + 8] + counts + size + content[end + 16 :]
    content = content[:start] + 100 * content[start:end] + tail
    with pytest.raises(ValueError, match="its members have 6553600 bytes, and it has"):
        open_archive(io.BytesIO(content))


def test_an_archive_lists_so_many_members_only():
    content = archive_of({"a": b"1"}).getvalue()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    times = 2**25 // (end - start) + 1
    size = np.array([times * (end - start)], "<u4").tobytes()
    tail = content[end : end + 12] + size + content[end + 16 :]
    content = content[:start] + times * content[start:end] + tail
    with pytest.raises(ValueError, match="wanted at most 33554432 bytes of the direct"):
        open_archive(io.BytesIO(content))
    # The record of a large archive counts where there is one.
    large = b"PK\x06\x06" + bytes(36) + np.array([2**40, 0], "<u8").tobytes()
    content = large + b"PK\x06\x07" + bytes(16) + archive_of({}).getvalue()
    with pytest.raises(ValueError, match="of its members, got 1099511627776"):
        open_archive(io.BytesIO(content))
    for content in (b"", b"PK", archive_of({}).getvalue() + b"\n"):
        with pytest.raises(zipfile.BadZipFile, match="does not end as archives do"):
            open_archive(io.BytesIO(content))


@pytest.mark.parametrize(
    ("packed", "shape", "match"),
    [
        (zipfile.ZIP_DEFLATED, b"(3,)", "without compression, got"),
        (zipfile.ZIP_STORED, b"(33333333333,)", "wanted 133333333332 bytes of float32"),
    ],
)
def test_no_checkpoint_makes_more_of_itself_than_it_has(packed, shape, match, tmp_path):
    path, tree = tmp_path / "tree.npz", {"w": np.ones(3, np.float32)}
    save_tree(path, tree)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["w.npy"] = members["w.npy"].replace(b"(3,)", shape)
    path.write_bytes(archive_of(members, packed).getvalue())
    with pytest.raises(
        ValueError, match=rf"load_tree: .*tree\.npz is damaged.*{match}"
    ):
        load_tree(path, tree)


def test_a_member_is_one_leaf(tmp_path):
    path, tree = tmp_path / "tree.npz", {"v": np.ones(3), "w": np.ones(3)}
    save_tree(path, tree)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    shared = members["manifest.json"].replace(b"w.npy", b"v.npy")
    path.write_bytes(archive_of(members | {"manifest.json": shared}).getvalue())
    with pytest.raises(ValueError, match=r"tree\.npz is damaged .*two leaves are in"):
        load_tree(path, tree)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b'"dtype": "int64", ', b"", "no sound .'dtype'."),
        (b'"shape": [3]', b'"shape": ["3"]', "no sound shape"),
        (b'"shape": [3]', b'"shape": 3', "no sound .'shape'."),
        (b'"dtype": "int64"', b'"dtype": {"a": 1}', "no sound .'dtype'."),
        (b'"dtype": "int64"', b'"dtype": "key<fry>"', "key without its implement"),
        (b'"shape": []', b'"shape": [1]', "has keys of the shape"),
        (b'"path": "', b'"path": "' + b"a" * 5000, "holds another tree"),
        (b'"member": "', b'"member": "' + b"a" * 5000, "damaged .KeyError: .There is"),
        (
            b'"impl": "threefry2x32"',
            b'"impl": [1]',
            "implementation that is not known here",
        ),
        (
            b'"impl": "threefry2x32"',
            b'"impl": "a"',
            "implementation that is not known here",
        ),
    ],
)
def test_a_manifest_that_was_not_written_here_is_refused(old, new, match, tmp_path):
    tree = {"key": jax.random.key(0), "w": np.arange(3)}
    save_tree(tmp_path / "tree.npz", tree)
    with zipfile.ZipFile(tmp_path / "tree.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = members["manifest.json"]
    assert old in manifest
    members["manifest.json"] = manifest.replace(old, new)
    (tmp_path / "tree.npz").write_bytes(archive_of(members).getvalue())
    with pytest.raises(
        ValueError, match=rf"load_tree: .*tree\.npz .*{match}"
    ) as caught:
        load_tree(tmp_path / "tree.npz", tree)
    assert len(str(caught.value)) < 2000
