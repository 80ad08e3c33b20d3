"""Fine-tunes SmolLM2-135M-Instruct with QLoRA: dates and amounts in words, to JSON.

    python examples/finetune.py

The frozen base is stored in 4 bits; the adapters of the seven linear layers are
trained. Takes about ten minutes on a small CPU; `--tiny` trains a random model for
seconds.
"""

import argparse
import functools
import json
import pathlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs
import tasks
from batches import Encoder, LengthBatches
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.models.checkpoint import load
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, init_cache
from qlora_jax.models.download import fetch
from qlora_jax.models.generation import generate
from qlora_jax.models.tokenizer import load_tokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = r"layers/.*/(q|k|v|o|gate|up|down)_proj/kernel"
ANSWER_ROOM = 48  # tokens of an answer; more where the right one is longer
STATE = "state.safetensors"  # in `--out`; `--resume` continues from it


def positive_int(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be positive. Got {text}.")
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        default=MODEL,
        help="hub id, folder of safetensors, or .gguf file; its tokenizer must have "
        "ChatML's <|im_start|> and <|im_end|>",
    )
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/finetune"))
    add("--steps", type=positive_int, default=200)
    add("--batch-size", type=positive_int, default=16)
    add("--rank", type=positive_int, default=16)
    add("--alpha", type=float, help="default: the rank")
    add("--fmt", default="nf4", choices=["nf4", "fp4", "int4", "int8"])
    add("--no-quantize", action="store_true", help="plain LoRA on the float base")
    add("--learning-rate", type=float, default=2e-3)
    add("--schedule", default="cosine", choices=["cosine", "constant"])
    add("--warmup", type=int, help="steps; default: a tenth of --steps, 20 at most")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add(
        "--no-remat", action="store_true", help="keep activations for the backward pass"
    )
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--held-out", type=positive_int, default=120, help="examples to evaluate on")
    add("--seed", type=int, default=0)
    add("--save-every", type=positive_int, default=50, help="steps")
    add(
        "--resume",
        action="store_true",
        help="continue from the state in --out, with the same options",
    )
    add(
        "--stop-at",
        type=positive_int,
        help="stop after this step, as if interrupted",
    )
    add("--tiny", action="store_true", help="a small random model, a few steps")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.held_out = min(args.steps, 8), min(args.held_out, 4)
        args.batch_size = 4
    if args.warmup is None:
        args.warmup = min(20, args.steps // 10)
    if not 0 <= args.warmup < args.steps:
        parser.error(
            "`--warmup` must be at least 0 and less than `--steps`. "
            f"Got {args.warmup} of {args.steps}."
        )
    if args.resume and not (args.out / STATE).is_file():
        parser.error(
            f"`--resume` must find a run's state in `--out`. Got no {args.out / STATE}."
        )
    return args


def tiny_model(seed, dtype):
    """A random model and a byte tokenizer, for tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    size = tokenizer.get_vocab_size()
    config = DecoderConfig(size, 64, 128, 2, num_heads=4, num_kv_heads=2)
    params = Decoder(config).init(jax.random.key(seed), np.zeros((1, 4), np.int32))
    params = jax.tree.map(lambda x: x.astype(dtype), params["params"])
    return config, params, tokenizer


def make_model(args):
    """Returns the wrapped model, base, adapter and encoder.

    A setting or a tokenizer that is not supported is refused before the model is
    loaded.
    """
    dtype = jnp.dtype(args.dtype)
    qlora = ql.QLoRAConfig(
        rank=args.rank,
        alpha=args.alpha,
        fmt=None if args.no_quantize else args.fmt,
        targets=TARGETS,
    )
    if args.tiny:
        config, params, tokenizer = tiny_model(args.seed, dtype)
        encoder = Encoder(tokenizer)
    else:
        path = fetch(args.model)
        encoder = Encoder(load_tokenizer(path))
        config, params = load(path, dtype)
    model = Decoder(config, dtype=dtype, remat=not args.no_remat)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    key = jax.random.key(args.seed)
    base, lora = ql.linen.init(key, model, params, qlora, tokens, donate=True)
    wrapped = ql.linen.wrap(model, scanned=model.scanned)
    return wrapped, base, lora, encoder


def settings_of(args):
    """The options that change the result: a resumed run must have the same ones.

    `--no-remat`, `--held-out` and when to save or stop do not change it. `--steps` does
    so by the cosine schedule, and by the default of `--warmup`.
    """
    return {
        "model": "tiny" if args.tiny else args.model,
        "fmt": None if args.no_quantize else args.fmt,
        "rank": args.rank,
        "alpha": args.rank if args.alpha is None else args.alpha,
        "dtype": args.dtype,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "schedule": args.schedule,
        "warmup": args.warmup,
        "clip": args.clip,
        "steps": args.steps if args.schedule == "cosine" else None,
    }


def check_resumed(args):
    """Refuses, before any work, to continue a run that had other settings.

    Raises:
        ValueError: If settings differ; the text names them.
    """
    path = args.out / STATE
    then, now = runs.read_metadata(path).get("settings", {}), settings_of(args)
    if differing := [
        f"{name} was {then.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in then or then[name] != value
    ]:
        raise ValueError(
            f"`--resume` must have the options of the run in {args.out}. Got others: "
            f"{'; '.join(differing)}. Give the same ones, or start anew in another "
            "`--out`."
        )


def make_optimizer(args):
    if args.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, args.learning_rate, args.warmup, args.steps, 0.05 * args.learning_rate
        )
    else:
        warmup = optax.linear_schedule(0.0, args.learning_rate, max(args.warmup, 1))
        constant = optax.constant_schedule(args.learning_rate)
        schedule = optax.join_schedules([warmup, constant], [args.warmup])
    adam = optax.adamw(schedule, b2=0.99, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(args.clip), adam), schedule


def make_step(model, optimizer):
    def loss_fn(lora, base, batch):
        variables = {"params": base, "lora": lora}
        logits = model.apply(variables, batch.tokens, select=batch.select)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora, opt_state, base, batch):
        loss, grads = jax.value_and_grad(loss_fn)(lora, base, batch)
        updates, opt_state = optimizer.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    return step


def answer_room(encoder, examples):
    """Largest number of tokens of an answer: a few more than the longest right one."""
    longest = max(len(encoder.pair(example)[1]) for example in examples)
    return max(ANSWER_ROOM, longest + 4)


def make_evaluate(model, encoder, examples, room, batch_size=60):
    """Returns a function from (base, lora) to the answers, one text an example."""
    prompts = max(len(encoder.pair(example)[0]) for example in examples)
    width = -(-prompts // 16) * 16
    batch_size = min(batch_size, len(examples))

    @jax.jit
    def answer(base, lora, tokens, lengths):
        return generate(
            functools.partial(model.apply, {"params": base, "lora": lora}),
            tokens,
            lengths,
            init_cache(model.config, batch_size, width + room),
            max_new_tokens=room,
            eos_ids=[encoder.end],
        )

    def evaluate(base, lora):
        texts = []
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            rows = part + [examples[0]] * (batch_size - len(part))
            new = answer(base, lora, *encoder.prompts(rows, width))
            decode = encoder.tokenizer.decode
            texts += [decode(ids) for ids in np.asarray(new).tolist()[: len(part)]]
        return texts

    return evaluate


def show(title, examples, texts):
    """Prints a few answers; returns the share of exact ones."""
    exact = [tasks.is_exact(t, e) for t, e in zip(texts, examples, strict=True)]
    print(f"\n{title}: {sum(exact)} of {len(exact)} exact")
    for example, text, good in list(zip(examples, texts, exact, strict=True))[:3]:
        print(f"  {example.text}\n    {'ok   ' if good else 'wrong'} {text.strip()!r}")
    return sum(exact) / len(exact)


def memory_table(base, lora, opt_state):
    """Bytes of the base, the adapter and the optimizer's state."""
    summary = ql.summary(base, lora)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(opt_state))
    return {
        "float base": summary.float_bytes,
        "base": summary.base_bytes,
        "adapter": summary.lora_bytes,
        "optimizer": nbytes,
    }


