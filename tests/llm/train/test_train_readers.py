"""Files of rows give the same tokens in every file format."""

import csv
import io
import json
import sys

import numpy as np
import pytest
from tokenizer_helpers import read, read_rows_of, save_tokenizer, write_rows

from qlora_jax.llm.data import open_tokenizer, readers
from qlora_jax.llm.data.dataset import read_rows

TALK = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two,\n“three”"}]
MESSAGES = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two,\n“three”"},
]
ROWS = {
    "pairs": [{"prompt": 'a "b", c', "completion": x} for x in ("d\n\ne", "é", "f,")],
    "talks": [{"messages": MESSAGES}, {"messages": MESSAGES * 2}],
    "tokens": [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers") / "model"
    save_tokenizer(folder, bos=True)
    return open_tokenizer(folder)


def tokens(rows):
    return [(row.ids.tolist(), row.labels.tolist()) for row in rows]


def as_csv(rows):
    """Returns a CSV file of the rows, whose values other than text are JSON."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0]])
    writer.writeheader()

    def as_text(x):
        return x if isinstance(x, str) else json.dumps(x)

    writer.writerows({key: as_text(x) for key, x in row.items()} for row in rows)
    return file.getvalue()


WRITERS = {
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    ".json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False),
    ".csv": as_csv,
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_those_of_the_jsonl_file(tokenizer, tmp_path, kind, suffix):
    expected = read_rows_of(tokenizer, tmp_path, *ROWS[kind])
    data = WRITERS[suffix](ROWS[kind]).encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    dataset = read(tokenizer, path)
    assert (
        tokens(dataset.train) == tokens(expected.train)
        and dataset.kind == expected.kind
    )
    first = {".jsonl": 1, ".json": 0, ".csv": 2}[suffix]
    assert dataset.train[0].place == f"{path}:{first}"
    path.write_bytes(b"\xef\xbb\xbf" + data)  # a byte order mark, as on Windows
    assert tokens(read(tokenizer, path).train) == tokens(expected.train)


def test_messages_may_be_under_the_key_data(tokenizer, tmp_path):
    expected = read_rows_of(tokenizer, tmp_path, *ROWS["talks"])
    path = tmp_path / "renamed.jsonl"
    rows = [{"data": row["messages"]} for row in ROWS["talks"]]
    path.write_text(WRITERS[".jsonl"](rows), "utf-8")
    data = read(tokenizer, path, keys={"messages": "data"})
    assert tokens(data.train) == tokens(expected.train)


def test_a_json_file_may_have_a_row_on_each_line(tokenizer, tmp_path):
    path = write_rows(tmp_path / "d.json", ROWS["pairs"])
    rows = read(tokenizer, path).train
    assert rows[-1].place == f"{path}:3"
    expected = read_rows_of(tokenizer, tmp_path, *ROWS["pairs"])
    assert tokens(rows) == tokens(expected.train)


@pytest.mark.parametrize("system_setting", [{}, {"system": "be brief"}])
def test_conversations_of_sharegpt_are_messages(tokenizer, tmp_path, system_setting):
    system = [{"role": "system", "content": "be brief"}] if system_setting else []
    tool_turns = [{"from": "tool", "value": "sun"}, {"from": "gpt", "value": "it is"}]
    tool_messages = [{"role": "tool", "content": "sun"}]
    tool_messages += [{"role": "assistant", "content": "it is"}]
    row = {"messages": [*system, *MESSAGES, *tool_messages]}
    expected = read_rows_of(tokenizer, tmp_path, row).train
    for talk in (TALK + tool_turns, MESSAGES + tool_messages):
        row = {"conversations": talk} | system_setting
        dataset = read_rows_of(tokenizer, tmp_path, row)
        assert tokens(dataset.train) == tokens(expected) and dataset.kind == "sharegpt"


def test_unknown_senders_of_a_conversation_are_refused(tokenizer, tmp_path):
    rows = [
        {"conversations": [*TALK, {"from": sender, "value": "a"}]} for sender in "xyz"
    ]
    with pytest.raises(ValueError, match=r"line 1: `conv.*\[2\]` must be from on") as e:
        read_rows_of(tokenizer, tmp_path, *rows)
    assert str(e.value).endswith("Got 'x'. ... and 2 more rows like it, lines 2, 3")


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("instruction", "output")])
def test_other_keys_of_pairs_are_refused_but_a_system(tokenizer, tmp_path, keys):
    row = dict(zip(keys, "ab", strict=True))
    with pytest.raises(
        ValueError, match=r"line 1: the row must not have \['history'\]"
    ):
        read_rows_of(tokenizer, tmp_path, row | {"history": [["a", "b"]]})
    row |= {"system": "c"}
    with pytest.raises(ValueError, match="line 1: .*`system` need a chat template"):
        read_rows_of(tokenizer, tmp_path, row, chat=False)
    [encoded] = read_rows_of(tokenizer, tmp_path, row).train
    assert tokenizer.decode(encoded.ids) == "system\nc\nuser\na\nassistant\nb\n"


def test_a_text_is_cut_into_rows_and_all_of_it_is_trained(tokenizer, tmp_path):
    text = "one and two\r\n\r\nthe user, é\n" * 9
    path = write_rows(tmp_path / "d.jsonl", [{"text": text}])
    [full_row] = read(tokenizer, path, max_length=999).train
    (tmp_path / "d.txt").write_bytes(text.encode())
    for size in (2, 16, len(full_row.ids) - 1, len(full_row.ids), 999):
        data = read(tokenizer, tmp_path / "d.txt", max_length=size)
        rows, count = data.train, -(-(len(full_row.ids) - 1) // (size - 1))
        assert len(rows) == count and all(2 <= len(row.ids) <= size for row in rows)
        ids = np.concatenate([rows[0].ids[:1], *(row.ids[1:] for row in rows)])
        np.testing.assert_array_equal(ids, full_row.ids)
        # Each row begins with the last token of the one before: all tokens are targets.
        assert all(a.ids[-1] == b.ids[0] for a, b in zip(rows, rows[1:], strict=False))
        assert sum(row.num_trained for row in rows) == full_row.num_trained
        assert bool(data.notes) == (count > 1)
        split = read(tokenizer, path, max_length=size, too_long="split").train
        assert tokens(split) == tokens(rows)
    rows = read_rows(tmp_path / "d.txt", tokenizer, vocab_size=320, max_length=9)
    # The rows have no end token.
    assert sum(row.num_trained for row in rows) == full_row.num_trained - 1
    for size in (1, 0):  # with 0, there would be no rows
        with pytest.raises(ValueError, match=f"`max_length` must be .* Got {size}"):
            read_rows(tmp_path / "d.txt", tokenizer, vocab_size=320, max_length=size)
    with pytest.raises(ValueError, match="or to split, which is for rows of `text`"):
        read(tokenizer, path, max_length=9)
    path = write_rows(tmp_path / "d.jsonl", ROWS["pairs"])
    with pytest.raises(ValueError, match="or to split, which is for rows of `text`"):
        read(tokenizer, path, max_length=9, too_long="split")


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "eval"])
def test_a_folder_has_validation_rows_by_any_of_their_names(tokenizer, tmp_path, name):
    (tmp_path / "train.csv").write_text(as_csv(ROWS["pairs"]))
    write_rows(tmp_path / f"{name}.jsonl", ROWS["pairs"][:1])
    write_rows(tmp_path / "more.jsonl", ROWS["pairs"])
    (tmp_path / "README.md").touch()
    (tmp_path / ".train.jsonl").touch()
    data = read(tokenizer, tmp_path)
    assert (len(data.train), len(data.valid), data.test) == (3, 1, [])
    [note] = data.notes
    assert note.startswith(f"{tmp_path}: ignored") and note.endswith(": more.jsonl")
    for second_file in (f"{name}.json", "train.jsonl"):
        (tmp_path / second_file).touch()
        with pytest.raises(ValueError, match="must have one of .* all of them") as e:
            read(tokenizer, tmp_path)
        assert second_file in str(e.value)
        (tmp_path / second_file).unlink()


LONG_LINE = b'{"text": "' + b"a" * 4000 + b'"}\n{"text": "b"}'


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "d.json",
            b'[{"text": "a"}, 3]',
            r"rows of .*\n  row 1: the row must be a JSON",
        ),
        (
            "d.json",
            b'[{"text": "a"}',
            "d.json must be a .json file. The file must be JSON",
        ),
        ("d.json", b"[]", "d.json must have rows. Got none"),
        (
            "d.json",
            b'{"text":\n"a"}',
            r"The file must be a list of rows, or .* Got an object with \['text'\]",
        ),
        ("d.json", b"3", "d.json must be a .json file. The file must be .* Got 3"),
        ("d.json", b'"text"', "d.json must be a .json file. The file .* Got 'text'"),
        (
            "d.json",
            b'{"data": [{"text": "a"}]}',
            "line 1: .* Got an object whose `data` is a list of rows",
        ),
        ("d.jsonl", b"", "must have rows. Got none"),
        ("d.jsonl", b"\n \n", "must have rows. Got none"),
        ("d.jsonl", b'{"text": "\xff"}', "line 1: the row must be JSON. 'utf-8' codec"),
        ("d.jsonl", LONG_LINE, "line 1: the row must have at"),
        ("d.csv", b"", "d.csv must have rows. Got none"),
        ("d.csv", b"text\n", "d.csv must have rows. Got none"),
        ("d.csv", b"text,text\na,b\n", "must have different names"),
        ("d.csv", b'text\n"a\nb\n', "must be a .csv file. Line 3: unexpected end"),
        ("d.csv", b"text\na\n\xff\n", "must be a .csv file. 'utf-8' codec"),
        (
            "d.csv",
            b"text,b\na,b\nc\n",
            "line 3: the row must have 2 fields, as the header has",
        ),
        (
            "d.csv",
            b"messages\n[{'role': 'a'}]\n",
            "`messages` must be JSON if it is a string",
        ),
        (
            "d.jsonl",
            b'{"input_ids": [1], "labels": "[{\\"a\\": 1, \\"a\\": 2}]"}',
            r"`labels` must be JSON .* It has duplicate keys: \['a'\]",
        ),
        ("d.txt", b"", "d.txt must have rows. Got none"),
        ("d.txt", b"\xff", "must be a .txt file. 'utf-8' codec"),
        (
            "d.txt",
            b"a" * 2001,
            "must be a .txt file. The file must have at most 2000 bytes",
        ),
        (
            "d.tsv",
            b"text\na\n",
            r"`data` must be a file \(.jsonl, .json, .csv, .tx",
        ),
        ("d.jsonl.gz", b"", r"or .parquet\), a folder"),
    ],
)
def test_files_that_are_wrong(tokenizer, tmp_path, monkeypatch, name, data, message):
    monkeypatch.setattr(readers, "MAX_BYTES", 2000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tokenizer, tmp_path / name)


def test_a_csv_file_has_long_fields_and_other_readers_their_limit(tokenizer, tmp_path):
    limit = csv.field_size_limit()
    rows = [{"text": "a" * (limit + 1)}]
    (tmp_path / "d.csv").write_text(as_csv(rows))
    read_back = readers.open_file(tmp_path / "d.csv").rows
    assert next(read_back) == (2, rows[0]) and csv.field_size_limit() == limit


def test_parquet_needs_a_library(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install 'qlora-jax\[parquet\]'"):
        read(tokenizer, tmp_path / "d.parquet")
