"""Rows of training data: their kinds, their target tokens, and invalid rows."""

import json
import re
import sys

import numpy as np
import pytest
import tokenizer_helpers
from tokenizer_helpers import CHATML, save_tokenizer, write_rows

from qlora_jax.llm.data import batches, open_tokenizer, sources

MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "the end"},
]
BEGIN, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a chat template."""
    folder = tmp_path_factory.mktemp("data") / "model"
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without a chat template, whose tokenizer adds a beginning token."""
    folder = tmp_path_factory.mktemp("data") / "plain"
    save_tokenizer(folder, template=None, eos="<|endoftext|>", bos=True)
    return folder


def read(folder, path, **settings):
    return tokenizer_helpers.read(open_tokenizer(folder), path, **settings)


def read_raw(folder, tmp_path, *rows, **settings):
    return read(folder, write_rows(tmp_path / "d.jsonl", rows), **settings)


def trained(folder, row):
    """Returns the text of a row, and of each run of target tokens."""

    def decode(ids):
        return open_tokenizer(folder).decode(ids, skip_special_tokens=False)

    is_trained = row.labels != -100
    assert np.array_equal(row.labels[is_trained], row.ids[is_trained])
    cuts = np.flatnonzero(np.diff(is_trained.astype(int))) + 1
    runs = zip(np.split(row.ids, cuts), np.split(is_trained, cuts), strict=True)
    return decode(row.ids), [decode(run) for run, counts in runs if counts[0]]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "HALF"},
        {"prompt": "HALF", "completion": "a"},
        {"prompt": "a", "completion": "HALF"},
        {"messages": [MESSAGES[1], {"role": "assistant", "content": "HALF"}]},
        {"instruction": "HALF", "output": "a"},
        {"conversations": [{"from": "human", "value": "HALF"}, {"from": "gpt"}]},
    ],
)
def test_half_a_character_is_refused_by_its_line(folder, tmp_path, row, chat):
    """A lone surrogate is valid in JSON, but not in UTF-8."""
    path = tmp_path / "d.jsonl"
    row = json.dumps(row).replace('"gpt"', '"gpt", "value": "a"')
    lines = row.replace("HALF", "half"), row.replace("HALF", r"\ud800")
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 2: .*surrogates not allowed"):
        read(folder, path, chat=chat)


def test_answers_of_the_assistant_are_trained(folder, tmp_path):
    data = read_raw(folder, tmp_path, {"messages": MESSAGES})
    [row] = data.train
    text, answers = trained(folder, row)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n"
        f"{BEGIN}one?{ANSWER}two<|im_end|>\n{BEGIN}and?{ANSWER}the end<|im_end|>\n"
    )
    assert answers == ["two<|im_end|>", "the end<|im_end|>"]
    assert (data.kind, row.place) == ("messages", f"{tmp_path}/d.jsonl:1")
    assert data.trained_share == row.num_trained / len(row.ids)
    [row] = read(folder, tmp_path / "d.jsonl", train_on="all").train
    assert trained(folder, row) == (text, [text])
    row = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}
    [row] = read_raw(folder, tmp_path, row).train
    assert trained(folder, row) == (text, answers[1:])


BRIEF = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    "### Response:\n|two"
)
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\none and one\n\n### Response:\n|two"
)
ADD = {"instruction": "Add.", "output": "two"}
NAMED = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    "row, keys, by_plain, by_chat",
    [
        ({"prompt": "one &", "completion": " two"}, {}, "one &| two", "one &| two"),
        ({"q": "one?", "a": "two"}, NAMED, "one?|two", "one?|two"),
        (ADD | {"input": "", "text": "not read"}, {}, BRIEF, "Add.|two"),
        (ADD | {"input": "one and one"}, {}, PAIRED, "Add.\none and one|two"),
    ],
)
def test_prompts_with_completions(
    folder, plain, tmp_path, row, keys, by_plain, by_chat
):
    path = write_rows(tmp_path / "d.jsonl", [row])
    prompt, completion = by_plain.split("|")
    text_and_targets = trained(plain, read(plain, path, keys=keys).train[0])
    end = "<|endoftext|>"
    assert text_and_targets == (f"<s>{prompt}{completion}{end}", [completion + end])
    text_and_targets = trained(
        folder, read(folder, path, keys=keys, chat=False).train[0]
    )
    assert text_and_targets == (
        f"{prompt}{completion}<|im_end|>",
        [f"{completion}<|im_end|>"],
    )
    prompt, completion = by_chat.split("|")
    text_and_targets = trained(folder, read(folder, path, keys=keys).train[0])
    text = f"{BEGIN}{prompt}{ANSWER}{completion}<|im_end|>\n"
    assert text_and_targets == (text, [f"{completion}<|im_end|>"])


