import math

import pytest

from toyfeat.report.numbers import aligned, rounded, short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (-20.0, "-20"),
        (12345.0, "12,345"),
        (0.99999994, "1.0000"),
        (0.99996, "1.0000"),
        (0.99994, "0.9999"),
        (0.87759, "0.8776"),
        (-0.1116, "-0.1116"),
        (0.0011028, "0.0011"),
        (0.000404, "0.00040"),
        (0.0000968, "0.000097"),
        (1.0001e-6, "0.0000010"),
        (9.9e-7, "≈ 0"),
        (-6.90e-16, "≈ 0"),
        (1.23456, "1.235"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
        (2.5e20, "2.5e20"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_number_is_rounded_as_by_hand(value, text):
    assert rounded(value) == text


def test_decimals_are_as_many_as_asked_for():
    assert rounded(0.12345, 2) == "0.12"
    assert rounded(0.00012345, 2) == "0.00012"
    assert rounded(0.000012345, 2) == "≈ 0"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9999, "0.9999"),
        (0.99995, "0.99995"),
        (1e-6, "1e-6"),
        (0.45352, "0.4535"),
        (0.05, "0.05"),
        (1.0, "1"),
        (3e8, "3e8"),
        (1e-300, "1e-300"),
    ],
)
def test_a_bound_is_written_shortly_and_not_rounded_to_one(value, text):
    assert short(value) == text


def test_points_of_a_column_are_in_line():
    texts = ["0.1223", "-20", "≈ 0", "", "12,345.6", "nan"]
    column = aligned(texts)
    assert [text.strip() for text in column] == texts
    padded = [text for text in column if text]
    assert len({len(text) for text in padded}) == 1
    # The point, or the space in its place, is at one place.
    places = {next(i for i, c in enumerate(text) if c in ".\u2008") for text in padded}
    assert places == {len("12,345")}
    assert aligned(["1", "20", "≈ 0"]) == ["\u2007\u20071", "\u200720", "≈ 0"]
    assert aligned([]) == []
