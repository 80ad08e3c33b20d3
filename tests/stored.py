"""Helpers that read stored tensors, and write PEFT adapters with random factors."""

import numpy as np
from helpers import write_peft

import qlora_jax as ql


def tensors_of(path):
    """Returns the tensors of a file, or of all files in a folder."""
    return {name: np.asarray(x) for name, x in ql.io.open_safetensors(path).items()}


def draw_peft(folder, shapes, rank=4, **settings):
    """Writes an adapter of modules with weights `[N, K]`; returns A and B of each."""
    rng, factors = np.random.default_rng(1), {}
    for module, (n, k) in shapes.items():

        def draw(*shape):
            return (0.2 * rng.normal(size=shape)).astype(np.float32)

        factors[module] = draw(rank, k), draw(n, rank)
    write_peft(folder, factors, **settings)
    return factors


def export(model, form, out, adapter=None, **options):
    """Runs `qlora-jax export`, with paths as strings."""
    from qlora_jax.llm import app  # tests/outside lacks its dependencies

    adapter = None if adapter is None else str(adapter)
    config = app.ExportConfig(str(model), form, str(out), adapter, **options)
    return app.export(config)
