"""Hostile files that would take more time or memory than any computer has."""

import time
import tracemalloc

import pytest
from hostile_files import ENDLESS_TEMPLATES
from tokenizer_helpers import save_tokenizer

from qlora_jax.llm.data import bounded_jinja, open_tokenizer
from qlora_jax.llm.data.model_files import ModelError

ASK = [{"role": "user", "content": "one?"}]


@pytest.mark.parametrize("name", ENDLESS_TEMPLATES)
def test_a_template_without_end_is_stopped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(bounded_jinja, "MAX_SECONDS", 0.3)
    save_tokenizer(tmp_path / "model", template=ENDLESS_TEMPLATES[name])
    tokenizer = open_tokenizer(tmp_path / "model")
    tracemalloc.start()  # counts what is allocated, but makes it slower
    start = time.monotonic()
    try:
        # A fault of the model stops a command at its first row.
        with pytest.raises(ModelError, match="chat template"):
            tokenizer.render(ASK)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert peak < 2 * bounded_jinja.MAX_BYTES


@pytest.mark.parametrize("text", ["{{ " + "1 +" * 30000 + "1 }}", "{{" + "[" * 60000])
def test_a_template_nested_deeply_is_refused(tmp_path, text):
    save_tokenizer(tmp_path / "model", template=text)
    with pytest.raises(ValueError, match="chat template"):
        open_tokenizer(tmp_path / "model").render(ASK)


def test_limits_of_a_template_hold_for_each_rendering(tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.content * 2 }}{% endfor %}"
    save_tokenizer(tmp_path / "model", template=template)
    tokenizer = open_tokenizer(tmp_path / "model")
    messages = ASK * 1000
    monkeypatch.setattr(bounded_jinja, "MAX_BYTES", 10**6)
    for _ in range(5):
        assert tokenizer.render(messages) == "one?one?" * 1000
    with pytest.raises(ModelError, match="MiB"):
        tokenizer.render(messages * 5)
