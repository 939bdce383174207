"""Rewards by hand: the published scores, with their odd corners; expressions against Python's own parser."""

import ast
import json
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwise import rewards
from blockwise.cli import InputError

SUM = {"question": "Natalia sold clips ...", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 72"}
BOX = {"problem": "What is a half?", "solution": "It is \\boxed{\\frac{1}{2}}.", "level": "Level 1"}
COUNTDOWN = {"target": 98, "nums": [44, 19, 35]}
SUDOKU = {"Puzzle": "3102200002100320", "Solution": "3142243142131324"}  # 8 cells are empty
GOOD = "<reasoning>\n48 + 24\n</reasoning>\n<answer>\n72\n</answer>\n"


@pytest.mark.parametrize(
    "completion, score",
    [
        (GOOD, 0.5),
        (GOOD.strip(), 0.5 - 0.001 * len(GOOD.strip()) + 0.001),  # no line ends behind </answer>: all of it counts
        (GOOD + "bye", 0.5 - 2 * 0.003),
        (GOOD + "x" * 1000, 0.5 - 2 * 1.0),
        (GOOD + "é🙂\n", 0.5 - 2 * 0.003),  # characters, not bytes
        (GOOD + GOOD, 0),  # every tag is there twice
        ("", 0),
        ("72", 0),
        ("<reasoning>\nabc", 0.125),
        ("\n</reasoning>\n", 0.125),
        ("\n<answer>\n", 0.125 - 0.001 * 10),
        ("\n</answer>", 0.125 + 0.001),
        ("<reasoning>\na\n</reasoning>\n<answer>\n7", 0.375 - 0.001 * len("<reasoning>\na\n</reasoning>\n<answer>\n7")),
        ("<reasoning>a</reasoning><answer>7</answer>", 0),  # the tags must have lines of their own
    ],
)
def test_the_count_of_tags(completion, score):
    assert rewards.xml_count(completion) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    "completion, more",  # what the score has besides the count of tags
    [
        (GOOD, 0.5 + 0.5 + 0.5 + 2),
        (GOOD.strip(), 0.5 + 0.5 + 2),  # the strict format needs the line to end
        (GOOD + "\n", 0.5 + 0.5 + 0.5 + 2),  # as `$` in a regular expression has it
        (GOOD + "bye", 0.5 + 0.5 + 2),
        ("Well: " + GOOD, 0.5 + 2),  # both formats start at the start
        (GOOD.replace("72", "73"), 0.5 + 0.5 + 0.5),
        (GOOD.replace("72", "-72"), 0.5 + 0.5),
        (GOOD.replace("72", "$72"), 0.5 + 0.5),
        (GOOD.replace("72", "72.0"), 0.5 + 0.5),
        (GOOD.replace("72", "٧٢"), 0.5 + 0.5 + 0.5),  # digits, but not the text of the reference
        (GOOD.replace("72", "  72  "), 0.5 + 0.5 + 0.5 + 2),
        (GOOD.replace("72", "71") + GOOD, 0.5 + 0.5 + 0.5 + 2),  # the last answer counts
        (GOOD + GOOD.replace("72", "71"), 0.5 + 0.5 + 0.5),
        ("72", 0.5 + 2),  # without tags, all of it is the answer
        (" 72\n", 0.5 + 2),
        ("It is 72", 0),
        ("<answer>72", 0.5 + 2),
        ("<reasoning>a</reasoning> <answer>72</answer> bye", 0.5 + 0.5 + 2),
        ("<reasoning>a</reasoning> so <answer>72</answer>", 0.5 + 2),
        ("<answer>\n72\n</answer>\n<reasoning>\na\n</reasoning>\n", 0.5 + 2),
        ("", 0),
        ("<answer></answer>", 0),
        ("x" * 100_000, 0),
    ],
)
def test_gsm8k(completion, more):
    score = rewards.xml_count(completion) + more
    assert rewards.REWARDS["gsm8k"](completion, SUM) == pytest.approx(score, abs=1e-9)


def test_the_best_and_a_bad_score_of_gsm8k_in_numbers():
    assert rewards.REWARDS["gsm8k"](GOOD, SUM) == 4
    assert rewards.REWARDS["format"](GOOD, {}) == 1.5
    assert rewards.REWARDS["gsm8k"](GOOD + "x" * 3000, SUM) == pytest.approx(0.5 - 6 + 0.5 + 0.5 + 2)


def test_what_gsm8k_compares_with():
    reward = rewards.REWARDS["gsm8k"]
    assert reward("1,450", {"answer": "so\n#### 1,450"}) == 2  # as published: the same text, which is not of digits
    assert reward("1450", {"answer": "so\n#### 1,450"}) == 0.5
    assert reward("-3", {"response": "#### -3"}) == 2 and reward("5", {"answer": "#### 5 #### 6"}) == 2.5


