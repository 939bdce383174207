"""What an answer is worth to reinforcement: the scores published with diffu-GRPO (d1), and the rules of eval.py.

A reward is a function (completion, row) -> float. `row` is a line of the data: a dict with a question, and with what
the reward compares the answer with. docs/rl.md has a table of both. No reward takes anything else into account.
"""

import math
import re
from fractions import Fraction

from blockwise import sandbox, scoring
from blockwise.cli import InputError
from blockwise.prompts import ANSWER, QUESTION, text_of

SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", re.DOTALL)
PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)
ANSWERS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
TERM = re.compile(r"(?:(\d+(?:\.\d+)?|\.\d+)\*)?(\w+)", re.ASCII)  # of REWARD: 0.5*countdown
TOKEN = re.compile(r"\s*(?:(0|[1-9][0-9]{0,17})(?![0-9])|([-+*/()]))")  # of an expression
DEPTH = 50  # parentheses within parentheses
NUMBERS, TARGET = ("nums", "numbers", "input"), ("target", "output")  # Countdown-Tasks-3to4, TinyZero, d1
PUZZLE, SOLUTION = ("puzzle", "Puzzle"), ("solution", "Solution")
COUNTDOWN_QUESTION = (
    "Using only the numbers {numbers}, create an arithmetic expression that evaluates to exactly {target}. You must "
    "use all numbers from the list, and each number must be used exactly once. You may use the operations +, -, *, "
    "and / as needed. Write only the final expression inside <answer></answer> tags, without an equals sign or the "
    "target number."
)
SUDOKU_QUESTION = (
    "Solve this Sudoku puzzle. It is given row by row, with 0 for an empty cell: {puzzle}\n"
    "Write the digits of the solution in the same way inside <answer></answer> tags."
)


# ---------------------------------------------------------------- what a row holds


def first_of(row: dict, names: tuple[str, ...], where: str) -> str:
    """The text that a row has under the first of the names that is there. Raises InputError.

    where: the file and line of the row, for the message.
    """
    text = text_of(row, names)
    if text is None:
        raise InputError(f"{where} needs a text as {' or '.join(names)}.")
    return text


def number_of(row: dict, where: str) -> str:
    """The reference answer of a row, which has a number. Raises InputError."""
    gold = first_of(row, ANSWER, where)
    if scoring.number(gold) is None:
        raise InputError(f"{where}: its answer has no number, which REWARD number compares with.")
    return gold


def mathematics_of(row: dict, where: str) -> str:
    """The reference answer of a row, or the box of its solution. Raises InputError."""
    gold = first_of(row, (*ANSWER, "solution"), where)
    gold = gold if (box := boxed(gold)) is None else box
    if not scoring.expression(gold, whole=True):
        raise InputError(f"{where}: nothing can be read in its answer, which REWARD math and math_answer compare with.")
    return gold


def hash_answer_of(row: dict, where: str) -> str:
    """What stands behind the `####` of a row of GSM8K. Raises InputError."""
    _, marker, tail = first_of(row, ANSWER, where).partition("####")
    if not marker or not (gold := tail.partition("####")[0].strip()):
        raise InputError(f"{where}: its answer has nothing behind ####, which REWARD gsm8k compares with.")
    return gold


def countdown_of(row: dict, where: str) -> tuple[list[int], int]:
    """The numbers and the target of a row; numbers may be a list or a text such as "30,100,93". Raises InputError."""
    numbers, target = (next((row[name] for name in names if name in row), None) for names in (NUMBERS, TARGET))
    numbers = numbers.split(",") if isinstance(numbers, str) else numbers
    try:
        if isinstance(numbers, list) and numbers and not {type(n) for n in [*numbers, target]} - {int, str}:
            return [int(n) for n in numbers], int(target)
    except ValueError:
        pass  # the sentence below says what is needed
    raise InputError(
        f"{where}: REWARD countdown needs whole numbers as {', '.join(NUMBERS[:-1])} or {NUMBERS[-1]}, and one as "
        f"{' or '.join(TARGET)}."
    )


def sudoku_of(row: dict, where: str) -> tuple[str, str]:
    """The puzzle of a row, with 0 for an empty cell, and its solution, as texts of equal length. Raises InputError."""
    puzzle, solution = first_of(row, PUZZLE, where), first_of(row, SOLUTION, where)
    if len(puzzle) != len(solution) or not f"{puzzle}{solution}".isdecimal() or "0" not in puzzle:
        raise InputError(f"{where}: puzzle and solution must have equally many digits, and the puzzle a 0.")
    return puzzle, solution


