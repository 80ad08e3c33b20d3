"""Tunix's GRPO learner on a packed base that actor, rollout and reference share."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close

import qlora_jax as ql

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    import test_tunix as models
    import tunix_grpo as example

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = example.Sums()
WORDS = example.Words(TASK)
STEPS = 60


@pytest.fixture(autouse=True, scope="module")
def rank_promotion():
    """Sets the option for all threads, since Tunix samples in another thread."""
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


@pytest.fixture(scope="module")
def base():
    return example.make_base(TASK, WORDS, 64, 2, 300)


@pytest.fixture(scope="module")
def trained(base):
    """Returns the learner's cluster, its rewards, and new codes on the device."""
    before = device_codes()  # keeps them, so no buffer is reused
    cluster, rewards = example.train(base, TASK, WORDS, STEPS)
    return cluster, rewards, device_codes().keys() - before.keys()


def buffers(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def device_codes():
    """All codes in device memory, and all scales in 8 bits, by buffer."""
    live = [x for x in jax.live_arrays() if x.dtype == jnp.uint8]
    live = [x for x in live if x.sharding.memory_kind == "device"]
    return dict(zip(buffers(live), live, strict=True))


def roles(cluster):
    reference = cluster.inference_worker.get_model("reference")
    return cluster.actor_trainer.model, cluster.rollout.model(), reference


def test_rewards_rise(trained):
    _, rewards, _ = trained
    assert rewards.shape == (STEPS,)
    assert rewards[-10:].mean() > rewards[:10].mean() + 0.15


def test_rewards_depend_on_the_seed_alone(base, trained):
    _, rewards = example.train(base, TASK, WORDS, 3)
    np.testing.assert_array_equal(rewards, trained[1][:3])


def test_the_base_is_in_memory_once(trained):
    cluster, _, codes = trained
    actor, rollout, reference = roles(cluster)
    packed = buffers(nnx.state(actor, ql.nnx.Packed))
    assert packed == buffers(nnx.state(rollout, ql.nnx.Packed))
    assert packed == buffers(nnx.state(reference, ql.nnx.Packed))
    assert len(nnx.to_flat_state(nnx.state(actor, ql.nnx.Packed))) == 15
    kernels = jax.tree.leaves(nnx.state(actor, ql.nnx.Packed))
    assert codes == set(buffers([x for x in kernels if x.dtype == jnp.uint8]))


def test_the_rollout_has_the_actor_s_adapters_and_the_reference_none(trained):
    actor, rollout, reference = roles(trained[0])

    def adapters(model):
        return buffers(nnx.state(model, nnx.LoRAParam))

    assert adapters(actor) == adapters(rollout)
    reference_logits = models.logits(reference)
    assert not np.allclose(reference_logits, models.logits(actor), atol=0.1)
    with ql.nnx.disable_adapters(actor):
        assert_close(reference_logits, models.logits(actor))