def test_all_tokens_of_texts_are_targets(plain, tmp_path):
    [row] = read_raw(plain, tmp_path, {"text": "one two"}).train
    text = "<s>one two<|endoftext|>"
    assert trained(plain, row) == (text, [text])


def test_tokens_are_taken_as_they_are(tmp_path):
    raw = [{"input_ids": [3, 4, 5]}, {"input_ids": [3, 4], "labels": [-100, 7]}]
    data = read_raw(tmp_path / "no model", tmp_path, *raw)
    ids_and_labels = [(row.ids.tolist(), row.labels.tolist()) for row in data.train]
    assert ids_and_labels == [([3, 4, 5], [3, 4, 5]), ([3, 4], [-100, 7])]
    assert data.trained_share == 3 / 5 and data.kind == "input_ids"


def test_a_folder_has_splits_with_examples(folder, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"prompt": "one?", "completion": "two"}] * 2)
    write_rows(tmp_path / "validation.jsonl", [{"prompt": "is?", "completion": "two"}])
    data = read(folder, tmp_path)
    [example] = data.valid_examples
    prompt = open_tokenizer(folder).decode(example.prompt, skip_special_tokens=False)
    assert prompt == f"{BEGIN}is?{ANSWER}" and example.answer == "two"
    assert (len(data.train), len(data.valid), data.test) == (2, 1, [])
    assert data.notes == ()
    # A format that no reader supports.
    (tmp_path / "validation.jsonl").rename(tmp_path / "validation.jsonl.zst")
    data = read(folder, tmp_path)
    [note] = data.notes
    assert data.valid == [] and note.endswith(": validation.jsonl.zst")


def test_data_sets_with_weights_follow_each_other(folder, tmp_path, monkeypatch):
    pair = {"prompt": "one?", "completion": "two"}
    texts = write_rows(tmp_path / "one.jsonl", [{"text": "one"}] * 2)
    (tmp_path / "two").mkdir()
    for split, count in (("train", 3), ("valid", 1)):
        write_rows(tmp_path / "two" / f"{split}.jsonl", [pair] * count)
    data = read(folder, f"{texts}=0.7, {tmp_path}/two=0.3")
    assert data.mix == ((2, 0.7), (3, 0.3))
    assert data.kind == "text and prompt/completion"
    places = [row.place for row in data.train[1:3]]
    assert places == [f"{texts}:2", f"{tmp_path}/two/train.jsonl:1"]
    assert (len(data.valid), len(data.valid_examples)) == (1, 1)
    by_mapping = read(folder, {str(texts): 0.7, f"{tmp_path}/two": 0.3})
    assert by_mapping.mix == data.mix
    # KTO trains on each answer of a pair separately.
    pair = {"prompt": "one?", "chosen": "two", "rejected": "the end"}
    pairs = [write_rows(tmp_path / f"{n}.jsonl", [pair] * n) for n in (1, 2)]
    data = read(folder, dict.fromkeys(map(str, pairs), 1), rows="labelled")
    assert data.mix == ((2, 1.0), (4, 1.0)) and len(data.train) == 6
    # The names of many data sets are together longer than a path may be.
    with pytest.raises(ValueError, match="Got '0.jsonl', which is missing"):
        read(folder, ",".join(f"{i}.jsonl=1" for i in range(100)))
    monkeypatch.chdir(tmp_path / "two")  # which has a file named train
    with pytest.raises(ValueError, match="must list each data set once, .* Got ''"):
        read(folder, "")
    with pytest.raises(ValueError, match="must list each data set once, .* None"):
        read(folder, {str(texts): None})
    # A file name with "=" is not a weight.
    odd_name = write_rows(tmp_path / "a=1.jsonl", [{"text": "one"}])
    assert read(folder, odd_name).mix == ()


def line_numbers(rows):
    return [int(row.place.rpartition(":")[2]) for row in rows]


