"""Right and wrong by exact cases; intervals and tests against published values and brute force."""

import math
from decimal import Decimal
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwise import scoring


@pytest.mark.parametrize(
    "text, number",
    [
        ("She makes $18.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("first #### 3, then #### 4 or 5", "4"),
        ("#### 42\nThe answer is: 7", "42"),
        ("The answer is: 42", "42"),
        ("3 apples and 4 pears are 7.", "7"),
        ("It costs $1,000.50 in all.", "1000.50"),
        ("so -3", "-3"),
        ("10-5", "5"),
        ("(2+3)-4", "4"),
        ("1,2345", "2345"),
        ("a half is .5", "0.5"),
        ("50%", "50"),
        ("2)18", "18"),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert scoring.number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "####", "####\n", "#### none of the 3"[:10]])
def test_no_number_is_never_right(text):
    assert scoring.number(text) is None and not scoring.same_number(text, text)


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.00", "${}", "{:,}."]))
def test_a_number_is_right_however_it_is_written(value, form):
    assert scoring.same_number("2 + 2 = 4\nThe answer is: " + form.format(value), f"5 ... #### {value}")
    assert not scoring.same_number("The answer is: " + form.format(value + 1), f"#### {value}")


@pytest.mark.parametrize(
    "completion, gold, right",
    [
        ("... so it is \\boxed{\\frac12}.", "\\frac{1}{2}", True),
        ("#### 1/2\nThe answer is: 1/2", "\\frac{1}{2}", True),
        ("The answer is: 1+x^2", "x^2+1", True),
        ("The answer is: $(-\\infty, 2]$", "(-\\infty,2]", True),
        ("The answer is: (3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("The answer is: 6-5i", "6-5i", True),
        ("The answer is: \\text{east}", "\\text{east}", True),
        ("The answer is: (-\\infty, 2)", "(-\\infty,2]", False),
        ("The answer is: 3", "\\frac{1}{2}", False),
        ("The answer is: \\frac{14}{3}.", "\\frac{14}{3}", True),
        ("so \\boxed{\\$36}", "\\$36", True),
        ("", "5", False),
        ("The answer is:", "5", False),
        ("nothing here", "\\frac{1}{2}", False),
        ("The answer is: 5", "We add.\nThe answer is: 5", True),
    ],
)
def test_mathematics(completion, gold, right):
    assert scoring.same_math(completion, gold) is right


def test_wilson():
    """Against the definition: the shares that a two-sided z test at 5 % does not reject."""
    for right, n in ((0, 10), (7, 200), (100, 200), (9, 10), (10, 10)):
        low, high = scoring.wilson(right, n)
        for share in (low, high):
            if 1e-9 < share < 1 - 1e-9:
                z = abs(right / n - share) / math.sqrt(share * (1 - share) / n)
                assert z == pytest.approx(1.959964, abs=1e-5)
        assert 0 <= low < high <= 1 and (low < 1e-9) == (right == 0) and (high > 1 - 1e-9) == (right == n)
    assert scoring.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, Table I


def pairs(both, first, second, neither):
    """Results of two models, given how many problems both, only the first, only the second, and neither solved."""
    first_model = [True] * both + [True] * first + [False] * second + [False] * neither
    return [True] * both + [False] * first + [True] * second + [False] * neither, first_model


@pytest.mark.parametrize(
    "table, interval",  # Newcombe 1998, Statistics in Medicine 17, 2635-2650, Table II, method 10
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((0, 0, 0, 30), (-0.1135, 0.1135)), ((53, 0, 1, 0), (-0.0977, 0.0496))],
)
def test_interval_of_the_difference(table, interval):
    base, tuned = pairs(*table)
    gained, lost, found, _ = scoring.paired(base, tuned)
    assert (gained, lost) == table[1:3] and found == pytest.approx(interval, abs=5e-5)


def test_mcnemar_by_counting():
    """If both models are alike, each changed problem is a fair coin: count the outcomes at least as uneven."""
    for gained, lost in ((0, 0), (5, 0), (4, 1), (3, 3), (2, 7)):
        base, tuned = pairs(6, gained, lost, 4)
        *_, p = scoring.paired(base, tuned)
        coins = list(product((0, 1), repeat=gained + lost))
        uneven = [abs(2 * sum(c) - len(c)) >= abs(gained - lost) for c in coins]
        assert p == pytest.approx(sum(uneven) / len(uneven))


@pytest.mark.parametrize(
    "tokens, share",
    [
        ([], 0), ([5, 5, 5], 0), ([1, 2, 3, 4], 0), ([5] * 5, 1 / 2), ([5] * 20, 16 / 17), ([1, 2] * 4, 3 / 5),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6), ([1, 2, 3, 9, 1, 2, 3], 0), (list("abcdabcd"), 1 / 5),
    ],
)  # fmt: skip
def test_repetition(tokens, share):
    assert scoring.repetition(tokens) == pytest.approx(share)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5))
def test_repetition_is_that_of_a_loop(tokens, n):
    """Each n-gram that has begun earlier, too, counts once."""
    starts = range(len(tokens) - n + 1)
    again = sum(any(tokens[i : i + n] == tokens[j : j + n] for j in range(i)) for i in starts)
    assert scoring.repetition(tokens, n) == pytest.approx(again / len(starts) if starts else 0)


def test_the_share_of_answers_that_are_not_empty():
    assert scoring.not_empty(["", " \n", "a", " b "]) == 0.5 and scoring.not_empty(["0"]) == 1
