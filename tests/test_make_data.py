"""The data that examples/make_data.py writes."""

import json

import make_data
import pytest


def test_numbers_in_words():
    words = {
        0: "zero",
        19: "nineteen",
        40: "forty",
        101: "one hundred one",
        2000: "two thousand",
        7365: "seven thousand three hundred sixty-five",
        9012: "nine thousand twelve",
    }
    assert {n: make_data.number_in_words(n) for n in words} == words


def test_ordinals_in_words():
    expected = (
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh "
        "twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth "
        "nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth "
        "twenty-fifth twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth "
        "thirty-first"
    )
    assert [make_data.ordinal_in_words(n) for n in range(1, 32)] == expected.split()


def test_times_in_words():
    words = {
        (0, 0, 0): "at twelve o'clock at night",
        (0, 45, 0): "at twelve forty-five at night",
        (4, 5, 0): "at four oh five at night",
        (12, 15, 0): "at a quarter past twelve in the afternoon",
        (12, 15, 1): "at twelve fifteen in the afternoon",
        (16, 30, 0): "at half past four in the afternoon",
        (18, 0, 1): "at six o'clock in the evening",
        (23, 55, 1): "at eleven fifty-five at night",
    }
    assert {time: make_data.time_in_words(*time) for time in words} == words


def test_different_values_have_different_words():
    """The task has one right answer."""
    times = {}
    for hour in range(24):
        for minute in range(0, 60, 5):
            for style in (0, 1):
                text = make_data.time_in_words(hour, minute, style)
                assert times.setdefault(text, (hour, minute)) == (hour, minute)
    assert len({make_data.number_in_words(n) for n in range(10_000)}) == 10_000


def test_splits_share_no_part():
    training, held_out = make_data.make_splits(seed=0, training=4000, held_out=120)
    assert len({e.text for e in training}) == 4000
    assert len({e.text for e in held_out}) == 120
    assert not {e.phrasing for e in training} & {e.phrasing for e in held_out}
    for part in range(4):
        seen = {example.values[part] for example in training}
        assert not seen & {example.values[part] for example in held_out}


def test_splits_follow_the_seed():
    assert make_data.make_splits(3, 50, 10) == make_data.make_splits(3, 50, 10)
    assert make_data.make_splits(3, 50, 10) != make_data.make_splits(4, 50, 10)


def test_splits_refuse_empty_sizes():
    with pytest.raises(ValueError, match="`training` and `held_out` must be positive"):
        make_data.make_splits(0, 0, 10)


def test_answers_are_the_values():
    for example in make_data.make_splits(0, 50, 10)[1]:
        answer = json.loads(example.answer)
        assert tuple(answer.values()) == example.values
        assert list(answer) == ["name", "amount", "date", "time"]


def test_files_hold_the_conversations(tmp_path):
    out = tmp_path / "new" / "data"
    make_data.main(["--out", str(out), "--training=20", "--held-out=3", "--seed=1"])
    assert sorted(path.name for path in out.iterdir()) == ["train.jsonl", "valid.jsonl"]
    splits = make_data.make_splits(1, 20, 3)
    for name, examples in zip(("train", "valid"), splits, strict=True):
        lines = (out / f"{name}.jsonl").read_text("utf-8").splitlines()
        for line, example in zip(lines, examples, strict=True):
            said = json.loads(line)["messages"]
            assert [x["role"] for x in said] == ["system", "user", "assistant"]
            assert [x["content"] for x in said[1:]] == [example.text, example.answer]