@pytest.mark.parametrize("count, share", [(40, 0.05), (39, 0.3), (50, 0.9), (3, 0.4)])
def test_a_share_of_the_rows_is_held_out(folder, tmp_path, count, share):
    rows = [{"prompt": f"{i}?", "completion": f"two{i}"} for i in range(1, count + 1)]
    path = write_rows(tmp_path / "d.jsonl", rows)
    settings = dict(validation_split=share)
    data = read(folder, path, **settings, seed=3)
    assert abs(len(data.valid) - count * share) < 1
    assert sorted(line_numbers(data.valid) + line_numbers(data.train)) == [
        *range(1, count + 1)
    ]
    # Both halves of the file give about the same number of rows.
    halves = [
        sum((x <= count / 2) == y for x in line_numbers(data.valid)) for y in (0, 1)
    ]
    assert abs(halves[0] - halves[1]) <= 2
    same_seed = read(folder, path, **settings, seed=3)
    assert line_numbers(same_seed.valid) == line_numbers(data.valid)
    assert same_seed.hash == data.hash
    other_seeds = [read(folder, path, **settings, seed=seed) for seed in range(4)]
    assert len({tuple(line_numbers(x.valid)) for x in other_seeds}) > 1
    # The result equals that of two files.
    split_folder = tmp_path / "both"
    split_folder.mkdir()
    for name in ("train", "valid"):
        split_rows = [rows[i - 1] for i in line_numbers(getattr(data, name))]
        write_rows(split_folder / f"{name}.jsonl", split_rows)
    expected = read(folder, split_folder)
    assert data.valid_examples == expected.valid_examples
    assert data.trained_share == expected.trained_share
    for name in ("train", "valid"):
        pairs = zip(getattr(data, name), getattr(expected, name), strict=True)
        assert all(x.ids.tolist() == y.ids.tolist() for x, y in pairs)
    with pytest.raises(ValueError, match="left out for data with validation rows. Go"):
        read(folder, split_folder, **settings)


def test_the_pieces_of_a_text_are_split_too(plain, tmp_path):
    (tmp_path / "d.txt").write_text("the user " * 100)
    data = read(plain, tmp_path / "d.txt", max_length=8, validation_split=0.25)
    counts = [len(data.train), len(data.valid)]
    assert abs(counts[1] - sum(counts) / 4) < 1
    unsplit = read(plain, tmp_path / "d.txt", max_length=8).train

    def sorted_ids(rows):
        return sorted(row.ids.tolist() for row in rows)

    assert sorted_ids([*data.train, *data.valid]) == sorted_ids(unsplit)


def test_the_answers_of_a_pair_stay_together(folder, tmp_path):
    pairs = [{"prompt": f"{i}?", "chosen": "two", "rejected": "one"} for i in range(9)]
    settings = dict(rows="labelled", validation_split=0.3)
    data = read_raw(folder, tmp_path, *pairs, **settings)
    for numbers in (line_numbers(data.train), line_numbers(data.valid)):
        assert numbers[::2] == numbers[1::2] and numbers
    # Each of several data sets is split by the same share.
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a"}] * 6)
    other_text = write_rows(tmp_path / "two.jsonl", [{"text": "b"}] * 10)
    data = read(folder, f"{text}=1,{other_text}=1", validation_split=0.5)
    assert data.mix == ((3, 1.0), (5, 1.0)) and len(data.valid) == 8


@pytest.mark.parametrize("share, side", [(0.001, "validate on"), (0.999, "train on")])
def test_a_split_leaves_rows_on_both_sides(folder, tmp_path, share, side):
    message = f"Got {share}, which leaves .*d.jsonl without rows to {side}"
    with pytest.raises(ValueError, match=message):
        read_raw(folder, tmp_path, *[{"text": "a"}] * 3, validation_split=share)


def test_a_data_set_of_the_hub_leaves_out_what_is_none(folder):
    row = {"messages": [m | {"tool_calls": None} for m in MESSAGES], "tools": None}
    splits, notes = {"train": [row], "dev": [row], "extra": [row]}, []
    found = sources.sources_of("user/name", splits, notes)
    assert found["train"].name == "user/name/train"
    assert found["valid"].name == "user/name/dev" and len(found) == 2
    assert [*found["train"].rows] == [(0, {"messages": MESSAGES})]
    [note] = notes
    assert note.startswith("user/name: ignored") and note.endswith(": extra")


