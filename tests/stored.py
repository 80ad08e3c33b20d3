"""What files hold, and adapters of PEFT with random factors."""

import numpy as np
from helpers import write_peft

import qlora_jax as ql


def tensors_of(path):
    """The tensors of a file or of a folder's files, such as those of an adapter."""
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
    """Runs `qlora-jax export`, which takes paths as texts."""
    from qlora_jax import cli  # tests/outside is without what it needs

    adapter = None if adapter is None else str(adapter)
    config = cli.ExportConfig(str(model), form, str(out), adapter, **options)
    return cli.export(config)
