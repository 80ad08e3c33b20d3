"""`qlora-jax generate`: answers to prompts, conversations, and wrong arguments."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from commands import PROGRAM, start_python
from commands import run as run_command
from helpers import trees_of
from tokenizer_helpers import SPECIAL, save_tokenizer, write_rows

import qlora_jax as ql
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.stream import TextStream
from qlora_jax.llm.models.tiny import save_tiny

END = SPECIAL.index("<|im_end|>")
NEW = 9  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model with a chat template, and its tokenizer."""
    folder = tmp_path_factory.mktemp("generate") / "base"
    save_tiny(folder, vocab_size=400)
    (folder / "chat_template.jinja").unlink()
    return folder, save_tokenizer(folder, bos=True)


@pytest.fixture(scope="module")
def write(folder):
    """The definition of greedy decoding: a full forward pass for each new token."""
    config, params = load(folder[0], progress=False)
    run = jax.jit(lambda params, x: Decoder(config).apply({"params": params}, x))

    def write_greedily(text, *, bos=False, params=params, max_new_tokens=NEW):
        tokenizer = folder[1]
        ids = tokenizer.encode(text, add_special_tokens=bos).ids
        assert (ids[0] == SPECIAL.index("<s>")) == bos
        new_tokens = []
        while len(new_tokens) < max_new_tokens and END not in new_tokens:
            tokens = np.zeros((1, 256), np.int32)
            tokens[0, : len(ids) + len(new_tokens)] = ids + new_tokens
            logits = run(params, tokens)[0, len(ids) + len(new_tokens) - 1]
            new_tokens.append(int(jnp.argmax(logits)))
        return (
            tokenizer.decode([x for x in new_tokens if x != END]),
            len(ids),
            new_tokens,
        )

    return write_greedily


ROLES = "user", "assistant", "user"


def chatml(*turns):
    rendered_turns = [
        f"<|im_start|>{ROLES[i]}\n{x}<|im_end|>\n" for i, x in enumerate(turns)
    ]
    return "".join(rendered_turns) + "<|im_start|>assistant\n"


def run(capsys, *arguments):
    return run_command(capsys, "generate", "--max-new-tokens", NEW, *arguments)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """The folder of a PEFT adapter, and the parameters merged with it."""
    config, params = load(folder[0], progress=False)
    base, lora = trees_of(params, rank=4, fmt=None, targets=r"layers/.*_proj/kernel")
    path = tmp_path_factory.mktemp("adapter") / "peft"
    ql.io.save_peft(path, base, lora, decoder_names(config))
    return path, ql.merge(base, lora)


@pytest.mark.slow
def test_a_prompt_is_a_users_turn(capsys, folder, write):
    prompt = "one and one?"
    text, prompt_tokens, new_tokens = write(chatml(prompt))
    flags = "--model", folder[0], "--prompt", prompt
    assert run(capsys, *flags)[:2] == (0, text + "\n")
    status, out, _ = run(capsys, *flags, "--json")
    [answer] = json.loads(out)["answers"]
    assert status == 0 and answer.pop("seconds") > 0
    expected = dict(prompt=prompt, text=text, prompt_tokens=prompt_tokens)
    expected |= {
        "new_tokens": len(new_tokens),
        "finished": END in new_tokens,
    }
    assert answer == expected


