"""Doublings of time to an aim, against curves whose doublings are known."""

import math

import pytest

from optgen.evidence.published import doublings_to_aim


@pytest.mark.parametrize("power", [0.2, 1.0, 2.0])
def test_a_power_law_gains_the_same_ratio_with_each_doubling(power):
    times = [3, 6, 12, 24]
    values = [7 * t**-power for t in times]
    for doublings in (0.5, 3):
        aim = 7 * (24 * 2**doublings) ** -power
        assert doublings_to_aim(times, values, aim, True) == pytest.approx(doublings)


def test_a_logarithm_gains_the_same_amount_with_each_doubling():
    times = [1, 2, 4]
    values = [10 - 0.5 * math.log2(t) for t in times]
    assert doublings_to_aim(times, values, 8.0, False) == pytest.approx(2)


def test_the_value_at_half_the_time_is_interpolated():
    # At 5, half of 10, the line from (4, 9) to (8, 5) is at 8; the gain to 10 is 8 - 4.
    assert doublings_to_aim([4, 8, 10], [9.0, 5.0, 4.0], 2.0, False) == pytest.approx(0.5)
    expected = math.log(4 / 2) / math.log(8 / 4)
    assert doublings_to_aim([4, 8, 10], [9.0, 5.0, 4.0], 2.0, True) == pytest.approx(expected)


def test_what_has_arrived_and_what_never_does():
    assert doublings_to_aim([1, 2], [3.0, 2.0], 2.0, False) == 0
    assert doublings_to_aim([1, 2], [3.0, 3.0], 2.0, False) == math.inf
    assert doublings_to_aim([1, 2], [3.0, 4.0], 2.0, True) == math.inf
    with pytest.raises(ValueError, match="begins at 6 and ends at 10"):
        doublings_to_aim([6, 10], [3.0, 2.0], 1.0, False)
