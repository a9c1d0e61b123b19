"Argument checks: an error names the argument, its range and the value; the rest passes."

import math
import re

import pytest

from optgen.checks import check_choice, check_count, check_number


@pytest.mark.parametrize(
    "bounds, good, bad",
    [
        ({}, (-1e300, 0, 2.5), (math.inf, -math.inf, math.nan, "1", None, 1j)),
        (dict(low=0), (0, 1), (-1e-9,)),
        (dict(high=2), (2, -5), (2.1,)),
        (dict(above=0), (1e-9,), (0, -1)),
        (dict(below=1), (0.999,), (1, 2)),
        (dict(above=0, high=1), (0.5, 1), (0, 1.5)),
    ],
    ids=str,
)
def test_numbers_lie_in_their_range(bounds, good, bad):
    for value in good:
        check_number("f", **bounds, x=value)
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"got {value!r}")):
            check_number("f", **bounds, x=value)


def test_the_message_of_a_number_names_every_bound():
    for bounds, words in (
        ({}, "a finite number; got"),
        (dict(low=0, below=1), "a finite number, at least 0, below 1; got"),
        (dict(above=0.5, high=9), "a finite number, above 0.5, at most 9; got"),
    ):
        with pytest.raises(ValueError, match=f"Owner: rate must be {words} nan"):
            check_number("Owner", **bounds, fine=1 if "low" not in bounds else 0, rate=math.nan)


def test_counts_are_integers_from_their_least():
    check_count("f", n=1, m=7)
    check_count("f", low=0, n=0)
    for value in (0, -1, 1.0, True, "1", None):
        message = f"f: n must be an integer, at least 1; got {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_count("f", m=3, n=value)
    with pytest.raises(ValueError, match="at least 3; got 2"):
        check_count("f", low=3, n=2)


def test_choices_are_listed():
    check_choice("f", ("a", "b"), kind="a", other="b")
    check_choice("f", (name for name in "ab"), kind="b", other="a")
    for value in ("c", "", None, 1, ["a"]):
        message = f"f: kind must be one of 'a', 'b'; got {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_choice("f", ("a", "b"), other="b", kind=value)