def train(args, model, base, lora, encoder, examples):
    """Trains the adapter; returns it with its optimizer state."""
    optimizer, schedule = make_optimizer(args)
    opt_state, first = optimizer.init(lora), 0
    state_file = args.out / STATE
    if args.resume:
        (lora, opt_state), saved = runs.restore(state_file, (lora, opt_state))
        first = saved["step"]
        print(f"Resuming after step {first}.")
    step = make_step(model, optimizer)
    pairs = [encoder.pair(example) for example in examples]
    multiple = 128 if args.tiny else 16
    batches = LengthBatches(pairs, args.batch_size, encoder.end, args.seed, multiple)
    metrics = runs.Metrics(args.out / "metrics.jsonl", first)
    last = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    bar = tqdm(range(first, last), initial=first, total=args.steps, unit="step")
    for index in bar:
        batch, start = batches[index], time.perf_counter()
        lora, opt_state, loss = step(lora, opt_state, base, batch)
        loss = float(loss)
        seconds = time.perf_counter() - start
        rate = batch.num_tokens / seconds
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
        metrics.write(
            step=index + 1,
            loss=loss,
            learning_rate=float(np.asarray(schedule(index))),
            tokens=batch.num_tokens,
            tokens_per_s=round(rate, 1),
            seconds=round(seconds, 4),
        )
        if not np.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss} at step {index + 1}.")
        if (index + 1) % args.save_every == 0 or index + 1 == last:
            metadata = {"step": index + 1, "settings": settings_of(args)}
            runs.save(state_file, (lora, opt_state), metadata)
    return lora, opt_state


