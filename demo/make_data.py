"""A dataset of arithmetic problems in MetaMathQA's row format (query, response, type), from a seed.

    python -m demo.make_data --output FOLDER --rows 2000 --seed 1

Each answer is a chain of small sums, one a line, so that a later block needs the earlier ones.
"""

import argparse
import json
import random
from pathlib import Path

THINGS = ["apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps"]
PEOPLE = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida"]


def problem(rng):
    """One row: a story of two to four changes to a number of things."""
    who, things, total = rng.choice(PEOPLE), rng.choice(THINGS), rng.randint(10, 60)
    query, lines = [f"{who} has {total} {things}."], []
    for _ in range(rng.randint(2, 4)):
        change = rng.randint(2, 9)
        if rng.random() < 0.6:
            query.append(f"{who} gets {change} more.")
            lines.append(f"{total} + {change} = {total + change}")
            total += change
        else:
            query.append(f"{who} gives away {change}.")
            lines.append(f"{total} - {change} = {total - change}")
            total -= change
    query.append(f"How many {things} does {who} have now?")
    response = "\n".join(lines) + f"\nThe answer is: {total}"
    return {"query": " ".join(query), "response": response, "type": "STORY_Sums"}


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
