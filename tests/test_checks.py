"Argument checks: an error names the argument, its range and the value; the rest passes."

import math
import re
import reprlib

import numpy as np
import pytest
import torch

from optgen.checks import check_choice, check_count, check_number, check_seed


@pytest.mark.parametrize(
    "bounds, good, bad",
    [
        (
            {},
            (-1e38, 0, 2.5, 1e-300),
            (math.inf, -math.inf, math.nan, "1", None, 1j, 1e39, 10**400),
        ),
        (dict(low=0), (0, 1), (-1e-9,)),
        (dict(high=2), (2, -5), (2.1,)),
        (dict(above=0), (1e-9, 2e-38), (0, -1, 1e-38, 5e-324)),
        (dict(above=-1), (-0.9, 0, 1e-300), (-1, -2)),
        (dict(below=1), (0.999,), (1, 2)),
        (dict(above=0, high=1), (0.5, 1), (0, 1.5)),
    ],
    ids=str,
)
def test_numbers_lie_in_their_range(bounds, good, bad):
    for value in good:
        check_number("f", **bounds, x=value)
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"got {reprlib.repr(value)}")):
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
    with pytest.raises(ValueError, match="n must be a Python integer, at least 1; got np.int64"):
        check_count("f", n=np.int64(3))
    check_count("f", n=2**31 - 1)
    for value in (2**31, 2**64, 10**400):
        with pytest.raises(ValueError, match="n must be an integer, at least 1, at most 21474836"):
            check_count("f", n=value)
    check_count("f", high=5, n=5)
    with pytest.raises(ValueError, match="at least 1, at most 5; got 6"):
        check_count("f", high=5, n=6)


def test_seeds_are_integers_of_64_bits():
    for seed in (0, -1, -(2**63), 2**64 - 1, np.int32(7), np.uint64(2**64 - 1)):
        check_seed("f", seed=seed)
        torch.Generator().manual_seed(int(seed))
    for seed in (-(2**63) - 1, 2**64, 10**400, 1.0, math.nan, True, "1", None, torch.tensor(1)):
        with pytest.raises(
            ValueError, match=r"f: seed must be an integer from -2\*\*63 to .*; got"
        ):
            check_seed("f", other=0, seed=seed)


def test_choices_are_listed():
    check_choice("f", ("a", "b"), kind="a", other="b")
    check_choice("f", (name for name in "ab"), kind="b", other="a")
    for value in ("c", "", None, 1, ["a"]):
        message = f"f: kind must be one of 'a', 'b'; got {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_choice("f", ("a", "b"), other="b", kind=value)
