"""A small decoder, from the golden files of transformers."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder

FOLDER = pathlib.Path(__file__).parents[2] / "data" / "models" / "llama_tied"


@pytest.fixture(scope="module")
def tiny():
    """A decoder, its variables, and tokens."""
    config, params = load(FOLDER, progress=False)
    golden = np.load(FOLDER / "golden.npz")
    return Decoder(config), {"params": params}, jnp.asarray(golden["tokens"], jnp.int32)
