"""`qlora-jax export`: models and adapters for other programs."""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

import qlora_jax as ql

from ..models.checkpoint import has_vision
from .base_model import (
    BaseModel,
    LoadOptions,
    open_model,
    open_run,
    runs_of,
    training_load_options,
)
from .configs import FMTS, AdapterFormat, ExportConfig
from .processes import log
from .pushing import check_base, push
from .scoring import Score, make_scorer
from .servers import AS_IS, MERGED, NOT_RUN, Pair, open_pair, pair_for, write_start


@dataclass(frozen=True)
class Repacked:
    """The cost of merging an adapter into packed weights.

    Errors are Frobenius norms, divided by those of the merged kernels.

    Attributes:
        error: The error of all packed kernels together.
        worst_error: The largest error of a kernel.
        worst_kernel: The path of that kernel.
        change: The change of all kernels by the adapter.
        kept: The share of that change which survives packing: the projection of the
            packed kernels' change onto it.
        loss_before: With data, the loss of the model with the adapter, not merged.
        loss_beside: The loss of the packed model with the adapter, not merged.
        loss_after: The loss of the merged and packed model.

    Example:
        >>> from qlora_jax.llm import app
        >>> print(app.Repacked(0.0936, 0.0984, "up/kernel", change=0.0128, kept=0.99))
        packing changed the merged weights by 9.36% (up/kernel by 9.84%)
        the adapter had changed them by 1.28%, of which 99% is left
    """

    error: float
    worst_error: float
    worst_kernel: str
    change: float
    kept: float
    loss_before: float | None = None
    loss_beside: float | None = None
    loss_after: float | None = None

    def __str__(self):
        lines = [
            f"packing changed the merged weights by {self.error:.2%} "
            f"({self.worst_kernel} by {self.worst_error:.2%})",
            f"the adapter had changed them by {self.change:.2%}, of which "
            f"{self.kept:.0%} is left",
        ]
        if self.loss_before is not None:
            lines.append(
                f"loss with the adapter {self.loss_before:.6f}, with it on the packed "
                f"base {self.loss_beside:.6f}, merged and packed {self.loss_after:.6f}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Written:
    """The result of `export`.

    Attributes:
        out: The folder or file.
        format: Its format.
        bytes: Its size in bytes.
        cost: What packing changed, if an adapter was merged into 4 bits.
        pair: For a server: what was written, and whether it is exact.

    Example:
        >>> from qlora_jax.llm import app
        >>> print(app.Written("new", "merged", 1200))
        new: merged, 1,200 bytes
    """

    out: str
    format: str
    bytes: int
    cost: Repacked | None = None
    pair: Pair | None = None

    def __str__(self):
        written = f"{self.out}: {self.format}, {self.bytes:,} bytes"
        if self.pair is not None:
            return f"{written}; {self.pair}"
        return f"{written}\n{self.cost}" if self.cost else written


def export(config: ExportConfig) -> Written:
    """Writes a model or an adapter in a format that other programs load.

    Merged weights are read, computed and written one at a time. If training used a base
    in 4 bits, the adapter is added to its decoded weights. For a 4-bit format, the
    adapter is added to the weights in the files instead, and the sum is packed. The
    base, the sum and the packed sum are then all in memory.

    Args:
        config: The model, the adapter and the format.

    Returns:
        The path, the format and the size.

    Raises:
        ValueError: If the model or the adapter cannot be read or do not fit, if the
            format cannot represent them, or if `out` is not empty.
        OSError: If the result cannot be pushed to the hub.

    Example:
        >>> import os, tempfile
        >>> from qlora_jax.llm import app
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> model, out = save_tiny(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> config = app.ExportConfig(model, "bitsandbytes", out)
        >>> app.export(config).format
        'bitsandbytes'
        >>> os.path.isfile(out + "/model.safetensors")
        True
    """
    if config.push_to_hub is None:
        return _export(config)
    if config.format in get_args(AdapterFormat):
        for run in runs_of(config.adapter, config.run):
            check_base(run.model.path, config.model)
    push(config.push_to_hub)  # fails now rather than after the export
    written = _export(config)
    log(f"pushed to {push(config.push_to_hub, pathlib.Path(written.out))}")
    return written


def _export(config: ExportConfig) -> Written:
    if config.server is not None:
        return _export_for_server(config)
    if str(config.format).startswith("gguf") and pathlib.Path(str(config.out)).exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    source, out = config.model, config.out
    if config.run is None:
        model = open_model(str(source), config.adapter)
    else:
        model, step = open_run(config.run, config.step, source)
        out = out or f"{config.run}/adapter-{step}"
    path, form = pathlib.Path(str(out)), str(config.format)
    options: LoadOptions = {}
    if form in ("merged", "gguf") and config.gguf_type != "Q4_0":
        options = training_load_options(config, model)
    elif form in FMTS or form == "gguf":
        # The packing options describe the result here, not the base of training.
        unset = dict(fmt=None, block_size=None, double_quant=None)
        trained = training_load_options(dataclasses.replace(config, **unset), model)
        # The adapter is merged into the weights of the files, not into the weights that
        # training packed. Those already have values of a 4-bit format, so packing the
        # sum of such a weight and a small change would give the old value again.
        if trained:
            log(
                f"note: the adapter was trained on {trained['packing'].fmt}. It is "
                f"merged into the weights of {model.name}, and the sum is packed"
            )
    cost = _write(form, config, model, path, options)
    return Written(str(out), form, _count_bytes(path), cost)


def _count_bytes(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _export_for_server(config: ExportConfig) -> Written:
    """Writes the base and the adapter for a server, and how to start it."""
    server, out = str(config.server), pathlib.Path(str(config.out))
    if out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    model, options = open_pair(config)
    pair = pair_for(server, model, options, tokenizer=config.tokenizer)
    if pair.base == NOT_RUN:
        raise ValueError(f"{server} cannot run {model.name}: {pair.why}")
    base_only = dataclasses.replace(model, lora={}, adapter=None)
    with ql.io.new_path(out) as new:  # renamed to `out` once it is complete
        new.mkdir()
        files = {}
        for part, form in {"base": pair.base, "adapter": pair.adapter}.items():
            if form in (AS_IS, MERGED):
                continue
            # If the adapter is merged into the base, the file is named model.
            stem = "model" if pair.adapter == MERGED else part
            files[part] = new / (stem + ".gguf" * form.startswith("gguf"))
            is_base_only = part == "base" and pair.adapter != MERGED
            settings: dict[str, Any] = dict(
                format=form,
                out=str(files[part]),
                adapter=None if is_base_only else config.adapter or config.run,
                # Q4_0 stores int4_f16 in blocks of 32 exactly.
                gguf_type="Q4_0" if pair.exact and form == "gguf" else None,
                tokenizer=config.tokenizer,
            )
            _write(
                form,
                ExportConfig(model.name, **settings),
                base_only if is_base_only else model,
                files[part],
                options if part == "base" else {},  # adapters are written as they are
            )
        write_start(new, pair, model, files)
    return Written(str(out), f"for {server}", _count_bytes(out), None, pair)


# Writers of adapters


def _write_peft(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    # The base's weights are needed only if the adapter replaces some of them.
    model = model.read() if model.replaces_weights else model.with_adapter()
    base, lora, names, peft = model.base, model.lora, model.names, model.peft
    if peft is None:
        peft = ql.io.peft_config(
            base, lora, names, base_model=model.name, revision=model.revision
        )
    ql.io.save_peft(out, base, lora, names, peft)


def _write_portable(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    model = _with_plain_adapter(config, model)
    base, lora = model.base, ql.io.portable(model.base, model.lora)
    settings = model.peft.extra_settings if model.peft else {}
    # If the adapter's files name a base model, the export names the same one.
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        name, revision = model.name, model.revision
    peft = ql.io.peft_config(
        base, lora, model.names, base_model=name, revision=revision
    )
    ql.io.save_peft(out, base, lora, model.names, peft)


def _write_gguf_lora(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    from ..gguf.decoder_out import save_gguf_lora

    save_gguf_lora(out, model.path, _make_plain_lora(config, model))


def _write_mlx(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    ql.io.save_mlx(out, _make_plain_lora(config, model), model.config.num_layers)


def _make_plain_lora(config: ExportConfig, model: BaseModel) -> ql.io.PlainLoRA:
    model = _with_plain_adapter(config, model)
    return ql.io.PlainLoRA.of(model.base, model.lora, model.exported_names)


def _with_plain_adapter(config: ExportConfig, model: BaseModel) -> BaseModel:
    """Returns a model with its adapter read, if servers can load the adapter."""
    if model.replaces_weights:
        raise ValueError(
            f"`adapter` must not replace biases or modules for {config.format}, since "
            f"servers do not load them. Got {config.adapter!r}, which does. Use the "
            "format merged."
        )
    return model.with_adapter()


# Writers of models


def _write_merged(
    config: ExportConfig, model: BaseModel, out: pathlib.Path, options: LoadOptions
) -> None:
    # Tensors are copied from file to file unless their values or names change.
    is_packed = options.get("packing") is not None
    is_changed = is_packed or has_vision(model.config) or model.replaces_weights
    is_copied = not (is_changed or model.path.is_file())
    model = model.with_adapter() if is_copied else model.read(**options)
    weights = model.path if is_copied else model.base
    names, dtype = model.exported_names, config.dtype
    with model.open_description() as folder:
        ql.io.save_merged(out, weights, model.lora, names, folder, dtype=dtype)


def _write_packed(
    config: ExportConfig, model: BaseModel, out: pathlib.Path, options: LoadOptions
) -> Repacked | None:
    """Writes a folder in one of the formats of `FMTS`."""
    fmts, stored = FMTS[str(config.format)], model.stored_fmt
    # In the stored format, the codes stay as they are.
    default = stored if stored in fmts else fmts[0]
    # If a folder has another 4-bit format, `save_bitsandbytes` lists its kernels.
    if config.format == "bitsandbytes" and not model.path.is_file():
        default = stored or default
    packing = config.fmt or default, config.block_size, config.double_quant
    base, cost = _read_packed(config, model, options, *packing)
    with model.open_description() as folder:
        names = model.exported_names
        if config.format == "bitsandbytes":
            ql.io.save_bitsandbytes(out, base, names, folder)
        else:
            layout = "awq" if config.format == "awq" else "compressed-tensors"
            ql.io.save_packed(out, base, names, folder, layout)
    return cost


def _write_gguf(
    config: ExportConfig, model: BaseModel, out: pathlib.Path, options: LoadOptions
) -> Repacked | None:
    from ..gguf.decoder_out import check_gguf_source, save_gguf

    check_gguf_source(model.path, tokenizer=config.tokenizer)
    settings = {"fmt": config.gguf_type or "F16", "tokenizer": config.tokenizer}
    if config.gguf_type == "Q4_0" and (model.adapter or model.lora):
        base, cost = _read_packed(config, model, options, "q4_0", None, None)
        save_gguf(out, model.path, base, {}, **settings)
        return cost
    # 4-bit weights that no format here supports can be decoded to floats exactly. Q4_0
    # would round those floats, so it rejects such weights.
    recode = config.gguf_type != "Q4_0"
    model = dataclasses.replace(model, recode=recode).read(**options)
    save_gguf(out, model.path, model.base, model.lora, **settings)
    return None


_ADAPTER_WRITERS: dict[str, Callable[..., None]] = {
    "peft": _write_peft,
    "peft-portable": _write_portable,
    "gguf-lora": _write_gguf_lora,
    "mlx": _write_mlx,
}
_MODEL_WRITERS: dict[str, Callable[..., Repacked | None]] = {
    **dict.fromkeys(FMTS, _write_packed),
    "merged": _write_merged,
    "gguf": _write_gguf,
}


def _write(
    form: str,
    config: ExportConfig,
    model: BaseModel,
    out: pathlib.Path,
    options: LoadOptions,
) -> Repacked | None:
    if form in _ADAPTER_WRITERS:
        return _ADAPTER_WRITERS[form](config, model, out)
    return _MODEL_WRITERS[form](config, model, out, options)


# Merging an adapter into packed weights


def _read_packed(
    config: ExportConfig,
    model: BaseModel,
    options: LoadOptions,
    fmt: str,
    block_size: int | None,
    double_quant: bool | None,
) -> tuple[PyTree, Repacked | None]:
    """Returns the base in 4 bits, and the cost of merging an adapter, if any."""
    if model.adapter is None and not model.lora:
        packing = model.packing(fmt, block_size, double_quant)
        return model.read(**(options or {"packing": packing})).base, None
    score = make_scorer(model, config.data) if config.data else None
    # 4-bit weights that no format here supports are decoded to floats exactly.
    model = dataclasses.replace(model, recode=True)
    packing = model.packing(fmt, block_size, double_quant)
    assert packing is not None  # `recode` always packs
    return _repack(model.read(), packing, score)


def _repack(
    model: BaseModel,
    packing: ql.QLoRAConfig,
    score: Callable[[PyTree, PyTree], Score] | None,
) -> tuple[PyTree, Repacked]:
    """Returns the base with the adapter merged and its kernels packed, and the cost."""
    merged = ql.merge(model.base, model.lora)
    packed = ql.quantize(merged, packing)
    cost = _compare(*map(ql.leaves_by_path, (model.base, merged, packed)))
    if cost.kept < 0.5:
        message = (
            f"Packing keeps {cost.kept:.0%} of what the adapter changed. Weights that "
            "were already in 4 bits round back to their old values if the change is "
            "small. Merge into the float model, or serve the adapter with the base."
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    if score is None:
        return packed, cost
    del merged  # frees memory for the next copy
    packed_base = ql.quantize(ql.dequantize(model.base), packing)
    losses = {
        "loss_before": score(model.base, model.lora).loss,
        "loss_beside": score(packed_base, model.lora).loss,
        "loss_after": score(packed, {}).loss,
    }
    return packed, dataclasses.replace(cost, **losses)


def _compare(
    base: Mapping[str, Any], merged: Mapping[str, Any], packed: Mapping[str, Any]
) -> Repacked:
    """Compares the packed kernels with the merged ones, given leaves by path."""
    paths = [path for path, leaf in packed.items() if ql.is_packed(leaf)]
    sums = [_sum_products(base[p], merged[p], packed[p]) for p in paths]
    sums = np.asarray(jax.device_get(sums), np.float64)  # [kernels, 4]
    error, change, norm, product = sums.sum(0)
    errors = np.sqrt(sums[:, 0] / np.maximum(sums[:, 2], 1e-30))
    worst, norm = int(np.argmax(errors)), max(norm, 1e-30)  # no division by 0
    # The packed change is C + E, for the change C and the error E. Its projection on C
    # is <C + E, C> / <C, C> = 1 + <E, C> / <C, C>.
    kept = float(1 + product / change) if change else 1.0
    return Repacked(
        error=float(np.sqrt(error / norm)),
        worst_error=float(errors[worst]),
        worst_kernel=paths[worst],
        change=float(np.sqrt(change / norm)),
        kept=kept,
    )


@jax.jit
def _sum_products(base: PyTree, merged: PyTree, packed: PyTree) -> Float32[Array, "4"]:
    """Returns |error|^2, |change|^2, |merged|^2 and <error, change> of a kernel."""
    arrays = (ql.dequantize(x).astype(jnp.float32) for x in (base, merged, packed))
    base, merged, packed = arrays
    error, change = packed - merged, merged - base
    pairs = (error, error), (change, change), (merged, merged), (error, change)
    return jnp.stack([jnp.sum(x * y) for x, y in pairs])
