"""train_grpo.py with two more rewards, for a model with random weights: all others give its answers 0.

vowels: the share of vowels among the letters of an answer; same: every answer is worth the same.
"""

import train_grpo
from blockwise import rewards
from blockwise.cli import run_script


def vowels(completion, row):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))


rewards.REWARDS |= {"vowels": vowels, "same": lambda completion, row: 0.1}
rewards.READERS |= {"vowels": rewards.nothing_of, "same": rewards.nothing_of}

if __name__ == "__main__":
    run_script(train_grpo.main)
