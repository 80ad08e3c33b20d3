"""Merge-aware adapters: the format of their weights, and the files that can hold it.

A merge-aware adapter was trained for the weights that result from merging it and
packing the sum. Nothing else can be done with it, so these packed weights are computed
before a model is scored, generates text or is exported.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

from .configs import AdapterFormat, ExportConfig, TargetFmt
from .processes import log
from .servers import FMTS_BY_FORMAT, INT4_FMTS
from .train_config import TrainConfig

# The default of `export --format` for each number format of merge-aware adapters.
_EXPORT_FORMATS = dict.fromkeys(("nf4", "fp4"), "bitsandbytes")
_EXPORT_FORMATS |= {"int4_f16": "compressed-tensors", "q4_0": "gguf"}
_EXPORT_FORMATS |= {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
Q4_0_BLOCK_SIZE = 32
# Fields of a `Packing`, which are also names of options.
_PACKING_FIELDS = ("fmt", "block_size", "double_quant")


def target_settings(
    config: TrainConfig, base_packings: set[Any], unadapted: Sequence[str]
) -> dict[str, Any]:
    """Returns the settings of `QLoRAConfig` that make adapters merge-aware.

    `base_packings` are the packings of the layers of the base; the set is empty if the
    base is in float. Adapters are trained for the packing of the base, unless
    `merge_aware` is another number format. `unadapted` are the paths of the linear
    layers without an adapter.
    """
    packing = _find_target_packing(config.merge_aware or True, base_packings)
    # The file will have all linear layers in this format. A layer without an adapter
    # must already be in it, or else its weights would differ from those in training.
    if unadapted and base_packings != {packing}:
        raise ValueError(
            "`target_modules` must be all linear layers with `merge_aware`, unless the "
            "base has its format. Otherwise, packing would round the other layers "
            f"after training. Got {config.target_modules}, without "
            f"{', '.join(unadapted)}."
        )
    settings = {name: getattr(packing, name) for name in _PACKING_FIELDS}
    # In a `QLoRAConfig` without `fmt`, the block size and `double_quant` belong to
    # `target_fmt`. The base is packed already, so it needs no `fmt`.
    return {"merge_aware": True, **settings, "fmt": None, "target_fmt": packing.fmt}


def _find_target_packing(
    target_fmt: str | Literal[True], base_packings: set[Any]
) -> Any:
    described = " and ".join(sorted(map(describe_packing, base_packings))) or "float"
    fmts = get_args(TargetFmt)
    if target_fmt is True:
        packing, *different = base_packings or [None]
        if packing is None or different or packing.fmt not in fmts:
            raise ValueError(
                f"`merge_aware` must be one of {', '.join(fmts)}, unless the base has "
                f"one packing in such a format. Got true and a base in {described}."
            )
        return packing
    packings = [packing for packing in base_packings if packing.fmt == target_fmt]
    if len(packings) > 1:
        raise ValueError(
            f"the layers of the base must have one packing in {target_fmt} if this is "
            f"`merge_aware`. Got {described}."
        )
    return packings[0] if packings else ql.QLoRAConfig(fmt=target_fmt).packing


def target_packing_of(lora: PyTree) -> Any:
    """Returns the `Packing` that merge-aware adapters were trained for, or None."""
    adapters = leaves_by_path(lora).values()
    packings = {x.packing for x in adapters if isinstance(x, ql.MergeAware)}
    if len(packings) > 1:
        described = " and ".join(sorted(map(describe_packing, packings)))
        raise ValueError(
            "merge-aware adapters must be trained for one format, so that one file can "
            f"hold them. Got {described}."
        )
    return next(iter(packings), None)


def describe_packing(packing: Any) -> str:
    """Returns a packing in words, such as "nf4 in blocks of 64"."""
    double = ", with quantized scales" * packing.double_quant
    return f"{packing.fmt} in blocks of {packing.block_size}{double}"


def pack_as_trained(base: PyTree, lora: PyTree) -> tuple[PyTree, PyTree]:
    """Merges and packs merge-aware adapters. Returns the packed weights, and {}.

    The weights are computed once here. The adapters themselves would compute them again
    in each forward pass. For other adapters, returns `base` and `lora` unchanged.
    """
    if target_packing_of(lora) is None:
        return base, lora
    return ql.merge(base, lora, requantize=True), {}


def note_packing(lora: PyTree) -> None:
    """Prints a note on stderr if adapters are merge-aware, which are always packed."""
    if (packing := target_packing_of(lora)) is not None:
        log(f"note: the adapter is merged and packed in {describe_packing(packing)}")


def complete_export(
    config: ExportConfig, lora: PyTree, step: int | None
) -> ExportConfig:
    """Returns the config of an export, after setting defaults that depend on `lora`.

    These are `format`, `gguf_type` and `out`. Raises ValueError if a merge-aware
    adapter would be written in another format than the one that it was trained for.
    """
    packing, gguf_type, out = target_packing_of(lora), config.gguf_type, config.out
    export_format = config.format or _find_default_format(packing)
    if packing is not None and export_format == "gguf":
        gguf_type = gguf_type or "Q4_0"
    if out is None:
        name = "adapter" if export_format == "peft" else "model"
        out = f"{config.run}/{name}-{step}{'.gguf' * (export_format == 'gguf')}"
    config = dataclasses.replace(
        config, format=export_format, gguf_type=gguf_type, out=out
    )
    if packing is not None:
        _check_format(config, packing)
    return config


def _find_default_format(packing: Any) -> Any:
    if packing is None:
        return "peft"
    if packing.fmt not in _EXPORT_FORMATS:
        raise ValueError(
            "`format` must be given for a merge-aware adapter that was trained for "
            f"{packing.fmt}, because no format of `export` holds it. Got none. Use "
            "merged, which holds the decoded values."
        )
    return _EXPORT_FORMATS[packing.fmt]


def _check_format(config: ExportConfig, packing: Any) -> None:
    export_format, trained_for = config.format, describe_packing(packing)
    if export_format in get_args(AdapterFormat):
        raise ValueError(
            "`format` must be that of a model for a merge-aware adapter. Beside its "
            "base, the adapter would compute something else than in training, because "
            f"it was trained for weights that are merged and packed in {trained_for}. "
            f"Got {export_format}. Leave `format` out to write these weights."
        )
    if export_format == "merged":
        return  # this file has the decoded values; see `Writer.write_merged`
    if export_format == "gguf":
        can_hold = config.gguf_type == "Q4_0" and fits_q4_0(packing)
    else:
        can_hold = packing.fmt in FMTS_BY_FORMAT[str(export_format)]
    # For these formats, the packing options describe the file, and not the base.
    settings = {name: getattr(config, name) for name in _PACKING_FIELDS}
    can_hold &= all(
        value in (None, getattr(packing, name)) for name, value in settings.items()
    )
    if not can_hold:
        requested = {"gguf_type": config.gguf_type, **settings}
        options = [f", {k}={x}" for k, x in requested.items() if x is not None]
        raise ValueError(
            f"`format` and its options must hold {trained_for}, the format that the "
            "merge-aware adapter was trained for, because packing its weights in "
            "another format would round them again. Got "
            f"{export_format}{''.join(options)}. Leave `format` out, or use merged, "
            "which holds the decoded values."
        )


def check_dtype_holds(dtype: str, packed: PyTree) -> None:
    """Raises ValueError if decoded weights would be rounded to `dtype`."""
    leaves = filter(ql.is_packed, leaves_by_path(packed).values())
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    if any(jnp.promote_types(dtype, x) != dtype for x in dtypes):
        raise ValueError(
            "`dtype` must hold the decoded weights of a merge-aware adapter without "
            f"rounding them. Got {dtype} for {' and '.join(dtypes)}."
        )


def fits_q4_0(packing: Any) -> bool:
    """Returns whether GGUF's type Q4_0 has the codes and scales of a packing."""
    return packing.fmt in INT4_FMTS and packing.block_size == Q4_0_BLOCK_SIZE
