"""How other files of a folder change its tokenizer.json; see also interop/."""

import json
import subprocess
import sys

import pytest
from tokenizer_helpers import save_tokenizer

from qlora_jax.llm.data import open_tokenizer


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
    tokenizer = open_tokenizer(tmp_path / "model").inner
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
    assert tokenizer.hf.special_tokens_map["image_token"] == "<image>"


def test_code_of_a_folder_is_named(tmp_path):
    save_tokenizer(tmp_path / "model")
    code = {"AutoTokenizer": ["code.Tokenizer", None]}
    change_settings(tmp_path / "model", tokenizer_class="Mine", auto_map=code)
    with pytest.raises(ValueError, match="`auto_map` in tokenizer_config.json"):
        open_tokenizer(tmp_path / "model").encode("the")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "none"}}', None])
def test_a_file_without_a_tokenizer_is_named(tmp_path, text):
    save_tokenizer(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'model'} "):
        _ = open_tokenizer(tmp_path / "model").inner


WITHOUT_TORCH = """
import importlib.util, sys
from qlora_jax.llm.data import open_tokenizer
tokenizer = open_tokenizer(sys.argv[1])
print(tokenizer.render([{"role": "user", "content": "one"}]), tokenizer.encode("one"))
assert "transformers" in sys.modules and "torch" not in sys.modules
"""


def test_a_tokenizer_needs_no_torch(tmp_path):
    save_tokenizer(tmp_path / "model", template="{{ messages[0].content }}")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "model")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("one [") and not done.stderr
