"""How other files of a folder change its tokenizer.json; see also interop/."""

import json

import pytest
from tokenizer_helpers import save_tokenizer

from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.models.checkpoint import load_tokenizer
from qlora_jax.llm.models.tokenizer import FolderTokenizer


def change_settings(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, pieces",
    [
        ({}, ["▁", "a", "▁", "a"]),
        ({"legacy": True}, ["▁", "a", "▁", "a"]),
        ({"legacy": False}, ["▁", "a", "a"]),
        ({"legacy": None}, ["▁", "a", "a"]),
        ({"add_prefix_space": False}, ["a", "a"]),
    ],
)
def test_where_llama_puts_a_space(tmp_path, changes, pieces):
    save_tokenizer(tmp_path / "model", sentencepiece=True)
    if changes:
        change_settings(tmp_path / "model", tokenizer_class="LlamaTokenizer", **changes)
    tokenizer = load_tokenizer(tmp_path / "model")
    got = tokenizer.encode("a<|im_end|>a").tokens
    got.remove("<|im_end|>")
    assert got == pieces


def test_tokens_of_other_files_are_added(tmp_path):
    folder = tmp_path / "model"
    vocab_size = save_tokenizer(folder).get_vocab_size()
    added = {str(vocab_size): {"content": "<late>", "special": False}}
    extra = {"image_token": "<image>"}
    changes = {"added_tokens_decoder": added, "extra_special_tokens": extra}
    change_settings(folder, eos_token="<end>", **changes)
    tokenizer = open_tokenizer(folder)
    added_ids = [vocab_size, vocab_size + 1, vocab_size + 2]
    assert tokenizer.encode("<late><end><image>") == added_ids
    assert tokenizer.eos_id == vocab_size + 1
    assert tokenizer.decode(added_ids) == "<late>"
    assert FolderTokenizer(folder).special["image_token"] == "<image>"


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokenizer_class", "CodeLlamaTokenizer"),
        ("auto_map", {"AutoTokenizer": ["code.Tokenizer", None]}),
        ("fix_mistral_regex", True),
    ],
)
def test_a_setting_that_is_not_supported_is_refused(tmp_path, key, value):
    save_tokenizer(tmp_path / "model")
    change_settings(tmp_path / "model", **{key: value})
    with pytest.raises(ValueError, match=f"`{key}` in tokenizer_config.json would"):
        open_tokenizer(tmp_path / "model").encode("the")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "tokenizer.json must be JSON"),
        ("[]", "tokenizer.json must contain a JSON object"),
        ('{"model": {"type": "none"}}', "tokenizer.json cannot be read"),
        (None, "tokenizer.json must exist"),
    ],
)
def test_a_file_without_a_tokenizer_is_named(tmp_path, text, message):
    save_tokenizer(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"extra_special_tokens": "<image>"}, "must be a list or an object. Got '<ima"),
        ({"extra_special_tokens": 5}, "`extra_special_tokens` must be a list or an"),
        ({"additional_special_tokens": "<image>"}, "must be a list or an object. Got"),
        ({"added_tokens_decoder": ["<late>"]}, "an object with `content` for each id"),
        ({"added_tokens_decoder": {"7": "<late>"}}, "an object with `content`"),
        ({"added_tokens_decoder": {"x": {"content": "<late>"}}}, "for each id. Got"),
    ],
)
def test_tokens_of_the_wrong_form_are_refused(tmp_path, changes, message):
    save_tokenizer(tmp_path / "model")
    change_settings(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "model")
