"""Errors of `save_merged`. tests/interop compares its files with PEFT."""

import jax
import jax.numpy as jnp
import pytest

import qlora_jax as ql

NAMES = ql.io.Names({"up/kernel": "up.weight", "norm/scale": "norm.weight"})


def save(path, base, lora, **settings):
    config = {"model_type": "mine"}
    ql.io.save_merged(path, base, lora, NAMES, config, progress=False, **settings)


def test_a_trained_leaf_of_another_size_is_refused(tmp_path):
    def tree(n):
        return {
            "norm": {"scale": jnp.ones(n)},
            "up": {"kernel": jnp.ones((4, 2))},
        }

    save(tmp_path / "base", tree(4), {})
    config = ql.QLoRAConfig(fmt=None, targets="up/.*", trainable="norm/.*", rank=1)
    for size in (4, 5):
        _, lora = ql.init(jax.random.key(0), tree(size), config)
        if size == 4:
            save(tmp_path / "new", tmp_path / "base", lora)
            continue
        with pytest.raises(
            ql.io.CheckpointError, match=r"norm.weight \(must be \(4,\)"
        ):
            save(tmp_path / "out", tmp_path / "base", lora)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_a_dtype_does_not_hold_are_refused(tmp_path, dtype):
    base = {"up": {"kernel": jnp.full((4, 2), 1e5, dtype)}}
    save(tmp_path / "new", base, {}, dtype="float32")
    with pytest.raises(ql.io.CheckpointError, match="up.weight must be finite after"):
        save(tmp_path / "out", base, {}, dtype="float16")
    assert not (tmp_path / "out").exists()