def nothing_of(row: dict, where: str) -> None:
    """What a reward reads that only looks at the answer."""


def question(row: dict, where: str) -> str:
    """The question of a row; of numbers and target, or of a puzzle, it is made. Raises InputError."""
    names = (*QUESTION, "prompt", "text")
    if not any(name in row for name in names):
        if any(name in row for name in NUMBERS):
            numbers, target = countdown_of(row, where)
            return COUNTDOWN_QUESTION.format(numbers=numbers, target=target)
        if any(name in row for name in PUZZLE):
            return SUDOKU_QUESTION.format(puzzle=sudoku_of(row, where)[0])
    return first_of(row, names, where)


# ---------------------------------------------------------------- the rewards


def number(completion: str, row: dict) -> float:
    """1 for the number of the reference answer, as `eval.py --task gsm8k` counts it."""
    return float(scoring.same_number(completion, number_of(row, "the row")))


def math_answer(completion: str, row: dict) -> float:
    """1 for an answer that equals the reference in mathematics, as `eval.py --task math500` counts it."""
    return float(scoring.same_math(completion, mathematics_of(row, "the row")))


def xml_count(completion: str) -> float:
    """0.125 for each of four tags that is there exactly once, less 0.001 for each character behind the last one.

    As published: those characters count twice, and the whole answer counts if no line ends behind </answer>.
    """
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    once = [completion.count(tag) == 1 for tag in tags]
    score = 0.125 * sum(once)
    if once[2]:
        score -= 0.001 * len(completion.split("\n</answer>\n")[-1])
    if once[3]:
        score -= 0.001 * (len(completion.split("\n</answer>")[-1]) - 1)
    return score


def form(completion: str, row: dict | None = None) -> float:
    """The format of <reasoning> and <answer> alone, at most 1.5: the count of tags, and 0.5 each for two patterns."""
    return xml_count(completion) + 0.5 * bool(SOFT.match(completion)) + 0.5 * bool(STRICT.match(completion))


def gsm8k(completion: str, row: dict) -> float:
    """The format, 0.5 for an answer of digits only, and 2 for the text of the reference. At most 4."""
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    return form(completion) + 0.5 * answer.isdigit() + 2.0 * (answer == hash_answer_of(row, "the row"))


def mathematics(completion: str, row: dict) -> float:
    """2 if the last \\boxed equals the reference, 0.5 for <answer>, and 0.5 for a box in it, else 0.25. At most 3."""
    gold, box = mathematics_of(row, "the row"), boxed(completion)
    right = box is not None and scoring.same_math(f"\\boxed{{{box}}}", gold)
    _, tag, inside = completion.partition("<answer>")
    inside = inside.split("</answer>")[0].split("<answer>")[0] if tag else completion
    return 2.0 * right + 0.5 * bool(tag) + (0.5 if "\\boxed" in inside else 0.25)


def boxed(text: str) -> str | None:
    """What is in the last \\boxed{...} of a text, with braces that close; None if there is none."""
    _, found, tail = text.rpartition("\\boxed{")
    depth = 1
    for i, letter in enumerate(tail):
        depth += (letter == "{") - (letter == "}")
        if found and not depth:
            return tail[:i]
    return None


def countdown(completion: str, row: dict) -> float:
    """1 for an expression in <answer> that has each number once and gives the target, 0.1 for any other answer."""
    numbers, target = countdown_of(row, "the row")
    answers = ANSWERS.findall(completion)
    if not answers:
        return 0.0
    try:
        value, used = calculate(answers[-1])
    except (ValueError, ZeroDivisionError):
        return 0.1
    return 1.0 if sorted(used) == sorted(numbers) and value == target else 0.1


def sudoku(completion: str, row: dict) -> float:
    """The share of the empty cells for which the digits in the last <answer> are right. Cells without one are wrong."""
    puzzle, solution = sudoku_of(row, "the row")
    answers = ANSWERS.findall(completion)
    digits = [letter for letter in answers[-1] if letter.isdigit()] if answers else []
    empty = [i for i, cell in enumerate(puzzle) if cell == "0"]
    return sum(i < len(digits) and digits[i] == solution[i] for i in empty) / len(empty)


