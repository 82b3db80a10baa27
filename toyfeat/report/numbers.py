"""Numbers for people: rounded, and in columns with their decimal points in line."""

import math
import re
from collections.abc import Sequence

_LARGE = 1e15  # from here on digits before the point tell nothing
_NEARLY_ONE = 0.999  # three nines, which 4 digits can still show
_DIGIT, _POINT = "\u2007", "\u2008"  # spaces as wide as a digit and as a full stop


def rounded(value: float, decimals: int = 4) -> str:
    """Round a number for people.

    Args:
      value: any number.
      decimals: places of a number below 1; a larger one has as many fewer as it has
        digits before the point, and a small one as many more as two digits need.

    Returns:
      Whole numbers without decimals, ``"≈ 0"`` for what is not 0 and yet smaller than
      a hundredth of the last decimal.

    Example:
      >>> [rounded(x) for x in (0.99999994, 6.90e-16, 0.000404, 0.53, 12.3456, 20.0)]
      ['1.0000', '≈ 0', '0.00040', '0.5300', '12.35', '20']
    """
    size = abs(value)
    if not math.isfinite(value) or size >= _LARGE:
        return short(value)
    if value == int(value):
        return f"{int(value):,}"
    if size < 10.0 ** -(decimals + 2):
        return "≈ 0"
    first = math.floor(math.log10(size))  # power of ten of the first digit
    places = decimals - 1 - first if size >= 1 else max(decimals, 1 - first)
    return f"{value:,.{max(places, 0)}f}"


def short(value: float, digits: int = 4) -> str:
    """Write a number with few digits, with a power of ten if it is far from 1.

    Args:
      value: any number.
      digits: significant ones; at least six next to 1, which four would round to it.

    Returns:
      Text, such as a bound.

    Example:
      >>> short(0.99995), short(3.14159), short(1e-6)
      ('0.99995', '3.142', '1e-6')
    """
    if _NEARLY_ONE < abs(value) < 1:
        digits = max(digits, 6)
    return re.sub(r"e([+-])0*", r"e\1", f"{value:.{digits}g}").replace("e+", "e")


def aligned(texts: Sequence[str]) -> list[str]:
    """Pad the numbers of a column so that their decimal points are in line.

    Args:
      texts: numbers, or empty.

    Returns:
      Texts of one length, padded with spaces that are as wide as digits and points
      where digits are all equally wide; empty ones stay empty.

    Example:
      >>> column = aligned(["0.1223", "20", "≈ 0", ""])
      >>> [text.replace("\u2007", "_").replace("\u2008", ":") for text in column]
      ['__0.1223', '_20:____', '≈ 0:____', '']
    """
    parts = [text.partition(".") for text in texts]
    before = max((len(whole) for whole, _, _ in parts), default=0)
    after = max((len(rest) for _, _, rest in parts), default=0)
    # Without any point in the column there is none to make room for.
    space = _POINT if any(point for _, point, _ in parts) else ""
    return [
        whole.rjust(before, _DIGIT) + (point or space) + rest.ljust(after, _DIGIT)
        if whole + point
        else ""
        for whole, point, rest in parts
    ]