# Invalid lines, and a part of the error message, in a file whose other rows have a
# prompt and a completion.
WRONG = {
    "[1]": "must be a JSON object",
    '{"prompt": "a", "completion": ': "must be JSON",
    '{"prompt": "a", "prompt": "b", "completion": "c"}': "has duplicate keys",
    '{"prompt": "a", "completion": NaN}': "strict JSON",
    '{"prompt": "a"}': "`messages`, or `conversations`, or `prompt` and",
    '{"prompt": "a", "completion": ""}': "`completion` must be text",
    '{"prompt": "a", "completion": 3}': "both be text or messages",
    '{"prompt": [], "completion": "b"}': "both be text or messages",
    '{"text": "a"}': "of the kind of the first row, prompt/completion. Got text",
    '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}': "both",
    '{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}': (
        "`prompt[0]` must have content"
    ),
    '{"prompt": [{"role": "user", "content": "a"}], "completion": '
    '[{"role": "user", "content": "b"}]}': "must have a message of the assistant",
    '{"prompt": [{"content": "a"}], "completion": []}': "an object with a `role`",
    '{"prompt": "a", "completion": "b", "tools": "x"}': "`tools` must be JSON",
}  # fmt: skip


def test_wrong_rows_are_listed_by_line(folder, tmp_path):
    path = tmp_path / "d.jsonl"
    good = '{"prompt": "a", "completion": "b"}'
    for line, message in WRONG.items():
        path.write_text("\n".join([good, "", line, good]))
        with pytest.raises(ValueError) as raised:
            read(folder, path)
        assert str(raised.value).startswith(f"lines of {path} are wrong:\n  line 3: ")
        assert message in str(raised.value)
    path.write_text("\n".join([good, *WRONG]))
    with pytest.raises(ValueError, match=r"line 13: .*\n  and 2 more$"):
        read(folder, path)


def test_a_fault_that_recurs_is_listed_once(folder, tmp_path):
    """Rows with the same error share a line, even if their values differ."""
    raw = [{"q": i} if i % 2 else {"prompt": "a", "completion": i} for i in range(14)]
    with pytest.raises(ValueError) as raised:
        read_raw(folder, tmp_path, *raw)
    _, first, second = str(raised.value).split("\n")
    assert "line 1: `prompt` and `completion` must both be text" in first
    assert first.endswith("... and 6 more rows like it, lines 3, 5, 7, 9, 11, ...")
    assert "Got ['q']. If these are other names, map" in second
    assert second.endswith("... and 6 more rows like it, lines 4, 6, 8, 10, 12, ...")


@pytest.mark.parametrize("name", ["data/trian", "trian.jsnl", "trian"])
def test_a_missing_path_is_named_before_the_hub(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=f"Got '{name}', which is missing") as raised:
        read(folder, name)
    text = str(raised.value)
    assert text.index("missing") < text.index("hub") < text.index("datasets")


@pytest.mark.parametrize("value", ["null", '"x"'])
def test_a_null_is_not_called_a_missing_key(folder, tmp_path, value):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"prompt": {value}, "completion": null}}')
    with pytest.raises(ValueError, match="where .*`completion` is null") as raised:
        read(folder, path)
    assert ("`prompt` is null" in str(raised.value)) == (value == "null")
    assert "--keys" not in str(raised.value)


def test_an_error_in_json_has_one_line_number(folder, tmp_path):
    path, good = tmp_path / "d.jsonl", '{"text": "a"}\n'
    for bad in ('{"text": "b"\n', '{"text": "b",}\n'):
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(bad.rstrip())  # versions of Python differ in the column
        path.write_text(3 * good + bad + good)
        with pytest.raises(ValueError) as raised:
            read(folder, path)
        text = str(raised.value).replace(f"lines of {path}", "")
        assert re.findall(r"line \d+|column \d+", text) == [
            "line 4",
            f"column {expected.value.colno}",
        ]


@pytest.mark.parametrize("role", ["human", "bot", "gpt"])
def test_roles_of_other_formats_are_mapped_in_the_file(folder, tmp_path, role):
    messages = [{"role": role, "content": "a"}, *MESSAGES]
    expected = "user instead of human.* assistant instead of bot"
    with pytest.raises(ValueError, match=f"Got '{role}' in .*{expected}"):
        read_raw(folder, tmp_path, {"messages": messages})


