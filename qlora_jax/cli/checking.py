"""`qlora-jax check`: what this library computes on this machine's devices."""

import dataclasses
import json
import pathlib
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax

from .. import __version__
from .._jax.progress import plural
from .configs import CheckConfig
from .measured_products import check_products, time_products
from .measured_step import check_step
from .programs import processor_lines
from .run_folder import write_text

_PACKAGES = "jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "numpy"


@dataclass(frozen=True)
class Checked:
    """A report on this machine's devices.

    Attributes:
        versions: Of this library, Python and what it computes with.
        machine: The operating system and the processor.
        devices: The kind of the devices, their number and their memory in bytes.
        products: For each format, dtype, direction and number of rows: the back end,
            why none before it was taken, the error and its bound.
        times: Of products: seconds, and those of the dense one.
        step: The loss of a step of training and the CPU's, its time, its memory, and
            the memory that the compiler planned.

    Example:
        >>> from qlora_jax import cli
        >>> product = {"error": 0.001, "bound": 0.004, "is_right": True}
        >>> product |= {"backend": "tiled", "refused": {}}
        >>> devices = {"kind": "cpu", "platform": "cpu", "count": 1, "bytes": None}
        >>> step = {"loss": 5.0, "cpu": None, "tokens_per_s": 900.0, "is_right": True}
        >>> step |= {"planned_bytes": 2**20, "peak_bytes": None}
        >>> print(cli.Checked({"jax": "0.10.2"}, "Linux", devices, [product], [], step))
        jax 0.10.2
        Linux
        1 x cpu
        products: 1 of 1 are right, with at most 0.25 of the bound; by tiled
        a step of training: loss 5.0000, 900 tokens/s, 1.0 MiB planned
    """

    versions: dict[str, str]
    machine: str
    devices: dict[str, Any]
    products: list[dict[str, Any]]
    times: list[dict[str, Any]]
    step: dict[str, Any]

    @property
    def is_wrong(self) -> bool:
        """Whether an error is above its bound."""
        return not all(x["is_right"] for x in (*self.products, self.step))

    def __str__(self):
        devices, step, right = self.devices, self.step, "is_right"
        used = {x["backend"]: None for x in self.products}
        errors = [x for x in self.products if x["error"] is not None]
        most = max((x["error"] / x["bound"] for x in errors), default=0.0)
        size = f", {devices['bytes'] / 2**30:.1f} GiB each" if devices["bytes"] else ""
        wrong = [f"wrong: {x}" for x in (*self.products, step) if not x[right]]
        reasons = {
            f"not {name}: {reason}": None
            for x in self.products
            for name, reason in x["refused"].items()
        }
        beside = f", {step['cpu']:.4f} on the CPU" if step["cpu"] is not None else ""
        loss = "not finite" if step["loss"] is None else f"{step['loss']:.4f}"
        peak = step["peak_bytes"]
        taken = f", {peak / 2**20:.1f} MiB taken at most" if peak else ""
        return "\n".join(
            [
                ", ".join(f"{name} {x}" for name, x in self.versions.items()),
                self.machine,
                f"{devices['count']} x {devices['kind']}{size}",
                f"products: {sum(x[right] for x in self.products)} of "
                f"{len(self.products)} are right, with at most {most:.2f} "
                f"of the bound; by {', '.join(used)}",
                *reasons,
                *map(_told, self.times),
                f"a step of training: loss {loss}{beside}, "
                f"{step['tokens_per_s']:,.0f} tokens/s, "
                f"{step['planned_bytes'] / 2**20:.1f} MiB planned{taken}",
                *wrong,
            ]
        )


def _told(time: dict[str, Any]) -> str:
    return (
        f"{time['format']}, {plural(time['rows'], 'row')}, {time['direction']}: "
        f"{time['seconds'] / time['dense_seconds']:.2f} of the dense product's "
        f"{time['dense_seconds'] * 1e3:.2f} ms"
    )


def check(config: CheckConfig) -> Checked:
    """Returns a report on this machine's devices.

    Products are compared with those of NumPy in float64 on the weights that a CPU
    decodes, and a step of training with the same on a CPU, if the device is another.

    Args:
        config: The settings.

    Raises:
        OSError: If the report cannot be written.

    Example:
        >>> from qlora_jax import cli
        >>> cli.check(cli.CheckConfig(rounds=1)).is_wrong
        False
    """
    report = Checked(
        _versions(),
        f"{platform.system()} {platform.machine()}, {_processor()}",
        _devices(),
        check_products(),
        time_products(config.rounds),
        check_step(config.rounds),
    )
    if config.out is not None:
        found = dataclasses.asdict(report) | {"is_wrong": report.is_wrong}
        text = json.dumps(found, allow_nan=False)
        write_text(pathlib.Path(config.out), text + "\n")
    return report


def _versions() -> dict[str, str]:
    found = {"qlora_jax": __version__, "python": platform.python_version()}
    installed = {x.metadata["Name"]: x.version for x in metadata.distributions()}
    return found | {name: installed[name] for name in _PACKAGES if name in installed}


def _processor() -> str:
    """Returns the processor's name, on Linux as the kernel has it."""
    lines = processor_lines()
    names = [line.partition(": ")[2] for line in lines if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _devices() -> dict[str, Any]:
    device, *_ = devices = jax.local_devices()
    size = (device.memory_stats() or {}).get("bytes_limit")
    count = {"count": len(devices), "bytes": size}
    return {"kind": device.device_kind, "platform": device.platform, **count}
