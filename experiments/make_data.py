"""Problems for tiny models, in MetaMathQA's row format (query, response, type), from a seed.

    python -m experiments.make_data --output FOLDER --rows 2000 --seed 1
    python -m experiments.make_data --output FOLDER --rows 2000 --seed 1 --task lag --rule 1

addition: numbers are written with their lowest digit first, in the answer too: 95 + 17 is `59 + 71`, and the answer
`211`. So every digit needs the carry from the digit before it: what a block-by-block decoder has, and one that writes
all positions at once has not.

lag: 6 blocks of 4 digits from 0 to 7; the first two are the query, the other four the response. Digit j of a block is
T[digit j of the block before, digit j of the block before that], T a Latin square of 8 x 8 that the rule chooses. So a
digit needs two digits of earlier blocks, and a model that knows one rule has another table to learn, not another form.

lag3: the same with digits from 0 to 3, each of which needs three: T[digit j of the block before, digit j + 1 of that
block (of the last: the first), digit j of the block before that], T a table of 4 x 4 x 4.
"""

import argparse
import json
import random
from pathlib import Path

from blockwise.cli import InputError, run_script

DIGITS = 12  # of a number in addition
WIDTH, ANSWER_BLOCKS = 4, 4  # of lag and lag3: digits in a block, blocks of a response


def written(value: int, width: int) -> str:
    """The digits of a number, lowest first, with zeros up to the width: 35 -> 5300."""
    return str(value).zfill(width)[::-1]


def addition(rng: random.Random) -> dict[str, str]:
    """A row of the task addition."""
    first, second = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
    query = f"{written(first, DIGITS)} + {written(second, DIGITS)}"
    return {"query": query, "response": f"The answer is: {written(first + second, DIGITS + 1)}", "type": "addition"}


def latin_square(rng: random.Random, size: int) -> list[list[int]]:
    """Rows are drawn until one repeats no digit in a column of those before it."""
    square = []
    while len(square) < size:
        row = rng.sample(range(size), size)
        if all(digit != above for other in square for digit, above in zip(row, other)):
            square.append(row)
    return square


def lag(rng: random.Random, square: list[list[int]]) -> dict[str, str]:
    """A row of the task lag, by the table of its rule."""
    return in_blocks("lag", rng, 8, lambda near, far: [square[a][b] for a, b in zip(near, far)])


def lag3(rng: random.Random, table: list[int]) -> dict[str, str]:
    """A row of the task lag3, by the table of its rule, of 64 digits."""
    return in_blocks(
        "lag3", rng, 4, lambda near, far: [table[16 * a + 4 * b + c] for a, b, c in zip(near, near[1:] + near[:1], far)]
    )


def in_blocks(task: str, rng: random.Random, values: int, following) -> dict[str, str]:
    """A row of random first two blocks, and the blocks that follow: following(block before, block before that)."""
    blocks = [[rng.randrange(values) for _ in range(WIDTH)] for _ in range(2)]
    for _ in range(ANSWER_BLOCKS):
        blocks.append(following(blocks[-1], blocks[-2]))
    digits = "".join(str(digit) for block in blocks for digit in block)
    return {"query": digits[: 2 * WIDTH], "response": digits[2 * WIDTH :], "type": task}


def problems(task: str, rule: int | None, number: int, seed: int | str) -> list[dict[str, str]]:
    """Rows of a task, `addition`, `lag` or `lag3`, from a seed. rule: chooses the table of lag or lag3."""
    rng, of_rule = random.Random(seed), random.Random(f"rule {rule}")
    if task == "lag":
        square = latin_square(of_rule, 8)
        return [lag(rng, square) for _ in range(number)]
    if task == "lag3":
        table = of_rule.sample(list(range(4)) * 16, 64)
        return [lag3(rng, table) for _ in range(number)]
    return [addition(rng) for _ in range(number)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write train.jsonl into")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", choices=("addition", "lag", "lag3"), default="addition")
    parser.add_argument("--rule", type=int, help="of the tasks lag and lag3, which need it")
    args = parser.parse_args()
    if (args.rule is None) != (args.task == "addition"):
        raise InputError("the tasks lag and lag3 need a --rule, a number; the task addition has none.")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w") as file:
        for row in problems(args.task, args.rule, args.rows, args.seed):
            file.write(json.dumps(row) + "\n")
    print(f"{folder}/train.jsonl: {args.rows:,} problems")


if __name__ == "__main__":
    run_script(main)
