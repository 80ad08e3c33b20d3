"""`qlora-jax check`: compares the results on this machine's devices with references."""

import contextlib
import itertools
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import qlora_jax as ql

from .... import __version__
from ...data.batching import eval_batches
from ...data.encode import Row
from ...models.decoder import Decoder
from ...models.families import config_from_hf
from ...models.tiny import CONFIG, random_params
from ...train.objectives.sft import decoder_loss
from ...train.optimizer import make_optimizer
from ...train.step import State, make_step
from ..configs import CheckConfig, Fmt
from ..environment import read_cpuinfo

_PACKAGES = "jax", "jaxlib", "flax", "optax", "libtpu"
_PACKAGES += "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy"
FORMATS = tuple(fmt for fmt in get_args(Fmt) if fmt != "none")
_SHAPE = 512, 768  # of the checked kernels; multiples of every block size
_ROWS = 16, 512  # of the inputs; typical of generation and of training
_DTYPES = "float32", "bfloat16"
_DIRECTIONS = "x W", "x W^T"
# The model and the batch `[rows, tokens]` of the training step.
_MODEL_SIZES = dict(hidden_size=256, intermediate_size=768, vocab_size=512)
_BATCH_SHAPE = 8, 128
# Largest allowed relative difference between the losses of a device and of a CPU. They
# sum in different orders and round to bfloat16, but a loss is a mean over many tokens.
_LOSS_BOUND = 0.01


@dataclass(frozen=True)
class Checked:
    """A report on this machine's devices.

    Attributes:
        versions: The versions of this library, Python and the numerical packages.
        machine: The operating system and the processor.
        devices: The kind of the devices, their number and their memory in bytes.
        products: For each format, dtype, direction and number of rows: the error and
            its bound.
        step: The losses after training on the device and on the CPU.
    """

    versions: dict[str, str]
    machine: str
    devices: dict[str, Any]
    products: list[dict[str, Any]]
    step: dict[str, Any]

    @property
    def is_wrong(self) -> bool:
        """Whether an error exceeds its bound."""
        return not all(x["is_right"] for x in (*self.products, self.step))

    def __str__(self):
        devices, products, step = self.devices, self.products, self.step
        size = f", {devices['bytes'] / 2**30:.1f} GiB each" if devices["bytes"] else ""
        num_right = sum(x["is_right"] for x in products)
        # Errors that are not finite are None.
        ratios = [x["error"] / x["bound"] for x in products if x["error"] is not None]
        lines = [
            ", ".join(f"{name} {x}" for name, x in self.versions.items()),
            self.machine,
            f"{devices['count']} x {devices['kind']}{size}",
            f"products: {num_right} of {len(products)} are right, with at most "
            f"{max(ratios, default=0.0):.2f} of the bound",
        ]
        loss = "not finite" if step["loss"] is None else f"{step['loss']:.4f}"
        cpu = f", {step['cpu']:.4f} on the CPU" if step["cpu"] is not None else ""
        lines.append(f"training: loss {loss}{cpu}")
        lines += [f"wrong: {x}" for x in (*products, step) if not x["is_right"]]
        return "\n".join(lines)


def check(config: CheckConfig) -> Checked:
    """Returns a report on this machine's devices.

    Matrix products are compared with products in float64, which NumPy computes from
    weights that were decoded on a CPU. If the device is not a CPU, training is compared
    with the same steps on a CPU.

    Args:
        config: The settings, of which there are none.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.check(app.CheckConfig()).is_wrong
        False
    """
    return Checked(
        _read_versions(),
        f"{platform.system()} {platform.machine()}, {_describe_processor()}",
        _describe_devices(),
        check_products(),
        check_step(),
    )


def _read_versions() -> dict[str, str]:
    versions = {"qlora_jax": __version__, "python": platform.python_version()}
    installed = {x.metadata["Name"]: x.version for x in metadata.distributions()}
    return versions | {name: installed[name] for name in _PACKAGES if name in installed}


def _describe_processor() -> str:
    lines = read_cpuinfo()
    names = [line.partition(": ")[2] for line in lines if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _describe_devices() -> dict[str, Any]:
    device, *_ = devices = jax.local_devices()
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": len(devices),
        "bytes": (device.memory_stats() or {}).get("bytes_limit"),
    }


def check_products() -> list[dict[str, Any]]:
    """Returns the errors of matrix products in each format, dtype and direction."""
    cases = [*itertools.product(FORMATS, _DTYPES)]
    bar = tqdm(cases, "checking products", unit=" kernels", disable=None, leave=False)
    return [product for case in bar for product in _check_kernels(*case)]


