"""What examples/colab.ipynb chooses for each device, and the data that it makes.

`.ci/notebook.py` runs the notebook on the CPU.
"""

import json
import pathlib

import aot_scale
import make_data
import pytest
import scale_rows

from qlora_jax.llm import app

ROOT = pathlib.Path(__file__).parent.parent
# The chip that the settings of each platform are for, and the bytes that JAX may use
# there. On a GPU, JAX allocates three quarters of the memory by default.
CHIPS = {
    "tpu": ("v5e", scale_rows.HBM["v5e"]),
    "gpu": ("t4", 0.75 * scale_rows.HBM["t4"]),
}


def run_cell(tag):
    """Runs the cell with a tag, and returns the names that it defines."""
    book = json.loads((ROOT / "examples" / "colab.ipynb").read_text("utf-8"))
    (cell,) = [x for x in book["cells"] if tag in x["metadata"].get("tags", [])]
    names: dict = {}
    exec(compile("".join(cell["source"]), f"colab.ipynb, {tag}", "exec"), names)
    return names


def test_a_cpu_gets_the_small_model(capsys):
    names = run_cell("settings")
    assert names["SETTINGS"] == names["choose_settings"]("cpu")
    config = app.TrainConfig.from_settings(names["SETTINGS"])
    assert config.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert capsys.readouterr().out == f"{config.model} for cpu\n"


@pytest.mark.parametrize("platform", CHIPS)
def test_the_step_for_an_accelerator_fits(platform):
    """The result of the chip's compiler is among the records of `aot_scale.py`."""
    chosen = run_cell("settings")["choose_settings"](platform)
    config = app.TrainConfig.from_settings(chosen)
    # These settings have no influence on the memory of a step.
    others = {x: chosen[x] for x in ("model", "data", "out", "steps", "eval_examples")}
    chip, limit = CHIPS[platform]
    (record,) = [
        x
        for x in aot_scale.read_results()
        if (scale_rows.chip_of(x), f"Qwen/{x['model']}") == (chip, chosen["model"])
    ]
    assert app.TrainConfig.from_settings(others | record["settings"]) == config
    assert "error" not in record
    assert record["hbm"] < limit


def test_numbers_are_in_the_words_of_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_words = run_cell("data")["in_words"]
    words = [in_words(number) for number in range(1000)]
    assert words == [make_data.number_in_words(number) for number in range(1000)]
    amounts = []
    for name in ("train.jsonl", "valid.jsonl"):
        rows = [
            json.loads(x) for x in pathlib.Path("data", name).read_text().split("\n")
        ]
        answers = [json.loads(row["completion"]) for row in rows]
        for row, answer in zip(rows, answers, strict=True):
            dollars = make_data.number_in_words(answer["amount"])
            sentence = (
                f"{answer['name']} paid {dollars} dollars for a {answer['item']}."
            )
            assert row["prompt"] == sentence
        amounts.append([answer["amount"] for answer in answers])
    assert len(amounts[1]) == 60
    assert not {*amounts[0]} & {*amounts[1]}
