"""The models and tasks of `quality.py`."""

import json
import pathlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

import formats_model

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# 11.4 M weights; widths are multiples of 128.
SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
PRETRAINING = 900  # steps of 2,048 tokens
TRAINING = 1000  # rows
TESTS = 120  # rows that an adapter is tested on; half as many choose its learning rate


@dataclass(frozen=True)
class Task:
    """A model and data; the data's folder has the task's name.

    Attributes:
        name: Its name.
        model: A hub id, or the name of a folder.
        rate: Where the search for LoRA's learning rate begins.
        full_rate: The same for full fine-tuning.
        steps: Steps of a run.
        max_length: The most tokens of a row.
        batch_size: Rows of a step.
    """

    name: str
    model: str
    rate: float
    full_rate: float
    steps: int
    max_length: int = 128
    batch_size: int = 8


TASKS = {
    task.name: task
    for task in (
        Task("text", "model", 4e-3, 4e-4, steps=100),
        Task("words", SMOLLM2, 4e-3, 2e-4, steps=60, batch_size=4),
        Task("sums", SMOLLM2, 2e-3, 1e-4, steps=60, batch_size=4),
    )
}


def make_task(folder: pathlib.Path, task: Task) -> None:
    """Writes the model and the data of a task, if they are not there."""
    if task.model == "model" and not (folder / "model").exists():
        _make_model(folder / "model")
    if (folder / task.name).exists():
        return
    part = folder / f"{task.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for split, rows in _ROWS[task.name]().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (part / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    part.rename(folder / task.name)


def _make_model(folder: pathlib.Path) -> None:
    """Trains the model on the Old Testament."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    chapters = formats_model.read_chapters()[: formats_model.OLD]
    formats_model.make_model(part, chapters, steps=PRETRAINING, **SIZES)
    part.rename(folder)


def _text() -> dict[str, Iterable[dict]]:
    """The New Testament, and held-out chapters of the Old, which the model learned."""
    chapters = formats_model.read_chapters()
    old, new = chapters[: formats_model.OLD], chapters[formats_model.OLD :]
    held_out = new[5::10]
    text = [chapter for i, chapter in enumerate(new) if i % 10 != 5]
    splits = {"train": text, "valid": held_out[::2], "test": held_out[1::2]}
    splits["old"] = [formats_model.split(old)[1]]
    return {name: [{"text": x} for x in texts] for name, texts in splits.items()}


def _words() -> dict[str, Iterable[dict]]:
    """Words to JSON, of `examples/make_data.py`."""
    import make_data

    training, held_out = make_data.make_splits(
        training=TRAINING, held_out=TESTS + TESTS // 2, spelled=True
    )

    def as_row(example):
        return {"messages": make_data.messages(example)}

    return _splits([*map(as_row, training)], [*map(as_row, held_out)])


def _sums() -> dict[str, Iterable[dict]]:
    """Sums and differences of two numbers, of reasoning-gym."""
    import reasoning_gym

    count = TRAINING + TESTS + TESTS // 2
    examples = reasoning_gym.create_dataset(
        "chain_sum",
        size=2 * count,
        seed=0,
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=2,
    )
    answer_of = {x["question"]: x["answer"] for x in examples}  # questions are unique
    rows = [{"prompt": q, "completion": a} for q, a in answer_of.items()][:count]
    return _splits(rows[:TRAINING], rows[TRAINING:])


def _splits(training: list, held_out: list) -> dict[str, Iterable[dict]]:
    return {"train": training, "valid": held_out[TESTS:], "test": held_out[:TESTS]}


_ROWS = {"text": _text, "words": _words, "sums": _sums}
