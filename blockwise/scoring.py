"""What an answer is worth: right or wrong, how repetitive, how sure shares are, and whether one model beats another."""

import math
import re
from decimal import Decimal

from math_verify import parse, verify

NUMBER = re.compile(r"(?<![\d.])(?:(?<!\))-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")  # 5-3 has no -3
Z = 1.959963984540054  # 95 % of a normal distribution lie within Z standard deviations


def number(text: str) -> Decimal | None:
    """The number that an answer gives, as GSM8K counts it: the first one behind its last `####`, else the last one."""
    head, marker, tail = text.rpartition("####")
    found = NUMBER.findall(tail)
    if not found:
        return None
    return Decimal(found[0 if marker else -1].replace(",", ""))


def same_number(completion: str, gold: str) -> bool:
    """Whether an answer gives the number of the reference answer. 1,000 is 1000.00; no number is never right."""
    return number(completion) is not None and number(completion) == number(gold)


def same_math(completion: str, gold: str) -> bool:
    """Whether an answer equals the reference in mathematics, by the math-verify package."""
    return verify(expression(gold, whole=True), expression(completion))


def expression(text: str, whole: bool = False) -> list:
    """What math-verify reads in a text: behind MetaMathQA's `The answer is:`, else wherever it finds an answer.

    whole: without that phrase, the text is nothing but the answer, as in MATH-500.
    """
    _, phrase, tail = text.replace("\\$", "").rpartition("The answer is:")
    if (phrase or whole) and "$" not in tail and "\\boxed" not in tail:
        return parse(f"${tail.strip().rstrip('.')}$")  # without the dollars it would not be read as LaTeX
    return parse(tail)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of right answers, (low, high)."""
    share, spread = right / n, Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / n / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(base: list[bool], tuned: list[bool]) -> tuple[int, int, tuple[float, float], float]:
    """Compares two models on the same problems. base, tuned: lists of bool.

    Returns how many problems only the tuned and only the base model solved; the 95 % interval of the difference of
    their shares, (low, high), by Newcombe's score method for paired data (Statistics in Medicine 17, 1998, method 10);
    and the p value of the exact McNemar test (two-sided), to which only the two counts matter.
    """
    n, both = len(base), sum(b and t for b, t in zip(base, tuned, strict=True))
    gained, lost = sum(tuned) - both, sum(base) - both
    neither = n - both - gained - lost
    (share_1, (low_1, high_1)), (share_0, (low_0, high_0)) = ((sum(x) / n, wilson(sum(x), n)) for x in (tuned, base))
    cross, product = both * neither - gained * lost, sum(tuned) * (n - sum(tuned)) * sum(base) * (n - sum(base))
    cross = max(cross - n / 2, 0) if cross > 0 else cross  # continuity correction of a positive correlation
    phi = cross / math.sqrt(product) if product else 0.0

    def reach(x, y):
        return math.sqrt(x * x - 2 * phi * x * y + y * y)

    difference = share_1 - share_0
    low = difference - reach(share_1 - low_1, high_0 - share_0)
    high = difference + reach(high_1 - share_1, share_0 - low_0)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return gained, lost, (low, high), min(1.0, 2 * tail)


def repetition(tokens: list[int], n: int = 4) -> float:
    """The share of an answer's n-grams that it has already had: 1 - distinct / all (Welleck et al. 2019).

    tokens: ids, or any others; 0 for an answer that is too short to have an n-gram.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def not_empty(completions: list[str]) -> float:
    """The share of answers that are more than white space."""
    return sum(bool(text.strip()) for text in completions) / len(completions)
