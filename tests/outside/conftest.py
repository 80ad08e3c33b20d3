"""Fixtures for models of other libraries."""

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion():
    """JAX's own default, which these models need."""
    with jax.numpy_rank_promotion("allow"):
        yield
