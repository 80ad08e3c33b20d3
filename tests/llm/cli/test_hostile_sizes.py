"""Hostile files that would take more time or memory than any computer has."""

import concurrent.futures
import json
import random
import re
import time

import numpy as np
import pytest
import tokenizers
from commands import run, run_python
from hostile_files import (
    ENDLESS_ADAPTERS,
    ENDLESS_TEMPLATES,
    commands_on,
    make_adapter,
    make_model,
)
from tokenizer_helpers import read_rows_of, save_tokenizer
from tokenizers import models, normalizers, pre_tokenizers

from qlora_jax.io.peft import matching
from qlora_jax.llm.data import open_tokenizer, rendering
from qlora_jax.llm.reading import ModelError

ASK = [{"role": "user", "content": "one?"}]


@pytest.mark.parametrize("name", ENDLESS_TEMPLATES)
def test_a_template_without_end_is_stopped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)
    save_tokenizer(tmp_path / "model", template=ENDLESS_TEMPLATES[name])
    tokenizer = open_tokenizer(tmp_path / "model")
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.render(ASK)


@pytest.mark.parametrize("text", ["{{ " + "1 +" * 30000 + "1 }}", "{{" + "[" * 60000])
def test_a_template_nested_deeply_is_refused(tmp_path, text):
    save_tokenizer(tmp_path / "model", template=text)
    with pytest.raises(ValueError, match="chat template"):
        open_tokenizer(tmp_path / "model").render(ASK)


def test_limits_of_a_template_hold_for_each_rendering(tmp_path):
    template = "{{ 'a' * messages[0].content|length * 2 ** 20 }}"
    save_tokenizer(tmp_path / "model", template=template)
    tokenizer = open_tokenizer(tmp_path / "model")
    for _ in range(3):
        for _ in range(5):
            text = tokenizer.render([{"role": "user", "content": 50 * "a"}])
            assert len(text) == 50 << 20
        with pytest.raises(ModelError, match="512 MiB"):
            tokenizer.render([{"role": "user", "content": 300 * "a"}])


