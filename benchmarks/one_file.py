"""The quality of a single 4-bit file, which has the adapter merged into it.

    python benchmarks/one_file.py FOLDER [--tasks sums,words,text] [--arms "a;b"]

Trains on the tasks of `quality.py`. What is measured is the packed file, and not the
adapter beside its base. Two arms are trained on a bfloat16 base towards NF4 and INT4.
As in `quality.py`, their best learning rate is searched with one seed, and two more
seeds are trained at this rate. Every other arm differs from one of the two in a single
setting, and is trained at the same rate with the same seeds. Every run appends its
results to `one_file.jsonl`, and finished runs are skipped. `one_file_report.py` prints
the tables.
"""

import argparse
import functools
import math
import pathlib
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from quality import SEEDS, Arm, Bench, losses_by_rate, read_records, study
from quality_tasks import TASKS, Task, make_task

import qlora_jax as ql
from qlora_jax.adapters.base import register_adapter
from qlora_jax.adapters.lora import lora_delta
from qlora_jax.llm.app.base_model import LAYERS
from qlora_jax.quant.formats import Packing
from qlora_jax.quant.pack import quantize_unchecked

RESULTS = pathlib.Path(__file__).with_name("one_file.jsonl")
RESIDUAL = "nf4 + nf4"
# The searches for the best rate start at this multiple of the rate of `quality.py`.
RATE_FACTOR = 0.5


@dataclass(frozen=True)
class FileArm(Arm):
    """A way to train a model that ends in one packed file.

    `fmt` is the format of the base during training. None means bfloat16. `nf4 + nf4`
    means the sum of two packed arrays: the weights in NF4, and the errors of their
    rounding, also in NF4.

    Attributes:
        file_fmt: The format of the file.
        merge_aware: Whether the adapter is trained through the packing of the file.
        starts_trained: Whether training starts from an ordinary adapter, which was
            trained for the same number of steps beside the same base.
        keep: A threshold, in units of half a step of the file's grid. If the adapter
            changes a weight by less than this, the change is dropped before packing.
    """

    file_fmt: str = "nf4"
    merge_aware: bool = True
    starts_trained: bool = False
    keep: float = 0.0
    seeds: int = len(SEEDS)


def make_main_arm(file_fmt: str) -> FileArm:
    """Returns the arm to which the other arms with files in a format are compared."""
    name = f"{file_fmt} file, bfloat16 base"
    return FileArm(name, file_fmt=file_fmt)


def make_arms() -> list[FileArm]:
    """Returns the arms, the most important ones first."""
    arms = [make_main_arm("nf4"), make_main_arm("int4")]
    for base_fmt in ("int8", "same"):
        for file_fmt in ("nf4", "int4"):
            fmt = file_fmt if base_fmt == "same" else base_fmt
            name = f"{file_fmt} file, {fmt} base"
            arms.append(FileArm(name, fmt, double_quant=False, file_fmt=file_fmt))
    for file_fmt in ("nf4", "int4"):
        name = f"{file_fmt} file, packed once"
        arms.append(FileArm(name, file_fmt=file_fmt, merge_aware=False))
    return [
        *arms,
        FileArm("nf4 file, ordinary adapter first", starts_trained=True),
        FileArm("nf4 file, codes kept", keep=0.5),
        FileArm("nf4 file, rank 64", rank=64),
        FileArm("nf4 file, 4 + 4 bits base", RESIDUAL),
    ]