@pytest.mark.parametrize(
    "true, false", [("True", "False"), ("1.0", "0.0"), ("TRUE", "0")]
)
def test_labels_are_as_pandas_writes_them(folder, tmp_path, true, false):
    path = tmp_path / "d.csv"
    path.write_text(f"prompt,completion,label\na,b,{true}\na,c,{false}\n")
    assert [row.label for row in read(folder, path, rows="labelled").train] == [1, 0]
    raw = [{"prompt": "a", "completion": "b", "label": x} for x in (1.0, 0.0, True, 0)]
    data = read_raw(folder, tmp_path, *raw, rows="labelled")
    assert [row.label for row in data.train] == [True, False, True, False]
    for label in (0.5, 2.0, "yes", "", None):
        with pytest.raises(ValueError, match="line 1: .*label"):
            read_raw(folder, tmp_path, raw[0] | {"label": label}, rows="labelled")


@pytest.mark.parametrize("path", ["nowhere/d.jsonl", "d.jsonl", "/dev/null", "a/b/c"])
def test_a_path_that_is_none(folder, path):
    with pytest.raises(ValueError, match=r"`data` must be a file \(.jsonl, .* id"):
        read(folder, path)


def test_errors_in_pairs_name_the_keys_and_values_of_the_row(folder, tmp_path):
    chosen = [{"role": "completion", "content": "two"}]
    row = {"prompt": MESSAGES[:2], "chosen": chosen, "rejected": MESSAGES[-1:]}
    with pytest.raises(ValueError, match=r"Got 'completion' in `chosen\[0\]`"):
        read_raw(folder, tmp_path, row, rows="pairs")
    row = {"chosen": "one, two", "rejected": "one, three", "system": "s"}
    with pytest.raises(ValueError, match="pairs of texts only with a `prompt`"):
        read_raw(folder, tmp_path, row, rows="pairs")


