"""Rows with images become the tokens and pixels that transformers computes."""

import copy
import json

import numpy as np
import pytest
from helpers import refusal
from image_models import TOKENS_PER_IMAGE, save_image_model, write_image_rows

from qlora_jax.llm.data import eval_batches, open_tokenizer, read_dataset
from qlora_jax.llm.data.images import ImageProcessor

SETTINGS = {"vocab_size": 300, "max_length": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder, its model's processor, its file of rows, and these rows."""
    folder = tmp_path_factory.mktemp("images")
    return folder, save_image_model(folder / "model"), *write_image_rows(folder)


def open_both(folder, processor):
    token_id = processor.tokenizer.image_token_id
    return open_tokenizer(folder / "model"), ImageProcessor(folder / "model", token_id)


def torch_inputs(folder, processor, row):
    """Returns what the processor of transformers computes for a row."""
    row = copy.deepcopy(row)
    for part in row["messages"][0]["content"]:
        if isinstance(part, dict) and "path" in part:
            part["path"] = str(folder / part["path"])
    return processor.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True
    )


def test_tokens_and_pixels_equal_transformers(folder):
    folder, processor, path, raw = folder
    tokenizer, images = open_both(folder, processor)
    data = read_dataset(path, tokenizer, images=images, **SETTINGS)
    for row, raw_row in zip(data.train, raw, strict=True):
        expected = torch_inputs(folder, processor, raw_row)
        [ids] = expected["input_ids"]
        assert row.ids.tolist() == ids
        targets = processor.tokenizer.decode(row.ids[row.labels != -100])
        assert targets == raw_row["messages"][1]["content"] + "<|im_end|>"
        if row.images is not None:
            np.testing.assert_array_equal(row.images.load(), expected["pixel_values"])
    assert [row.images is None for row in data.train] == [False, False, True, False]


def test_tokens_of_images_are_never_targets(folder):
    folder, processor, path, _ = folder
    tokenizer, images = open_both(folder, processor)
    settings = SETTINGS | {"images": images, "train_on": "all"}
    for row in read_dataset(path, tokenizer, **settings).train:
        is_image = row.ids == images.token_id
        np.testing.assert_array_equal(row.labels, np.where(is_image, -100, row.ids))


def test_each_row_of_a_batch_has_the_same_number_of_images(folder):
    folder, processor, path, _ = folder
    tokenizer, images = open_both(folder, processor)
    rows = read_dataset(path, tokenizer, images=images, **SETTINGS).train
    [batch] = eval_batches(rows, batch_size=5, max_length=128)  # one row is padding
    assert batch.pixel_values.shape == (5, 2, 3, 16, 16)
    is_image = batch.ids == images.token_id
    assert is_image.sum(axis=1).tolist() == [2 * TOKENS_PER_IMAGE] * 5
    # Rows with fewer images get blank images, whose tokens are in the padding.
    is_blank = is_image & (batch.segment_ids == 0)
    assert (is_blank.sum(axis=1) // TOKENS_PER_IMAGE).tolist() == [1, 0, 2, 1, 2]
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(batch.ids[index, : len(row.ids)], row.ids)


def parts(*contents):
    messages = [{"role": "user", "content": [*contents]}]
    return {"messages": [*messages, {"role": "assistant", "content": "yes"}]}


def test_wrong_rows_are_listed(folder, tmp_path):
    folder, processor, *_ = folder
    tokenizer, images = open_both(folder, processor)
    (tmp_path / "text.png").write_text("text")
    rows = [
        parts({"type": "image", "path": "missing.png"}),
        parts({"type": "image", "path": "text.png"}),
        parts({"type": "image", "url": "https://example.com/a.png"}),
        parts({"type": "image_url", "image_url": {"url": "a.png"}}),
        parts({"type": "image", "path": str(folder / "a.png"), "url": "b.png"}),
        parts({"type": "text", "text": "<image>"}),
        parts(
            {"type": "image", "path": str(folder / "a.png")},
            {"type": "text", "text": "<begin>"},
        ),
    ]
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusal(
        lambda: read_dataset(path, tokenizer, images=images, **SETTINGS),
        "line 1: images must be files of images. Got",
        "missing.png (FileNotFoundError)",
        "1 more row like it, line 2",
        "line 3: `messages[0].content[0]` must be an image in a file on this machine",
        "2 more rows like it, lines 4, 5",
        "line 6: a row without images must not have tokens of images",
        "line 7: ",
        "Found total 2 <begin> tokens and 1 images",
    )


def test_images_need_a_processor_and_rows_of_texts(folder, tmp_path):
    folder, processor, path, _ = folder
    tokenizer, images = open_both(folder, processor)
    refusal(
        lambda: read_dataset(path, tokenizer, **SETTINGS),
        "line 1: `messages[0].content[1]` must be text. Got an image, which needs a",
        "2 more rows like it, lines 2, 4",
    )
    refusal(
        lambda: read_dataset(path, tokenizer, images=images, stream=True, **SETTINGS),
        "`stream` must be false for rows with images",
    )
    refusal(
        lambda: read_dataset(
            path,
            tokenizer,
            images=images,
            too_long="truncate",
            vocab_size=300,
            max_length=24,
        ),
        "rows must have at most `max_length` = 24 tokens",
    )
    prompt = parts({"type": "image", "path": str(folder / "a.png")})["messages"][:1]
    answers = {x: [{"role": "assistant", "content": x}] for x in ("chosen", "rejected")}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": prompt, **answers}))
    refusal(
        lambda: read_dataset(pairs, tokenizer, images=images, rows="pairs", **SETTINGS),
        "`prompt[0].content[0]` must be text in preferences. Got an image.",
    )


def test_a_changed_image_is_noticed(folder):
    folder, processor, path, _ = folder
    tokenizer, images = open_both(folder, processor)
    rows = read_dataset(path, tokenizer, images=images, **SETTINGS).train
    old = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
    try:
        refusal(lambda: rows[0].images.load(), "images must not change", "a.png")
    finally:
        (folder / "a.png").write_bytes(old)