@dataclass(frozen=True, eq=False)
class CodesKept(ql.MergeAware):
    """A merge-aware adapter that drops small changes of weights; see `FileArm.keep`."""

    keep: float = 0.0

    settings = (*ql.MergeAware.settings, "keep")
    label = "merge-aware, codes kept"

    def packed(self, kernel: Any) -> ql.QTensor:
        """Returns the packed weights. Keeps the whole float sum in memory meanwhile."""
        w = kernel.dequantize().astype(jnp.float32)
        change = lora_delta(self)
        *batch, k, n = w.shape
        block_size = self.packing.block_size
        blocks = jnp.abs(w).reshape(*batch, k // block_size, block_size, n)
        # The scale is the largest magnitude of a block. The 16 values from -1 to 1 are
        # 2 / 15 apart on average, so half a step is 1 / 15 of the scale.
        half_step = jnp.max(blocks, axis=-2) / 15
        is_small = jnp.abs(change) < self.keep * jnp.repeat(half_step, block_size, -2)
        merged = w + jnp.where(is_small, 0, change)
        return quantize_unchecked(
            merged.astype(kernel.dtype), self.packing, self.geometry
        )


register_adapter(CodesKept)


class FileBench(Bench):
    """A task and an arm, ready to train, whose result is a packed file."""

    arm: FileArm
    rates_at_once = 1

    def __init__(self, folder: pathlib.Path, task: Task, arm: FileArm):
        is_residual = arm.fmt == RESIDUAL
        super().__init__(folder, task, replace(arm, fmt=None) if is_residual else arm)
        self.folder, self.arm = folder, arm
        self.file_config = ql.QLoRAConfig(
            fmt=arm.file_fmt, double_quant=False, targets=LAYERS
        )
        if is_residual:
            self.base = jax.jit(self._with_residual)(self.base)

    def _with_residual(self, base: Any) -> Any:
        """Returns float weights: decoded NF4, plus its rounding errors in NF4."""
        values = ql.dequantize(ql.quantize(base, self.file_config))
        errors = jax.tree.map(jnp.subtract, base, values)
        errors = ql.dequantize(ql.quantize(errors, self.file_config))
        return jax.tree.map(jnp.add, values, errors)

    def init(self, seed: int) -> Any:
        """Returns the adapter before the first step."""
        if self.arm.starts_trained:
            ordinary = replace(self.arm, merge_aware=False, starts_trained=False)
            bench = FileBench(self.folder, self.task, ordinary)
            (lora,) = bench.train(seed, [self.task.rate / RATE_FACTOR])
        else:
            lora = super().init(seed)
        if not self.arm.merge_aware:
            return lora
        packing = Packing(self.arm.file_fmt, double_quant=False)

        def aware(lora: ql.LoRA) -> ql.MergeAware:
            kind = ql.MergeAware
            if self.arm.keep:
                kind = functools.partial(CodesKept, keep=self.arm.keep)
            return kind(lora.a, lora.b, lora.scaling, 0.0, lora.geometry, packing)

        return jax.tree.map(aware, lora, is_leaf=lambda node: isinstance(node, ql.LoRA))

    def file(self, lora: Any) -> Any:
        """Returns the tree of the packed file."""
        if self.arm.merge_aware:
            return ql.merge(self.base, lora, requantize=True)
        return self._pack(ql.merge(self.base, lora))

    def _pack(self, params: Any) -> Any:
        return jax.jit(ql.quantize, static_argnums=1)(params, self.file_config)

    def before(self) -> dict[str, Any]:
        """Returns the record of the base alone, packed in the file's format."""
        file = self._pack(ql.dequantize(self.base))
        return {"rate": None, "seed": None, "test": self.mean({}, self.data.test, file)}

    def valid_loss(self, trained: Any) -> float:
        """Returns the loss of the file on the validation rows, to select the rate."""
        return self.mean({}, self.data.valid, self.file(trained))

    def measure(self, trained: Any) -> dict[str, Any]:
        """Returns the loss and the share of exact answers of the file."""
        file = self.file(trained)
        test = self.mean({}, self.data.test, file)
        return {"test": test, "exact": self.exact({}, file)}


def best_rate(path: pathlib.Path, task: Task, arm: FileArm) -> float:
    """Returns the learning rate with the lowest validation loss in an arm's records."""
    losses = losses_by_rate(read_records(path, task=task.name, arm=arm.name))
    if not losses:
        raise SystemExit(f"{arm.name!r} must be trained first on {task.name}.")
    return min(losses, key=losses.__getitem__)


def main(argv: list[str] | None = None) -> None:
    """Trains all arms that have no results yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tasks", default="sums,words,text")
    parser.add_argument("--arms", help="their names, separated by semicolons")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    names = [arm.name for arm in make_arms()]
    chosen = args.arms.split(";") if args.arms else names
    if unknown := {*chosen} - {*names}:
        parser.error(f"--arms must be of {'; '.join(names)}. Got {unknown}.")
    for name in args.tasks.split(","):
        task = replace(TASKS[name], rate=RATE_FACTOR * TASKS[name].rate)
        make_task(args.folder, task)
        for arm in make_arms():
            if arm.name in chosen:
                main_arm = make_main_arm(arm.file_fmt)
                is_main = arm == main_arm
                rate = None if is_main else best_rate(args.results, task, main_arm)
                study(args.folder, task, arm, args.results, end, FileBench, rate)


if __name__ == "__main__":
    main()