@pytest.mark.slow
def test_plain_text_from_stdin_goes_on(capsys, folder, write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the user\n and\n"))
    text = write("the user\n and", bos=True)[0]
    assert run(capsys, "--model", folder[0], "--chat=false")[:2] == (0, text + "\n")


@pytest.mark.slow
def test_an_adapter_writes_as_a_merged_model(capsys, folder, adapter, write):
    flags = "--model", folder[0], "--prompt", "one?", "--adapter", adapter[0]
    text = write(chatml("one?"), params=adapter[1])[0]
    assert run(capsys, *flags)[1] == text + "\n" != write(chatml("one?"))[0] + "\n"


@pytest.mark.slow
def test_layers_are_packed_as_they_are_read(capsys, folder, write):
    packing = ql.QLoRAConfig(fmt="fp4", block_size=32, targets=r"layers/.*kernel")
    _, base = load(folder[0], jnp.float32, packing, progress=False)
    text = write(chatml("one?"), params=ql.dequantize(base))[0]
    assert text != write(chatml("one?"))[0]
    flags = "--model", folder[0], "--prompt", "one?", "--fmt=fp4", "--block-size=32"
    assert run(capsys, *flags)[1] == text + "\n"


@pytest.mark.slow
def test_a_conversation_on_a_terminal_keeps_its_history(folder, write):
    ours, theirs = pty.openpty()
    command = [*PROGRAM, "generate", "--json", "--model", folder[0]]
    command.append(f"--max-new-tokens={NEW}")
    pipe = subprocess.PIPE
    with start_python(*command, stdin=theirs, stdout=pipe, stderr=pipe) as process:
        os.write(ours, b"one and one?\n\n  \nthe user\n\x04")  # \x04 ends it
        out, err = process.communicate(timeout=300)
    for end in (ours, theirs):
        os.close(end)
    assert process.returncode == 0, err
    first, second = json.loads(out)["answers"]
    assert first["text"] == write(chatml("one and one?"))[0]
    history = chatml("one and one?", first["text"], "the user")
    text, prompt_tokens, _ = write(history)
    assert (second["text"], second["prompt_tokens"]) == (text, prompt_tokens)


@pytest.mark.slow
def test_prompts_of_a_file_are_answered_each_by_itself(capsys, folder, write, tmp_path):
    conversation = [dict(role=ROLES[i], content="abc"[i]) for i in range(3)]
    rows = [
        {"prompt": "one and one?"},
        {"messages": conversation},
        {"prompt": "the user"},
    ]
    texts = [chatml("one and one?"), chatml("a", "b", "c"), chatml("the user")]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "answers.jsonl"
    flags = "--model", folder[0], "--prompts", file, "--batch-size=2"
    assert run(capsys, *flags, "--out", out)[:2] == (0, "")
    assert run(capsys, *flags)[:2] == (0, out.read_text())
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    for row, text, answer in zip(rows, texts, answers, strict=True):
        text, size, new_tokens = write(text)
        expected = dict(prompt=[*row.values()][0], text=text, prompt_tokens=size)
        assert answer == expected | dict(
            new_tokens=len(new_tokens), finished=END in new_tokens
        )
    assert "`out` must be new" in run(capsys, *flags, "--out", out)[2]

    def draw(seed):
        return run(capsys, *flags, "--temperature=3", f"--seed={seed}")[1]

    assert draw(1) == draw(1) != draw(2)


# Errors that are raised before the weights are read


@pytest.fixture
def without_weights(folder, tmp_path):
    """A copy of the model whose weights file is broken."""
    path = shutil.copytree(folder[0], tmp_path / "base")
    (path / "model.safetensors").write_bytes(b"broken")
    return path


def edit(path, **changes):
    old = json.loads(path.read_text())
    path.write_text(json.dumps(old | changes))


PACKED = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, [], "model.safetensors"),  # the weights are read last
        ({}, ["--adapter=nowhere"], "must be a path or a hub id"),
        ({}, ["--adapter", "MODEL"], "`adapter` must be a folder with adapter_config"),
        ({}, ["--fmt=nf4", "--block-size=17"], "`block_size`"),
        ({"chat_template": None}, ["--chat=true"], "`chat` must be false: the model"),
        ({"chat_template": None}, ["--system=s"], "`system` must be left out: the mo"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, [], "no system"),
        ({"chat_template": "{% for"}, [], "template"),
        ({"chat_template": "{{ '' }}"}, [], "`prompt` must have tokens"),
        ({"vocab_size": 8}, [], "the tokenizer's ids must be less than 8"),
        ({"quantization_config": PACKED}, ["--fmt=int4"], "`fmt` must be none or nf4"),
        ({"num_hidden_layers": 1}, ["--adapter", "OTHER"], "layers.1"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    capsys, without_weights, adapter, changes, flags, message
):
    folders = {"OTHER": adapter[0], "MODEL": without_weights}
    flags = [folders.get(flag, flag) for flag in flags]
    is_template_change = "chat_template" in changes
    file = "tokenizer_config.json" if is_template_change else "config.json"
    edit(without_weights / file, **changes)
    flags = "--model", without_weights, "--prompt", "one", *flags
    status, out, err = run(capsys, *flags)
    assert (status, out) == (1, "") and message in err