@pytest.mark.parametrize(
    "completion, score",
    [
        ("<answer>\\boxed{\\frac{1}{2}}</answer>", 3),
        ("<answer>so \\boxed{0.5}</answer>", 3),
        ("<answer>\\boxed{\\dfrac12}", 3),  # an answer that does not end
        ("<reasoning>\\boxed{1/2}</reasoning><answer>1/2</answer>", 2.75),
        ("<answer>1/2</answer>", 0.75),  # right only in a box
        ("\\boxed{\\frac{1}{2}}", 2.5),
        ("\\boxed{3}, no, \\boxed{\\frac{1}{2}}", 2.5),
        ("\\boxed{\\frac{1}{2}}, no, \\boxed{3}", 0.5),
        ("<answer>\\boxed{3}</answer>", 1),
        ("<answer>\\boxed{\\frac{1}{2}", 1),  # the braces do not close
        ("<answer></answer><answer>\\boxed{1/2}</answer>", 2.75),  # a box in the first answer only
        ("", 0.25),
        ("\\boxed{}", 0.5),
        ("{{{}}}\\boxed{\\text{½}}", 0.5),
    ],
)
def test_math(completion, score):
    assert rewards.REWARDS["math"](completion, BOX) == score
    assert (
        rewards.REWARDS["math"](completion, {"problem": "?", "answer": "\\frac{1}{2}"}) == score
    )  # as MATH-500 has it


def test_the_rules_of_eval():
    assert rewards.REWARDS["number"]("The answer is: 72.", SUM) == 1
    assert rewards.REWARDS["number"]("72 or 71", SUM) == 0 == rewards.REWARDS["number"]("", SUM)
    assert rewards.REWARDS["number"]("The answer is: 21", {"query": "5 + 7", "response": "The answer is: 21"}) == 1
    assert rewards.REWARDS["math_answer"]("The answer is: 1/2", BOX) == 1
    assert rewards.REWARDS["math_answer"]("The answer is: 2", BOX) == 0


@pytest.mark.parametrize(
    "answer, score",
    [
        ("44 + 19 + 35", 1), ("\n(44+19)+35\n", 1), ("35+44--19", 1), ("44+19+35 = 98", 0.1), ("44+19", 0.1),
        ("44+19+35+44", 0.1), ("44+19+35+0", 0.1), ("98", 0.1), ("", 0.1), ("44*19*35", 0.1), ("44/(19-19)+35", 0.1),
        ("44/0", 0.1), ("44**19", 0.1), ("44//19", 0.1), ("44+19+35.0", 0.1), ("044+19+35", 0.1), ("44 19 35", 0.1),
        ("44+19+35)", 0.1), ("(44+19+35", 0.1), ("44+19(35)", 0.1), ("__import__('os')", 0.1), ("４４+19+35", 0.1),
        ("4 4+19+35", 0.1), ("(" * 40 + "44+19+35" + ")" * 40, 1), ("(" * 9999 + "44+19+35" + ")" * 9999, 0.1),
        ("-" * 9998 + "44+19+35", 1), ("9" * 9999, 0.1), ("44+19+35 <b>", 0.1), ("+", 0.1), ("()", 0.1),
    ],
)  # fmt: skip
def test_countdown(answer, score):
    assert rewards.REWARDS["countdown"](f"so <answer>{answer}</answer>", COUNTDOWN) == score


def test_which_answer_counts_in_countdown():
    reward = rewards.REWARDS["countdown"]
    assert reward("44+19+35", COUNTDOWN) == 0 == reward("", COUNTDOWN) == reward("<answer>44+19+35", COUNTDOWN)
    assert reward("<answer>1</answer><answer>44+19+35</answer> bye", COUNTDOWN) == 1
    assert reward("<answer>44+19+35</answer><answer>1</answer>", COUNTDOWN) == 0.1
    assert reward("<answer>8/(3-8/3)</answer>", {"nums": [8, 3, 8, 3], "target": 24}) == 1  # exact in fractions
    assert reward("<answer>100-93+30</answer>", {"input": "30,100,93", "output": "37"}) == 1  # as d1's file has it
    assert reward("<answer>1+1</answer>", {"numbers": [1, 1], "target": 2}) == 1


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " - ", " / "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
        inner.map("+{}".format),
        inner.map("( {} )".format),
    ),
    max_leaves=12,
)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.USub: operator.neg, ast.UAdd: operator.pos}


def by_python(node):
    """The value of an expression as Python's parser has read it."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](by_python(node.left), by_python(node.right))
    if isinstance(node, ast.UnaryOp):
        return OPERATORS[type(node.op)](by_python(node.operand))
    return Fraction(node.value)


@given(expressions)
def test_expressions_are_those_of_python(text):
    tree = ast.parse(text, mode="eval").body
    try:
        value = by_python(tree)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            rewards.calculate(text)
        return
    used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    found, numbers = rewards.calculate(text)
    assert found == value and sorted(numbers) == sorted(used)


@given(st.text("0123456789+-*/() .x", max_size=12))
def test_what_python_does_not_read_is_no_expression(text):
    """The other way round, too, but for what Countdown does not have: names, points, powers, // and calls."""
    try:
        value, _ = rewards.calculate(text)
    except (ValueError, ZeroDivisionError):
        return
    assert by_python(ast.parse(text.strip(), mode="eval").body) == value


