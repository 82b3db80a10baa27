"""Types of the numbers of a job, with the values that they may have."""

from typing import Annotated, NamedTuple


class Limit(NamedTuple):
    """Values of a number that an entry may have; stands with the entry's type.

    Attributes:
      at_least: smallest value, or ``None``.
      above: value that has to be exceeded, or ``None``.
      finite: whether ``inf`` is refused; NaN is in any case.
      at_most: largest value, or ``None``.
    """

    at_least: int | None = None
    above: int | None = None
    finite: bool = True
    at_most: int | None = None


Count = Annotated[int, Limit(at_least=1)]
CountOrZero = Annotated[int, Limit(at_least=0)]
# Keys of JAX drop higher bits, so that larger seeds would be others.
Seed = Annotated[int, Limit(at_least=0, at_most=2**31 - 1)]
TokenOrNone = Annotated[int, Limit(at_least=-1)]
Positive = Annotated[float, Limit(above=0)]
PositiveOrInf = Annotated[float, Limit(above=0, finite=False)]
Coefficient = Annotated[float, Limit(at_least=0)]
