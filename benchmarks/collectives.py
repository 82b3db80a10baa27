"""What a compiled program exchanges between devices, read from its text."""

import math
import re
from typing import NamedTuple

_KIND = re.compile(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?(%[\w.-]+) \(.*\{$")
_LOOP = re.compile(r' while\(.* body=(%[\w.-]+).*"known_trip_count":\{"n":"(\d+)"')
_BYTES = {"pred": 1, "bf16": 2}


class Collective(NamedTuple):
    """One exchange of a program.

    Attributes:
      kind: such as ``"all-reduce"``.
      sizes: entries of the arrays that a device has after it.
      bytes: of these arrays, times the passes of a loop whose number is known.
      source: name of the operation that it belongs to.
    """

    kind: str
    sizes: tuple[int, ...]
    bytes: int
    source: str


def read_collectives(text: str) -> list[Collective]:
    """Read the exchanges of a program, those of a loop of unknown length once.

    Args:
      text: ``compiled.as_text()``.

    Returns:
      One entry for each, in the order of the text.

    Example:
      >>> line = '%sum = (f32[], f32[80,16]{1,0}) all-reduce(%a, %b), op_name="dot"'
      >>> [(x.kind, x.sizes, x.bytes, x.source) for x in read_collectives(line)]
      [('all-reduce', (1, 1280), 5124, 'dot')]
    """
    passes = {body: int(num) for body, num in _LOOP.findall(text)}
    exchanges, times = [], 1
    for line in text.splitlines():
        # Lines of a computation follow its name.
        if begin := _COMPUTATION.match(line):
            times = passes.get(begin[1], 1)
        kind = _KIND.search(line)
        if kind is None or " = " not in line[: kind.start() + 1]:
            continue
        arrays = _ARRAY.findall(line[: kind.start()].split(" = ", 1)[1])
        sizes = [
            math.prod(int(n) for n in shape.split(",") if n) for _, shape in arrays
        ]
        widths = [_BYTES.get(dtype) or int(dtype[1:]) // 8 for dtype, _ in arrays]
        source = re.search(r'op_name="([^"]*)"', line)
        exchanges.append(
            Collective(
                kind=kind[1],
                sizes=tuple(sizes),
                bytes=times * sum(n * w for n, w in zip(sizes, widths, strict=True)),
                source=source[1] if source else "",
            )
        )
    return exchanges
