"""Chat templates are written, and their answers found, as transformers does it."""

import json
import pathlib

import pytest
import transformers
from tokenizer_helpers import CHATML, save_tokenizer, write_rows

from qlora_jax.train import open_tokenizer, read_dataset

# In the shapes of Llama 3's, Mistral's and Qwen's.
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
        wanted = theirs.apply_chat_template(messages, return_dict=False, **settings)
        assert ours.encode(text, add_special_tokens=False) == wanted
    assert ours.eos_id == theirs.eos_token_id
    assert ours.end_ids == (theirs.eos_token_id,)
    assert ours.encode("one and é") == theirs("one and é").input_ids


def test_what_a_template_refuses_is_what_transformers_refuses(tmp_path):
    ours, theirs = open_both(tmp_path, "turns")
    with pytest.raises(ValueError, match="roles must alternate"):
        ours.render(CALLS)
    with pytest.raises(Exception, match="roles must alternate"):
        theirs.apply_chat_template(CALLS)


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("messages, tools", [(TALK, None), (CALLS, TOOLS)])
def test_marked_answers_are_those_of_transformers(
    tmp_path, messages, tools, sentencepiece
):
    ours, theirs = open_both(tmp_path, "thoughts", sentencepiece=sentencepiece)
    row = {"messages": messages, "tools": json.dumps(tools)}
    path = write_rows(tmp_path / "d.jsonl", [row])
    [found] = read_dataset(path, ours, vocab_size=500, max_length=999).train
    wanted = theirs.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids.tolist() == wanted["input_ids"]
    is_trained = [int(label != -100) for label in found.labels]
    assert is_trained == wanted["assistant_masks"] and 0 < sum(is_trained)


# Reads parts of contents, as the templates of models that see do.
PARTED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}{{ '\n' + part.text }}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)


def test_parts_are_written_as_by_transformers_or_as_their_text(tmp_path):
    parts = [{"type": "text", "text": text} for text in ("one ", "and one?")]
    talk = [{"role": "user", "content": parts}, TALK[2]]
    ours, theirs = open_both(tmp_path, "chatml", template=PARTED)
    assert ours.render(talk) == theirs.apply_chat_template(talk, tokenize=False)
    joined = [{"role": "user", "content": "one and one?"}, TALK[2]]
    for name in ("turns", "chatml"):
        ours, theirs = open_both(tmp_path, name)
        wanted = theirs.apply_chat_template(joined, tokenize=False)
        assert ours.render(talk) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_transformers_leaves_out_is_refused(tmp_path, name):
    ours, theirs = open_both(tmp_path, name)
    write = lambda talk, tools=None: theirs.apply_chat_template(
        talk, tools=tools, tokenize=False
    )
    talk = TALK[1:3]
    silent = [talk[0], talk[1] | {"content": ""}]
    called = [talk[0], silent[1] | {"tool_calls": CALLS[1]["tool_calls"]}]
    named = [talk[0] | {"name": "Ada"}, talk[1]]
    cases = [(talk, TOOLS, talk), (called, None, silent), (named, None, talk)]
    for messages, tools, without in cases:
        row = {"messages": messages, "tools": tools}
        path = write_rows(tmp_path / "d.jsonl", [row])
        settings = dict(vocab_size=500, max_length=999)
        if write(messages, tools) == write(without):
            with pytest.raises(ValueError, match="line 1: .* does not write all of"):
                read_dataset(path, ours, **settings)
        else:
            [found] = read_dataset(path, ours, **settings).train
            wanted = write(messages, tools)
            assert found.ids.tolist() == ours.encode(wanted, add_special_tokens=False)
