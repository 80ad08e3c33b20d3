"""Draws the pictures of docs/pictures.md and docs/scale.

    python benchmarks/pictures.py memory
    python benchmarks/pictures.py step_memory
    python benchmarks/pictures.py loss --run runs/smollm2
    python benchmarks/pictures.py scale_models
    python benchmarks/pictures.py scale_fit

`loss` draws the folder of a run of `qlora-jax train`. Needs the extra `train`.
"""

import argparse
import json
import pathlib
import textwrap

import aot_scale
import jax
import matplotlib
import memory
import numpy as np
import scale_pictures
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from tqdm import tqdm

from qlora_jax.llm.train import read_metrics

matplotlib.rcParams.update(
    {
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.titlesize": 15,
    }
)
ASSETS = pathlib.Path(__file__).parent.parent / "docs" / "assets"
# The palette of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
WAYS = {
    "full": ("Full fine-tuning, bfloat16", RED, "o"),
    "lora": ("LoRA, bfloat16 base", ORANGE, "s"),
    "qlora": ("QLoRA, 4-bit base (this library)", BLUE, "D"),
}
PARTS = {
    "base": ("base", BLUE),
    "adapter": ("adapter", GREEN),
    "optimizer": ("optimizer's state", RED),
    "temporaries": ("activations, gradients, other temporaries", "#C4C4C4"),
}
STEPS = {
    "LoRA,\nactivations kept": (None, False),
    "QLoRA,\nactivations kept": ("nf4", False),
    "LoRA,\nlayers recomputed": (None, True),
    "QLoRA,\nlayers recomputed\n(the default)": ("nf4", True),
}

SCALE = {
    "scale_models": scale_pictures.draw_models,
    "scale_fit": scale_pictures.draw_fit,
}
NAMES = ["memory", "step_memory", "loss", *SCALE]


def draw_memory(totals: dict[str, dict[str, int]]) -> Figure:
    """Draws gigabytes by model and way to train; `totals[model][way]` is in bytes."""
    figure = Figure(figsize=(8.5, 5.4), layout="constrained")
    axes = figure.subplots()
    positions = range(len(totals))
    for size in (16, 24):
        axes.axhline(size, color=GREY, linestyle="--", linewidth=1)
        axes.text(len(totals) - 0.62, size, f"{size} GB device", va="center", size=11)
    for way, (label, color, marker) in WAYS.items():
        sizes = [total[way] / 1e9 for total in totals.values()]
        axes.plot(
            positions, sizes, color=color, marker=marker, label=label, linewidth=2
        )
        for position, size in zip(positions, sizes, strict=True):
            text = f"{size:.2g}" if size < 10 else f"{size:.0f}"
            offset, side = ((6, -15), "left") if way == "qlora" else ((-4, 6), "right")
            note = axes.annotate(
                text, (position, size), offset, textcoords="offset points", ha=side
            )
            note.set_path_effects([withStroke(linewidth=4, foreground="white")])
    names = [name.replace("-", " ").replace(" ", "\n", 1) for name in totals]
    axes.set_xticks(positions, names)
    axes.set_yscale("log")
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.set_ylim(0.08, 1000)
    axes.set_xlim(-0.4, len(totals) - 0.65)
    axes.set_ylabel("GB (10⁹ bytes), log scale")
    figure.suptitle("Memory of weights, adapters and AdamW's state", weight="bold")
    axes.set_title("Activations and gradients not included", size=12)
    axes.legend(loc="upper left", frameon=False)
    return figure


