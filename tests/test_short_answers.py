"""The pairs of answers that examples/short_answers.py makes, and its rule for wins."""

import json

import pytest
import short_answers


@pytest.mark.parametrize(
    "answer, right, is_win",
    [
        ("Green.", "Green.", True),
        ("It is green", "Green.", True),
        ("The boat is green.", "Green.", False),  # four words
        ("Red.", "Green.", False),
        ("", "Green.", False),
    ],
)
def test_rule(answer, right, is_win):
    assert short_answers.wins(answer, right) == is_win


def test_chosen_answers_win_and_splits_share_nothing(tmp_path):
    splits = [short_answers.make_rows(0, 100, held_out=x) for x in (False, True)]
    assert splits[0] == short_answers.make_rows(0, 100, held_out=False)
    for row in sum(splits, []):
        assert short_answers.wins(row["chosen"], row["chosen"])
        assert not short_answers.wins(row["rejected"], row["chosen"])
        assert row["chosen"].rstrip(".").lower() in row["prompt"].lower()
    part = slice(-short_answers.HELD_OUT, None)
    held_out = short_answers.NAMES.split()[part] + short_answers.THINGS.split()[part]
    for names, rows in zip((False, True), splits, strict=True):
        for row in rows:
            words = set(row["prompt"].replace(".", "").replace(",", "").split())
            assert bool(words & {*held_out}) == names
    rows = [{"right": "Red.", "before": "It might be red.", "after": "Red"}]
    rows.append({"right": "Bruno.", "before": "Bruno", "after": "It is Alice."})
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert short_answers.win_rates(tmp_path) == {"before": 0.5, "after": 0.5}
