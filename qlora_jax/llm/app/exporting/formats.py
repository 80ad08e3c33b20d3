"""Writes models and adapters in the formats of `qlora-jax export`."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

from ...models.jax_engine import LAYERS
from ..as_trained import (
    LoadOptions,
)
from ..configs import ExportConfig
from ..merge_aware import (
    check_dtype_holds,
    describe_packing,
    pack_as_trained,
    target_packing_of,
)
from ..open_model import OpenModel
from ..servers import FMTS_BY_FORMAT
from .repacking import Repacked, repack


@dataclass(frozen=True)
class Writer:
    """Writes a model or an adapter; there is a method for each format."""

    config: ExportConfig
    model: OpenModel
    options: LoadOptions  # for the weights to merge into, or for the base of a server
    out: pathlib.Path

    # Adapters

    def write_peft(self) -> None:
        """Writes an adapter for PEFT."""
        # The base's weights are needed only if the adapter replaces some of them.
        has_weights = self.model.replaces_weights
        model = self.model.read() if has_weights else self.model.read_adapter()
        trees, peft = (model.base, model.lora, model.names), model.peft
        if peft is None:
            source = {"base_model": model.name, "revision": model.revision}
            peft = ql.io.peft_config(*trees, **source)
        ql.io.save_peft(self.out, *trees, peft)

    def write_portable(self) -> None:
        """Writes an adapter for servers that load PEFT's folders."""
        model = self._read_plain()
        trees = model.base, ql.io.portable(model.base, model.lora), model.names
        settings = model.peft.extra_settings if model.peft else {}
        # If the adapter's files name a base model, the export names the same one.
        name = settings.get("base_model_name_or_path")
        revision = settings.get("revision") if name else model.revision
        source = {"base_model": name or model.name, "revision": revision}
        ql.io.save_peft(self.out, *trees, ql.io.peft_config(*trees, **source))

    def write_gguf_lora(self) -> None:
        """Writes an adapter for llama.cpp."""
        from ...gguf.save import save_gguf_lora

        save_gguf_lora(self.out, self.model.path, self._make_plain_lora())

    def write_mlx(self) -> None:
        """Writes an adapter for mlx-lm."""
        lora = self._make_plain_lora()
        ql.io.save_mlx(self.out, lora, self.model.decoder.num_layers)

    def _make_plain_lora(self) -> ql.io.PlainLoRA:
        model = self._read_plain()
        return ql.io.PlainLoRA.of(model.base, model.lora, model.engine.exported_names)

    def _read_plain(self) -> OpenModel:
        """Returns the model with its adapter.

        Raises ValueError if the adapter replaces weights.
        """
        config = self.config
        if self.model.replaces_weights:
            raise ValueError(
                f"`adapter` must not replace biases or modules for {config.format}, "
                f"since servers do not load them. Got {config.adapter!r}, which does. "
                "Use the format merged."
            )
        return self.model.read_adapter()

    # Models

    def write_merged(self) -> None:
        """Writes a folder in float."""
        # `save_merged` takes the model's folder or a tree of weights. The folder is
        # enough if an adapter is added to the weights as they are stored, under the
        # same names. Only a model with a vision part is written under other names.
        model, names = self.model, self.model.engine.exported_names
        is_merge_aware = target_packing_of(model.lora) is not None
        is_changed = self.options or is_merge_aware or model.replaces_weights
        is_copied = not (is_changed or model.engine.has_vision)
        model = model.read_adapter() if is_copied else model.read(**self.options)
        weights, lora, dtype = model.path, model.lora, self.config.dtype
        if not is_copied:
            weights, lora = pack_as_trained(model.base, lora)
            if is_merge_aware and dtype is not None:
                check_dtype_holds(dtype, weights)
        with model.files.open_description() as folder:
            ql.io.save_merged(self.out, weights, lora, names, folder, dtype=dtype)

    def write_packed(self) -> Repacked | None:
        """Writes a folder in one of the formats of `FMTS_BY_FORMAT`."""
        config, model, export_format = self.config, self.model, str(self.config.format)
        fmts, stored_fmt = FMTS_BY_FORMAT[export_format], model.stored_fmt
        # By default, weights in a suitable 4-bit format keep their codes.
        default = stored_fmt if stored_fmt in fmts else fmts[0]
        # `save_bitsandbytes` raises an error that lists kernels in another format.
        if export_format == "bitsandbytes":
            default = stored_fmt or default
        fmt = config.fmt or default
        base, cost = self._read_packed(fmt, config.block_size, config.double_quant)
        with model.files.open_description() as folder:
            arguments = self.out, base, model.engine.exported_names, folder
            if export_format == "bitsandbytes":
                ql.io.save_bitsandbytes(*arguments)
            elif export_format == "awq":
                ql.io.save_packed(*arguments, "awq")
            else:
                ql.io.save_packed(*arguments, "compressed-tensors")
        return cost

    def write_gguf(self) -> Repacked | None:
        """Writes a file for llama.cpp."""
        from ...gguf.save import check_gguf_source, save_gguf

        config, model, cost = self.config, self.model, None
        check_gguf_source(model.files, tokenizer=config.tokenizer)
        is_q4_0 = config.gguf_type == "Q4_0"
        if is_q4_0 and (model.adapter_path or model.lora):
            base, cost = self._read_packed("q4_0", None, None)
            model = dataclasses.replace(model, base=base, lora={})
        else:
            # 4-bit weights in a format that this package lacks can be decoded to floats
            # exactly. This is not done for Q4_0, which would round the floats.
            model = dataclasses.replace(model, recode=not is_q4_0).read(**self.options)
        settings = {"fmt": config.gguf_type or "F16", "tokenizer": config.tokenizer}
        save_gguf(self.out, model.path, model.base, model.lora, **settings)
        return cost

    def _read_packed(
        self, fmt: str, block_size: int | None, double_quant: bool | None
    ) -> tuple[PyTree, Repacked | None]:
        """Returns the base in 4 bits, and the cost of merging an adapter, if any."""
        model = self.model
        if (trained_for := target_packing_of(model.lora)) is not None:
            model = model.read(**self.options)
            base, _ = pack_as_trained(model.base, model.lora)
            _check_all_packed(base, trained_for)
            return base, None
        packing_options = fmt, block_size, double_quant
        if model.adapter_path is None and not model.lora:
            packing_config = model.packing_config(*packing_options)
            # The base of a server is packed as in training, by `self.options`. They are
            # empty for a `--format` in 4 bits, which is packed as requested.
            options = self.options or {"packing_config": packing_config}
            return model.read(**options).base, None
        # 4-bit weights in a format that this package lacks are decoded exactly.
        model = dataclasses.replace(model, recode=True)
        packing_config = model.packing_config(*packing_options)
        assert packing_config is not None  # `recode` always packs
        return repack(model.read(), packing_config)


def _check_all_packed(base: PyTree, packing: Any) -> None:
    """Raises ValueError if layers without a merge-aware adapter are not packed yet."""
    unpacked = [
        path
        for path, leaf in leaves_by_path(base).items()
        if re.fullmatch(LAYERS, path) and getattr(leaf, "packing", None) != packing
    ]
    if unpacked:
        raise ValueError(
            "a merge-aware adapter must have all layers that are not yet in "
            f"{describe_packing(packing)}, so that no layer is rounded after training. "
            f"Got none for {', '.join(unpacked)}. Use the format merged."
        )


WRITERS: dict[str, Callable[[Writer], Repacked | None]] = {
    "peft": Writer.write_peft,
    "peft-portable": Writer.write_portable,
    "gguf-lora": Writer.write_gguf_lora,
    "mlx": Writer.write_mlx,
    "merged": Writer.write_merged,
    "gguf": Writer.write_gguf,
    **dict.fromkeys(FMTS_BY_FORMAT, Writer.write_packed),
}
