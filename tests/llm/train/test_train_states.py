"""Damaged states raise errors that name the newest intact state."""

import hashlib
import random
import re
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.llm import train

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
    with train.Checkpoints(tmp_path / "state") as states:
        for step in (1, 2):
            states.save(make_state(step), ABOUT)
    return tmp_path / "state"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_intact(states, step=2):
    state, metadata = states.restore(make_state(0), step)
    assert metadata == ABOUT
    chex.assert_trees_all_equal(state, make_state(step))


def size_of(path):
    return path.stat().st_size


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damage(rng):
    """Yields pairs: a part of the error message, and a function that damages a file."""
    for _ in range(FLIPS):
        yield "contents", lambda path: flip(path, rng.randrange(8 * size_of(path)))
    yield "contents", lambda path: path.write_bytes(path.read_bytes()[:-1])
    yield "contents", lambda path: path.write_bytes(b"")
    yield "missing", lambda path: path.unlink()


def test_a_damaged_state_is_named_or_has_the_same_values(folder):
    """Bits of each file are flipped, and files are truncated, emptied and deleted."""
    rng, num_errors, harmless = random.Random(0), 0, set()
    for path in files_of(folder / "2"):
        data, name = path.read_bytes(), path.relative_to(folder / "2").as_posix()
        for kind, damage_file in damage(rng):
            damage_file(path)
            with train.Checkpoints(folder) as states:
                try:
                    assert_intact(states)
                    harmless.add(name)
                except ValueError as error:
                    message = (
                        f"the checkpoint of step 2 in {folder} is damaged: {name} "
                    )
                    assert message in str(error) and kind in str(error)
                    assert "intact checkpoint is that of step 1: pass" in str(error)
                    num_errors += 1
            path.write_bytes(data)
    # Two files of Orbax hold no values, so that damage to them is harmless.
    assert harmless == {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert num_errors == (len(files_of(folder / "2")) - 2) * (FLIPS + 3) >= 70
    with train.Checkpoints(folder) as states:
        assert_intact(states)


@pytest.mark.parametrize("part", ["state", "about", "."])
def test_a_state_of_which_a_part_is_missing_is_named(folder, part):
    shutil.rmtree(folder / "2" / part)
    (folder / "2").mkdir(exist_ok=True)
    with train.Checkpoints(folder) as states:
        for read in (states.metadata, lambda: states.restore(make_state())):
            message = "checkpoint of step 2 .* is missing.* of step 1:"
            with pytest.raises(ValueError, match=message):
                read()
        # As the error says, the run can resume from the other state.
        assert states.metadata(1) == ABOUT
        assert_intact(states, 1)
        assert states.remove_after(1) == [2]
        states.save(make_state(2), ABOUT)
        states.wait()
        assert_intact(states)


def test_a_state_is_read_once_it_is_complete(tmp_path):
    with train.Checkpoints(tmp_path) as states:
        states.save(make_state(1), ABOUT)
        assert_intact(states, 1)
        states.save(make_state(2), ABOUT)
        assert states.metadata() == ABOUT
        with pytest.raises(ValueError, match="`state` must be that of one adapter"):
            states.save(train.State.stack([make_state(3), make_state(3)]), ABOUT)


def test_all_damaged_files_are_named(folder):
    for step in (1, 2):
        for file in files_of(folder / str(step) / "about"):
            file.write_bytes(b"")
    with train.Checkpoints(folder) as states:
        message = "about/commit_success.txt has other contents than were saved; "
        message += "about/metadata has .*No other checkpoint is intact"
        with pytest.raises(ValueError, match=message):
            states.metadata()
        message = r"must be the step of a checkpoint .*\[1, 2\]. Got 7"
        with pytest.raises(ValueError, match=message):
            states.metadata(7)


def test_checksums_are_those_of_sha256sum(folder):
    text = (folder / "2" / "checksums.txt").read_text()
    *lines, last = text.splitlines(keepends=True)
    for line in lines:
        checksum, name = re.fullmatch("([0-9a-f]{64})  (.*)\n", line).groups()
        data = (folder / "2" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == checksum
    assert last == f"# {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n"


def test_a_reader_changes_nothing_in_the_folder_of_a_run(folder):
    unfinished = folder / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with train.Checkpoints(folder, read_only=True) as states:
        lora = states.restore_lora(make_state().lora, 1)
        with pytest.raises(ValueError, match="lora.b was float32.500., is nothing"):
            states.restore_lora({"w": make_state().lora["w"]})
    for name, x in make_state().lora.items():
        np.testing.assert_array_equal(lora[name], x)
    assert unfinished.is_dir()
    with train.Checkpoints(folder):
        assert not unfinished.exists()
