"""Problems for tiny models, in MetaMathQA's row format (query, response, type), from a seed.

    python -m experiments.make_data --output FOLDER --rows 2000 --seed 1
    python -m experiments.make_data --output FOLDER --rows 2000 --seed 1 --task lag --rule 1

addition: numbers are written with their lowest digit first, in the answer too: 95 + 17 is `59 + 71`, and the answer
`211`. So every digit needs the carry from the digit before it: what a block-by-block decoder has, and one that writes
all positions at once has not.

lag: 6 blocks of 4 digits from 0 to 7; the first two are the query, the other four the response. Digit j of a block is
T[digit j of the block before, digit j of the block before that], T a Latin square of 8 x 8 that the rule chooses. So a
digit needs two digits of earlier blocks, and a model that knows one rule has another table to learn, not another form.
"""

import argparse
import json
import random
from pathlib import Path

from blockwise.cli import InputError, run_script

DIGITS = 12  # of a number in addition
VALUES, WIDTH, ANSWER_BLOCKS = 8, 4, 4  # of lag: digits from 0 to 7, digits in a block, blocks of a response


def written(value: int, width: int) -> str:
    """The digits of a number, lowest first, with zeros up to the width: 35 -> 5300."""
    return str(value).zfill(width)[::-1]


def addition(rng: random.Random) -> dict[str, str]:
    """A row of the task addition."""
    first, second = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
    query = f"{written(first, DIGITS)} + {written(second, DIGITS)}"
    return {"query": query, "response": f"The answer is: {written(first + second, DIGITS + 1)}", "type": "addition"}


def latin_square(rule: int) -> list[list[int]]:
    """The table of a rule of the task lag: rows are drawn until one repeats no digit in a column of those before it."""
    rng, square = random.Random(f"rule {rule}"), []
    while len(square) < VALUES:
        row = rng.sample(range(VALUES), VALUES)
        if all(digit != above for other in square for digit, above in zip(row, other)):
            square.append(row)
    return square


def lag(rng: random.Random, square: list[list[int]]) -> dict[str, str]:
    """A row of the task lag, by the table of its rule."""
    blocks = [[rng.randrange(VALUES) for _ in range(WIDTH)] for _ in range(2)]
    for _ in range(ANSWER_BLOCKS):
        blocks.append([square[near][far] for near, far in zip(blocks[-1], blocks[-2])])
    digits = "".join(str(digit) for block in blocks for digit in block)
    return {"query": digits[: 2 * WIDTH], "response": digits[2 * WIDTH :], "type": "lag"}


def problems(task: str, rule: int, number: int, seed: int | str) -> list[dict[str, str]]:
    """Rows of a task, `addition` or `lag`, from a seed. The rule is lag's."""
    rng = random.Random(seed)
    if task == "addition":
        return [addition(rng) for _ in range(number)]
    square = latin_square(rule)
    return [lag(rng, square) for _ in range(number)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write train.jsonl into")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", choices=("addition", "lag"), default="addition")
    parser.add_argument("--rule", type=int, help="of the task lag, which needs it")
    args = parser.parse_args()
    if (args.rule is None) == (args.task == "lag"):
        raise InputError("--rule belongs to --task lag, which needs one; the task addition has no rules.")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w") as file:
        for row in problems(args.task, args.rule, args.rows, args.seed):
            file.write(json.dumps(row) + "\n")
    print(f"{folder}/train.jsonl: {args.rows:,} problems")


if __name__ == "__main__":
    run_script(main)
