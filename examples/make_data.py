"""Makes training data: sentences with a name, an amount, a date and a time, and JSON.

    python examples/make_data.py

    "We paid $7,365 to Pablo Diaz on 28 October, at 4:15pm."
    {"name": "Pablo Diaz", "amount": 7365, "date": "Oct 28", "time": "4:15 pm"}

With `--spelled`, numbers are written in words, which takes longer to learn:

    "We paid seven thousand three hundred sixty-five dollars to Pablo on October
    twenty-eighth, at a quarter past four in the afternoon."
    {"name": "Pablo", "amount": 7365, "date": "10-28", "time": "16:15"}

It writes `train.jsonl` and `valid.jsonl` to `--out`, with a row of messages per line.
The data depends only on a seed. Training and held-out examples share no phrasing, name,
amount, date or time.
"""

import argparse
import dataclasses
import json
import pathlib
import random

NAMES = (
    "Alice Amir Anna Bruno Carla Chen David Elena Emma Farid Fatima Felix George Grace "
    "Hana Hugo Ivan Jack Julia Karim Laura Leila Liam Lucas Lucy Maria Marco Maya Mia "
    "Nadia Nina Noah Oscar Omar Pablo Paula Peter Priya Rosa Ruth Sam Sara Sofia Tariq "
    "Tom Uma Victor Wei Yuki Zoe"
).split()
LAST_NAMES = (
    "Adams Ahmed Bauer Bell Berg Brown Cohen Costa Cruz Diaz Evans Fischer Ford Fox "
    "Garcia Gomez Grant Gray Green Hall Hill Hughes Jones Keller King Lee Lewis Lopez "
    "Martin Miller Moore Murphy Park Perez Reed Rivera Rossi Russo Santos Scott Silva "
    "Singh Smith Stone Taylor Torres Turner Walker Ward White Wilson Wood Wright Young"
).split()
MONTHS = (
    "January February March April May June July August September October November "
    "December"
).split()
DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
    "twenty": "twentieth",
    "thirty": "thirtieth",
}
TRAINING_PHRASINGS = (
    "We paid {amount} to {name} on {date} {time}.",
    "On {date} {time}, {name} received {amount} from us.",
    "{name} sent us {amount} on {date} {time}.",
    "Please transfer {amount} to {name} on {date} {time}.",
    "{name} owes {amount}, due {time} on {date}.",
    "The bill for {name} came to {amount}; it arrived {time} on {date}.",
    "A payment of {amount} to {name} went out {time} on {date}.",
    "{time}, on {date}, {name} handed over {amount}.",
    "Remember: {name} gets {amount} {time} on {date}.",
    "It was {date}, {time}, and {name} had just spent {amount}.",
    "{amount} went to {name} on {date} {time}.",
    "Our records say that {name} withdrew {amount} on {date}, {time}.",
    "Pay {amount} to {name}, {date}, {time}.",
    "Charge {amount} to {name}, {time}, {date}.",
    "Note {amount} from {name}, {date}, {time}.",
    "{name} was paid {amount} {time} on {date}.",
)
HELD_OUT_PHRASINGS = (
    "{name} was given {amount} {time} on {date}.",
    "On {date}, {name} paid us {amount} {time}.",
    "An invoice of {amount} was sent to {name} on {date}, {time}.",
    "Book {amount} for {name}, {date}, {time}.",
)
INSTRUCTION = "Name, amount, date, time as JSON."


@dataclasses.dataclass(frozen=True)
class Example:
    """A sentence, and the JSON expected for it.

    Attributes:
        text: The sentence.
        answer: Its JSON, one line.
        phrasing: The template that the sentence was made from.
        values: Name, amount, date and time, as the JSON gives them.
    """

    text: str
    answer: str
    phrasing: str
    values: tuple[str, int, str, str]


def number_in_words(n: int) -> str:
    """Spells 0 to 9999: 7365 is "seven thousand three hundred sixty-five"."""
    if n >= 1000:
        lower_digits = f" {number_in_words(n % 1000)}" if n % 1000 else ""
        return f"{ONES[n // 1000]} thousand{lower_digits}"
    if n >= 100:
        lower_digits = f" {number_in_words(n % 100)}" if n % 100 else ""
        return f"{ONES[n // 100]} hundred{lower_digits}"
    if n >= 20:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return ONES[n]


def ordinal_in_words(n: int) -> str:
    """Spells 1st to 31st: 28 is "twenty-eighth"."""
    head, dash, last = number_in_words(n).rpartition("-")
    return head + dash + ORDINALS.get(last, last + "th")


def date_in_words(month: int, day: int, style: int) -> str:
    """Spells a date: "October twenty-eighth" or "the twenty-eighth of October"."""
    name, ordinal = MONTHS[month - 1], ordinal_in_words(day)
    return f"{name} {ordinal}" if style == 0 else f"the {ordinal} of {name}"


def time_in_words(hour: int, minute: int, style: int) -> str:
    """Spells a time of day, with "at" and the part of the day.

    "A quarter to" is left out: with only two dozen such times, a model memorizes those
    of the training set and fails on the held-out ones.
    """
    half = (
        "at night"
        if hour < 5 or hour >= 21
        else "in the morning"
        if hour < 12
        else "in the afternoon"
        if hour < 18
        else "in the evening"
    )
    hour_word = ONES[(hour - 1) % 12 + 1]
    if minute == 0:
        clock = f"{hour_word} o'clock"
    elif style == 0 and minute == 15:
        clock = f"a quarter past {hour_word}"
    elif style == 0 and minute == 30:
        clock = f"half past {hour_word}"
    else:
        clock = f"{hour_word} {'oh ' * (minute < 10)}{number_in_words(minute)}"
    return f"at {clock} {half}"


