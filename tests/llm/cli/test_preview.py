"""`qlora-jax train --preview` shows rows as training would see them."""

import json
import sys

import commands
import pytest
from tokenizer_helpers import write_rows

from qlora_jax.llm import app
from qlora_jax.llm.app.open_model import OpenModel
from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.models.tiny import save_tiny

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two", "weight": 0},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "é€𝄞"},
]
PAIR = {"prompt": "one?", "chosen": "two", "rejected": "three"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("preview") / "base")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(OpenModel, "read", None)


def show(folder, tmp_path, *rows, preview=3, **options):
    """Previews the training of `rows`, which must not create the run folder."""
    path = write_rows(tmp_path / "d.jsonl", rows)
    options = dict(batch_size=2, max_length=200, chat=True) | options
    config = commands.settings(folder, path, tmp_path / "run", **options)
    shown = app.train(config.replace(preview=preview))
    assert not (tmp_path / "run").exists()
    return shown


def text_of(shown, tmp_path):
    """The text of a preview, with paths relative to `tmp_path`."""
    return str(shown).replace(f"{tmp_path}/", "")


def test_targets_of_a_conversation_are_marked(folder, tmp_path, capsys):
    shown = show(folder, tmp_path, {"messages": MESSAGES})
    assert text_of(shown, tmp_path) == (
        "row 1, d.jsonl:1: 62 tokens, 10 targets\n"
        + f"{PROMPT.format('one?')}two<|im_end|>\n{PROMPT.format('and?')}"
        + "⟦é€𝄞<|im_end|>⟧"
    )
    assert "1 row of messages and 0 for validation; 16.1% of" in capsys.readouterr().err


# Previews are in the order of the batches. One row each leaves a single order.
CASES = {
    "all": (
        {"prompt": "a", "completion": "bc"},
        {"train_on": "all"},
        [
            "row 1, d.jsonl:1: 24 tokens, 23 targets",
            f"<|im_start|>⟦{PROMPT.format('a')[12:]}bc<|im_end|>",
            "⟧",
        ],
    ),
    "text": (
        {"text": "abc"},
        {},
        ["row 1, d.jsonl:1: 4 tokens, 3 targets", "a⟦bc<|im_end|>⟧"],
    ),
    "plain": (
        {"prompt": "one?", "completion": "two"},
        {"chat": False},
        ["row 1, d.jsonl:1: 8 tokens, 4 targets", "one?⟦two<|im_end|>⟧"],
    ),
    "pairs": (
        PAIR,
        {"objective": "dpo", "chat": False},
        [
            "row 1, chosen, d.jsonl:1: 8 tokens, 4 targets",
            "one?⟦two<|im_end|>⟧",
            "row 1, rejected, d.jsonl:1: 10 tokens, 6 targets",
            "one?⟦three<|im_end|>⟧",
        ],
    ),
    "packed pairs": (
        PAIR,
        {"objective": "simpo", "chat": False, "packing": True},
        [
            "row 1, sequence 1, chosen, d.jsonl:1: 8 tokens, 4 targets",
            "one?⟦two<|im_end|>⟧",
            "row 1, sequence 2, rejected, d.jsonl:1: 10 tokens, 6 targets",
            "one?⟦three<|im_end|>⟧",
        ],
    ),
    # The cross entropy of ORPO is that of the chosen completion alone.
    "all of pairs": (
        PAIR,
        {"objective": "orpo", "chat": False, "train_on": "all"},
        [
            "row 1, chosen, d.jsonl:1: 8 tokens, 7 targets",
            "o⟦ne?two<|im_end|>⟧",
            "row 1, rejected, d.jsonl:1: 10 tokens, 6 targets",
            "one?⟦three<|im_end|>⟧",
        ],
    ),
    "labels": (
        {"prompt": "one?", "completion": "two", "label": False},
        {"objective": "kto", "chat": False},
        [
            "row 1, bad answer, d.jsonl:1: 8 tokens, 4 targets",
            "one?⟦two<|im_end|>⟧",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_each_kind_are_shown(folder, tmp_path, case):
    row, options, expected_lines = CASES[case]
    shown = show(folder, tmp_path, row, **options)
    assert text_of(shown, tmp_path) == "\n".join(expected_lines)


@pytest.mark.parametrize("packing", [False, True])
def test_as_many_rows_as_are_asked_for(folder, tmp_path, packing):
    rows = [{"text": chr(97 + i) * (i + 2)} for i in range(12)]
    options = dict(packing=packing, max_length=30, validation_split=0.25)
    shown = show(folder, tmp_path, *rows, preview=2, **options)
    names = [row["name"] for row in shown.rows]
    assert {name.partition(",")[0] for name in names} == {"row 1", "row 2"}
    assert packing == (len(names) > 2) == any("sequence 2" in name for name in names)
    # Each training row appears once.
    shown = show(folder, tmp_path, *rows, preview=99, **options)
    sources = [row["source"] for row in shown.rows]
    assert len({*sources}) == len(sources) == 9
    texts = {f"{tmp_path}/d.jsonl:{i}": row["text"] for i, row in enumerate(rows, 1)}
    for row in shown.rows:
        assert (
            "".join(text for text, _ in row["pieces"])
            == f"{texts[row['source']]}<|im_end|>"
        )
        assert row["tokens"] == row["targets"] + 1 == len(texts[row["source"]]) + 1


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"objective": "kto"}])
def test_rows_that_are_equal_have_lines_of_their_own(folder, tmp_path, options):
    rows = [{"prompt": "a", "completion": "b", "label": True}] * 4
    if "objective" not in options:
        rows = [{"prompt": "a", "completion": "b"}] * 4
    shown = show(
        folder, tmp_path, *rows, preview=9, batch_size=2, chat=False, **options
    )
    sources = [row["source"] for row in shown.rows]
    assert sorted(sources) == [f"{tmp_path}/d.jsonl:{i}" for i in (1, 2, 3, 4)]


