"""Chat templates: where they come from, what they may do, which answers they mark."""

import json
import pathlib
import re

import gguf
import numpy as np
import pytest
from tokenizer_helpers import CHATML, SPECIAL, read_rows_of, save_tokenizer

import qlora_jax as ql
from qlora_jax.llm.data import open_tokenizer, rendering
from qlora_jax.llm.gguf.save import save_gguf
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.tiny import save_tiny

ASK = [{"role": "user", "content": "one?"}]
TALK = [*ASK, {"role": "assistant", "content": "two"}]
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Drops thoughts, and renders earlier turns differently, as some templates do.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {% if loop.last and m.role != 'user' %}"
    "({{ m.thought }}){% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer_with(tmp_path, template, **settings):
    save_tokenizer(tmp_path / "model", template=template, **settings)
    return open_tokenizer(tmp_path / "model")


def read(tokenizer, tmp_path, messages, **settings):
    return read_rows_of(tokenizer, tmp_path, {"messages": messages}, **settings)


def trained_texts_of(tokenizer, tmp_path, messages, **settings):
    row = read(tokenizer, tmp_path, messages, **settings).train[0]
    cuts = np.flatnonzero(np.diff((row.labels == -100).astype(int))) + 1
    runs = [ids for ids in np.split(row.labels, cuts) if ids[0] != -100]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in runs]


def test_marked_answers_are_trained_and_begin_once(tmp_path):
    tokenizer = tokenizer_with(tmp_path, MARKED, bos=True)
    text = tokenizer.render([*TALK, *TALK])
    assert text == "<s>" + "user: one?\nassistant: two<|im_end|>\n" * 2
    # The token " two" also holds the end of the prompt, and is a target.
    trained_texts = trained_texts_of(tokenizer, tmp_path, [*TALK, *TALK])
    assert trained_texts == [" two<|im_end|>"] * 2
    data = read(tokenizer, tmp_path, TALK)
    assert "in 1 rows one token covers the end of the prompt" in data.notes[0]
    [row] = data.train
    begin = SPECIAL.index("<s>")
    assert (row.ids == begin).sum() == 1 and row.ids[0] == begin
    # A plain text begins with the token that the tokenizer adds.
    assert tokenizer.encode("one")[0] == begin


# This template marks the header of the answer too.
WHOLE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "assistant: {{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_answers_are_marked_in_any_spelling(tmp_path):
    # `+` keeps the white space around a block, which has none here.
    template = WHOLE.replace("{% generation %}", "{%+ generation +%}")
    tokenizer = tokenizer_with(tmp_path, template)
    texts = trained_texts_of(tokenizer, tmp_path, TALK)
    assert texts == ["assistant: two<|im_end|>"]
    # An example in a comment marks nothing.
    source = "{# {% generation %} #}" + CHATML
    [text] = trained_texts_of(tokenizer_with(tmp_path, source), tmp_path, TALK)
    assert text == "two<|im_end|>"


