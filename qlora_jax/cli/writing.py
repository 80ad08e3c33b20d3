"""`qlora-jax export`, `merge` and `quantize`: what other programs load."""

import pathlib
import tempfile
from dataclasses import dataclass

import qlora_jax as ql

from ..models.checkpoint import read_config
from ..models.download import fetch
from ..models.text_half import has_vision
from .configs import ExportConfig, MergeConfig, QuantizeConfig
from .model import (
    LAYERS,
    description_of,
    holds_base_tensors,
    open_adapter,
    open_model,
    open_shapes,
)
from .run_adapter import save_run_adapter


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        out: The folder or file.
        format: Its format.
        bytes: Bytes that it takes.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Written("new", "merged", 1200))
        new: merged, 1,200 bytes
    """

    out: str
    format: str
    bytes: int

    def __str__(self):
        return f"{self.out}: {self.format}, {self.bytes:,} bytes"


def _written(out: str, fmt: str) -> Written:
    path = pathlib.Path(out)
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return Written(out, fmt, size)


def export(config: ExportConfig) -> Written:
    """Writes a model or an adapter in a format that other programs load.

    Args:
        config: The model, the adapter and the format.

    Returns:
        What was written.

    Raises:
        ValueError: If the model or the adapter cannot be read or do not fit, if the
            format does not hold them, or if `out` is not empty.

    Example:
        >>> import os, tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model, out = save_tiny(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> config = cli.ExportConfig(model, "bitsandbytes", out)
        >>> cli.export(config).format
        'bitsandbytes'
        >>> os.path.isfile(out + "/model.safetensors")
        True
    """
    if config.run is not None:
        with tempfile.TemporaryDirectory() as scratch:
            return export(save_run_adapter(config, scratch))
    model, out = str(config.model), str(config.out)
    if config.format == "peft":
        return _export_adapter(model, str(config.adapter), out)
    if config.format == "merged":
        return _merge(model, config.adapter, out, config.dtype)
    if config.format == "bitsandbytes":
        packing = None if _is_packed(model) else _packing(QuantizeConfig("", ""))
        return _save_packed(model, packing, out)
    return _export_gguf(config, model, out)


def _export_gguf(config: ExportConfig, source: str, out: str) -> Written:
    from ..models.gguf.decoder_out import check_gguf_source, save_gguf

    if pathlib.Path(out).exists():
        raise ValueError(f"`out` must be new. Got {out!r}, which exists.")
    check_gguf_source(fetch(source), tokenizer=config.tokenizer)
    model = open_model(source)
    base, lora, _ = open_adapter(model, config.adapter)
    save_gguf(
        out,
        model.path,
        base,
        lora,
        fmt=config.gguf_type,
        tokenizer=config.tokenizer,
    )
    return _written(out, "gguf")


def _export_adapter(source: str, adapter: str, out: str) -> Written:
    whole = holds_base_tensors(adapter)
    model = open_model(source) if whole else open_shapes(source)
    base, lora, settings = open_adapter(model, adapter)
    if settings is None:
        settings = ql.io.peft_config(base, lora, model.names, base_model=source)
    ql.io.save_peft(out, base, lora, model.names, settings)
    return _written(out, "peft")


def merge(config: MergeConfig) -> Written:
    """Adds an adapter to a model and writes a float checkpoint.

    Weights are read, merged and written one at a time. On a 4-bit base the adapter is
    added to the decoded weights, which are those that it was trained on.

    Args:
        config: The model and the adapter.

    Returns:
        What was written.

    Raises:
        ValueError: If the model or the adapter cannot be read or do not fit, or if
            `out` is not empty.

    Example:
        >>> import jax, tempfile, qlora_jax as ql
        >>> from qlora_jax import cli
        >>> from qlora_jax.models import checkpoint, names
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model, adapter = save_tiny(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> config, params = checkpoint.load(model, progress=False)
        >>> settings = ql.QLoRAConfig(rank=4, targets=r".*q_proj/kernel")
        >>> base, lora = ql.init(jax.random.key(0), params, settings)
        >>> table = names.decoder_names(config)
        >>> peft = ql.io.peft_config(base, lora, table, base_model=model)
        >>> ql.io.save_peft(adapter, base, lora, table, peft)
        >>> cli.merge(cli.MergeConfig(model, adapter, tempfile.mkdtemp())).format
        'merged'
    """
    return _merge(config.model, config.adapter, config.out, config.dtype)


def _merge(source: str, adapter: str | None, out: str, dtype: str | None) -> Written:
    path = fetch(source)
    whole = path.is_file() or has_vision(read_config(path))
    whole = whole or (adapter is not None and holds_base_tensors(adapter))
    with description_of(path) as folder:
        model = open_model(source) if whole else open_shapes(source)
        base, lora, _ = open_adapter(model, adapter)
        weights = base if whole else path
        ql.io.save_merged(out, weights, lora, model.written_names, folder, dtype=dtype)
    return _written(out, "merged")


def quantize(config: QuantizeConfig) -> Written:
    """Packs the layers of a model in 4 bits and writes a checkpoint of bitsandbytes.

    Args:
        config: The model, and how to pack it.

    Returns:
        What was written.

    Raises:
        ValueError: If the model cannot be read, is packed already, has layers that
            cannot be packed in this block size, or if `out` is not empty.

    Example:
        >>> import tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model, out = save_tiny(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> cli.quantize(cli.QuantizeConfig(model, out)).format
        'bitsandbytes'
    """
    if _is_packed(config.model):
        raise ValueError(
            f"`model` must be in float: packing it again would round it once more. Got "
            f"{config.model!r}, which is in 4 bits."
        )
    return _save_packed(config.model, _packing(config), config.out)


def _packing(config: QuantizeConfig) -> "ql.QLoRAConfig":
    return ql.QLoRAConfig(
        fmt=config.fmt,
        block_size=config.block_size,
        double_quant=config.double_quant,
        targets=LAYERS,
    )


def _is_packed(source: str) -> bool:
    path = fetch(source)
    if path.is_file():  # GGUF: its own quantization is undone
        return False
    return bool(ql.io.read_config_json(path).get("quantization_config"))


def _save_packed(source: str, packing: "ql.QLoRAConfig | None", out: str) -> Written:
    with description_of(fetch(source)) as folder:
        model = open_model(source, packing=packing)
        ql.io.save_bitsandbytes(out, model.base, model.written_names, folder)
    return _written(out, "bitsandbytes")