def test_a_character_of_several_tokens_is_not_cut(folder, tmp_path):
    """Each byte is a token of this model, and the second byte is the first target."""
    ids = open_tokenizer(folder).encode("aé€")
    labels = [-100, -100, *ids[2:]]
    shown = show(folder, tmp_path, {"input_ids": ids, "labels": labels})
    assert "".join(text for text, _ in shown.rows[0]["pieces"]) == "aé€"
    assert (shown.rows[0]["tokens"], shown.rows[0]["targets"]) == (6, 4)


def test_the_command_shows_rows_and_leaves_nothing(
    folder, tmp_path, capsys, monkeypatch
):
    path = write_rows(tmp_path / "d.jsonl", [PAIR | {"completion": "two"}] * 4)
    arguments = "train", "--model", folder, "--data", path, "--out", tmp_path
    arguments += "--preview", 1, "--objective", "dpo", "--chat", "false"
    arguments += "--learning-rate", "1e-3"
    arguments += "--log", "tensorboard"
    status, out, error = commands.run(capsys, *arguments)
    assert status == 0 and out.count("⟦") == out.count("row 1, ") == 2, error
    assert [x.name for x in tmp_path.iterdir()] == ["d.jsonl"]
    status, out, _ = commands.run(capsys, *arguments, "--json")
    [chosen, _] = json.loads(out)["rows"]
    assert status == 0 and chosen["pieces"][1] == ["two<|im_end|>", True]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = commands.run(capsys, *arguments)
    assert "one?\033[4;32mtwo<|im_end|>\033[0m\n" in out and "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦" in commands.run(capsys, *arguments)[1]
    # Invalid rows are listed, as in training.
    write_rows(path, [PAIR | {"chosen": "three"}])
    status, _, error = commands.run(capsys, *arguments)
    assert status == 1 and "line 1: `chosen` and `rejected` must differ" in error
