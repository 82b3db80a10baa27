"""Mutations of the files of a folder: bytes, JSON, members of zip archives, counts."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_EXTREMES = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_JSON_EXTREMES = (0, -1, 1, 2**31, 2**63, 10**18, 10**400, 1e308, 0.5, float("nan"))
_JSON_OTHERS = (
    None,
    True,
    False,
    "",
    "a",
    "5",
    "../a",
    "a" * 10_000,
    [],
    {},
    [1],
    {"a": 1},
)
_INFLATED = 2**32  # bytes of a member that was deflated


def mutate_folder(rng: np.random.Generator, folder: Path) -> str:
    """Mutate one file below a folder in place, and describe what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    data, is_structured = path.read_bytes(), rng.random() < 0.6
    if is_structured and path.suffix in (".pt", ".npz"):
        what, data = _mutate_archive(rng, data)
    elif is_structured and path.suffix in (".json", ".safetensors"):
        what, data = _edit_header(rng, data, path.suffix)
    else:
        what, data = _mutate_bytes(rng, data)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def _mutate_bytes(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Mutate a file or a member as bytes, by a way chosen at random."""
    ways = _flip, _truncate, _insert, _duplicate, _remove, _set_number, _change_count
    way = ways[rng.integers(len(ways))]
    return way.__name__.strip("_"), way(rng, data)


def _place(rng: np.random.Generator, data: bytes) -> int:
    """Draw a position, half of the time near the start, where headers are."""
    most = min(len(data), 512) if rng.random() < 0.5 else len(data)
    return int(rng.integers(most + 1))


def _flip(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[min(_place(rng, data), len(data) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _truncate(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _insert(rng: np.random.Generator, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 65))) + data[at:]


def _duplicate(rng: np.random.Generator, data: bytes) -> bytes:
    """Repeat a block, up to some 2 MB of it: what nests then nests deep."""
    at, length = _place(rng, data), int(2 ** rng.uniform(0, 10))
    block = data[at : at + length]
    return (
        data[:at] + block * int(2 ** rng.uniform(0, 21 - np.log2(length))) + data[at:]
    )


def _remove(rng: np.random.Generator, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + int(2 ** rng.uniform(0, 10)) :]


def _set_number(rng: np.random.Generator, data: bytes) -> bytes:
    """Overwrite any place with an extreme integer."""
    return _with_number(rng, data, _place(rng, data))


def _change_count(rng: np.random.Generator, data: bytes) -> bytes:
    """Overwrite what looks like a count: a small integer of 8 bytes."""
    places = [
        at
        for at in range(min(len(data) - 7, 4096))
        if 0 < int.from_bytes(data[at : at + 8], "little") < 2**16
    ]
    at = places[rng.integers(len(places))] if places else _place(rng, data)
    return _with_number(rng, data, at)


def _with_number(rng: np.random.Generator, data: bytes, at: int) -> bytes:
    width = 8 if rng.random() < 0.5 else 4
    number = _EXTREMES[rng.integers(len(_EXTREMES))]
    number = (number + int(rng.integers(-2, 3))) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _edit_header(
    rng: np.random.Generator, data: bytes, suffix: str
) -> tuple[str, bytes]:
    """Edit a JSON file, or the JSON in the header of a safetensors file."""
    if suffix == ".json":
        return _edit_json(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    what, header = _edit_json(rng, data[8 : 8 + size])
    return f"header: {what}", struct.pack("<Q", len(header)) + header + data[8 + size :]


def _edit_json(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Change, delete, rename, move or nest a value of a JSON document."""
    document = {"": json.loads(data)}
    places = list(_places(document))
    holder, key = places[rng.integers(len(places))]
    other, other_key = places[rng.integers(len(places))]
    value, nested = holder[key], ""
    match rng.integers(7):
        case 0 if holder is not document:
            del holder[key]
            what = f"without {key!r}"
        case 1 if isinstance(holder, dict) and holder is not document:
            holder[f"{key}s"] = holder.pop(key)
            what = f"renamed {key!r}"
        case 2:
            holder[key] = json.loads(json.dumps(other[other_key]))
            what = f"{key!r} is {other_key!r}"
        case 3:
            open_, close = ("[", "]") if rng.random() < 0.5 else ('{"a":', "}")
            depth = int(2 ** rng.uniform(1, 18))
            nested, holder[key] = open_ * depth + "1" + close * depth, "<nested>"
            what = f"{key!r} nests {depth}"
        case 4 | 5 if isinstance(value, int | float):
            numbers = (*_JSON_EXTREMES, value + 1, value * 2, -value)
            holder[key] = numbers[rng.integers(len(numbers))]
            what = f"{key!r} = {str(holder[key])[:20]}"
        case _:
            holder[key] = _JSON_OTHERS[rng.integers(len(_JSON_OTHERS))]
            what = f"{key!r} = {str(holder[key])[:20]!r}"
    text = json.dumps(document[""]).replace('"<nested>"', nested)
    return f"json: {what}", text.encode()


def _places(value: Any) -> Any:
    """List holder and key of every value below a value."""
    pairs: Any = ()
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(pairs):
        yield value, key
        yield from _places(part)


def _mutate_archive(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Mutate a member of a zip archive, and write the archive anew with it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # Small members hold descriptions, such as the pickle; choose them more often.
    names = sorted(members, key=lambda name: (name.endswith("/data.pkl"), name))
    name = names[-1] if rng.random() < 0.4 else names[rng.integers(len(names))]
    content, draw = members[name], rng.random()
    if draw < 0.005:
        return f"{name}: inflates", _with_inflated(members, name)
    if name.endswith(".json") and draw < 0.8:
        what, members[name] = _edit_json(rng, content)
    elif name.endswith(".npy") and draw < 0.5:
        number = str(_EXTREMES[rng.integers(len(_EXTREMES))]).encode()
        members[name] = content.replace(b"'shape': (", b"'shape': (" + number + b", ")
        what = f"shape with {number.decode()}"
    else:
        what, members[name] = _mutate_bytes(rng, content)
    packed = zipfile.ZIP_DEFLATED if draw > 0.95 else zipfile.ZIP_STORED
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed) as archive:
        for member, value in members.items():
            archive.writestr(member, value)
    return f"{name}: {what}", stream.getvalue()


def _with_inflated(members: dict[str, bytes], name: str) -> bytes:
    """Write an archive with a member that inflates to 4 GB of zeros."""
    stream, block = io.BytesIO(), bytes(2**20)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, value in members.items():
            with archive.open(member, "w", force_zip64=True) as part:
                part.write(value)
                for _ in range(_INFLATED // len(block) if member == name else 0):
                    part.write(block)
    return stream.getvalue()
