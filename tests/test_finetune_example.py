"""The fine-tuning example: its task, its batches, and a tiny run of the script."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import batches  # noqa: E402
import finetune  # noqa: E402
import runs  # noqa: E402
import tasks  # noqa: E402

# Task


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (101, "one hundred one"),
        (2000, "two thousand"),
        (7365, "seven thousand three hundred sixty-five"),
        (9012, "nine thousand twelve"),
    ],
)
def test_number_in_words(n, words):
    assert tasks.number_in_words(n) == words


def test_ordinals_in_words():
    expected = (
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh "
        "twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth "
        "nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth "
        "twenty-fifth twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth "
        "thirty-first"
    )
    assert [tasks.ordinal_in_words(n) for n in range(1, 32)] == expected.split()


@pytest.mark.parametrize(
    ("time", "style", "words"),
    [
        ((0, 0), 0, "at twelve o'clock at night"),
        ((0, 45), 0, "at twelve forty-five at night"),
        ((4, 5), 0, "at four oh five at night"),
        ((12, 15), 0, "at a quarter past twelve in the afternoon"),
        ((12, 15), 1, "at twelve fifteen in the afternoon"),
        ((16, 30), 0, "at half past four in the afternoon"),
        ((18, 0), 1, "at six o'clock in the evening"),
        ((23, 55), 1, "at eleven fifty-five at night"),
    ],
)
def test_time_in_words(time, style, words):
    assert tasks.time_in_words(*time, style) == words


def test_different_values_have_different_words():
    """The task has one right answer."""
    times = {}
    for hour in range(24):
        for minute in range(0, 60, 5):
            for style in (0, 1):
                text = tasks.time_in_words(hour, minute, style)
                assert times.setdefault(text, (hour, minute)) == (hour, minute)
    assert len({tasks.number_in_words(n) for n in range(10_000)}) == 10_000


def test_splits_share_no_part():
    training, held_out = tasks.make_splits(seed=0, training=4000, held_out=120)
    assert len({e.text for e in training}) == 4000
    assert len({e.text for e in held_out}) == 120
    assert not {e.phrasing for e in training} & {e.phrasing for e in held_out}
    for part in range(4):
        seen = {example.values[part] for example in training}
        assert not seen & {example.values[part] for example in held_out}


def test_splits_follow_the_seed():
    assert tasks.make_splits(3, 50, 10) == tasks.make_splits(3, 50, 10)
    assert tasks.make_splits(3, 50, 10) != tasks.make_splits(4, 50, 10)


def test_splits_refuse_empty_sizes():
    with pytest.raises(ValueError, match="`training` and `held_out` must be positive"):
        tasks.make_splits(0, 0, 10)


def test_answers_are_the_values():
    for example in tasks.make_splits(0, 50, 10)[1]:
        answer = json.loads(example.answer)
        assert tuple(answer.values()) == example.values
        assert list(answer) == ["name", "amount", "date", "time"]
        assert tasks.is_exact(example.answer, example)
        assert tasks.is_exact(f" {example.answer}\n", example)
        assert not tasks.is_exact(example.answer + " Done.", example)
        assert not tasks.is_exact("", example)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ('{"name": "Pablo", "amount": 7365}', True),
        ('{"name": "Pablo", "amount": 7365.0}', False),
        ('{"amount": 7365, "name": "Pablo"}', False),
        ('{"name": "Rosa", "name": "Pablo", "amount": 7365}', False),
    ],
)
def test_equal_values_in_another_form_are_not_exact(text, exact):
    answer = '{"name": "Pablo", "amount": 7365}'
    assert tasks.is_exact(text, tasks.Example("", answer, "", ("", 0, "", ""))) == exact


# Batches


@pytest.fixture(scope="module")
def encoder():
    return batches.Encoder(finetune.tiny_model(0, np.float32)[2])


@pytest.mark.slow
def test_targets_are_what_the_selected_tokens_must_predict(encoder):
    examples = tasks.make_splits(0, 6, 1)[0]
    pairs = [encoder.pair(example) for example in examples]
    longest = max(len(answer) for _, answer in pairs)
    batch = batches.collate(pairs, 16, longest, encoder.end)
    assert batch.tokens.shape[1] % 16 == 0
    assert batch.num_tokens == sum(len(p) + len(a) for p, a in pairs)
    for row, example in enumerate(examples):
        chosen = batch.mask[row] == 1
        following = batch.tokens[row, batch.select[row, chosen] + 1]
        np.testing.assert_array_equal(following, batch.targets[row, chosen])
        answer = following.tolist()
        assert answer[-1] == encoder.end
        assert encoder.tokenizer.decode(answer[:-1]) == example.answer


@pytest.mark.slow
def test_length_batches_cover_an_epoch_and_repeat(encoder):
    pairs = [([n] * (1 + n % 40), [7]) for n in range(64)]
    made = batches.LengthBatches(pairs, 8, pad=0, seed=1)
    seen = [n for step in range(8) for n in made[step].tokens[:, 0].tolist()]
    assert sorted(seen) == list(range(64))
    again = batches.LengthBatches(pairs, 8, pad=0, seed=1)
    for step in (11, 3, 8):
        np.testing.assert_array_equal(made[step].tokens, again[step].tokens)
    widths = [made[step].tokens.shape[1] for step in range(8)]
    assert widths.count(16) >= 3  # short ones are not padded to the longest


def test_length_batches_refuse_a_batch_above_the_data():
    with pytest.raises(ValueError, match="`batch_size` must not exceed the 1 examples"):
        batches.LengthBatches([([1], [2])], 2, pad=0, seed=0)


# Schedule, clipping and loss


def cosine(step):
    """From 1 after 20 steps of warmup to 0.05 at the end, 200."""
    falling = (1 + np.cos(np.pi * (step - 20) / (200 - 20))) / 2
    return step / 20 if step < 20 else 0.05 + 0.95 * falling


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("cosine", cosine), ("constant", lambda step: min(step / 20, 1))],
)
def test_the_schedule_is_its_formula(kind, formula):
    args = finetune.parse_args(["--schedule", kind, "--learning-rate", "0.1"])
    _, schedule = finetune.make_optimizer(args)
    steps = [0, 1, 19, 20, 21, 110, 199, 200]
    got = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(got, [0.1 * formula(step) for step in steps], rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    options = ["--schedule", "constant", "--warmup", "0", "--clip", "0.5"]
    optimizer, _ = finetune.make_optimizer(finetune.parse_args(options))
    rng = np.random.default_rng(0)
    # Adam's first step hides the norm, its second does not. The second is not clipped.
    grads = [
        {"a": rng.normal(size=3) * s, "b": rng.normal(size=2) * s} for s in (1e3, 0.1)
    ]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), grads[0])
    state = optimizer.init(params)
    for tree in grads:
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        updates, state = optimizer.update(tree, state, params)
    first, second = (np.concatenate([tree["a"], tree["b"]]) for tree in grads)
    assert np.linalg.norm(second) < 0.5
    first = first * 0.5 / np.linalg.norm(first)
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.99 * 0.01 * first**2 + 0.01 * second**2) / (1 - 0.99**2)
    expected = -2e-3 * mean / (np.sqrt(square) + 1e-8)
    got = np.concatenate([updates["a"], updates["b"]])
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.slow
def test_the_loss_is_the_mean_over_the_answers_tokens(encoder):
    config, params, _ = finetune.tiny_model(0, np.float32)
    model = finetune.Decoder(config)
    pairs = [encoder.pair(example) for example in tasks.make_splits(0, 3, 1)[0]]
    longest = max(len(answer) for _, answer in pairs)
    batch = batches.collate(pairs, 128, longest + 5, encoder.end)
    logits = np.asarray(model.apply({"params": params}, batch.tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = [
        -log_p[row, len(prompt) + place - 1, token]
        for row, (prompt, answer) in enumerate(pairs)
        for place, token in enumerate(answer)
    ]
    # Tokens after an answer do not count, neither as targets nor as inputs.
    behind = np.arange(batch.tokens.shape[1])[None] >= np.array(
        [[len(prompt) + len(answer)] for prompt, answer in pairs]
    )
    altered = batch._replace(
        tokens=np.where(behind, 7, batch.tokens),
        targets=np.where(batch.mask == 0, 9, batch.targets),
    )
    assert behind.any() and (batch.mask == 0).any()
    optimizer = optax.identity()
    step = finetune.make_step(model, optimizer)
    lora = {"none": jnp.zeros(1)}
    *_, loss = step(lora, optimizer.init(lora), params, altered)
    np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)


# The script


def run(out, *options):
    finetune.main(["--tiny", "--out", str(out), *options])


def losses(out):
    return [row["loss"] for row in runs.read_metrics(out / "metrics.jsonl")]


@pytest.fixture
def compiled_once(tmp_path):
    """Shares compiled programs between the runs of a test: most of their time."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_tiny_run_writes_everything_and_resumes_exactly(tmp_path, capsys):
    from safetensors.numpy import load_file

    options = ["--fmt", "int4", "--seed", "3"]
    run(tmp_path / "whole", *options)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert "exact match 0.0% before" in printed and "int4" in printed
    assert tasks.make_splits(3, 64, 4)[1][0].text in printed
    assert result["exact_before"] == 0
    metadata = runs.read_metadata(tmp_path / "whole" / "adapter.safetensors")
    assert (metadata["fmt"], metadata["rank"]) == ("int4", 16)
    assert (tmp_path / "whole" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    answers = runs.read_metrics(tmp_path / "whole" / "answers.jsonl")
    assert [row["text"] for row in answers] == [
        example.text for example in tasks.make_splits(3, 64, 4)[1]
    ]
    assert all(f"{row['after']!r}" in printed for row in answers[:3])
    history = losses(tmp_path / "whole")
    assert len(history) == 8 and history[-1] < history[0]
    adapter = load_file(tmp_path / "whole" / "adapter.safetensors")
    assert adapter["layers/mlp/up_proj/kernel/a"].shape == (2, 64, 16)
    assert len(adapter) == 14
    assert sum(x.nbytes for x in adapter.values()) == result["bytes"]["adapter"]
    assert result["bytes"]["optimizer"] >= 2 * result["bytes"]["adapter"]

    run(tmp_path / "parts", *options, "--stop-at", "3")
    assert losses(tmp_path / "parts") == history[:3]
    run(tmp_path / "parts", *options, "--resume")
    assert losses(tmp_path / "parts") == history
    resumed = load_file(tmp_path / "parts" / "adapter.safetensors")
    for name, value in adapter.items():
        np.testing.assert_array_equal(resumed[name], value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fmt", "int4"], "fmt was 'nf4', is 'int4'"),
        (["--no-quantize"], "fmt was 'nf4', is None"),
        (["--alpha", "32"], "alpha was 16, is 32.0"),
        (["--rank", "8"], "rank was 16, is 8; alpha was 16, is 8"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--learning-rate", "1e-3"], "learning_rate was 0.002, is 0.001"),
        (["--schedule", "constant"], "schedule was 'cosine', is 'constant'"),
        (["--warmup", "1"], "warmup was 0, is 1"),
        (["--clip", "2"], "clip was 1.0, is 2.0"),
        (["--steps", "5"], "steps was 8, is 5"),
        (["--dtype", "float32"], "dtype was 'bfloat16', is 'float32'"),
    ],
)
def test_resume_refuses_other_options(tmp_path, options, says):
    args = finetune.parse_args(["--tiny", "--out", str(tmp_path)])
    metadata = {"step": 1, "settings": finetune.settings_of(args)}
    runs.save(tmp_path / "state.safetensors", {"x": np.ones(1)}, metadata)
    with pytest.raises(ValueError, match=f"options of the run in .*{re.escape(says)}"):
        run(tmp_path, "--resume", *options)


def test_resume_takes_what_does_not_change_the_run(tmp_path):
    parse = lambda *o: finetune.parse_args(["--tiny", "--out", str(tmp_path), *o])
    save = lambda metadata: runs.save(
        tmp_path / "state.safetensors", {"x": np.ones(1)}, metadata
    )
    save({"settings": finetune.settings_of(parse("--schedule", "constant"))})
    finetune.check_resumed(
        parse("--schedule", "constant", "--steps", "6", "--no-remat", "--alpha", "16")
    )
    save({"step": 1})  # a state from before settings were kept
    with pytest.raises(ValueError, match="fmt was None, is 'nf4'"):
        finetune.check_resumed(parse())


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_main_resumes_plain_lora_on_a_model_from_disk(tmp_path, encoder):
    from safetensors.numpy import load_file, save_file
    from test_models import DATA

    size = encoder.tokenizer.get_vocab_size()
    raw = json.loads((DATA / "llama_tied" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vocab_size": size}))
    tensors = load_file(DATA / "llama_tied" / "model.safetensors")
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(size, raw["hidden_size"])).astype(np.float32)
    tensors["model.embed_tokens.weight"] = embedding
    save_file(tensors, tmp_path / "model.safetensors")
    encoder.tokenizer.save(str(tmp_path / "tokenizer.json"))

    out, model = tmp_path / "out", str(tmp_path)
    options = ["--model", model, "--out", str(out), "--no-quantize", "--no-remat"]
    options += ["--steps", "2", "--batch-size", "2", "--rank", "4", "--held-out", "1"]
    options += ["--schedule", "constant", "--dtype", "float32"]
    finetune.main([*options, "--stop-at", "1"])
    assert not (out / "result.json").exists()
    (first,) = losses(out)
    finetune.main([*options, "--resume"])
    assert losses(out)[0] == first and len(losses(out)) == 2
    settings = {"model": model, "fmt": None, "rank": 4, "alpha": 4}
    metadata = runs.read_metadata(out / "adapter.safetensors")
    assert metadata == settings | {"targets": finetune.TARGETS}
    result = json.loads((out / "result.json").read_text())
    assert result["settings"] == settings | {
        "dtype": "float32",
        "seed": 0,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "schedule": "constant",
        "warmup": 0,
        "clip": 1.0,
        "steps": 2,
        "held_out": 1,
        "remat": False,
    }
    nbytes = sum(x.nbytes for x in tensors.values())
    assert result["bytes"]["base"] == result["bytes"]["float base"] == nbytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_model_from_disk(tmp_path, kind):
    from test_models import DATA, write_gguf

    from qlora_jax.models.checkpoint import load

    folder = DATA / "llama_tied"
    tokenizer = finetune.tiny_model(0, np.float32)[2]
    if kind == "gguf":
        path = tmp_path / "model.gguf"
        write_gguf(path, folder, tokenizer)
    else:
        path = tmp_path
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder / name, path)
        tokenizer.save(str(path / "tokenizer.json"))
    args = finetune.parse_args(["--model", str(path), "--fmt", "fp4"])
    model, base, lora, found = finetune.make_model(args)
    text = "<|im_start|>Three o'clock<|im_end|>"
    assert found.encode(text) == tokenizer.encode(text).ids
    assert model.config.hidden_size == 16 and len(jax.tree.leaves(lora)) == 14
    params = load(folder, "bfloat16")[1]
    for place in ("embed_tokens", "norm"):
        jax.tree.map(np.testing.assert_array_equal, base[place], params[place])
    kernel = base["layers"]["mlp"]["up_proj"]["kernel"]
    want = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float32)
    assert (kernel.fmt, kernel.dtype) == ("fp4", "bfloat16")
    # Blocks run down whole columns of 16.
    error = np.abs(helpers.dequantize(kernel).astype(np.float32) - want)
    largest = np.abs(want).max(axis=-2, keepdims=True)
    assert np.all(error <= 1.02 * helpers.HALF_GAP["fp4"] * largest + 1e-3)