def _check_kernels(fmt: str, dtype: str) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    kernel = draw(*_SHAPE)
    packed = ql.quantize(kernel, fmt)
    if packed.double_quant:  # the default where the format supports it
        yield from _check_directions(packed, draw)
        packed = ql.quantize(kernel, fmt, double_quant=False)
    yield from _check_directions(packed, draw)


def _check_directions(
    q: ql.QTensor, draw: Callable[..., jax.Array]
) -> Iterator[dict[str, Any]]:
    """Yields the errors of products with a kernel, for random inputs from `draw`."""
    with on_cpu():
        weight = np.asarray(ql.dequantize(jax.device_get(q)), np.float64)
    # All back ends round a weight in the same way, so decoding must be exact.
    is_exact = np.array_equal(np.asarray(ql.dequantize(q), np.float64), weight)
    cases = [*itertools.product(_ROWS, (False, True))]
    inputs = [draw(rows, _SHAPE[is_transposed]) for rows, is_transposed in cases]
    outputs = _compute_products(inputs, q)
    for (rows, is_transposed), x, y in zip(cases, inputs, outputs, strict=True):
        error, bound = _relative_error(y, x, weight.T if is_transposed else weight)
        yield {
            "format": q.fmt + " double" * q.double_quant,
            "dtype": q.dtype.name,
            "rows": rows,
            "direction": _DIRECTIONS[is_transposed],
            "decodes_exactly": is_exact,
            "error": error if np.isfinite(error) else None,
            "bound": bound,
            "is_right": is_exact and error <= bound,
        }


def _compute_product(x: jax.Array, q: ql.QTensor, is_transposed: bool) -> jax.Array:
    def multiply(x: jax.Array) -> jax.Array:
        return ql.matmul(x, q, precision="highest")

    if not is_transposed:
        return multiply(x)
    # The product is linear, so its gradient at any input is the transposed product.
    _, pull_back = jax.vjp(multiply, jnp.zeros((len(x), q.shape[0]), x.dtype))
    return pull_back(x)[0]


@jax.jit
def _compute_products(xs: list[jax.Array], q: ql.QTensor) -> list[jax.Array]:
    # One program computes all products, because compiling takes most of the time.
    return [_compute_product(x, q, x.shape[1] != q.shape[0]) for x in xs]


def _relative_error(
    y: jax.Array, x: jax.Array, weight: np.ndarray
) -> tuple[float, float]:
    """Returns the relative error of `y = x @ weight` (Frobenius norm) and its bound."""
    inputs = np.asarray(x, np.float64)
    expected = inputs @ weight
    norm = np.linalg.norm(expected)
    # The error of a float32 sum of K products is at most K 2^-24 |x| |W|. Rounding the
    # result to its dtype adds at most half a unit in the last place.
    magnitudes = np.linalg.norm(np.abs(inputs) @ np.abs(weight))
    bound = len(weight) * 2.0**-24 * magnitudes / norm
    bound += float(jnp.finfo(y.dtype).eps) / 2
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / norm
    return float(error), float(bound)


@contextlib.contextmanager
def on_cpu() -> Iterator[bool]:
    """Computes on a CPU, if any; yields whether that is not the default device."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # for example with JAX_PLATFORMS=tpu
        yield False
        return
    with jax.default_device(cpu):
        yield jax.default_backend() != "cpu"


def check_step() -> dict[str, Any]:
    """Trains a tiny Llama in nf4 on the device; if it is not a CPU, on a CPU too."""
    loss = _train()
    with on_cpu() as is_other_device:
        cpu_loss = _train() if is_other_device else None
    is_right = math.isfinite(loss)
    if cpu_loss is not None:
        is_right &= abs(loss - cpu_loss) <= _LOSS_BOUND * abs(cpu_loss)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "cpu": cpu_loss,
        "bound": _LOSS_BOUND,
        "is_right": is_right,
    }


def _train() -> float:
    """Returns the loss after two steps on a batch of random tokens."""
    config, rng = config_from_hf({**CONFIG, **_MODEL_SIZES}), np.random.default_rng(0)
    params = random_params(config)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=16))
    module = Decoder(config, dtype=jnp.dtype(jnp.bfloat16), remat=True)
    model = ql.linen.wrap(module, scanned=module.scanned)
    optimizer = make_optimizer("adamw", 1e-3)
    step = make_step(decoder_loss(model), optimizer)
    ids = rng.integers(0, config.vocab_size, _BATCH_SHAPE, np.int32)
    rows = [Row(row, row, "random") for row in ids]
    batch_size, max_length = _BATCH_SHAPE
    [batch] = eval_batches(rows, batch_size=batch_size, max_length=max_length)
    state = State.create(lora, optimizer, 0)
    # A step reports the loss before its update, so one more step is needed.
    losses = []
    for _ in range(3):
        state, report = step(state, base, [batch])
        losses.append(float(report.loss))
    return losses[-1]