def code(completion: str, row: dict) -> float:
    """The count of tags, the share of tests that the first ```python block passes, and 0.5 if <answer> has it."""
    tests = sandbox.tests_of(row, "the row")
    program, answer = PROGRAM.search(completion), ANSWERS.search(completion)
    score = xml_count(completion)
    if program and program[1]:
        score += 0.5 * bool(answer and program[0] in answer[1])
        score += sandbox.passed(program[1], tests) / len(tests.tests)
    return score


# ---------------------------------------------------------------- expressions of countdown


def calculate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of whole numbers, + - * / and parentheses, and the numbers in it.

    Raises ValueError for anything else, and ZeroDivisionError.
    """
    tokens, position, text = [], 0, text.strip()
    while position < len(text):
        found = TOKEN.match(text, position)
        if not found:
            raise ValueError(f"{text[position : position + 20]!r} is no part of an expression")
        tokens.append(found[1] or found[2])
        position = found.end()
    tokens.reverse()  # the next one is the last
    value = total_of(tokens, 0)
    if tokens:
        raise ValueError(f"{tokens[-1]!r} is too much")
    return value, [int(number) for number in re.findall("[0-9]+", text)]


def total_of(tokens: list[str], depth: int) -> Fraction:
    """Takes a sum from the end of `tokens`. depth: of the parentheses around it. Raises ValueError."""
    value = product_of(tokens, depth)
    while tokens and tokens[-1] in "+-":
        sign = 1 if tokens.pop() == "+" else -1
        value += sign * product_of(tokens, depth)
    return value


def product_of(tokens: list[str], depth: int) -> Fraction:
    """Takes a product from the end of `tokens`. Raises ValueError."""
    value = factor_of(tokens, depth)
    while tokens and tokens[-1] in "*/":
        value = value * factor_of(tokens, depth) if tokens.pop() == "*" else value / factor_of(tokens, depth)
    return value


def factor_of(tokens: list[str], depth: int) -> Fraction:
    """Takes a number or an expression in parentheses, with signs before it. Raises ValueError."""
    sign = 1
    while tokens and tokens[-1] in "+-":
        sign *= 1 if tokens.pop() == "+" else -1
    token = tokens.pop() if tokens else "the end"
    if token == "(" and depth < DEPTH:
        value = total_of(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise ValueError("a parenthesis is not closed")
        return sign * value
    if not token.isdecimal():
        raise ValueError(f"{token!r} where a number should be")
    return sign * Fraction(token)


# ---------------------------------------------------------------- the knob REWARD

REWARDS = {
    "number": number, "math_answer": math_answer, "format": form, "gsm8k": gsm8k, "math": mathematics,
    "countdown": countdown, "sudoku": sudoku, "code": code,
}  # fmt: skip
READERS = {  # what each of them reads in a row
    "number": number_of, "math_answer": mathematics_of, "format": nothing_of, "gsm8k": hash_answer_of,
    "math": mathematics_of, "countdown": countdown_of, "sudoku": sudoku_of, "code": sandbox.tests_of,
}  # fmt: skip


def parse(text: str, allow_code: bool = False) -> list[tuple[str, float]]:
    """Reads REWARD, such as "gsm8k" or "gsm8k+0.5*countdown". Returns names and weights. Raises InputError.

    allow_code: whether programs that the model has written may be run, which `code` does.
    """
    parsed = []
    for term in text.replace(" ", "").split("+"):
        found = TERM.fullmatch(term)
        if not found or found[2] not in REWARDS:
            known = ", ".join(REWARDS)
            raise InputError(f"REWARD={text!r}: {term!r} is no reward. They are {known}; sums are a+0.5*b.")
        parsed.append((found[2], float(found[1] or 1)))
    if any(name == "code" for name, _ in parsed):
        if not allow_code:
            raise InputError(
                f"REWARD={text!r} runs programs that the model has written, on this machine: read in docs/rl.md what "
                "they are kept from, then say ALLOW_CODE_EXECUTION=True."
            )
        sandbox.check()
    return parsed


def total(parsed: list[tuple[str, float]], completion: str, row: dict) -> float:
    """The reward of an answer: the weighted sum of those that `parse` has returned."""
    return math.fsum(weight * REWARDS[name](completion, row) for name, weight in parsed)


def check_row(parsed: list[tuple[str, float]], row: dict, where: str) -> None:
    """Refuses a row that lacks what the rewards read. where: its file and line. Raises InputError."""
    for name, _ in parsed:
        READERS[name](row, where)
