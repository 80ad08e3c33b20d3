"""Makes preference pairs in which short answers are preferred, and counts wins.

    python examples/short_answers.py
    qlora-jax train --config examples/short_answers.yaml
    python examples/short_answers.py --run runs/short_answers

The first command writes `train.jsonl` and `valid.jsonl` to `--out`, the second trains
with ORPO, and the third counts wins among the held-out questions before and after
training: an answer wins if it has the right word and at most three words.

    {"prompt": "Rosa has a green boat. What colour is it?",
     "chosen": "Green.",
     "rejected": "Rosa has a green boat."}

The data depends only on a seed. Training and held-out questions share no name or thing.
"""

import argparse
import json
import pathlib
import random
import re

NAMES = (
    "Alice Bruno Chen David Elena Farid Grace Hugo Ivan Julia Laura Marco Nadia Omar"
)
THINGS = "car boat house coat chair lamp cup bag pen clock ball door kite drum tent"
COLOURS = "red green blue yellow black white brown orange purple grey".split()
PLACES = (
    "garden kitchen cellar attic station library office market school harbour".split()
)
FACTS = (
    ("{name} has a {colour} {thing}.", "What colour is it?", "colour"),
    ("The {thing} of {name} is in the {place}.", "Where is it?", "place"),
    ("In the {place}, {name} keeps a {thing}.", "Who keeps it there?", "name"),
    ("{name} left a {colour} {thing} in the {place}.", "Where was it left?", "place"),
)
LONG = (
    "{fact}",  # a sentence, as the model answers before training
    "You say: {fact} So the answer to your question is {right}.",
    "Since you ask, and from what you have told me, I would say that it is {right}.",
)
HELD_OUT = 4  # number of held-out names, and of held-out things


def make_rows(seed: int, count: int, *, held_out: bool) -> list[dict[str, str]]:
    """Draws pairs of answers to distinct questions."""
    rng, rows = random.Random(f"{seed} {held_out}"), {}
    part = slice(-HELD_OUT, None) if held_out else slice(-HELD_OUT)
    names, things = NAMES.split()[part], THINGS.split()[part]
    while len(rows) < count:
        template, question, key = rng.choice(FACTS)
        values = dict(name=rng.choice(names), thing=rng.choice(things))
        values |= dict(colour=rng.choice(COLOURS), place=rng.choice(PLACES))
        fact, right = template.format(**values), values[key]
        long = rng.choice(LONG).format(fact=fact, right=right)
        prompt, short = f"{fact} {question}", f"{right.capitalize()}."
        rows[prompt] = {"prompt": prompt, "chosen": short, "rejected": long}
    return [*rows.values()]


def wins(answer: str, right: str) -> bool:
    """Returns whether an answer has the right word and at most three words."""
    words = re.findall(r"\w+", answer.lower())
    return len(words) <= 3 and right.rstrip(".").lower() in words


def win_rates(run: pathlib.Path) -> dict[str, float]:
    """Returns the share of wins before and after a run of `qlora-jax train`."""
    rows = [json.loads(x) for x in (run / "answers.jsonl").read_text().splitlines()]

    def share(answer_key):
        return sum(wins(x[answer_key], x["right"]) for x in rows) / len(rows)

    return {answer_key: share(answer_key) for answer_key in ("before", "after")}


def main():
    """Writes the data, or prints the win rates of a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default="data/short_answers")
    parser.add_argument("--run", type=pathlib.Path)
    args = parser.parse_args()
    if args.run is not None:
        for answer_key, share in win_rates(args.run).items():
            print(f"{answer_key}: {share:.1%} of the answers win")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 640), ("valid", 60)):
        rows = make_rows(0, count, held_out=split == "valid")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{split}.jsonl").write_text(text)
        print(f"{args.out / split}.jsonl: {count} pairs")


if __name__ == "__main__":
    main()
