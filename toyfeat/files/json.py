"""Read JSON files and their fields, with errors that name the file and the fault.

Foreign files may be broken in every way, so each file that the library reads goes
through :func:`read_json` or :func:`read_json_lines`, and each value whose type matters
through :func:`field`.  All errors are ``ValueError``, and a ``FileNotFoundError`` for a
file that does not exist.
"""

import json
import math
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, overload

MAX_BYTES = 2**28
"""Bound on the size of a file: ``store.json`` of 1.8 million shards has 256 MiB."""

_AGAIN = "fetch or save it again"
_REQUIRED = object()
_FLOAT_BITS = sys.float_info.max_exp - 1  # ints of so many bits are all floats
_SIMILAR = 0.7  # share of letters from which on a key may be another one misspelt
_KINDS = {
    int: "an int",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}

T = TypeVar("T")
D = TypeVar("D")


def read_json(
    path: str | Path, who: str, *, advice: str = _AGAIN, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read the object in a JSON file.

    ``NaN`` and ``Infinity``, which Python writes and JSON does not have, are read as
    floats; :func:`field` refuses them.

    Args:
      path: of the file.
      who: the function, for messages.
      advice: what to do about a broken file, the end of messages.
      max_bytes: larger files are refused.

    Returns:
      The object.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is larger than the bound, not UTF-8, not JSON, nested too
        deeply, has a number that is too long or a key twice, or is not an object.

    Example:
      >>> read_json("no/such/cfg.json", "load")
      Traceback (most recent call last):
      FileNotFoundError: load: there is no file no/such/cfg.json; give another path
    """
    value = parse_json(read_bytes(path, who, max_bytes), path, who, advice=advice)
    if not isinstance(value, dict):
        raise _broken(path, who, _short(value), advice)
    return value


def read_json_lines(
    path: str | Path, who: str, *, advice: str = "delete that line"
) -> list[dict[str, Any]]:
    """Read a file with a JSON object in every line.

    A last line without its newline, which a kill cut off, is left out.

    Args:
      path: of the file.
      who: the function, for messages.
      advice: what to do about a broken line, the end of messages.

    Returns:
      The objects.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line is broken; says which.
    """
    rows = []
    # What follows the last newline is empty, or a line that was cut off.
    lines = read_bytes(path, who).split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        source = f"line {number} of {path}"
        row = parse_json(line, source, who, advice=advice)
        if not isinstance(row, dict):
            raise _broken(source, who, _short(row), advice)
        rows.append(row)
    return rows


def read_bytes(path: str | Path, who: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file that must not be larger than a bound.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is larger than ``max_bytes``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{who}: there is no file {path}; give another path")
    with Path(path).open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(
            f"{who}: {path} must have at most {max_bytes} bytes, got more; it is not a "
            "file of settings"
        )
    return data


def parse_json(
    data: bytes | str, source: str | Path, who: str, *, advice: str = _AGAIN
) -> Any:
    """Parse a JSON text of any value.

    Args:
      data: the text, bytes in UTF-8.
      source: where it is from, for messages.
      who: the function, for messages.
      advice: what to do about a broken text, the end of messages.

    Raises:
      ValueError: as :func:`read_json`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        fault = f"bytes that are not UTF-8 at {error.start}"
    except json.JSONDecodeError as error:
        fault = f"other text ({error})"
    except RecursionError:
        fault = "lists or objects that are nested too deeply"
    except ValueError as error:  # a number with too many digits, or a key twice
        fault = str(error)
    raise _broken(source, who, fault, advice)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, with no key twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        ((twice, _),) = counts.most_common(1)
        raise ValueError(f"the key {_short(twice)} twice")
    return values


@overload
def field(
    values: Mapping[str, Any],
    name: str,
    kind: type[T],
    source: str | Path,
    who: str,
    *,
    low: float | None = None,
    high: float | None = None,
) -> T: ...
@overload
def field(
    values: Mapping[str, Any],
    name: str,
    kind: type[T],
    source: str | Path,
    who: str,
    *,
    default: D,
    low: float | None = None,
    high: float | None = None,
) -> T | D: ...
def field(
    values: Mapping[str, Any],
    name: str,
    kind: type,
    source: str | Path,
    who: str,
    *,
    default: Any = _REQUIRED,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Look up a value of an object and check its type and range.

    Args:
      values: from :func:`read_json`.
      name: of the value.
      kind: ``int``, ``float``, ``bool``, ``str``, ``dict`` or ``list``.  An ``int`` is
        a ``float`` too; ``true`` is no ``int``, ``"false"`` is no ``bool``, and
        ``NaN`` and ``Infinity`` are no ``float``.
      source: the file, for messages.
      who: the function, for messages.
      default: result if there is no such value; without it the value is required.
        With ``default=None`` the value may also be ``null``.
      low: least value that is allowed.
      high: largest value that is allowed.

    Returns:
      The value, as ``kind``, or the default.

    Raises:
      ValueError: if the value is missing, of another type or out of range.

    Example:
      >>> field({"k": 3}, "k", int, "cfg.json", "load", low=1)
      3
      >>> field({"k": True}, "k", int, "cfg.json", "load")
      Traceback (most recent call last):
      ValueError: load: 'k' in cfg.json must be an int, got True; correct it there
    """
    wanted = f"{who}: {name!r} in {source} must be {_wanted(kind, low, high)}"
    # Missing: the default, or an error that names a key that may be misspelt.
    if name not in values:
        if default is not _REQUIRED:
            return default
        near = get_close_matches(name, list(values), 1, _SIMILAR)
        also = f" ({near[0]!r} is there)" if near else ""
        raise ValueError(f"{wanted}, got nothing{also}; add it there")
    value = values[name]
    if value is None and default is None:
        return default
    if not _is_kind(value, kind) or not _in_range(value, low, high):
        raise ValueError(f"{wanted}, got {_short(value)}; correct it there")
    return kind(value)


def list_field(
    values: Mapping[str, Any],
    name: str,
    kind: type[T],
    source: str | Path,
    who: str,
    *,
    low: float | None = None,
    high: float | None = None,
) -> list[T]:
    """Look up a list and check the type and range of its entries.

    Args are those of :func:`field`, where ``kind`` is that of every entry.

    Raises:
      ValueError: if the list is missing, is no list, or has an entry of another type
        or out of range.
    """
    entries = field(values, name, list, source, who)
    named = {f"{name}[{i}]": entry for i, entry in enumerate(entries)}
    return [field(named, n, kind, source, who, low=low, high=high) for n in named]


def check_keys(
    values: Mapping[str, Any],
    known: Iterable[str],
    source: str | Path,
    who: str,
    *,
    ignore_off: bool = False,
) -> None:
    """Refuse keys that are not known, such as misspelt ones.

    Args:
      values: from :func:`read_json`.
      known: all keys that are known.
      source: the file, for messages.
      who: the function, for messages.
      ignore_off: pass keys whose value is off (``null``, ``false``, ``0``, ``"none"``),
        as newer versions of a format add them, unless they look like a known key.

    Raises:
      ValueError: if there is such a key; says which may have been meant.
    """
    known = list(known)
    for key, value in values.items():
        if key in known:
            continue
        # An option that is off changes nothing, unless it is a known one misspelt.
        near = get_close_matches(key, known, 1, _SIMILAR)
        if ignore_off and not near and value in (None, False, "none"):
            continue
        meant = f"{near[0]!r} is known" if near else f"known are {', '.join(known)}"
        raise ValueError(
            f"{who}: {_short(key)} in {source} is not known here, got "
            f"{_short(value)}; {meant}"
        )


def _is_kind(value: Any, kind: type) -> bool:
    """Check the type of a value, where ``true`` is a bool and nothing else."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float and isinstance(value, int | float):
        return isinstance(value, float) or value.bit_length() <= _FLOAT_BITS
    return isinstance(value, kind)


def _in_range(value: Any, low: float | None, high: float | None) -> bool:
    """Check that a number is finite and in a range."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def _wanted(kind: type, low: float | None, high: float | None) -> str:
    """Describe a type and a range."""
    bounds = {"at least": low, "at most": high}
    parts = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return " ".join([_KINDS[kind], " and ".join(parts)]).strip()


def _broken(source: str | Path, who: str, fault: str, advice: str) -> ValueError:
    """Make the error of a text that is not what it should be."""
    return ValueError(
        f"{who}: {source} must be a JSON object in UTF-8, got {fault}; {advice}"
    )


def _short(value: Any) -> str:
    """Show a value of any size in a few words."""
    return reprlib.repr(value)
