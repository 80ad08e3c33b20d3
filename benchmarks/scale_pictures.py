"""The pictures of docs/scale, from the records of `aot_scale.py`."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scale_models import HBM, chip_of
from scale_tables import FIT_TOKENS, SHORT, fit_rows, fits, words

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#666666"


def draw_fit(records: list[dict]) -> Figure:
    """Draws HBM and host memory of an 8B model; each bar has one more option."""
    rows = fit_rows(records)[::-1]
    figure = Figure(figsize=(9.5, 0.55 * len(rows) + 1.9), layout="constrained")
    axes = figure.subplots()
    limit = HBM["v5e"] / 1e9
    last = [words(x["settings"]).split(", ")[-1] for x in rows]
    names = [x if x in ("nothing", "splash") else f"+ {x}" for x in last]
    positions = np.arange(len(rows))
    for kind, color, offset in (("hbm", BLUE, 0.19), ("host", ORANGE, -0.19)):
        sizes = [x.get(kind, 0) / 1e9 for x in rows]
        shown = [min(size, 1.6 * limit) for size in sizes]
        colors = [color if fits(x) else RED for x in rows]
        bars = axes.barh(positions + offset, shown, 0.36, color=colors)
        texts = [f" {x:.2f}" if x else "" for x in sizes]
        axes.bar_label(bars, texts, size=11)
    axes.axvline(limit, color=GREY, linestyle="--", linewidth=1)
    axes.text(limit, len(rows) - 0.45, f" {limit:.1f} GB: a v5e chip", color=GREY)
    axes.set_yticks(positions, names)
    axes.set_xlim(0, 1.75 * limit)
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.set_xlabel("GB (10⁹ bytes); red: does not fit")
    axes.tick_params(axis="y", length=0)
    figure.suptitle(
        f"A QLoRA step of Llama 3.1 8B, {FIT_TOKENS:,} tokens, one v5e chip",
        weight="bold",
    )
    colors = {"HBM": BLUE, "pinned host memory": ORANGE}
    patches = [Patch(color=color) for color in colors.values()]
    axes.legend(patches, [*colors], loc="lower right", frameon=False)
    return figure


def draw_models(records: list[dict]) -> Figure:
    """Draws HBM of each model's largest row next to LoRA on a bfloat16 base."""
    groups: dict[tuple, dict[bool, dict]] = {}
    for x in records:
        group_key = list(SHORT).index(x["model"]), x["chips"], chip_of(x)
        is_lora = x["settings"].get("fmt") == "none"
        best = groups.setdefault(group_key, {}).get(is_lora)
        is_special = {"objective", "engine", "merge_aware"} & {*x["settings"]}
        if not is_special and "hbm" in x and (best is None or _rank(x) > _rank(best)):
            groups[group_key][is_lora] = x
    group_keys = sorted(key for key, group in groups.items() if False in group)[::-1]
    figure = Figure(figsize=(9.5, 0.5 * len(group_keys) + 1.4), layout="constrained")
    axes = figure.subplots()
    for position, key in enumerate(group_keys):
        limit = HBM[key[2]] / 1e9
        axes.plot(
            [limit, limit],
            [position - 0.42, position + 0.42],
            color=GREY,
            linestyle="--",
        )
        for is_lora, offset, color in ((False, 0.2, BLUE), (True, -0.2, ORANGE)):
            if (x := groups[key].get(is_lora)) is None:
                continue
            size = x["hbm"] / 1e9
            color = color if fits(x) else RED
            axes.barh(position + offset, size, 0.38, color=color)
            text, style = f"{size:.3g}, {_tokens(x)}", {"ha": "right", "va": "center"}
            axes.text(
                size * 0.98, position + offset, text, color="white", size=10, **style
            )
    axes.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(1, 400)
    axes.set_ylim(-0.7, len(group_keys) - 0.3)
    names = list(SHORT.values())
    axes.set_yticks(
        range(len(group_keys)), [f"{names[m]} on {n} {c}" for m, n, c in group_keys]
    )
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("GB of HBM a chip, log scale, and tokens of a row")
    figure.suptitle("What one training step takes of each chip", weight="bold")
    axes.set_title(
        "Blue: QLoRA, the most tokens compiled. Orange: LoRA on a bfloat16 base.\n"
        "Dashed: memory of the chip. Red: does not fit.",
        size=10,
    )
    return figure


def _tokens(record: dict) -> str:
    tokens = record["settings"]["max_length"]
    return f"{tokens // 1024}k" if tokens >= 1024 else f"{tokens}"


def _rank(record: dict) -> tuple:
    return fits(record), record["settings"]["max_length"], -record["hbm"]
