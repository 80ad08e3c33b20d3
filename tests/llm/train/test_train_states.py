"""States are saved and restored with equal bits."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.llm import train
from qlora_jax.llm.train.checkpoints import Checkpoints

ABOUT = {"position": {"place": 3}}
FLIPS = 4  # single bits in each file


def make_state(step=2):
    rng = np.random.default_rng(0)
    lora = {"w": jnp.asarray(rng.normal(size=(30, 4)), jnp.float32), "b": jnp.ones(500)}
    state = train.State.create(lora, optax.adam(0.1), seed=0)
    return state._replace(step=jnp.int32(step))


@pytest.fixture
def folder(tmp_path):
    """The states of steps 1 and 2."""
    with Checkpoints(tmp_path / "state") as states:
        for step in (1, 2):
            states.save(make_state(step), ABOUT)
    return tmp_path / "state"


def assert_same(states, step=2):
    state, metadata = states.restore(make_state(0), step)
    assert metadata == ABOUT
    chex.assert_trees_all_equal(state, make_state(step))


def test_a_state_is_read_once_it_is_complete(tmp_path):
    with Checkpoints(tmp_path) as states:
        states.save(make_state(1), ABOUT)
        assert_same(states, 1)
        states.save(make_state(2), ABOUT)
        assert states.metadata() == ABOUT


def test_a_run_resumes_from_an_earlier_state(folder):
    with Checkpoints(folder) as states:
        with pytest.raises(ValueError, match=r"of a checkpoint .*\[1, 2\]. Got 7"):
            states.metadata(7)
        states.remove_after(1)
        assert states.steps == [1]
        states.save(make_state(2), ABOUT)
        assert_same(states)


def test_a_reader_changes_nothing_in_the_folder_of_a_run(folder):
    unfinished = folder / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(folder, read_only=True) as states:
        lora = states.restore_lora(make_state().lora, 1)
        with pytest.raises(ValueError, match="lora.b was float32.500., is nothing"):
            states.restore_lora({"w": make_state().lora["w"]})
    for name, x in make_state().lora.items():
        np.testing.assert_array_equal(lora[name], x)
    assert unfinished.is_dir()
    with Checkpoints(folder):
        assert not unfinished.exists()