def test_a_tokenizer_without_chat_tokens_is_refused_before_the_model(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"<|im_start|>": 0}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))  # and no model
    with pytest.raises(ValueError, match=r"Missing: \['<\|im_end\|>'\]"):
        finetune.main(["--model", str(tmp_path)])


def test_an_answer_may_take_more_than_the_longest_right_one(encoder, monkeypatch):
    examples = tasks.make_splits(0, 1, 20)[1]
    longest = max(len(example.answer) for example in examples)  # one token a letter
    assert finetune.answer_room(encoder, examples) == longest + 1 + 4
    monkeypatch.setattr(encoder, "pair", lambda example: ([1], [2] * 43))
    assert finetune.answer_room(encoder, examples) == 48


def test_the_script_shows_its_options():
    command = [sys.executable, str(EXAMPLES / "finetune.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "--no-quantize" in done.stdout


def test_restore_refuses_another_run(tmp_path):
    tree = {"a": np.ones(3, np.float32), "b": np.int32(1)}
    runs.save(tmp_path / "file", tree, {"step": 2})
    tree, metadata = runs.restore(tmp_path / "file", tree)
    assert metadata == {"step": 2} and tree["a"].tolist() == [1, 1, 1]
    assert tree["b"].shape == ()
    with pytest.raises(ValueError, match="does not fit this run"):
        runs.restore(tmp_path / "file", {"a": np.zeros(4)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "5", "--warmup", "5"], "less than `--steps`. Got 5 of 5."),
        (["--warmup", "-1"], "`--warmup` must be at least 0"),
        (["--rank", "0"], "argument --rank: must be positive. Got 0."),
        (["--rank", "few"], "argument --rank: invalid positive_int value: 'few'"),
        (["--batch-size", "0"], "argument --batch-size: must be positive"),
        (["--held-out", "0"], "argument --held-out: must be positive"),
        (["--save-every", "0"], "argument --save-every: must be positive"),
        (["--stop-at", "0"], "argument --stop-at: must be positive"),
        (["--steps", "0"], "argument --steps: must be positive"),
        (["--resume", "--out", "nowhere"], "`--resume` must find a run's state in"),
    ],
)
def test_options_are_checked_before_any_work(options, says, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(options)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        ([], 20),
        (["--steps", "400"], 20),
        (["--steps", "20"], 2),
        (["--steps", "1"], 0),
        (["--steps", "20", "--warmup", "19"], 19),
        (["--tiny", "--steps", "2"], 0),
        (["--tiny", "--warmup", "3"], 3),
    ],
)
def test_warmup_is_a_tenth_of_the_steps_at_most(options, warmup):
    assert finetune.parse_args(options).warmup == warmup