def test_threads_and_interrupted_renderings_get_their_own_texts(tmp_path, monkeypatch):
    template = "{{ messages[0].content }}{{ raise_exception('no') if false }}"
    save_tokenizer(tmp_path / "model", template=template)
    tokenizer = open_tokenizer(tmp_path / "model")
    tokenizer.render(ASK)
    process = rendering.renderer._process

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process.stdout, "readline", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.render([{"role": "user", "content": "late"}])
    texts = [str(i) for i in range(50)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rendered = pool.map(
            lambda x: tokenizer.render([{"role": "user", "content": x}]), texts
        )
        assert [*rendered] == texts


# The parts of tokenizers. All but the first two remove characters, or make one token of
# any number of unknown characters.
KINDS = {
    "bytes": (None, None, None),
    "sentencepiece": (None, None, None),
    "stripped": (normalizers.Strip(), None, None),
    "replaced": (normalizers.Replace("e", ""), None, None),
    "unaccented": (normalizers.NFKC(), None, None),
    "words": (None, pre_tokenizers.Whitespace(), models.WordLevel),
    "unknown": (None, None, models.WordLevel),
}


def save_kind(folder, kind):
    normalizer, split, model = KINDS[kind]
    tokenizer = save_tokenizer(folder, sentencepiece=kind == "sentencepiece")
    if model is not None:
        vocab = {"<unk>": 0, "the": 1, "user": 2, "<|im_end|>": 3}
        tokenizer = tokenizers.Tokenizer(model(vocab, "<unk>"))
        tokenizer.add_special_tokens(["<|im_end|>"])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def draw_text(rng, limit):
    """Draws a text of up to three times the limit, or about as long as the limit."""
    words = ["the ", "user ", "e", " ", "  " * 40, "\n", "é", "e\u0301", "<|im_end|>"]
    words = rng.sample(words, rng.randint(1, 4))
    size = rng.choice([rng.randint(1, 3 * limit), limit + rng.randint(-20, 20)])
    text = "".join(rng.choice(words) for _ in range(size))
    return rng.choice("au") + text[:size]


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_read_as_if_all_of_their_tokens_were_known(tmp_path, kind):
    expected = save_kind(tmp_path / "model", kind)
    tokenizer = open_tokenizer(tmp_path / "model")
    end = expected.token_to_id("<|im_end|>")
    rng = random.Random(kind)
    num_cut = 0
    for _ in range(25):
        max_length = rng.choice([4, 5, 16])
        longest = max(map(len, expected.get_vocab()))
        limit = (2 * max_length + longest) * longest
        text = draw_text(rng, limit)
        num_cut += len(text) > limit
        start = rng.randrange(len(text))
        row = {"prompt": text[:start], "completion": text[start:]}
        ids = expected.encode(text).ids
        ids += [end] * (ids[-1:] != [end])
        settings = {"max_length": max_length, "chat": False, "train_on": "all"}
        for raw in (row, {"text": text}):
            if len(ids) <= max_length:
                [read] = read_rows_of(tokenizer, tmp_path, raw, **settings).train
                assert read.ids.tolist() == ids
                continue
            with pytest.raises(ValueError, match="max_length") as error:
                read_rows_of(tokenizer, tmp_path, raw, **settings)
            listed = re.search(r"\((at least )?([0-9,]+) tokens\)", str(error.value))
            assert listed is not None
            num_listed = int(listed[2].replace(",", ""))
            assert num_listed <= len(ids) if listed[1] else num_listed == len(ids)
            short = dict.fromkeys(raw, "a")
            data = read_rows_of(
                tokenizer, tmp_path, short, raw, **settings, too_long="truncate"
            )
            assert data.train[1].ids.tolist() == ids[:max_length]
            data = read_rows_of(
                tokenizer, tmp_path, short, raw, **settings, too_long="drop"
            )
            assert len(data.train) == 1
        if len(ids) > max_length:
            data = read_rows_of(
                tokenizer, tmp_path, {"text": text}, **settings, too_long="split"
            )
            parts = [data.train[0].ids[:1], *(x.ids[1:] for x in data.train)]
            assert np.concatenate(parts).tolist() == ids
    assert num_cut


def test_long_answers_have_the_same_targets_as_if_they_were_read_whole(tmp_path):
    save_tokenizer(tmp_path / "model")
    tokenizer = open_tokenizer(tmp_path / "model")
    # Many answers have an end token in the middle, which is not their end.
    answers = ["the user<|im_end|> " * 3000, "the user " * 3000, "two"]
    for answer in answers:
        messages = [*ASK, {"role": "assistant", "content": answer}]
        settings = {"max_length": 24, "too_long": "truncate"}
        [row] = read_rows_of(
            tokenizer, tmp_path, {"messages": messages}, **settings
        ).train
        whole = read_rows_of(
            tokenizer, tmp_path, {"messages": messages}, max_length=10**6
        ).train[0]
        np.testing.assert_array_equal(row.ids, whole.ids[:24])
        np.testing.assert_array_equal(row.labels, whole.labels[:24])


@pytest.mark.parametrize("rows", ["pairs", "labelled"])
def test_long_preferences_are_those_that_were_read_whole(tmp_path, rows):
    save_tokenizer(tmp_path / "model")
    tokenizer = open_tokenizer(tmp_path / "model")
    long = "the user " * 5000
    raw = [
        {"prompt": "a", "chosen": long + "a", "rejected": long + "b"},
        {"prompt": long, "chosen": "a", "rejected": "b"},
        {"prompt": "a", "chosen": "b" + long, "rejected": "c"},
    ]
    settings = {"too_long": "truncate", "rows": rows, "chat": False, "train_on": "all"}
    data = read_rows_of(tokenizer, tmp_path, *raw, max_length=16, **settings)
    # Answers that differ only after the cut, or begin there, cannot be trained.
    assert [row.place.rpartition(":")[2] for row in data.train] == ["3"] * (
        1 + (rows == "labelled")
    )
    whole = read_rows_of(tokenizer, tmp_path, raw[2], max_length=10**6, **settings)
    row, expected = data.train[0], whole.train[0].truncated(16)
    np.testing.assert_array_equal(row.ids, expected.ids)
    np.testing.assert_array_equal(row.labels, expected.labels)
    # KTO joins an answer to another prompt, and cuts it then.
    size = len(row.uncut.ids)
    assert size >= 32
    np.testing.assert_array_equal(row.uncut.ids, expected.uncut.ids[:size])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("name", ENDLESS_ADAPTERS)
def test_settings_of_an_adapter_are_matched_in_little_time(
    model, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr(matching, "MAX_SECONDS", 1)
    adapter = make_adapter(tmp_path / "adapter", **ENDLESS_ADAPTERS[name])
    arguments = [*commands_on(model, tmp_path)["generate"], "--adapter", adapter]
    start = time.process_time()
    status, _, errors = run(capsys, *arguments)
    assert time.process_time() - start < 2
    setting, _, value = name.partition(": ")
    assert status == 1 and setting in errors and value.removeprefix("many") in errors


LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1)) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.argv = ["qlora-jax", *sys.argv[1:]]
runpy.run_module("qlora_jax_program", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("key", ["text", "prompt"])
def test_a_line_of_50_megabytes_is_refused_in_little_memory(tmp_path, key):
    model = make_model(tmp_path / "model")
    arguments = commands_on(model, tmp_path)["train"]
    text = "the user " * 5_500_000
    row = {"text": text} if key == "text" else {"prompt": text, "completion": "in"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments += ["--max-length", 64]
    done = run_python("-c", LIMITED, 2000, *arguments, timeout=120)
    assert done.returncode == 1
    assert "`max_length` = 64" in done.stderr
