"""The predictions of language models whose scales are chosen by search.

    python benchmarks/scales_quality.py FOLDER [--models ...] [--formats ...]

Packs the linear layers of two models, with the scales of the format's rule, with scales
by search, and with a search that is weighted by the mean squares of the inputs. The
first model is the one of `quality_tasks.py` (11.4 million weights), which is trained on
the Old Testament once and saved in FOLDER. The second is SmolLM2-135M-Instruct. If the
hub cannot be reached, its weights are decoded from the file in Q4_1 of a package.

Both models read the same text: rows of 128 tokens, spaced evenly over the held-out
chapters of the New Testament. The mean squares are measured on its other chapters. The
numbers are the divergence from the float model, as in `formats_quality.py`, and the
perplexity, with its change from that of the float model and from that with the format's
rule, and the standard errors of these changes over the rows.

Needs the extra `train`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import json
import pathlib

import numpy as np
from formats_quality import LanguageModel, perplexity_change
from quality_tasks import SMOLLM2, TASKS, make_task
from timing import print_table

import qlora_jax as ql
from qlora_jax.llm.app.base_model import LAYERS
from qlora_jax.llm.models.download import fetch

# Batches of 16 rows of 128 tokens: of the held-out text, and of the other chapters.
NUM_BATCHES = {"SmolLM2-135M": (1, 1), "Bible model": (8, 2)}
# Arguments of `QLoRAConfig`.
FORMATS: dict[str, dict] = {
    "int4": {"block_size": 64, "double_quant": True},
    "nf4": {"block_size": 64, "double_quant": True},
    "int4_f16": {"block_size": 32},
    "nvfp4": {"block_size": 16},
    "q4_0": {"block_size": 32},
    "mxfp4": {"block_size": 32},
    "int8": {"block_size": 64, "double_quant": True},
}
HEADER = [
    "model",
    "format, block size",
    "scales",
    "divergence, thousandths",
    "perplexity",
    "change from float, %",
    "change from the rule, %",
]


def read_text(folder: pathlib.Path, *splits: str) -> str:
    """Returns the text of the task `text` in some of its splits."""
    files = (folder / "text" / f"{split}.jsonl" for split in splits)
    lines = (line for file in files for line in file.read_text("utf-8").splitlines())
    return "".join(json.loads(line)["text"] for line in lines)


def format_change(losses: np.ndarray, reference_losses: np.ndarray) -> str:
    """Returns the change of the perplexity and its standard error, in percent."""
    change, error = perplexity_change(losses, reference_losses)
    return f"{change:+.2f} ± {error:.2f}"


def measure_format(lm: LanguageModel, fmt: str, importance: dict) -> list[list[str]]:
    """Returns the rows of a format, without the name of the model."""
    options = FORMATS[fmt]
    rule_losses = None
    rows = []
    for scales in ("rule", "search", "weighted search"):
        config = ql.QLoRAConfig(
            fmt=fmt,
            targets=LAYERS,
            scales="absmax" if scales == "rule" else "search",
            **options,
        )
        moments = importance if scales == "weighted search" else None
        packed = ql.quantize(lm.params, config, importance=moments)
        losses, divergences = lm.compare(ql.dequantize(packed))
        if rule_losses is None:
            rule_losses = losses
        row = [f"{fmt}, {options['block_size']}", scales]
        row += [f"{1000 * divergences.mean():.2f}", f"{np.exp(losses.mean()):.3f}"]
        row.append(format_change(losses, lm.float_losses))
        row.append("" if scales == "rule" else format_change(losses, rule_losses))
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of `quality.py`")
    models, formats = [*NUM_BATCHES], [*FORMATS]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--markdown", metavar="FILE", help="write the report here too")
    args = parser.parse_args(argv)
    make_task(args.folder, TASKS["text"])
    held_out = read_text(args.folder, "valid", "test")
    other_chapters = read_text(args.folder, "train")
    rows = []
    for model in args.models:
        is_smollm2 = model == "SmolLM2-135M"
        path = fetch(SMOLLM2) if is_smollm2 else args.folder / "model"
        num_batches, num_calibration_batches = NUM_BATCHES[model]
        lm = LanguageModel(path, held_out, num_batches)
        perplexity = np.exp(lm.float_losses.mean())
        print(f"{model}, {lm.rows[..., 1:].size} tokens: {perplexity:.3f}", flush=True)
        importance = lm.calibrate(other_chapters, num_calibration_batches)
        for fmt in args.formats:
            format_rows = measure_format(lm, fmt, importance)
            rows += [[model, *row] for row in format_rows]
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
