"""Chat templates: whose they are, what they may do, which answers they mark."""

import datetime
import json
import pathlib

import numpy as np
import pytest
from tokenizer_helpers import CHATML, SPECIAL, save_tokenizer, write_rows

from qlora_jax.models.checkpoint import load
from qlora_jax.models.gguf_out import save_gguf
from qlora_jax.models.tiny import save_tiny
from qlora_jax.train import open_tokenizer, read_dataset, sandbox

ASK = [{"role": "user", "content": "one?"}]
TALK = [*ASK, {"role": "assistant", "content": "two"}]
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Drops the reasoning of earlier turns, as some models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {% if m.thought and loop.last %}"
    "({{ m.thought }}){% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer_with(tmp_path, template, **settings):
    save_tokenizer(tmp_path / "model", template=template, **settings)
    return open_tokenizer(tmp_path / "model")


def read(tokenizer, tmp_path, messages, **settings):
    path = write_rows(tmp_path / "d.jsonl", [{"messages": messages}])
    return read_dataset(path, tokenizer, vocab_size=320, max_length=200, **settings)


def answers(tokenizer, tmp_path, messages, **settings):
    row = read(tokenizer, tmp_path, messages, **settings).train[0]
    cuts = np.flatnonzero(np.diff((row.labels == -100).astype(int))) + 1
    runs = [ids for ids in np.split(row.labels, cuts) if ids[0] != -100]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in runs]


def test_marked_answers_are_trained_and_begin_once(tmp_path):
    tokenizer = tokenizer_with(tmp_path, MARKED, bos=True)
    text = tokenizer.render([*TALK, *TALK])
    assert text == "<s>" + "user: one?\nassistant: two<|im_end|>\n" * 2
    # The token " two" holds the end of the prompt too, and counts.
    found = answers(tokenizer, tmp_path, [*TALK, *TALK])
    assert found == [" two<|im_end|>"] * 2
    data = read(tokenizer, tmp_path, TALK)
    assert "in 1 rows one token holds the end of the prompt" in data.notes[0]
    [row] = data.train
    begin = SPECIAL.index("<s>")
    assert (row.ids == begin).sum() == 1 and row.ids[0] == begin
    # A plain text begins with the token that the tokenizer adds.
    assert tokenizer.encode("one")[0] == begin
    with pytest.raises(ValueError, match="must not hold the noncharacters"):
        read(tokenizer, tmp_path, [ASK[0], TALK[1] | {"content": "\ufdd0"}])


def test_answers_that_cannot_be_found_are_refused(tmp_path):
    tokenizer = tokenizer_with(tmp_path, FORGETFUL)
    thoughtful = [*ASK, TALK[1] | {"thought": "1 + 1"}]
    assert answers(tokenizer, tmp_path, thoughtful) == ["(1 + 1)two<|im_end|>"]
    twice = [*thoughtful, *thoughtful]
    with pytest.raises(ValueError, match="line 1: the answer in message 1 cannot be"):
        read(tokenizer, tmp_path, twice)
    [found] = answers(tokenizer, tmp_path, twice, train_on="all")
    assert found == tokenizer.render(twice)