def test_folders_that_are_wrong(folder, tmp_path):
    write_rows(tmp_path / "notes.jsonl", [{"text": "a"}])
    with pytest.raises(
        ValueError, match=r"must have a file \(.jsonl.* named train. .*notes.js"
    ):
        read(folder, tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "valid.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="all splits must have rows of one kind"):
        read(folder, tmp_path)


def test_rows_that_are_too_long(plain, tmp_path):
    """Rows have 4, 9 and 12 tokens with both ends; the third prompt alone has 11."""
    raw = [("z", "y"), ("z", "yyyyyy"), ("z" * 9, "y")]
    raw = [{"prompt": prompt, "completion": text} for prompt, text in raw]
    path = write_rows(tmp_path / "d.jsonl", raw)
    with pytest.raises(ValueError) as raised:
        read(plain, path, max_length=6)
    lines = f"\n  {path}:2 (9 tokens)\n  {path}:3 (12 tokens)"
    assert "longest has 12" in str(raised.value) and str(raised.value).endswith(lines)
    data = read(plain, path, max_length=6, too_long="drop")
    assert [row.place for row in data.train] == [f"{path}:1"]
    assert (
        "of 2 rows with more than 6 tokens, 2 are dropped and 0 trunc" in data.notes[0]
    )
    data = read(plain, path, max_length=6, too_long="truncate")
    assert [row.place for row in data.train] == [f"{path}:1", f"{path}:2"]
    assert trained(plain, data.train[1]) == ("<s>zyyyy", ["yyyy"])
    assert "1 are dropped and 1 truncated" in data.notes[0]
    for too_long in ("drop", "truncate"):
        with pytest.raises(ValueError, match="`max_length` = 2 .* 3 rows .* 12"):
            read(plain, path, max_length=2, too_long=too_long)


def test_rows_without_a_token_to_train_on_are_named(tmp_path):
    raw = [{"input_ids": [3, 4]}, {"input_ids": [3, 4], "labels": [3, -100]}]
    with pytest.raises(ValueError, match=r"have none:\n  .*d.jsonl:2\n  .*d.jsonl:3$"):
        read_raw(tmp_path, tmp_path, *raw, {"input_ids": [5]})


def test_a_token_across_the_boundary_is_trained_and_noted(plain, tmp_path):
    """ " two" is one token, whose space ends the prompt."""
    data = read_raw(plain, tmp_path, {"prompt": "one ", "completion": "two"})
    assert trained(plain, data.train[0])[1] == [" two<|endoftext|>"]
    assert "in 1 rows one token covers the end of the prompt" in data.notes[0]
    row = {"prompt": "one", "completion": " two"}
    assert read_raw(plain, tmp_path, row).notes == ()


def test_rows_need_no_grain(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    for raw in ({"text": "one"}, {"input_ids": [3, 4]}, {"messages": MESSAGES}):
        assert len(read_raw(folder, tmp_path, raw).train) == 1
    with pytest.raises(ImportError, match="batches need: pip install"):
        batches([], batch_size=1, max_length=1, seed=0, packing=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_on": "answers"}, "`train_on` must be"),
        ({"too_long": "cut"}, "`too_long` must be"),
        ({"max_length": 1}, "`max_length` must be"),
        ({"seed": -1}, "`seed` must not be negative. Got -1"),
        ({"validation_split": 0}, "`validation_split` must be between 0 and 1. Got 0"),
        ({"validation_split": 5}, "`validation_split` must be between 0 and 1. Got 5"),
        ({"keys": {"prompt": "q", "text": "a"}}, "`keys` must belong to a single kind"),
        ({"keys": {"text": 3}}, "`keys` must map names to names"),
        ({"vocab_size": 50}, "the ids of its text must be .* below 50"),
    ],
)
def test_arguments_are_checked(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_raw(folder, tmp_path, {"text": "a"}, **settings)


def test_a_model_that_lacks_what_the_rows_need(plain, tmp_path):
    raw = [{"messages": MESSAGES}] * 20
    with pytest.raises(ValueError, match="need a chat template: .*plain has none") as e:
        read_raw(plain, tmp_path, *raw)
    assert "line" not in str(e.value)  # once, not for each row
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    tokenizer = open_tokenizer(plain, template=template)
    data = tokenizer_helpers.read_rows_of(tokenizer, tmp_path, *raw)
    assert trained(plain, data.train[0])[1] == ["two<|im_end|>", "the end<|im_end|>"]
    with pytest.raises(ValueError, match="the tokenizer of .* cannot be read"):
        read_raw(tmp_path, tmp_path, {"text": "a"})
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings


ASKED, GOOD = MESSAGES[:4], MESSAGES[4:]
BAD = [{"role": "assistant", "content": "one"}]


WHOLE = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "one &", "chosen": " two", "rejected": " one"}, None),
        ({"chosen": "one & two", "rejected": "one & one"}, "one &"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, None),
        (WHOLE, None),
        (WHOLE | {"prompt": "and?"}, None),
    ],
    ids=["texts", "implicit texts", "messages", "implicit messages", "both"],
)
def test_forms_of_preferences(folder, tmp_path, row, prompt):
    """The forms are those of TRL: see its page on data sets, and `extract_prompt`."""
    answers = ("the end", "one") if "role" in str(row) else (" two", " one")
    [pair] = read_raw(folder, tmp_path, row, rows="pairs").train
    texts_and_targets = [trained(folder, sequence) for sequence in pair.sequences]
    assert [text for _, [text] in texts_and_targets] == [
        f"{text}<|im_end|>" for text in answers
    ]
    prompts = {
        x.rpartition(y)[0] for (x, _), y in zip(texts_and_targets, answers, strict=True)
    }
    assert len(prompts) == 1 and (prompt is None or prompts == {prompt})
    assert [sequence.label for sequence in pair.sequences] == [True, False]
    for sequence in pair.sequences:
        assert (sequence.labels[: sequence.start] == -100).all()
        assert sequence.labels[sequence.start] != -100
    good, bad = read(folder, tmp_path / "d.jsonl", rows="labelled").train
    assert (good.label, bad.label, good.rejected) == (True, False, None)
    np.testing.assert_array_equal(bad.ids, pair.rejected.ids)
    # If all tokens are targets, `start` is still that of the answer.
    [row] = read(folder, tmp_path / "d.jsonl", rows="pairs", train_on="all").train
    assert row.start == pair.start and (row.labels == row.ids).all()


