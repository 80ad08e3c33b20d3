"""Rows of training data: kinds, chat templates, which tokens are trained."""

import numpy as np
import pytest
from tokenizer_helpers import save_tokenizer, write_rows

import qlora_jax as ql
from qlora_jax.train import open_tokenizer, read_dataset

VOCAB = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "model"
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without a chat template, whose tokenizer adds a first token."""
    folder = tmp_path_factory.mktemp("data") / "plain"
    save_tokenizer(folder, template=None, eos="<|endoftext|>", bos=True)
    return folder


def read(folder, path, **settings):
    settings = {"vocab_size": VOCAB, "max_length": 200} | settings
    return read_dataset(path, open_tokenizer(folder), **settings)


def trained(folder, row):
    """The text of a row, and of each run of trained tokens."""
    decode = lambda ids: open_tokenizer(folder).decode(ids, skip_special_tokens=False)
    is_trained = row.labels != -100
    assert np.array_equal(row.labels[is_trained], row.ids[is_trained])
    cuts = np.flatnonzero(np.diff(is_trained.astype(int))) + 1
    runs = zip(np.split(row.ids, cuts), np.split(is_trained, cuts), strict=True)
    return decode(row.ids), [decode(run) for run, counts in runs if counts[0]]


def test_answers_of_the_assistant_are_trained(folder, tmp_path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "the end"},
    ]
    data = read(folder, write_rows(tmp_path / "d.jsonl", [{"messages": messages}]))
    text, answers = trained(folder, data.train[0])
    assert text == open_tokenizer(folder).render(messages)
    assert answers == ["two<|im_end|>", "the end<|im_end|>"]
    assert data.kind == "messages" and data.train[0].place.endswith("d.jsonl:1")
    assert data.trained_share == data.train[0].num_trained / len(data.train[0].ids)


def test_prompt_and_completion(folder, plain, tmp_path):
    row = {"prompt": "one and", "completion": " two"}
    path = write_rows(tmp_path / "d.jsonl", [row])
    assert trained(plain, read(plain, path).train[0]) == (
        "<s>one and two<|endoftext|>",
        [" two<|endoftext|>"],
    )
    chat = trained(folder, read(folder, path).train[0])
    assert chat[1] == [" two<|im_end|>"] and chat[0].startswith("<|im_start|>user\none")
    flat = trained(folder, read(folder, path, chat=False).train[0])
    assert flat == ("one and two<|im_end|>", [" two<|im_end|>"])
    everything = trained(folder, read(folder, path, train_on="all").train[0])
    assert everything == (chat[0], [chat[0]])


def test_a_folder_has_splits_with_examples(folder, tmp_path):
    row = {"prompt": "one?", "completion": "two"}
    for name in ("train", "valid", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [row])
    data = read(folder, tmp_path)
    [example] = data.valid_examples
    tokenizer = open_tokenizer(folder)
    assert tokenizer.decode(example.prompt, skip_special_tokens=False) == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.answer == "two"
    end = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert [*example.end_ids] == end
    assert len(data.train) == len(data.valid) == len(data.test) == 1
    assert ql.train.read_dataset is read_dataset