@pytest.mark.parametrize(
    "completion, score",
    [
        ("<answer>3142243142131324</answer>", 1),
        ("<answer>\n31 42\n24 31\n42 13\n13 24\n</answer>", 1),
        ("<answer>3102200002100320</answer>", 0),
        ("<answer>3142243142131321</answer>", 7 / 8),
        ("<answer>31422431</answer>", 4 / 8),
        ("<answer>31422431421313249999</answer>", 1),
        ("<answer>0" + "3142243142131324"[:15] + "</answer>", 0),  # moved by one
        ("<answer>3142243142131324</answer><answer></answer>", 0),
        ("3142243142131324", 0),
        ("<answer>no</answer>", 0),
        ("", 0),
    ],
)
def test_sudoku(completion, score):
    assert rewards.REWARDS["sudoku"](completion, SUDOKU) == score


def test_cells_that_were_given_do_not_count():
    assert rewards.REWARDS["sudoku"]("<answer>9149949149999994</answer>", SUDOKU) == 5 / 8
    assert (
        rewards.REWARDS["sudoku"]("<answer>123456789</answer>", {"puzzle": "100000780", "solution": "123456789"}) == 1
    )


# ---------------------------------------------------------------- the knob


def test_reward_is_read_and_added_up():
    assert rewards.parse("gsm8k") == [("gsm8k", 1)]
    parsed = rewards.parse(" gsm8k + 0.5*number+.25*format")
    assert parsed == [("gsm8k", 1), ("number", 0.5), ("format", 0.25)]
    assert rewards.total(parsed, GOOD, SUM) == 4 + 0.5 + 0.25 * 1.5


@pytest.mark.parametrize(
    "text", ["", "gsm9k", "gsm8k+", "2*", "gsm8k*2", "gsm8k-number", "1e3*gsm8k", "nan*gsm8k", "٣*gsm8k"]
)
def test_a_reward_that_is_none_is_named(text):
    with pytest.raises(InputError, match="REWARD=.* is no reward. They are number, math_answer, format, gsm8k, math"):
        rewards.parse(text)


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("number", {"answer": "none"}, "rows.jsonl, line 7: its answer has no number"),
        ("number", {}, "rows.jsonl, line 7 needs a text as answer or response"),
        ("number", {"answer": 7}, "needs a text as answer"),
        ("gsm8k", {"answer": "The answer is: 7"}, "nothing behind ####"),
        ("gsm8k", {"answer": "#### "}, "nothing behind ####"),
        ("math", {"answer": " "}, "needs a text as answer or response or solution"),
        ("countdown", {"nums": [1, 2]}, "needs whole numbers as nums, numbers or input, and one as target or output"),
        ("countdown", {"nums": [], "target": 1}, "needs whole numbers"),
        ("countdown", {"nums": [1.5], "target": 1}, "needs whole numbers"),
        ("countdown", {"nums": [True], "target": 1}, "needs whole numbers"),
        ("countdown", {"input": "1,x", "output": "1"}, "needs whole numbers"),
        ("sudoku", {"puzzle": "0123"}, "needs a text as solution or Solution"),
        ("sudoku", {"puzzle": "0123", "solution": "412"}, "equally many digits"),
        ("sudoku", {"puzzle": "4123", "solution": "4123"}, "and the puzzle a 0"),
        ("sudoku", {"puzzle": "....", "solution": "4123"}, "equally many digits"),
    ],
)
def test_a_row_that_lacks_what_a_reward_reads_is_named(name, row, message):
    with pytest.raises(InputError, match=message):
        rewards.check_row(rewards.parse(f"format+{name}"), row, "rows.jsonl, line 7")


@pytest.mark.parametrize(
    "line, reward, question",
    [
        ('{"question": "How many?", "answer": "#### 7"}', "gsm8k+number", "How many?"),
        ('{"problem": "a", "solution": "\\\\boxed{1}"}', "math+math_answer", "a"),
        ('{"query": "5 + 7", "response": "The answer is: 21", "type": "addition"}', "number", "5 + 7"),
        ('{"target": 98, "nums": [44, 19, 35]}', "countdown", "numbers [44, 19, 35], create"),
        ('{"input": "30,100,93", "output": "23"}', "countdown", "numbers [30, 100, 93], create"),
        ('{"Puzzle": "3102200002100320", "Solution": "3142243142131324"}', "sudoku", "cell: 3102200002100320"),
        ('{"question": "Mine", "puzzle": "0", "solution": "1"}', "sudoku", "Mine"),
    ],
)
def test_rows_of_the_published_data_sets(line, reward, question):
    row = json.loads(line)
    rewards.check_row(rewards.parse(reward), row, "a row")
    assert question in rewards.question(row, "a row")


def test_a_row_without_a_question_is_named():
    with pytest.raises(InputError, match="line 3 needs a text as question or problem or query or prompt or text"):
        rewards.question({"answer": "7"}, "line 3")
