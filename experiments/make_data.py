"""Problems for a tiny model, in MetaMathQA's row format (query, response, type), from a seed: long additions.

    python -m experiments.make_data --output FOLDER --rows 2000 --seed 1

Numbers are written with their lowest digit first, in the answer too: 95 + 17 is `59 + 71`, and the answer `211`. So
every digit needs the carry from the digit before it: what a block-by-block decoder has, and one that writes all
positions at once has not.
"""

import argparse
import json
import random
from pathlib import Path

DIGITS = 12


def written(value, width):
    """The digits of a number, lowest first, with zeros up to the width: 35 -> 5300."""
    return str(value).zfill(width)[::-1]


def problem(rng):
    """One row."""
    first, second = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
    query = f"{written(first, DIGITS)} + {written(second, DIGITS)}"
    return {"query": query, "response": f"The answer is: {written(first + second, DIGITS + 1)}", "type": "addition"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write train.jsonl into")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w") as file:
        for _ in range(args.rows):
            file.write(json.dumps(problem(rng)) + "\n")
    print(f"{folder}/train.jsonl: {args.rows:,} problems")


if __name__ == "__main__":
    main()