def test_a_template_is_the_models_own(tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    tokenizer = tokenizer_with(tmp_path, named)
    assert tokenizer.render(ASK) == "plain"
    assert tokenizer.render(ASK, tools=[{"name": "f"}]) == "tools"
    (tmp_path / "model" / "chat_template.jinja").write_text("from the file")
    assert open_tokenizer(tmp_path / "model").render(ASK) == "from the file"
    other = tmp_path / "other.jinja"
    other.write_text("by option")
    tokenizer = open_tokenizer(tmp_path / "model", template=other)
    assert tokenizer.render(ASK, tools=[{}]) == "by option"
    with pytest.raises(ValueError, match="nowhere must be a file"):
        open_tokenizer(tmp_path / "model", template=tmp_path / "nowhere")
    only = tokenizer_with(tmp_path / "model", [{"name": "rag", "template": "x"}])
    with pytest.raises(ValueError, match=r"has templates \['rag'\], but no default"):
        only.render(ASK)


def test_the_end_of_an_answer_is_known(tmp_path):
    """From the files, and from what the template writes behind one."""
    tokenizer = tokenizer_with(tmp_path, CHATML, eos="<|endoftext|>")
    assert tokenizer.end_ids == (0, 2) and tokenizer.eos_id == tokenizer.pad_id == 0
    more = tmp_path / "model" / "generation_config.json"
    more.write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert open_tokenizer(tmp_path / "model").end_ids == (0, 2, 1)


def test_dates_can_be_fixed(tmp_path):
    save_tokenizer(tmp_path / "model", template="{{ strftime_now('%d %b %Y') }}")
    now = datetime.datetime(2024, 7, 26)
    assert open_tokenizer(tmp_path / "model", now=now).render(ASK) == "26 Jul 2024"


def test_messages_that_a_template_refuses_are_named(tmp_path):
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('ask!') }}{% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(ValueError, match="line 1: the chat template refuses it: ask!"):
        read(tokenizer, tmp_path, [{"role": "system", "content": "s"}, *TALK])


# Templates that reach for Python, or for much time or memory.
HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self.__init__.__globals__ }}",
    "{% set x = namespace(__class__=1) %}",
    "{{ 'a' * 10**9 }}",
    "{{ [1] * 10**9 }}",
    "{{ (10**9) ** (10**9) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}"
    "{{ n.x }}{% endset %}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ ([1] * 1000)|join('a' * 100000) }}",
    "{{ ('a' * 10000).replace('a', 'a' * 10000) }}",
    "{{ [[1]]|tojson(indent=10**9) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused(tmp_path, monkeypatch, template):
    monkeypatch.setattr(sandbox, "BUDGET", 20_000)  # to be quick
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(ValueError, match="must not reach outside its sandbox"):
        read(tokenizer, tmp_path, TALK)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% if %}", "must be Jinja. Line 1"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        (["x"], "must be text, or a list of named ones"),
    ],
)
def test_a_broken_template_is_an_error(tmp_path, template, message):
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(ValueError, match=message):
        read(tokenizer, tmp_path, TALK)


def test_a_template_can_do_what_it_needs(tmp_path):
    template = (
        "{%- for x in [1, 2, 3] if x > 1 -%}{% if loop.last %}{% break %}{% endif %}"
        "{{ x ~ 'a' * 2 }}{% else %}none{% endfor %}"
        "{{ {'é': '<'}|tojson }}{{ '%d'|format(250000) }}{{ 'ab'[::-1] }}"
        "{{ none|default(1000000, true) }}{{ '{:>4}'.format(7) }}{{ 7 * 1.5 }}"
    )
    tokenizer = tokenizer_with(tmp_path, template)
    assert tokenizer.render(ASK) == '2aa{"é": "<"}250000ba1000000   710.5'


def test_a_gguf_file_has_the_template_of_its_folder(tmp_path):
    tokens = pathlib.Path(save_tiny(tmp_path / "model"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (tokens / "tokenizer_config.json").write_text(json.dumps(settings))
    _, params = load(tokens, progress=False)
    path = tmp_path / "model.gguf"
    save_gguf(path, tokens, params, progress=False)
    ours, theirs = open_tokenizer(path), open_tokenizer(tokens)
    assert ours.render(TALK) == theirs.render(TALK) and ours.has_template
    assert ours.end_ids == theirs.end_ids and ours.eos_id == theirs.eos_id
    text = ours.render(TALK)
    assert ours.encode(text) == theirs.encode(text)


def test_a_marked_completion_is_trained_without_the_answers_before_it(tmp_path):
    # This one marks the header of the answer too.
    whole = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "assistant: {{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for template in (MARKED, whole):
        tokenizer = tokenizer_with(tmp_path, template)
        path = write_rows(
            tmp_path / "d.jsonl", [{"prompt": TALK + ASK, "completion": TALK[1:]}]
        )
        [row] = read_dataset(path, tokenizer, vocab_size=320, max_length=200).train
        text = tokenizer.decode(row.labels[row.labels != -100])
        assert text.count("two") == 1
