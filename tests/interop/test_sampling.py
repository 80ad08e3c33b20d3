"""What tokens are drawn from, against transformers' logits processors."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.sampling import Sampling

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.generation import (  # noqa: E402
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 12, 5000])
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.4, 0.9, 0.999, 1.0])
def test_the_same_tokens_are_kept(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32)
    logits[3] = np.linspace(0, 1e-3, 300)  # almost uniform
    logits[4, 7] = 100.0  # one that takes all of the probability
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:  # as `GenerationMixin` does
        warpers.append(TopPLogitsWarper(top_p))
    want = warpers(torch.zeros(5, 1, dtype=torch.long), torch.from_numpy(logits))
    got = Sampling(temperature, top_k, top_p).filtered(jnp.asarray(logits))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