def test_wrong_prompts_of_a_file_are_named(capsys, without_weights, tmp_path):
    file, answer = tmp_path / "p.jsonl", {"role": "assistant", "content": "a"}
    rows = [{"prompt": "one"}, {"text": "one"}, {"prompt": 1}, {"messages": [answer]}]
    rows += [{"messages": [{"role": "usr", "content": "one"}]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    flags = "--model", without_weights, "--prompts", file
    status, out, err = run(capsys, *flags)
    assert (status, out) == (1, "") and f"lines of {file} are wrong" in err
    assert "line 2: the row must have `prompt` or `messages`. Got ['text']" in err
    assert "line 3: `messages` must be a list of messages. Got 1" in err
    assert "line 4: the last message of the row must not be an answer" in err
    assert "line 5: roles must be system, user, " in err
    assert "names. Got 'usr' in `messages[0]`." in err
    assert "line 6: the row must be JSON" in err and "  line 1" not in err
    # As in a table in which other rows have a prompt.
    file.write_text(json.dumps({"prompt": None, "messages": [answer]}))
    err = run(capsys, *flags)[2]
    assert "line 1: the last message of the row must not be an answer" in err
    file.write_text('{"prompt": "one", "system": "s"}')
    err = run(capsys, *flags, "--chat=false")[2]
    assert "line 1: the row must not have ['system'] without a chat template" in err
    edit(without_weights / "tokenizer_config.json", chat_template="{% if %}")
    err = run(capsys, *flags)[2]
    assert "the chat template must be Jinja" in err and "are wrong" not in err


@pytest.mark.parametrize("text", [" \n", ""])
def test_no_text_is_refused(capsys, without_weights, monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status, _, err = run(capsys, "--model", without_weights)
    assert status == 1 and "`prompt` must be given, or text on stdin" in err


@pytest.mark.parametrize(
    "prompt", ["5", "true", '{"a": 1}', "a: b", "- x", "-3 degrees?", "--dry-run: how?"]
)
def test_prompts_are_taken_as_they_are(capsys, prompt):
    with pytest.raises(SystemExit):
        main(["generate", "--model=m", "--prompt", prompt, "--chat", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["prompt"], printed["chat"]) == (prompt, True)


# Pieces of text


def test_pieces_are_the_text_and_end_with_whole_characters():
    rng, text = np.random.default_rng(0), "aé漢🙂 ü"

    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    for _ in range(300):
        data = list(text.encode() * 2)
        for index in rng.integers(0, len(data), rng.integers(0, 4)):
            data[index] = int(rng.integers(256))
        data = data[: rng.integers(1, len(data) + 1)]
        stream = TextStream(decode)
        pieces = [stream.add(byte) for byte in data]
        assert "".join(pieces) + stream.flush() == decode(data)
        assert not any(piece.endswith("\ufffd") for piece in pieces)
    stream = TextStream(decode)
    assert [stream.add(x) for x in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_decoders_that_treat_the_first_token_differently():
    """SentencePiece decoders drop the space before the first token of a text."""
    words = ["▁the", "▁user", "s", "▁and"]

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").lstrip()

    stream = TextStream(decode)
    assert [stream.add(i) for i in range(4)] == ["the", " user", "s", " and"]