def test_bad_preferences_are_named_by_line(folder, tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    empty = [{"role": "assistant", "content": ""}]
    empty_answer = {"prompt": ASKED, "chosen": GOOD, "rejected": empty}
    wrong = {
        "`chosen` and `rejected` must differ": good | {"rejected": "b"},
        "the row must have `chosen` and `rejected`. Got": {
            "prompt": "a",
            "chosen": "b",
        },
        "`rejected` must be text": good | {"rejected": ""},
        "`rejected[0]` must have content": empty_answer,
        "must both be text or messages": good | {"rejected": 5},
        "the row must have a `prompt`, or": {"chosen": "b", "rejected": "c"},
    }
    conversations = {"prompt": "x", "chosen": MESSAGES, "rejected": MESSAGES[:3]}
    with pytest.raises(ValueError) as error:
        read_raw(folder, tmp_path, good, *wrong.values(), conversations, rows="pairs")
    for line, text in enumerate(wrong, 2):
        assert re.search(f"line {line}: .*{re.escape(text)}", str(error.value))
    assert "1 more row like it, line 8" in str(error.value)
    label = {"prompt": "a", "completion": "b", "label": "maybe"}
    with pytest.raises(ValueError, match="line 2: `label` must be"):
        rows = [label | {"label": 1}, label | {"label": 2}]
        read_raw(folder, tmp_path, *rows, rows="labelled")
    with pytest.raises(ValueError, match="line 1: the row must have `chosen`"):
        read(folder, tmp_path / "d.jsonl", rows="pairs")


MARKED = {"prompt": "a", "completion": "b"}
PAIR = {"chosen": "ab", "rejected": "ac"}
HINT = "a `label` of true or false need an `--objective` for labelled answers: others "
HINT += "would train on the bad answers too"
TOPIC_HINT = (
    'a `text` and a `label` need `--keys \'{"prompt": "text", "completion": "label"}\'`'
)
PAIR_HINT = "`chosen` and `rejected` need an `--objective` for preferences"


@pytest.mark.parametrize(
    "row, keys, message",
    [
        (MARKED | {"label": False}, {}, HINT),
        (MARKED | {"label": 1}, {}, HINT),
        (MARKED | {"label": "False"}, {}, HINT),
        (MARKED | {"label": 0.0}, {}, HINT),
        ({"messages": MESSAGES, "label": True}, {}, HINT),
        ({"q": "a", "a": "b", "label": False}, NAMED, HINT),
        ({"prompt": "a"} | PAIR, {}, PAIR_HINT),
        ({"messages": MESSAGES, "chosen": GOOD, "rejected": BAD}, {}, PAIR_HINT),
        ({"text": "a"} | PAIR, {}, PAIR_HINT),
        # Keys that select an answer, or other kinds of labels, are not preferences.
        (PAIR, {"text": "chosen"}, None),
        (MARKED | {"label": "sports"}, {}, None),
        ({"text": "a", "label": 1}, {"text": "text"}, None),
        ({"text": "a", "label": "x"}, {"prompt": "text", "completion": "label"}, None),
        ({"text": "a", "label": "x"}, {}, TOPIC_HINT),
        (MARKED | {"chosen": "b"}, {}, None),
    ],
)
def test_preferences_are_no_targets_without_an_objective(
    folder, tmp_path, row, keys, message
):
    if message is None:
        assert len(read_raw(folder, tmp_path, row, keys=keys).train) == 1
        return
    with pytest.raises(ValueError, match=f"line 1: rows with {message}.* Got "):
        read_raw(folder, tmp_path, row, keys=keys)


def test_pairs_that_are_cut_to_nothing_are_dropped(folder, tmp_path):
    rows = [
        {"prompt": "a" * 30, "chosen": "b" * n, "rejected": "b" * (n + 4) + "c"}
        for n in (2, 12)
    ]
    settings = dict(rows="pairs", max_length=40, too_long="truncate", chat=False)
    data = read_raw(folder, tmp_path, *rows, **settings)
    assert [len(sequence.ids) for sequence in data.train[0].sequences] == [33, 38]
    # After truncation, both answers of the second pair are the same.
    assert len(data.train) == 1 and "1 are dropped and 0 truncated" in data.notes[-1]
    with pytest.raises(ValueError, match=r"d.jsonl:2 \(48 tokens\)"):
        read(folder, tmp_path / "d.jsonl", **settings | {"too_long": "error"})
