"""The data that examples/make_data.py writes."""

import json

import make_data
import pytest

ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth "
    "twentieth twenty-first twenty-second twenty-third twenty-fourth twenty-fifth "
    "twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first"
)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("ordinal", {(n + 1,): word for n, word in enumerate(ORDINALS.split())}),
        ("number", {(0,): "zero", (19,): "nineteen", (101,): "one hundred one"}),
        ("number", {(2000,): "two thousand", (9012,): "nine thousand twelve"}),
        ("number", {(7365,): "seven thousand three hundred sixty-five"}),
        ("time", {(0, 0, 0): "at twelve o'clock at night"}),
        ("time", {(4, 5, 0): "at four oh five at night"}),
        ("time", {(12, 15, 0): "at a quarter past twelve in the afternoon"}),
        ("time", {(12, 15, 1): "at twelve fifteen in the afternoon"}),
        ("time", {(16, 30, 0): "at half past four in the afternoon"}),
        ("time", {(18, 0, 1): "at six o'clock in the evening"}),
        ("time", {(23, 55, 1): "at eleven fifty-five at night"}),
    ],
)
def test_words(function, words):
    in_words = getattr(make_data, f"{function}_in_words")
    assert {arguments: in_words(*arguments) for arguments in words} == words


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        ("amount", (7365,), ["$7,365", "7365 dollars", "USD 7,365"]),
        ("amount", (80,), ["$80", "80 dollars", "USD 80"]),
        ("date", (10, 28), ["Oct 28", "October 28", "28 October"]),
        ("date", (5, 1), ["May 1", "May 1", "1 May"]),
        ("time", (16, 15), ["4:15 pm", "4:15pm", "4:15 PM"]),
        ("time", (0, 5), ["12:05 am", "12:05am", "12:05 AM"]),
        ("time", (12, 0), ["12:00 pm", "12:00pm", "12:00 PM"]),
    ],
)
def test_digits(function, arguments, expected):
    in_digits = getattr(make_data, f"{function}_in_digits")
    assert [in_digits(*arguments, style) for style in range(3)] == expected


def test_different_values_have_different_words():
    """The task has one right answer."""
    times = {}
    for hour in range(24):
        for minute in range(0, 60, 5):
            for style in (0, 1):
                text = make_data.time_in_words(hour, minute, style)
                assert times.setdefault(text, (hour, minute)) == (hour, minute)
    assert len({make_data.number_in_words(n) for n in range(10_000)}) == 10_000


@pytest.mark.parametrize("spelled", [False, True])
def test_splits_share_no_part(spelled):
    training, held_out = make_data.make_splits(0, 4000, 120, spelled)
    assert len({e.text for e in training}) == 4000
    assert len({e.text for e in held_out}) == 120
    assert not {e.phrasing for e in training} & {e.phrasing for e in held_out}
    for part in range(4):
        training_values = {example.values[part] for example in training}
        assert not training_values & {example.values[part] for example in held_out}


def test_splits_follow_the_seed():
    assert make_data.make_splits(3, 50, 10) == make_data.make_splits(3, 50, 10)
    assert make_data.make_splits(3, 50, 10) != make_data.make_splits(4, 50, 10)


def test_splits_refuse_empty_sizes():
    with pytest.raises(ValueError, match="`training` and `held_out` must be positive"):
        make_data.make_splits(0, 0, 10)


@pytest.mark.parametrize("spelled", [False, True])
def test_files_hold_the_conversations(tmp_path, spelled):
    out = tmp_path / "new" / "data"
    options = ["--training=20", "--held-out=3", "--seed=1"]
    options += ["--spelled"] if spelled else []
    make_data.main(["--out", str(out), *options])
    assert sorted(path.name for path in out.iterdir()) == ["train.jsonl", "valid.jsonl"]
    splits = make_data.make_splits(1, 20, 3, spelled)
    for name, examples in zip(("train", "valid"), splits, strict=True):
        lines = (out / f"{name}.jsonl").read_text("utf-8").splitlines()
        for line, example in zip(lines, examples, strict=True):
            messages = json.loads(line)["messages"]
            assert [x["role"] for x in messages] == ["system", "user", "assistant"]
            assert [x["content"] for x in messages[1:]] == [
                example.text,
                example.answer,
            ]
            values = zip(
                ["name", "amount", "date", "time"], example.values, strict=True
            )
            assert [*json.loads(example.answer).items()] == [*values]