@pytest.mark.parametrize("template", [MARKED, WHOLE])
def test_a_completion_is_trained_without_the_answers_before_it(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    row = {"prompt": TALK + ASK, "completion": TALK[1:]}
    [row] = read_rows_of(tokenizer, tmp_path, row).train
    assert tokenizer.decode(row.labels[row.labels != -100]).count("two") == 1


def test_answers_that_cannot_be_found_are_refused(tmp_path):
    tokenizer = tokenizer_with(tmp_path, FORGETFUL)
    thoughtful = [*ASK, TALK[1] | {"thought": "1 + 1"}]
    assert trained_texts_of(tokenizer, tmp_path, thoughtful) == ["(1 + 1)two<|im_end|>"]
    twice = [*TALK, *thoughtful]
    with pytest.raises(ValueError, match="line 1: the answer in message 1 cannot be"):
        read(tokenizer, tmp_path, twice)
    [trained_text] = trained_texts_of(tokenizer, tmp_path, twice, train_on="all")
    assert trained_text == tokenizer.render(twice)
    # Pairs need the boundaries of their answers, even if all tokens are targets.
    pair = {"prompt": twice[:1], "chosen": twice[1:], "rejected": TALK[1:]}
    with pytest.raises(ValueError, match="line 1: the answer in message 1 cannot be"):
        read_rows_of(tokenizer, tmp_path, pair, rows="pairs", train_on="all")


def turn(role, content="one?"):
    return {"role": role, "content": content}


DEVELOPER = CHATML.replace(
    "m['role'] +", "('D' if m.role == 'developer' else m.role) +"
)


@pytest.mark.parametrize(
    "template, row, unknown",
    [
        (CHATML, {"messages": [turn("usr"), TALK[1]]}, "'usr' in `messages[0]`"),
        (CHATML, {"messages": [turn("developer"), *TALK]}, "'developer' in `messages"),
        (DEVELOPER, {"messages": [turn("develope"), *TALK]}, "'develope' in `messages"),
        (DEVELOPER, {"messages": [turn("developer"), *TALK]}, None),
        (CHATML, {"messages": [turn("system"), *TALK, turn("tool")]}, None),
        (
            CHATML,
            {"prompt": [turn("User"), *TALK, turn("usr")], "completion": TALK[1:]},
            "'User' in `prompt[0]`, 'usr' in `prompt[3]`",
        ),
        (
            CHATML,
            {"conversations": [turn("user"), turn("bot")]},
            "'bot' in `conversations[1]`",
        ),
    ],
)
def test_roles_that_a_template_does_not_name(tmp_path, template, row, unknown):
    tokenizer = tokenizer_with(tmp_path, template)
    if unknown is None:
        assert len(read_rows_of(tokenizer, tmp_path, row).train) == 1
        return
    message = f"line 1: roles must be system, user, .* Got {re.escape(unknown)}"
    for train_on in ("completions", "all"):
        with pytest.raises(ValueError, match=message):
            read_rows_of(tokenizer, tmp_path, row, train_on=train_on)
    pair = {"prompt": [turn("usr")], "chosen": TALK[1:], "rejected": [turn("usr")]}
    with pytest.raises(ValueError, match=r"Got 'usr' in `prompt\[0\]`"):
        read_rows_of(tokenizer, tmp_path, pair, rows="pairs")


# Three answers, each with its own text and marks.
CHAT = [
    message | {"content": f"{message['content']}{i // 2}"}
    for i, message in enumerate(TALK * 3)
]


@pytest.mark.parametrize("template", [CHATML, MARKED, WHOLE])
@pytest.mark.parametrize(
    "marks, trained",
    [
        ({}, "012"),
        ({1: {"weight": 0}, 0: {"weight": 0}}, "12"),
        ({3: {"train": False}, 1: {"train": True}}, "02"),
        ({5: {"training": False}, 0: {"training": False}}, "01"),
        ({1: {"weight": 0.0, "train": False}, 5: {"weight": 0}}, "1"),
        ({3: {"weight": None, "train": True}}, "012"),
    ],
)
def test_messages_with_a_weight_of_0_are_not_trained(
    tmp_path, template, marks, trained
):
    tokenizer = tokenizer_with(tmp_path, template)
    messages = [message | marks.get(i, {}) for i, message in enumerate(CHAT)]
    row = {"messages": messages}
    names = {"user": "human", "assistant": "gpt"}
    turns = [
        {"from": names[m["role"]], "value": m["content"], **marks.get(i, {})}
        for i, m in enumerate(CHAT)
    ]
    data = read_rows_of(tokenizer, tmp_path, row, {"messages": CHAT})
    sharegpt = read_rows_of(tokenizer, tmp_path, {"conversations": turns})
    row, unweighted = data.train
    assert row.ids.tolist() == unweighted.ids.tolist()  # a mark is not rendered
    assert row.labels.tolist() == sharegpt.train[0].labels.tolist()
    trained_numbers = "".join(re.findall(r"two(\d)", tokenizer.decode(targets(row))))
    assert trained_numbers == trained
    # The targets of the other answers are the same as without weights.
    expected_runs = [
        x for x in runs(unweighted) if tokenizer.decode(x).rstrip()[-1] in trained
    ]
    assert runs(row) == expected_runs
    if trained[-1] != "2":
        return
    row = {"prompt": messages[:4], "completion": messages[4:]}
    [row] = read_rows_of(tokenizer, tmp_path, row).train
    assert runs(row) == expected_runs[-1:]


@pytest.mark.parametrize("template", [CHATML, MARKED, WHOLE])
def test_a_conversation_is_rendered_once(tmp_path, monkeypatch, template):
    tokenizer = tokenizer_with(tmp_path, template)
    renderings, render = [], rendering.renderer.render

    def count(*arguments):
        renderings.append(arguments)
        return render(*arguments)

    # Short texts are rendered again, to see whether the template omits them.
    roles = ["user", "assistant"] * 5
    messages = [turn(role, f"a sentence about {i}") for i, role in enumerate(roles)]
    messages[3] = messages[3] | {"weight": 0}
    expected = ["a sentence about 1", *(f"a sentence about {i}" for i in (5, 7, 9))]
    settings = {"max_length": 999}
    read(tokenizer, tmp_path, messages, **settings)
    monkeypatch.setattr(rendering.renderer, "render", count)
    [row] = read(tokenizer, tmp_path, messages, **settings).train
    assert len(renderings) == 1
    texts = [tokenizer.decode(x).removeprefix("assistant:").strip() for x in runs(row)]
    assert texts == expected
    # A question that looks like an answer is none.
    trap = turn("user", tokenizer.render(messages[:2])[len(messages[0]["content"]) :])
    [row] = read(tokenizer, tmp_path, [trap, *messages[1:]], **settings).train
    texts = [tokenizer.decode(x).removeprefix("assistant:").strip() for x in runs(row)]
    assert texts == expected


def targets(row):
    return row.ids[row.labels != -100]


def runs(row):
    """The tokens of each run of trained tokens."""
    cuts = np.flatnonzero(np.diff((row.labels != -100).astype(int))) + 1
    return [ids.tolist() for ids in np.split(row.labels, cuts) if ids[0] != -100]


@pytest.mark.parametrize("template", [CHATML, MARKED, WHOLE])
def test_the_last_answer_alone_is_trained(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    rows = [
        {"messages": CHAT},
        {"messages": CHAT + ASK},  # a question without an answer
        {"prompt": CHAT[:3], "completion": CHAT[3:]},
    ]
    for row in rows:
        [encoded] = read_rows_of(tokenizer, tmp_path, row, train_on="last").train
        [run] = runs(encoded)
        assert tokenizer.decode(run).removeprefix("assistant:").strip() == "two2"
    with pytest.raises(
        ValueError, match="the row must have a message of the assistant to"
    ):
        messages = [*CHAT[:5], CHAT[5] | {"weight": 0}]
        read(tokenizer, tmp_path, messages, train_on="last")


def test_the_last_answer_is_found_where_earlier_ones_are_not(tmp_path):
    """A template may drop the thoughts of earlier turns, as that of Qwen3 does."""
    tokenizer = tokenizer_with(tmp_path, FORGETFUL)
    messages = [*TALK, *ASK, TALK[1] | {"thought": "1 + 1"}]
    with pytest.raises(ValueError, match='or train on "last" or "all"'):
        read(tokenizer, tmp_path, messages)
    trained_texts = trained_texts_of(tokenizer, tmp_path, messages, train_on="last")
    assert trained_texts == ["(1 + 1)two<|im_end|>"]


@pytest.mark.parametrize(
    "message, train_on, error",
    [
        (ASK[0] | {"weight": 1}, "completions", r"`messages\[0\]` must not have a"),
        (ASK[0] | {"train": True}, "completions", "only messages of the assistant are"),
        (TALK[1] | {"weight": 0.5}, "completions", "must have a `weight` of 0 or 1"),
        (TALK[1] | {"train": "no"}, "completions", "must have a `weight` of 0 or 1"),
        (TALK[1] | {"weight": 0, "train": True}, "last", "Got .*'weight': 0, 'train'"),
        (TALK[1] | {"weight": 0}, "all", "must not have a `weight` of 0 or `train: f"),
        (TALK[1] | {"weight": 0}, "completions", "a message of the assistant to train"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, message, train_on, error):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    talk = [message, TALK[1]] if message["role"] == "user" else [ASK[0], message]
    with pytest.raises(ValueError, match=f"line 1: .*{error}"):
        read(tokenizer, tmp_path, talk, train_on=train_on)


CALL = {"name": "weather", "arguments": {"where": "Kiel", "day": "today"}}
ASKED = [*ASK, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}]
TOLD = [*ASKED, {"role": "tool", "content": "sun"}, *TALK[1:]]
LONG = "a content that is long enough to be found without a second rendering"
# Renders tools and calls, but only the first argument of a call.
CALLING = CHATML.replace(
    "m['content'] +", "m['content'] + (call(m) if m.tool_calls else '') +"
)
CALLING = (
    "{% macro call(m) %}{% for c in m.tool_calls %}[{{ c.function.name }} "
    "{{ c.function.arguments['where'] }}]{% endfor %}{% endmacro %}"
    "{% for t in tools or [] %}{{ t.function.name }}{{ t.function.parameters|tojson }}"
    "{% endfor %}" + CALLING
)
TOOL = {"name": "weather", "description": "Outside?", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": TOOL}


TWICE = {"role": "user", "content": LONG, "name": LONG}
RESULT = {"role": "tool", "name": "a", "content": "b"}
DAY = "[0].function.arguments.day"
CALLS_LOST = f"messages[1].tool_calls{DAY} tools[0].function.description"
ODD = {"prompt": ASK, "completion": [ASKED[1] | {"name": "a", "n": 0}]}
ODD_NAMES = f"completion[0].tool_calls{DAY} completion[0].name completion[0].n"


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def thinking(text):
    return [*ASK, TALK[1] | {"content": text}]


@pytest.mark.parametrize(
    "template, row, lost",
    [
        (CHATML, TOLD, "messages[1].tool_calls"),
        (CHATML, {"messages": TALK, "tools": [TOOL]}, "tools"),
        (CALLING, {"messages": TOLD, "tools": [TOOL]}, CALLS_LOST),
        (CALLING, ODD, ODD_NAMES),
        (CHATML, [ASK[0] | {"name": LONG}, TALK[1]], "messages[0].name"),
        (CHATML, {"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools"),
        # The same text in another field does not prove that a field is rendered.
        (CHATML, [TWICE, TALK[1]], "messages[0].name"),
        (FORGETFUL, thinking("<think>1 + 1</think>two"), "messages[1].content"),
        (FORGETFUL, thinking(f"<think>ok</think>{LONG} ok"), "messages[1].content"),
        # A tool result that does not follow its call.
        (CHATML, [*ASK, RESULT, TALK[1]], "messages[1].name"),
    ],
)
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_what_is_not_written_is_refused(tmp_path, template, row, lost, train_on):
    tokenizer = tokenizer_with(tmp_path, template)
    row = row if isinstance(row, dict) else {"messages": row}
    names = re.escape(", ".join(f"`{name}`" for name in lost.split()))
    message = f"line 1: the chat template does not write all of {names}: the"
    with pytest.raises(ValueError, match=message):
        read_rows_of(tokenizer, tmp_path, row, max_length=400, train_on=train_on)


def test_what_need_not_be_written(tmp_path):
    """Ids, empty values and the name of the call before a result may be left out."""
    tokenizer = tokenizer_with(tmp_path, CALLING)
    call = {"name": "weather", "arguments": {"where": "Kiel"}}
    calls = {"tool_calls": [{"id": "1", "type": "function", "function": call}]}
    named = {"tool_call_id": "1", "name": "weather"}
    rows = [
        [*ASK, ASKED[1] | calls, TOLD[2] | named, TALK[1]],
        [*ASK, ASKED[1] | calls | {"name": None, "thinking": ""}, *TOLD[2:]],
    ]
    raw = [{"messages": m, "source": "s"} for m in rows]
    data = read_rows_of(tokenizer, tmp_path, *raw, max_length=400)
    a, b = (row.ids.tolist() for row in data.train)
    assert a == b == tokenizer.encode(tokenizer.render(rows[0]))
    assert data.notes == ("ignored keys of rows: source",)


@pytest.mark.parametrize(
    "empty", ["", " \n", [], [{"type": "text", "text": " "}], None]
)
def test_empty_turns_of_the_assistant_are_refused(tmp_path, empty):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    with pytest.raises(ValueError, match=r"line 1: `messages\[1\]` must have cont"):
        read(tokenizer, tmp_path, [*ASK, {"role": "assistant", "content": empty}])


# Loops over the parts of a content, as templates of vision models do.
PARTED = CHATML.replace("m['content'] +", "text(m['content']) +")
PARTED = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part.type == 'text' %}{{ part.text }}|"
    "{% else %}<image>{% endif %}{% endfor %}{% endif %}{% endmacro %}" + PARTED
)


@pytest.mark.parametrize(
    "template",
    [CHATML, MARKED, PARTED, CHATML.replace("m['content']", "m['content']|tojson")],
)
def test_parts_are_joined(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    talk = [{"role": "user", "content": parts("on", "e?")}]
    talk += [{"role": "assistant", "content": parts("two")}]
    no_parts = [ASK[0] | {"content": []}, talk[1]]
    empty_text = [ASK[0] | {"content": ""}, TALK[1]]
    assert trained_texts_of(tokenizer, tmp_path, no_parts) == trained_texts_of(
        tokenizer, tmp_path, empty_text
    )
    assert trained_texts_of(tokenizer, tmp_path, talk) == trained_texts_of(
        tokenizer, tmp_path, TALK
    )
    thought, sound = {"type": "thinking", "thinking": "one"}, {"type": "audio"}
    for part in (thought, sound, sound | {"url": "a.wav"}):
        wrong = [{"role": "user", "content": [*parts("one?"), part]}, TALK[1]]
        with pytest.raises(ValueError, match="line 1: .* parts .*"):
            read(tokenizer, tmp_path, wrong)


def test_a_template_is_the_models_own(tmp_path):
    templates = {"default": "plain", "tool_use": "tools"}
    templates = [{"name": name, "template": text} for name, text in templates.items()]
    tokenizer = tokenizer_with(tmp_path, templates)
    assert tokenizer.render(ASK) == "plain"
    assert tokenizer.render(ASK, tools=[{"name": "f"}]) == "tools"
    (tmp_path / "model" / "chat_template.jinja").write_text("from the file")
    assert open_tokenizer(tmp_path / "model").render(ASK) == "from the file"
    template_file = tmp_path / "other.jinja"
    template_file.write_text("by option")
    tokenizer = open_tokenizer(tmp_path / "model", template=template_file)
    assert tokenizer.render(ASK, tools=[{}]) == "by option"
    with pytest.raises(ValueError, match="`template` must be a file"):
        open_tokenizer(tmp_path / "model", template=tmp_path / "nowhere")
    without_default = tokenizer_with(
        tmp_path / "model", [{"name": "rag", "template": "x"}]
    )
    with pytest.raises(ValueError, match=r"has templates \['rag'\], but no default"):
        without_default.render(ASK)


def test_the_end_of_an_answer_is_known(tmp_path):
    """End tokens come from the files, and from the template's text after an answer."""
    tokenizer = tokenizer_with(tmp_path, CHATML, eos="<|endoftext|>")
    assert tokenizer.end_ids == (0, 2) and tokenizer.eos_id == 0
    generation_config = tmp_path / "model" / "generation_config.json"
    generation_config.write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert open_tokenizer(tmp_path / "model").end_ids == (0, 2, 1)
    # Some models with a vision part have the tokens only in their text settings.
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({"text_config": {"eos_token_id": [7, 1]}}))
    assert open_tokenizer(tmp_path / "model").end_ids == (0, 2, 1, 7)
    config.write_text(json.dumps({"eos_token_id": "7"}))
    with pytest.raises(ValueError, match="`eos_token_id` must be an integer, or a lis"):
        _ = open_tokenizer(tmp_path / "model").end_ids


OUTSIDE = "must not reach outside its sandbox"


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{{ raise_exception('ask!') }}",
            "line 1: the chat template rejects the messages: ask!",
        ),
        ("{% if %}", "must be Jinja. Line 1"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        (["x"], "the tokenizer of .* cannot be read"),
        (5, "must be text, or texts by their names. Got 5"),
        ({"default": 5}, "must be text, or texts by their names. Got {'default': 5}"),
        ("{{ ''.__class__.__mro__ }}", OUTSIDE),
        ("{{ messages.append(1) }}", OUTSIDE),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", OUTSIDE),
        ("{{ self.__init__.__globals__ }}", OUTSIDE),
    ],
)
def test_a_broken_or_hostile_template_is_an_error(tmp_path, template, message):
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(ValueError, match=message):
        read(tokenizer, tmp_path, TALK)


def test_a_template_can_do_what_it_needs(tmp_path):
    template = (
        "{%- for x in [1, 2, 3] if x > 1 -%}{% if loop.last %}{% break %}{% endif %}"
        "{{ x ~ 'a' * 2 }}{% else %}none{% endfor %}"
        "{{ {'é': '<'}|tojson }}{{ '%d'|format(250000) }}{{ 'ab'[::-1] }}"
        "{{ none|default(1000000, true) }}{{ '{:>4}'.format(7) }}{{ 7 * 1.5 }}"
        "{% if true %}\n  {% endif %}|"  # leaves no newlines
    )
    tokenizer = tokenizer_with(tmp_path, template)
    assert tokenizer.render(ASK) == '2aa{"é": "<"}250000ba1000000   710.5|'


def test_a_gguf_file_has_the_templates_of_its_folder(tmp_path):
    tokens = pathlib.Path(save_tiny(tmp_path / "model"))
    templates = {"default": CHATML, "tool_use": "{{ tools }}"}
    (tokens / "chat_template.jinja").write_text(CHATML)
    (tokens / "additional_chat_templates").mkdir()
    tool_template = tokens / "additional_chat_templates" / "tool_use.jinja"
    tool_template.write_text(templates["tool_use"])
    settings = {"eos_token": "<|im_end|>", "chat_template": "older than the file"}
    (tokens / "tokenizer_config.json").write_text(json.dumps(settings))
    config, params = load(tokens, progress=False)
    ql.io.save_merged(tmp_path / "copy", tokens, {}, decoder_names(config))
    assert open_tokenizer(tmp_path / "copy").chat.templates == templates
    save_gguf(tmp_path / "model.gguf", tokens, params, progress=False)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    end = fields["tokenizer.ggml.eos_token_id"].contents()
    assert end == open_tokenizer(tokens).eos_id
