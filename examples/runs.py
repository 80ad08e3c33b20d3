"""Files of a training run: metrics, a plot, the adapter, the state."""

import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Leaves as NumPy arrays, by names such as "layers/mlp/up_proj/kernel/a"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def save(path: pathlib.Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes a tree to a safetensors file, under a temporary name first."""
    from safetensors.numpy import save_file

    tensors = {name: np.asarray(x, order="C") for name, x in by_path(tree).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        file = pathlib.Path(scratch) / "file"
        save_file(tensors, file, {key: json.dumps(v) for key, v in metadata.items()})
        file.replace(path)


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
    """Reads the metadata of a file of `save`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        return {key: json.loads(v) for key, v in (file.metadata() or {}).items()}


def restore(path: pathlib.Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads a file of `save` into a tree of the shape of `like`, and the metadata.

    Raises:
        ValueError: If the file holds other names or shapes than `like`.
    """
    from safetensors import safe_open

    names = by_path(like)
    with safe_open(str(path), framework="numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    shapes = lambda tensors: {name: (x.shape, x.dtype) for name, x in tensors.items()}
    if shapes(found) != shapes(names):
        wrong = sorted(set(shapes(found).items()) ^ set(shapes(names).items()), key=str)
        raise ValueError(f"{path} does not fit this run. Differing: {wrong[:4]}.")
    leaves = [jax.numpy.asarray(found[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), read_metadata(path)


class Metrics:
    """`metrics.jsonl`, one line a step; a resumed run drops what it will redo."""

    def __init__(self, path: pathlib.Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(path)[:step] if step and path.exists() else []
        self.path = path
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")

    def write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_answers(path: pathlib.Path, examples, before, after) -> None:
    """Writes each held-out sentence with its right answer and the model's two."""
    rows = [
        {"text": e.text, "right": e.answer, "before": b.strip(), "after": a.strip()}
        for e, b, a in zip(examples, before, after, strict=True)
    ]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    part.replace(path)


def plot_loss(metrics: pathlib.Path, path: pathlib.Path, title: str) -> None:
    """Draws the loss of each step, and its running mean, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics)
    steps, losses = [r["step"] for r in rows], np.array([r["loss"] for r in rows])
    window = max(1, len(rows) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="each step")
    label = f"mean of {window} steps"
    axes.plot(steps[window - 1 :], smooth, color="#1f4e8c", linewidth=2, label=label)
    axes.set(xlabel="step", ylabel="loss on the answer, nats a token", title=title)
    axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
