"""Chat templates are rendered, and answers marked, as transformers does."""

import json
import pathlib

import numpy as np
import pytest
import transformers
from tokenizer_helpers import CHATML, save_tokenizer, write_rows

from qlora_jax.llm.data import open_tokenizer, read_dataset

# Templates like those of Llama 3, Mistral and Qwen.
DATA = pathlib.Path(__file__).parent.parent / "data" / "templates"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in DATA.iterdir()}
TEMPLATES["chatml"] = CHATML

WHERE = {"type": "object", "properties": {"where": {"type": "string"}}}
TOOL = {"name": "weather", "description": "How <it> is — outside.", "parameters": WHERE}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"name": "weather", "arguments": {"where": "Kiel"}}
TALK = [
    {"role": "system", "content": "be brief "},
    {"role": "user", "content": "  one and one?\n\n"},
    {"role": "assistant", "content": "two\n"},
    {"role": "user", "content": "é € 𝄞 é?"},
    {"role": "assistant", "content": "é € 𝄞"},
]
CALLS = [
    {"role": "user", "content": "outside?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
    {"role": "tool", "name": "weather", "content": "sun"},
    {"role": "assistant", "reasoning": "sun is fine", "content": "the sun"},
]
CASES = [(name, messages, None) for name in TEMPLATES for messages in (TALK, TALK[:2])]
CASES += [(name, CALLS, TOOLS) for name in ("headers", "thoughts")]


def open_both(tmp_path, name, **settings):
    settings = {"template": TEMPLATES[name], "bos": True} | settings
    save_tokenizer(tmp_path / "model", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    return open_tokenizer(tmp_path / "model"), theirs


@pytest.mark.parametrize("name, messages, tools", CASES)
def test_texts_and_tokens_are_those_of_transformers(tmp_path, name, messages, tools):
    ours, theirs = open_both(tmp_path, name)
    for prompt in (False, True):
        settings = dict(tools=tools, add_generation_prompt=prompt)
        text = ours.render(messages, **settings)
        assert text == theirs.apply_chat_template(messages, tokenize=False, **settings)
        expected = theirs.apply_chat_template(messages, return_dict=False, **settings)
        assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.eos_id == theirs.eos_token_id
    assert ours.end_ids == (theirs.eos_token_id,)
    assert ours.encode("one and é") == theirs("one and é").input_ids


@pytest.mark.parametrize(
    "class_name, sentencepiece",
    [
        ("PreTrainedTokenizerFast", False),
        ("PreTrainedTokenizerFast", True),
        ("GPT2Tokenizer", False),
        ("GPTNeoXTokenizer", False),
        ("GemmaTokenizer", True),
        ("LlamaTokenizer", True),
    ],
)
@pytest.mark.parametrize("messages, tools", [(TALK, None), (CALLS, TOOLS)])
def test_marked_answers_are_those_of_transformers(
    tmp_path, messages, tools, class_name, sentencepiece
):
    settings = {"sentencepiece": sentencepiece, "class_name": class_name}
    ours, theirs = open_both(tmp_path, "thoughts", **settings)
    raw_row = {"messages": messages, "tools": json.dumps(tools)}
    path = write_rows(tmp_path / "d.jsonl", [raw_row])
    sizes = dict(vocab_size=500, max_length=999)
    [row] = read_dataset(path, ours, **sizes).train
    expected = theirs.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.ids.tolist() == expected["input_ids"]
    is_trained = [int(label != -100) for label in row.labels]
    assert is_trained == expected["assistant_masks"] and 0 < sum(is_trained)
    # The masks of the last answer and of the first one are parts of that mask.
    cut = np.flatnonzero(np.diff(is_trained, prepend=0) == 1)[1]
    last = np.where(np.arange(len(is_trained)) >= cut, is_trained, 0)
    [row] = read_dataset(path, ours, **sizes, train_on="last").train
    assert ((row.labels != -100) == last).all() and 0 < last.sum() < sum(is_trained)
    messages = [*messages[:-1], messages[-1] | {"weight": 0}]
    write_rows(path, [raw_row | {"messages": messages}])
    [row] = read_dataset(path, ours, **sizes).train
    assert ((row.labels != -100) == is_trained - last).all()