def draw_step_memory(rows: dict[str, dict[str, int]]) -> Figure:
    """Draws the parts of a step's memory; `rows[step][part]` is in bytes."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(rows)[::-1]
    start = np.zeros(len(names))
    for part, (label, color) in PARTS.items():
        sizes = np.array([rows[name][part] / 1e6 for name in names])
        if part in ("adapter", "optimizer"):
            label += f" ({sizes[0]:.0f} MB each)"
        bars = axes.barh(names, sizes, left=start, color=color, label=label, height=0.6)
        if part == "temporaries":
            axes.bar_label(bars, [f"{x:,.0f}" for x in sizes], label_type="center")
        start += sizes
    for position, (name, total) in enumerate(zip(names, start, strict=True)):
        base = rows[name]["base"] / 1e6
        axes.text(total, position, f"  {total:,.0f} MB (base {base:.0f})", va="center")
    axes.set_xlim(0, max(start) * 1.35)
    axes.set_xlabel("MB (10⁶ bytes)")
    axes.tick_params(axis="y", length=0)
    figure.suptitle(
        "What a training step of SmolLM2-135M holds in memory", weight="bold"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_loss(run: pathlib.Path, shown: int = 2) -> Figure:
    """Draws the loss of a run, and its answers to the first validation rows.

    Args:
        run: The folder of a run of `qlora-jax train` on rows of messages.
        shown: How many rows.
    """
    metrics = read_metrics(run / "metrics.jsonl")
    answers = _rows(run / "answers.jsonl")
    result = json.loads((run / "result.json").read_text("utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    valid = _rows(pathlib.Path(config["data"]) / "valid.jsonl")
    questions = [row["messages"][-2]["content"] for row in valid]
    figure = Figure(figsize=(9, 4 + 1.6 * shown), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(4, 1.6 * shown))
    _draw_curve(above, metrics)
    before, after = result["exact_before"], result["exact_after"]
    model = config["model"].rpartition("/")[2]
    steps = sum("loss" in row for row in metrics)
    figure.suptitle(f"{steps} steps of QLoRA on {model}", weight="bold")
    above.set_title(
        f"Exact answers to {len(answers)} held-out sentences: {before:.0%} before, "
        f"{after:.0%} after",
        size=12,
    )
    shown_rows = [
        {"text": text} | row
        for text, row in zip(questions[:shown], answers[:shown], strict=True)
    ]
    _write_answers(below, shown_rows)
    return figure


def _rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _draw_curve(axes: Axes, metrics: list[dict]) -> None:
    trained = [row for row in metrics if "loss" in row]
    steps = [row["step"] for row in trained]
    losses = np.array([row["loss"] for row in trained])
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(steps, losses, color="#9DB7D5", linewidth=1, label="each step")
    label = f"mean of {window} steps"
    axes.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=2, label=label)
    for key, label, mark, color in (
        ("valid_loss", "all held-out rows", "D", RED),
        ("valid_sample_loss", "some held-out rows", "o", "#E39A6F"),
    ):
        if valid := [row for row in metrics if key in row]:
            train_steps, losses = [r["step"] for r in valid], [r[key] for r in valid]
            axes.plot(train_steps, losses, mark, color=color, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)


def _write_answers(axes: Axes, answers: list[dict]) -> None:
    axes.set_axis_off()
    line = 0.0
    for answer in answers:
        is_right = answer["after"].strip() == answer["right"].strip()
        for label, text, color in (
            ("sentence", answer["text"], "black"),
            ("before", answer["before"].strip(), RED),
            ("after", answer["after"].strip(), BLUE if is_right else RED),
        ):
            text = textwrap.fill(
                text, 74, max_lines=2, placeholder=" ...", break_on_hyphens=False
            )
            style = {"va": "top", "size": 11, "in_layout": False}
            axes.text(0, -line, label, color=GREY, **style)
            axes.text(0.1, -line, text, color=color, family="monospace", **style)
            line += 1.1 + text.count("\n")
        line += 0.5
    axes.set_ylim(-line, 0)


def figure_of(name: str, run: pathlib.Path) -> Figure:
    """Computes a picture's numbers, prints them, and draws it."""
    if name == "loss":
        return draw_loss(run)
    if name in SCALE:
        return SCALE[name](aot_scale.read_results())
    if name == "memory":
        rows = {
            model: memory.model_memory(config)
            for model, config in tqdm(memory.MODELS.items(), unit="model")
        }
        print(json.dumps(rows, indent=1))
        totals = {
            model: {way: sum(parts.values()) for way, parts in ways.items()}
            for model, ways in rows.items()
        }
        return draw_memory(totals)
    config = memory.MODELS["SmolLM2-135M"]
    shape = memory.BATCH, memory.TOKENS, memory.ANSWER
    rows = {
        label: memory.step_memory(config, fmt, remat, shape)
        for label, (fmt, remat) in tqdm(STEPS.items(), unit="step")
    }
    print(json.dumps(rows, indent=1))
    return draw_step_memory(rows)


def main(argv: list[str] | None = None) -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--run", type=pathlib.Path, default="runs/smollm2")
    parser.add_argument("--out", type=pathlib.Path, help="default: docs/assets")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    figure = figure_of(args.name, args.run)
    out = args.out or ASSETS
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{args.name}.png"
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png", facecolor="white")
    part.replace(path)
    print(f"JAX {jax.__version__}. Wrote {path}.")


if __name__ == "__main__":
    main()
