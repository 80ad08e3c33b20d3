"""Merge-aware adapters: the format of their weights, and the files that can hold it.

A merge-aware adapter was trained for the weights that result from merging it and
packing the sum. Nothing else can be done with it, so these packed weights are computed
before a model is scored, generates text or is exported.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
from jaxtyping import PyTree

import qlora_jax as ql

from .configs import AdapterFormat, ExportConfig, TargetFmt
from .processes import log
from .servers import FMTS
from .train_groups import AdapterConfig

# Maps the number format of packed weights to the value of `export --format` for them.
_FORMATS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "q4_0": "gguf"}
_FORMATS |= {"int4_f16": "compressed-tensors", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
GGUF_BLOCK_SIZE = 32  # of Q4_0
# The fields of a `Packing`, and the options that have their names.
_PACKING_FIELDS = ("fmt", "block_size", "double_quant")


def target_settings(
    config: AdapterConfig, base_packings: set[Any], unadapted: Sequence[str]
) -> dict[str, Any]:
    """Returns the settings of `QLoRAConfig` that make adapters merge-aware.

    `base_packings` are the packings of the layers of the base; the set is empty if the
    base is in float. Adapters are trained for the packing of the base, unless
    `target_fmt` is another number format. `unadapted` are the paths of the linear
    layers without an adapter.
    """
    packing = _find_packing(config.target_fmt, base_packings)
    # The file will have all linear layers in this format. A layer without an adapter
    # must already be in it, or else its weights would differ from those in training.
    if unadapted and base_packings != {packing}:
        raise ValueError(
            "`target_modules` must be all linear layers with `target_fmt`, unless the "
            "base has this format. Otherwise, packing would round the other layers "
            f"after training. Got {config.target_modules}, without "
            f"{', '.join(unadapted)}."
        )
    settings = {name: getattr(packing, name) for name in _PACKING_FIELDS}
    # The base is packed already, so `fmt` is None. The block size and `double_quant` in
    # the config then belong to `target_fmt`.
    return {"merge_aware": True, **settings, "fmt": None, "target_fmt": packing.fmt}


def _find_packing(target_fmt: str | None, base_packings: set[Any]) -> Any:
    fmts = {target_fmt} if target_fmt else {*get_args(TargetFmt)}
    of_base = [packing for packing in base_packings if packing.fmt in fmts]
    if len(of_base) == 1 and (target_fmt or len(base_packings) == 1):
        return of_base[0]
    if target_fmt is not None and not of_base:
        return ql.QLoRAConfig(fmt=target_fmt).packing
    described = " and ".join(sorted(map(describe, base_packings))) or "float"
    if target_fmt is not None:
        raise ValueError(
            f"the layers of the base must have one packing in {target_fmt} if this is "
            f"`target_fmt`. Got {described}."
        )
    raise ValueError(
        "`target_fmt` must be given with `merge_aware` unless the base has one packing "
        f"in {', '.join(get_args(TargetFmt))}. Got None and a base in {described}."
    )


def packing_of(lora: PyTree) -> Any:
    """Returns the `Packing` that adapters were trained for; None for other adapters."""
    adapters = ql.leaves_by_path(lora).values()
    packings = {x.packing for x in adapters if isinstance(x, ql.MergeAware)}
    if len(packings) > 1:
        described = " and ".join(sorted(map(describe, packings)))
        raise ValueError(
            "merge-aware adapters must be trained for one format, so that one file can "
            f"hold them. Got {described}."
        )
    return next(iter(packings), None)


def describe(packing: Any) -> str:
    """Returns a packing in words, such as "nf4 in blocks of 64"."""
    double = ", with quantized scales" * packing.double_quant
    return f"{packing.fmt} in blocks of {packing.block_size}{double}"


def pack_as_trained(base: PyTree, lora: PyTree) -> tuple[PyTree, PyTree]:
    """Merges and packs merge-aware adapters. Returns the packed weights, and {}.

    The weights are computed once here. The adapters themselves would compute them again
    in each forward pass. For other adapters, returns `base` and `lora` unchanged.
    """
    if packing_of(lora) is None:
        return base, lora
    return ql.merge(base, lora, requantize=True), {}


def note_packing(lora: PyTree) -> None:
    """Prints a note on stderr if adapters are merge-aware, and so will be packed."""
    if (packing := packing_of(lora)) is not None:
        log(f"note: the adapter is merged and packed in {describe(packing)}")


def complete_export(
    config: ExportConfig, lora: PyTree, step: int | None
) -> ExportConfig:
    """Returns the config of an export, after setting defaults that depend on `lora`.

    These are `format`, `gguf_type` and `out`. Raises ValueError if a merge-aware
    adapter would be written in another format than the one that it was trained for.
    """
    packing = packing_of(lora)
    form, gguf_type, out = config.format or "peft", config.gguf_type, config.out
    if packing is not None:
        form = config.format or _find_default_format(packing)
        if form == "gguf":
            gguf_type = gguf_type or "Q4_0"
    if out is None:
        name = "adapter" if form == "peft" else "model"
        out = f"{config.run}/{name}-{step}{'.gguf' * (form == 'gguf')}"
    config = dataclasses.replace(config, format=form, gguf_type=gguf_type, out=out)
    if packing is not None:
        _check_format(config, packing)
    return config


def _find_default_format(packing: Any) -> Any:
    if packing.fmt not in _FORMATS:
        raise ValueError(
            "`format` must be given for a merge-aware adapter that was trained for "
            f"{packing.fmt}, because no format of `export` holds it. Got none. Use "
            "merged, which holds the decoded values."
        )
    return _FORMATS[packing.fmt]


def _check_format(config: ExportConfig, packing: Any) -> None:
    form, trained_for = config.format, describe(packing)
    for name in ("scales", "calibrate"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"`{name}` must be left out for a merge-aware adapter, whose file has "
                f"exactly the weights of training. Got {value!r}."
            )
    if form in get_args(AdapterFormat):
        raise ValueError(
            "`format` must be that of a model for a merge-aware adapter. Beside its "
            "base, the adapter would compute something else than in training, because "
            f"it was trained for weights that are merged and packed in {trained_for}. "
            f"Got {form}. Leave `format` out to write these weights."
        )
    if form == "merged":
        return  # this file has the decoded values; see `_Writer.write_merged`
    if form == "gguf":
        is_held = config.gguf_type == "Q4_0" and fits_q4_0(packing)
    else:
        is_held = packing.fmt in FMTS[str(form)]
    # For these formats, the packing options describe the file, and not the base.
    settings = {name: getattr(config, name) for name in _PACKING_FIELDS}
    is_held &= all(
        value in (None, getattr(packing, name)) for name, value in settings.items()
    )
    if not is_held:
        requested = {"gguf_type": config.gguf_type, **settings}
        options = [f", {k}={x}" for k, x in requested.items() if x is not None]
        raise ValueError(
            f"`format` and its options must hold {trained_for}, the format that the "
            "merge-aware adapter was trained for, because packing its weights in "
            "another format would round them again. Got "
            f"{form}{''.join(options)}. Leave `format` out, or use merged, which holds "
            "the decoded values."
        )


def check_holds(dtype: str, packed: PyTree) -> None:
    """Raises ValueError if decoded weights would be rounded to `dtype`."""
    leaves = filter(ql.is_packed, ql.leaves_by_path(packed).values())
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    if any(jnp.promote_types(dtype, x) != dtype for x in dtypes):
        raise ValueError(
            "`dtype` must hold the decoded weights of a merge-aware adapter without "
            f"rounding them. Got {dtype} for {' and '.join(dtypes)}."
        )


def fits_q4_0(packing: Any) -> bool:
    """Returns whether GGUF's type Q4_0 has the codes and scales of a packing."""
    is_int4 = packing.fmt in FMTS["compressed-tensors"]
    return is_int4 and packing.block_size == GGUF_BLOCK_SIZE
