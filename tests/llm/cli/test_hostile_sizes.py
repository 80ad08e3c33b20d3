"""Hostile files that would take more time or memory than any computer has."""

import concurrent.futures
import time

import pytest
from commands import run
from hostile_files import (
    ENDLESS_ADAPTERS,
    ENDLESS_TEMPLATES,
    commands_on,
    make_adapter,
    make_model,
)
from tokenizer_helpers import save_tokenizer

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