def main(argv=None):
    args, began = parse_args(argv), time.perf_counter()
    if args.resume:
        check_resumed(args)
    training, held_out = tasks.make_splits(
        seed=args.seed, training=64 if args.tiny else 4000, held_out=args.held_out
    )
    model, base, lora, encoder = make_model(args)
    room = 8 if args.tiny else answer_room(encoder, held_out)
    evaluate = make_evaluate(model, encoder, held_out, room)
    texts_before = evaluate(base, lora)
    before = show("Before training", held_out, texts_before)
    ready = time.perf_counter()
    lora, opt_state = train(args, model, base, lora, encoder, training)
    trained = time.perf_counter()
    settings = settings_of(args)
    metadata = {name: settings[name] for name in ("model", "fmt", "rank", "alpha")}
    runs.save(args.out / "adapter.safetensors", lora, metadata | {"targets": TARGETS})
    if args.stop_at is not None and args.stop_at < args.steps:
        print(f"Stopped after step {args.stop_at}; continue with --resume.")
        return
    texts = evaluate(base, lora)
    after = show("After training", held_out, texts)
    runs.write_answers(args.out / "answers.jsonl", held_out, texts_before, texts)
    report(args, before, after, ready - began, trained - ready, base, lora, opt_state)
    print(f"Everything took {time.perf_counter() - began:.0f} s. Files: {args.out}")


def report(args, before, after, setup_s, train_s, base, lora, opt_state):
    """Prints and writes the results of the run."""
    rows = runs.read_metrics(args.out / "metrics.jsonl")
    title = "LoRA on the float base" if args.no_quantize else f"QLoRA, {args.fmt}"
    plot = args.out / "loss.png"
    runs.plot_loss(args.out / "metrics.jsonl", plot, f"{title}, rank {args.rank}")
    memory = memory_table(base, lora, opt_state)
    print("\n" + str(ql.summary(base, lora)) + "\n")
    for name, nbytes in memory.items():
        print(f"{name:12} {nbytes / 1e6:8.1f} MB")
    # ru_maxrss counts kilobytes, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    seconds = [row["seconds"] for row in rows]
    result = {
        "exact_before": before,
        "exact_after": after,
        "final_loss": float(np.mean([row["loss"] for row in rows[-20:]])),
        "step_seconds": float(np.median(seconds)),
        "tokens_per_s": sum(row["tokens"] for row in rows) / sum(seconds),
        "setup_seconds": setup_s,
        "train_seconds": train_s,
        "peak_bytes": peak,
        "bytes": memory,
    }
    others = {"held_out": args.held_out, "remat": not args.no_remat}
    settings = settings_of(args) | {"steps": args.steps} | others
    text = json.dumps({"settings": settings} | result, indent=1)
    (args.out / "result.json").write_text(text + "\n", "utf-8")
    print(
        f"{'peak memory':12} {peak / 1e6:8.1f} MB\n"
        f"exact match {before:.1%} before, {after:.1%} after; final loss "
        f"{result['final_loss']:.4f}; {result['step_seconds']:.2f} s a step, "
        f"{result['tokens_per_s']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
