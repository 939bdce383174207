"""Small problems of different lengths in MetaMathQA's row format (query, response, type): stories of sums."""

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