def amount_in_digits(amount: int, style: int) -> str:
    """Writes an amount: "$7,365", "7365 dollars" or "USD 7,365"."""
    return (f"${amount:,}", f"{amount} dollars", f"USD {amount:,}")[style]


def date_in_digits(month: int, day: int, style: int) -> str:
    """Writes a date: "Oct 28", "October 28" or "28 October"."""
    name = MONTHS[month - 1]
    return (f"{name[:3]} {day}", f"{name} {day}", f"{day} {name}")[style]


def time_in_digits(hour: int, minute: int, style: int) -> str:
    """Writes a time of day: "4:15 pm", "4:15pm" or "4:15 PM"."""
    clock = f"{(hour - 1) % 12 + 1}:{minute:02}"
    half = "am" if hour < 12 else "pm"
    return (f"{clock} {half}", clock + half, f"{clock} {half.upper()}")[style]


def _split(values, share, rng):
    values = list(values)
    rng.shuffle(values)
    num_held_out = round(len(values) * share)
    return values[num_held_out:], values[:num_held_out]


def make_splits(
    seed: int = 0, training: int = 4000, held_out: int = 120, spelled: bool = False
) -> tuple[list[Example], list[Example]]:
    """Returns distinct training examples and held-out ones that share no part.

    Args:
        seed: The seed of all random choices.
        training: The number of training examples.
        held_out: The number of held-out examples.
        spelled: Whether numbers are written in words.

    Raises:
        ValueError: If a size is not positive.
    """
    if training < 1 or held_out < 1:
        raise ValueError(
            f"`training` and `held_out` must be positive. Got {training=}, {held_out=}."
        )
    rng = random.Random(seed)
    dates = [(m + 1, d + 1) for m, days in enumerate(DAYS) for d in range(days)]
    times = [(hour, minute) for hour in range(24) for minute in range(0, 60, 5)]
    full_names = [f"{name} {last_name}" for name in NAMES for last_name in LAST_NAMES]
    names = NAMES if spelled else full_names
    pools = [
        _split(values, 0.15, rng) for values in (names, range(10, 10_000), dates, times)
    ]
    make = _spelled_example if spelled else _example
    phrasings = TRAINING_PHRASINGS, HELD_OUT_PHRASINGS
    splits = []
    for side, count in enumerate((training, held_out)):
        examples: dict[str, Example] = {}
        while len(examples) < count:
            chosen = [rng.choice(pool[side]) for pool in pools]
            example = make(rng, rng.choice(phrasings[side]), *chosen)
            examples.setdefault(example.text, example)
        splits.append(list(examples.values()))
    return splits[0], splits[1]


def _example(rng, phrasing, name, amount, date, time) -> Example:
    (month, day), (hour, minute) = date, time
    text = phrasing.format(
        name=name,
        amount=amount_in_digits(amount, rng.randrange(3)),
        date=date_in_digits(month, day, rng.randrange(3)),
        time="at " + time_in_digits(hour, minute, rng.randrange(3)),
    )
    date_value, time_value = (
        date_in_digits(month, day, 0),
        time_in_digits(hour, minute, 0),
    )
    values = name, amount, date_value, time_value
    return _with_answer(phrasing, text, values)


def _spelled_example(rng, phrasing, name, amount, date, time) -> Example:
    (month, day), (hour, minute) = date, time
    text = phrasing.format(
        name=name,
        amount=number_in_words(amount) + " dollars",
        date=date_in_words(month, day, rng.randrange(2)),
        time=time_in_words(hour, minute, rng.randrange(2)),
    )
    values = name, amount, f"{month:02}-{day:02}", f"{hour:02}:{minute:02}"
    return _with_answer(phrasing, text, values)


def _with_answer(phrasing, text, values) -> Example:
    answer = json.dumps(
        dict(zip(("name", "amount", "date", "time"), values, strict=True))
    )
    return Example(text[0].upper() + text[1:], answer, phrasing, values)


def messages(example: Example) -> list[dict[str, str]]:
    """Returns the conversation: the instruction, the sentence and the answer."""
    turns = (
        ("system", INSTRUCTION),
        ("user", example.text),
        ("assistant", example.answer),
    )
    return [{"role": role, "content": content} for role, content in turns]


def write(path: pathlib.Path, examples: list[Example]) -> None:
    """Writes a JSONL file, under a temporary name first."""
    lines = [json.dumps({"messages": messages(example)}) for example in examples]
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    part.replace(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=pathlib.Path("data/words_to_json"))
    add("--training", type=int, default=4000, help="rows to train on")
    add("--held-out", type=int, default=120, help="rows to validate on")
    add("--seed", type=int, default=0)
    add("--spelled", action="store_true", help="write numbers in words")
    args = parser.parse_args(argv)
    training, held_out = make_splits(
        args.seed, args.training, args.held_out, args.spelled
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl", training)
    write(args.out / "valid.jsonl", held_out)
    print(f"{args.out}: {len(training):,} rows to train on, {len(held_out):,} held out")


if __name__ == "__main__":
    main()
