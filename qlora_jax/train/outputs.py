"""Writes an adapter for PEFT, with a model card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import qlora_jax as ql


def save_adapter(
    folder: str | pathlib.Path,
    base: Any,
    lora: Any,
    names: "ql.io.Names",
    *,
    base_model: str,
    card: str,
) -> None:
    """Writes a PEFT adapter with its model card; replaces an older one.

    Args:
        folder: The folder to write.
        base: The base tree.
        lora: The lora tree.
        names: The Hugging Face names of the leaves of `base`.
        base_model: Hub id or path of the base model.
        card: The text of the card, from `model_card`.

    Raises:
        ValueError: As `qlora_jax.io.save_peft`.

    Example:
        >>> import jax, jax.numpy as jnp, pathlib, qlora_jax as ql, tempfile
        >>> from qlora_jax import train
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "adapter"
        >>> train.save_adapter(folder, base, lora, names, base_model="org/m", card="#")
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    settings = ql.io.peft_config(base, lora, names, base_model=base_model)
    with ql.io.new_path(folder) as new:
        ql.io.save_peft(new, base, lora, names, settings)
        (new / "README.md").write_text(card, "utf-8")


def model_card(
    base_model: str,
    *,
    title: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
) -> str:
    """Returns the README.md of an adapter, with the header that the hub reads.

    Args:
        base_model: Hub id or path of the base model.
        title: The title.
        settings: The settings of the run.
        data: Facts about the data.
        results: Losses and other results.

    Example:
        >>> from qlora_jax import train
        >>> card = train.model_card(
        ...     "org/m", title="m", settings={"lora_r": 16}, data={}, results={})
        >>> card.splitlines()[:3]
        ['---', 'base_model: "org/m"', 'library_name: peft']
    """
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, qlora, qlora-jax]",
        "---",
        "",
        f"# {title}",
        "",
        f"A LoRA adapter of `{base_model}`, trained with qlora_jax {ql.__version__}.",
        "It loads with PEFT: `PeftModel.from_pretrained(model, folder)`.",
    ]
    for heading, rows in (("Results", results), ("Data", data), ("Settings", settings)):
        lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
        known = {key: value for key, value in rows.items() if value is not None}
        lines += [f"| {key} | {_cell(value)} |" for key, value in known.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
