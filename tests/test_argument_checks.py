"""Checks of arguments: what they accept, what they refuse, and how they say it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat import checks

INF, NAN = float("inf"), float("nan")
MESSAGE = r"^f: x must be [^;]+, got [^;]+; [^;]+$"  # who wanted what, what came, hint


def traced(kind):
    """A tracer of a dtype, kept only to be looked at."""
    held = []
    jax.make_jaxpr(held.append)(jax.ShapeDtypeStruct((), kind))
    return held[0]


# What is an int, whoever made it, and what only looks like one.
INTS = {
    "int": 3,
    "negative zero": -0,
    "numpy int": np.int64(3),
    "numpy unsigned": np.uint8(3),
    "numpy 0-d": np.array(3),
    "jax scalar": jnp.int32(3),
    "beyond 64 bits": 2**80,
}
NO_INTS = {
    "bool": True,
    "numpy bool": np.True_,
    "jax bool": jnp.array(True),
    "whole float": 3.0,
    "numpy float": np.float32(3),
    "jax float": jnp.float32(3),
    "nan": NAN,
    "word": "3",
    "none": None,
    "vector": np.array([3]),
    "jax vector": jnp.array([3]),
    "list": [3],
}
NUMBERS = INTS | {
    "float": 0.5,
    "negative zero as float": -0.0,
    "numpy float": np.float16(0.5),
    "bfloat16": jnp.bfloat16(0.5),
    "jax float": jnp.float32(0.5),
    "subnormal": 5e-324,
}
del NUMBERS["beyond 64 bits"]  # not a NumPy int, but a number: see the test of ranges
NO_NUMBERS = {
    "bool": False,
    "numpy bool": np.False_,
    "jax bool": jnp.array(False),
    "word": "0.5",
    "none": None,
    "complex": 1j,
    "vector": np.ones(1),
    "key": jax.random.key(0),
    "list": [0.5],
}


@pytest.mark.parametrize("value", INTS.values(), ids=INTS)
def test_ints_of_any_library_become_ints_of_python(value):
    number = checks.check_int("f", "x", value, least=0)
    assert type(number) is int
    assert number == value


@pytest.mark.parametrize("value", NO_INTS.values(), ids=NO_INTS)
def test_what_is_no_int_is_refused(value):
    with pytest.raises(TypeError, match=MESSAGE):
        checks.check_int("f", "x", value)
    with pytest.raises(ValueError, match=MESSAGE):
        checks.check_int("f", "x", value, error=ValueError)


def test_a_traced_int_is_refused_with_the_reason():
    wanted = r"got traced int32 array of shape \(\); pass one that is known before jit"
    with pytest.raises(TypeError, match=wanted):
        checks.check_int("f", "x", traced(jnp.int32))


@pytest.mark.parametrize(
    ("value", "bounds", "wanted"),
    [
        (0, {}, "an int of at least 1, got 0; pass a larger one"),
        (0, {"most": 4, "about": ", rows"}, "an int in 1 .. 4, rows, got 0; pass a la"),
        (5, {"most": 4}, "an int in 1 .. 4, got 5; pass a smaller one"),
        (5, {"least": None, "most": 4}, "an int of at most 4, got 5; pass a smaller"),
        ("a", {"least": None}, "an int, got 'a'; pass an int"),
        (1.5, {"most": 4}, "an int in 1 .. 4, got 1.5; pass an int"),
    ],
)
def test_messages_of_ints_name_the_range(value, bounds, wanted):
    with pytest.raises((TypeError, ValueError), match=MESSAGE) as caught:
        checks.check_int("f", "x", value, **bounds)
    assert str(caught.value).startswith(f"f: x must be {wanted}")


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS)
def test_numbers_come_back_as_they_are(value):
    assert checks.check_number("f", "x", value, least=0) is value


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=MESSAGE):
        checks.check_number("f", "x", value)


def test_a_traced_number_is_checked_by_its_type_only():
    number = traced(jnp.float32)
    assert checks.check_number("f", "x", number, above=0) is number
    with pytest.raises(TypeError, match="got traced bool array"):
        checks.check_number("f", "x", traced(jnp.bool_))


@pytest.mark.parametrize(
    ("value", "bounds", "wanted"),
    [
        (NAN, {}, "a finite number, got nan"),
        (jnp.float32(NAN), {}, "a finite number, got nan"),
        (NAN, {"finite": False}, "a number, got nan"),
        (-INF, {}, "a finite number, got -inf"),
        pytest.param(10**400, {}, "a finite number, got 1000", id="beyond float64"),
        (-1, {"least": 0}, "a finite number of at least 0, got -1"),
        (-0.0, {"above": 0}, "a finite number above 0, got -0.0"),
        (np.float32(0), {"above": 0, "most": 1}, "a finite number in (0, 1], got 0.0"),
        (1.5, {"least": 0, "most": 1}, "a finite number in [0, 1], got 1.5"),
        (0, {"above": 0, "finite": False}, "a number above 0, got 0"),
    ],
)
def test_messages_of_numbers_name_the_range(value, bounds, wanted):
    with pytest.raises(ValueError, match=MESSAGE) as caught:
        checks.check_number("f", "x", value, **bounds)
    assert str(caught.value).startswith(f"f: x must be {wanted}")


def test_borders_of_ranges_and_infinity_where_it_is_allowed():
    assert checks.check_number("f", "x", 1, above=0, most=1) == 1
    assert checks.check_number("f", "x", -0.0, least=0) == 0
    assert checks.check_number("f", "x", INF, above=0, finite=False) == INF
    assert checks.check_number("f", "x", -INF, finite=False) == -INF


@pytest.mark.parametrize("value", [0, 1, None, "no", np.int8(1), jnp.array(True)])
def test_flags_are_bools_and_nothing_that_counts_as_one(value):
    assert checks.check_flag("f", "x", np.False_) is False
    assert checks.check_flag("f", "x", True) is True
    with pytest.raises(TypeError, match=MESSAGE):
        checks.check_flag("f", "x", value)


@pytest.mark.parametrize("value", ["c", "", None, 0, ["a"], np.ones(2)])
def test_choices_are_named_in_the_message(value):
    assert checks.check_choice("f", "x", "a", {"a": 1, "b": 2}) == "a"
    with pytest.raises(ValueError, match=r"x must be one of a, b, got .*; pass one of"):
        checks.check_choice("f", "x", value, ["a", "b"])


@pytest.mark.parametrize("value", [None, 0.5, "len", np.ones(2), {}])
def test_functions_and_records(value):
    assert checks.check_function("f", "x", len, "of a list") is len
    with pytest.raises(TypeError, match=r"x must be a function of a list, got .*; do"):
        checks.check_function("f", "x", value, "of a list", hint="do")
    assert checks.check_type("f", "x", 1 + 1j, complex) == 1 + 1j
    with pytest.raises(TypeError, match=r"x must be a complex, got .*; pass one"):
        checks.check_type("f", "x", value, complex)


KEYS = {
    "typed": jax.random.key(0),
    "raw": jax.random.PRNGKey(0),
    "raw of numpy": np.array([0, 1], np.uint32),
    "of another generator": jax.random.key(0, impl="rbg"),
}
NO_KEYS = {
    "int": 0,
    "none": None,
    "typed keys": jax.random.split(jax.random.key(0)),
    "raw keys": jnp.zeros((2, 2), jnp.uint32),
    "ints": np.array([0, 1]),
    "list": [0, 1],
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_one_key_of_either_kind_is_a_key(key):
    assert checks.check_key("f", key) is key


@pytest.mark.parametrize("key", NO_KEYS.values(), ids=NO_KEYS)
def test_ints_and_several_keys_are_no_key(key):
    with pytest.raises(
        TypeError, match=r"^f: key must be one random key, got .*; make"
    ):
        checks.check_key("f", key)


def test_a_traced_key_is_a_key():
    seen = []
    jax.make_jaxpr(lambda key: seen.append(checks.check_key("f", key)))(KEYS["typed"])
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_float_arrays_come_back_as_they_are(kind):
    array = np.ones(2, jnp.dtype(kind))
    assert checks.check_array("f", "x", array, hint="convert", floats=True) is array
    tracer = traced(jnp.float32)
    assert checks.check_array("f", "x", tracer, hint="convert") is tracer


@pytest.mark.parametrize(
    "value",
    [[1.0], 1.0, None, "a", np.ones(2, int), np.ones(2, bool), np.ones(2, complex)],
)
def test_no_float_array(value):
    with pytest.raises(TypeError, match=MESSAGE):
        checks.check_array("f", "x", value, hint="convert", floats=True)


@pytest.mark.parametrize("value", [[1.0], 1.0, None, 1, np.ones(2, complex)])
def test_no_real_array(value):
    assert checks.check_array("f", "x", jnp.arange(2), hint="convert").shape == (2,)
    with pytest.raises(TypeError, match=MESSAGE):
        checks.check_array("f", "x", value, hint="convert")


# Values, and the functions that convert them: array, real, float, host float, integer.
CONVERTED = {
    "list": ([1, 2], "arfhi"),
    "number": (2, "arfhi"),
    "floats": (np.ones(2), "arfh"),
    "nan": ([NAN, INF], "arfh"),
    "jax floats": (jnp.ones(2), "arfh"),
    "bools": (np.ones(2, bool), "arfh"),
    "complex": (np.ones(2, complex), "a"),
    "traced": (traced(jnp.float32), "arf"),
    "words": (["a"], ""),
    "none": (None, ""),
    "ragged": ([[1], [1, 2]], ""),
    "objects": ([object()], ""),
}
CONVERTERS = {
    "a": checks.as_array,
    "r": checks.as_real,
    "f": checks.as_floats,
    "h": checks.as_host_floats,
    "i": checks.as_integers,
}
KINDS = {"f": np.float32, "h": np.float64}


@pytest.mark.parametrize(("value", "accepted"), CONVERTED.values(), ids=CONVERTED)
def test_conversions_keep_values_or_refuse(value, accepted):
    for letter, convert in CONVERTERS.items():
        if letter not in accepted:
            with pytest.raises(TypeError, match=MESSAGE):
                convert("f", "x", value)
            continue
        array = convert("f", "x", value)
        assert array.dtype == KINDS.get(letter, array.dtype)
        if not isinstance(array, jax.core.Tracer):
            np.testing.assert_array_equal(array, np.asarray(value))


def test_messages_show_values_in_a_line():
    shown = {
        "None": None,
        "'a'": "a",
        "int32 array of shape (2, 3)": jnp.zeros((2, 3), jnp.int32),
        "float64 array of shape (0,)": np.zeros(0),
        "dict": {"a": np.ones(9)},
        "(3, 'a')": (3, "a"),
        "list": [[1.0]],
        "ShapeDtypeStruct of shape (2,)": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    for text, value in shown.items():
        assert checks.show(value) == text
    assert not re.search(r"\n", checks.show("a\nb" * 1000))
    assert len(checks.show("a" * 1000)) == 80
