"""The numbers of docs/pictures.md, computed by formulas, and the drawn pictures."""

import math

import memory
import pictures
import pytest
from memory import DecoderConfig
from tokenizer_helpers import write_rows

SMALL = DecoderConfig(96, 128, 160, 3, num_heads=4, num_kv_heads=2)
# Numbers of parameters from the models' pages on the Hugging Face hub.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}


def linear(c):
    """Returns [K, N] of each linear module of a layer."""
    d, f, kv = c.hidden_size, c.intermediate_size, c.num_kv_heads * c.head_dim
    return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]


def num_other_params(c):
    """Returns the number of weights outside the linear modules of layers."""
    tables = 1 if c.tie_embeddings else 2
    return c.vocab_size * c.hidden_size * tables + (
        (2 * c.num_layers + 1) * c.hidden_size
    )


def in_bfloat16(c):
    return 2 * (num_other_params(c) + c.num_layers * sum(k * n for k, n in linear(c)))


def in_nf4(c):
    """4 bits a weight; a byte for each block of 64; a float32 for 256 of them, and one
    for each kernel (QLoRA, Dettmers et al. 2023, section 3)."""
    total = 0
    for k, n in linear(c):
        scales = math.ceil(k / 64) * n
        total += k * n // 2 + scales + 4 * math.ceil(scales / 256) + 4
    return 2 * num_other_params(c) + c.num_layers * total


def adapter(c):
    return c.num_layers * sum(4 * memory.RANK * (k + n) for k, n in linear(c))


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_sizes(name):
    assert in_bfloat16(memory.MODELS[name]) == 2 * PUBLISHED[name]
    assert set(memory.MODELS) == set(PUBLISHED)


def test_bytes_of_models_are_the_formulas():
    full, lora = in_bfloat16(SMALL), adapter(SMALL)
    rows = {
        "full": (full, 0, 2 * full + 4),  # two moments and a count
        "lora": (full, lora, 2 * lora + 4),
        "qlora": (in_nf4(SMALL), lora, 2 * lora + 4),
    }
    got = memory.model_memory(SMALL)
    assert {name: tuple(row.values()) for name, row in got.items()} == rows


@pytest.mark.slow
def test_bytes_of_steps_are_the_trees_and_the_temporaries():
    steps = {
        remat: memory.step_memory(SMALL, "nf4", remat, (4, 64, 8))
        for remat in (False, True)
    }
    for row in steps.values():
        lora = adapter(SMALL)
        assert row["base"] == in_nf4(SMALL) and row["adapter"] == lora
        assert row["optimizer"] == 2 * lora + 8  # the schedule has a count too
        assert row["temporaries"] >= lora  # the gradients
    # Without remat, at least the inputs of all linear modules are kept.
    saved_bytes = 2 * 4 * 64 * sum(k for k, _ in {*linear(SMALL)}) * SMALL.num_layers
    assert steps[False]["temporaries"] - steps[True]["temporaries"] >= saved_bytes / 2


def test_the_picture_of_a_run_shows_its_numbers_and_answers(tmp_path):
    def write(name, rows):
        return write_rows(tmp_path / name, rows)

    texts, right = ["Pay Ann.", "Pay Bob.", "Pay Eve."], ['{"a": 1}', "{}", "[]"]
    after = [*right[:2], "{}"]

    def conversation(text):
        return [{"role": "user", "content": text}, {"role": "assistant"}]

    write("valid.jsonl", [{"messages": conversation(text)} for text in texts])
    before = "```\nno JSON"
    answers = zip(right, after, strict=True)
    rows = [{"right": r, "before": before, "after": f" {a}\n"} for r, a in answers]
    write("answers.jsonl", rows)
    metrics = [{"step": 0, "valid_loss": 1.5}]
    metrics += [{"step": n + 1, "loss": 2.0**-n} for n in range(4)]
    metrics[-1]["valid_loss"] = 0.25
    write("metrics.jsonl", metrics)
    write("result.json", [{"exact_before": 0, "exact_after": 2 / 3}])
    settings = {"model": "someone/a-model", "data": str(tmp_path)}
    write("config.yaml", [settings])
    figure = pictures.draw_loss(tmp_path, shown=3)
    curve, table = figure.axes
    assert list(curve.lines[0].get_ydata()) == [1, 0.5, 0.25, 0.125]
    assert list(curve.lines[2].get_ydata()) == [1.5, 0.25]
    assert curve.get_title().endswith("3 held-out sentences: 0% before, 67% after")
    assert figure.get_suptitle() == "4 steps of QLoRA on a-model"
    drawn = [text.get_text().replace("\n", " ") for text in table.texts[1::2]]
    colors = [text.get_color() for text in table.texts[1::2]]
    assert drawn[::3] == texts
    assert drawn[1::3] == ["``` no JSON"] * 3
    assert drawn[2::3] == after
    assert colors[2::3] == [pictures.BLUE, pictures.BLUE, pictures.RED]
    figure.savefig(tmp_path / "loss.png")
