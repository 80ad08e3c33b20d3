"""Saves and restores training states with Orbax, and verifies their checksums."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .arrays import check_same_arrays, copy_to_save, leaves_by_name, mesh_of
from .step import State, unwrap_key, wrap_key

_CHECKSUMS = "checksums.txt"  # in the format of `sha256sum`, plus a hash of the lines
# Files without a checksum. Orbax writes the first two while the checksums are computed,
# or later. They contain no arrays.
_UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt", _CHECKSUMS)
# The results of verifying a file, and the texts for them.
_INTACT, _MISSING, _CHANGED, _UNREADABLE = range(4)
_FAULTS = "", "is missing", "has other contents than were saved", "cannot be read"


class Checkpoints:
    """The newest states of a run, and optionally its best state, in a folder.

    A state is written in the background, into a folder with a temporary name. The
    folder is renamed when all files and their checksums are written. The checksums are
    verified before a state is read.

    To keep one more state, such as the best one, set the attribute `best` to its step.
    At first, `best` is None.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax
        >>> from qlora_jax.llm import train
        >>> state = train.State.create({"w": jnp.ones(3)}, optax.adam(0.1), seed=0)
        >>> with train.Checkpoints(tempfile.mkdtemp(), keep=2) as states:
        ...     states.save(state, {"seed": 0})
        ...     states.wait()
        ...     same, about = states.restore(state)
        ...     states.latest, about, same.lora["w"].tolist()
        (0, {'seed': 0}, [1.0, 1.0, 1.0])
    """

    def __init__(
        self, folder: str | pathlib.Path, *, keep: int = 2, read_only: bool = False
    ):
        """Opens a folder, and deletes unfinished states of a killed run.

        Args:
            folder: The folder, which is created if it does not exist.
            keep: The number of newest states to keep.
            read_only: Whether to leave the folder as it is. Pass True if a run may be
                using it.

        Raises:
            ValueError: If `keep` is not positive.
        """
        if keep < 1:
            raise ValueError(f"`keep` must be positive. Got {keep}.")
        self._folder, self._keep = pathlib.Path(folder).absolute(), keep
        self._read_only = read_only
        self.best: int | None = None
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._last_saved: int | None = None  # the step that was saved last
        self._verified: set[int] = set()  # steps whose checksums were verified
        self._open()

    def _open(self) -> None:
        import orbax.checkpoint as ocp

        self._unfinished = f"{ocp.utils.TMP_DIR_SUFFIX}*"  # ends the temporary names
        self._remove_unfinished()
        policy: Any = SimpleNamespace(should_preserve=self._should_preserve)
        # The processes of a run wait for each other at barriers, which Orbax finds by
        # name. Several runs of a sweep may save at the same time. Each run has a prefix
        # for these names, so that no process waits at the barrier of another run.
        name = "/".join(self._folder.parts[-2:])
        mp_options = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            save_root_metadata=False,
            lightweight_initialize=True,  # reads no file, since any may be damaged
            create=False,
            multiprocessing_options=mp_options,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._add_checksums
            ),
        )
        self._args = ocp.args
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=mp_options),
            # The JSON object that is saved with a state.
            "about": ocp.JsonCheckpointHandler(multiprocessing_options=mp_options),
        }
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError:
            # This must not hide the error that has ended the block.
            if error_type is None:
                raise

    @property
    def steps(self) -> list[int]:
        """The steps of the states, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the newest state, or None if there is none."""
        return self._manager.latest_step()

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Returns the JSON object that was saved with a state.

        Args:
            step: The step of the state. Defaults to the newest.

        Raises:
            ValueError: If there is no state, or if it is damaged. The message lists
                the damaged files, and names the newest state that is intact.
            OSError: If the state that was saved last cannot be written.
        """
        step = self._find_intact(step)
        return self._restore(step, about=self._args.JsonRestore())["about"]

    def save(self, state: State, metadata: Mapping[str, Any]) -> None:
        """Saves a state. It is written in the background.

        Args:
            state: The state of one adapter. It may be donated as soon as this returns.
            metadata: A JSON object to save with it.

        Raises:
            ValueError: If the state is that of a sweep.
            OSError: If this state or the previous one cannot be written. Unfinished
                files are deleted, and the last complete state stays.
        """
        if np.ndim(state.step):
            raise ValueError(
                "`state` must be that of one adapter. Got that of a sweep: save each "
                "`state.member(index)`, or pass `SaveStates` to `ForMembers`."
            )
        step = int(state.step)
        leaves = leaves_by_name(unwrap_key(state))
        items = self._args.Composite(
            state=self._args.StandardSave({k: copy_to_save(leaves[k]) for k in leaves}),
            about=self._args.JsonSave(dict(metadata)),
        )
        self.wait()  # for the previous state, whose errors are raised here
        self._last_saved = step
        with self._convert_errors():
            self._manager.save(step, args=items, force=True)

    def restore(
        self, like: State, step: int | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Returns a saved state and its JSON object.

        Args:
            like: A state of the same structure, of arrays or shapes. The restored state
                gets its shardings and memory spaces.
            step: The step of the state. Defaults to the newest.

        Raises:
            ValueError: If there is no state, if it is damaged (see `metadata`), or if
                its arrays differ from those of `like`. The message lists them.
            OSError: As `metadata`.
        """
        step = self._find_intact(step)
        shapes = _expected_shapes(like)
        expected = leaves_by_name(shapes)
        check_same_arrays(self._read_shapes(step), expected, self._folder)
        # On a mesh, Orbax reads arrays onto their devices; otherwise into NumPy arrays.
        is_sharded = mesh_of(like) is not None
        target = expected if is_sharded else _empty_arrays(expected)
        state_args = self._args.StandardRestore(target)
        items = self._restore(step, about=self._args.JsonRestore(), state=state_args)
        self._check_step(step, items["state"])
        leaves = [items["state"][name] for name in expected]
        if not is_sharded:
            shardings = [leaf.sharding for leaf in expected.values()]
            leaves = [*map(jax.device_put, leaves, shardings)]
        state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        return wrap_key(state), items["about"]

    def restore_lora(self, like: PyTree, step: int | None = None) -> PyTree:
        """Returns only the lora tree of a state, in NumPy arrays.

        Args:
            like: A lora tree of the same structure, of arrays or shapes.
            step: The step of the state. Defaults to the newest.

        Raises:
            ValueError: As `restore`.
            OSError: As `restore`.
        """
        step = self._find_intact(step)
        expected, saved = leaves_by_name({"lora": like}), self._read_shapes(step)
        saved_lora = {k: x for k, x in saved.items() if k.startswith("lora.")}
        check_same_arrays(saved_lora, expected, self._folder)
        # Orbax can read only a whole state, so the state of the optimizer is read, too,
        # and dropped.
        target = self._args.StandardRestore(_empty_arrays(saved))
        arrays = self._restore(step, state=target)["state"]
        self._check_step(step, arrays)
        return jax.tree.structure(like).unflatten([arrays[name] for name in expected])

    def remove_after(self, step: int) -> list[int]:
        """Deletes later states, and returns their steps.

        Args:
            step: The step from which a run resumes.

        Returns:
            The steps of the deleted states.
        """
        later_steps = [x for x in self.steps if x > step]
        for later_step in later_steps:
            self._manager.delete(later_step)
        self._verified -= {*later_steps}
        return later_steps

    def wait(self) -> None:
        """Waits until the last state is written.

        Raises:
            OSError: If it cannot be written.
        """
        with self._convert_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until the last state is written, and ends the threads.

        Raises:
            OSError: If it cannot be written.
        """
        try:
            self.wait()
        finally:
            self._close_manager()
            self._remove_unfinished()

    def _should_preserve(self, states: Sequence[Any], **_: object) -> list[bool]:
        # Orbax deletes the states for which this returns False.
        steps = [state.step for state in states]
        return [step in (*steps[-self._keep :], self.best) for step in steps]

    def _add_checksums(self) -> None:
        # Orbax calls this in its thread, after the data is written and before the
        # rename that makes the checkpoint visible.
        [folder] = self._folder.glob(f"{self._last_saved}{self._unfinished}")
        _write_checksums(folder)

    def _find_intact(self, step: int | None) -> int:
        # Returns `step`, by default the newest one, after verifying its checksums.
        self.wait()  # `steps` has a state that is still being written, too
        steps = self.steps
        if not steps:
            raise ValueError(f"no checkpoint exists in {self._folder}.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"`step` must be the step of a checkpoint in {self._folder}: {steps}. "
                f"Got {step}."
            )
        # A state is verified once, since its files may be large.
        faults = [] if step in self._verified else _find_faults(self._folder, step)
        if not faults:
            self._verified.add(step)
            return step
        other_steps = (x for x in reversed(steps) if x != step)
        intact_steps = (x for x in other_steps if not _find_faults(self._folder, x))
        newest = next(intact_steps, None)
        advice = "No other checkpoint is intact"
        if newest is not None:
            advice = (
                f"The newest intact checkpoint is that of step {newest}: pass "
                f"`step={newest}`, or `--resume_step {newest}` on the command line"
            )
        raise ValueError(
            f"the checkpoint of step {step} in {self._folder} is damaged: "
            f"{'; '.join(faults)}. {advice}."
        )

    def _read_shapes(self, step: int) -> dict[str, Any]:
        return dict(self._manager.item_metadata(step)["state"] or {})

    def _check_step(self, step: int, arrays: Mapping[str, Any]) -> None:
        if (saved := int(arrays["step"])) != step:
            raise ValueError(
                f"{self._folder} must have the state of step {step} in the folder of "
                f"this name. Got that of step {saved}."
            )

    def _restore(self, step: int, **items: object) -> Mapping[str, Any]:
        return self._manager.restore(step, args=self._args.Composite(**items))

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        # Turns the many errors of Orbax and TensorStore into OSError, and cleans up.
        try:
            yield
        except Exception as error:
            # A manager of several processes cannot be reopened here. All of them would
            # have to open it together, but maybe only this one has an error.
            if jax.process_count() == 1:
                self._close_manager()
                self._open()
            # The message of TensorStore is long, and this is its usual reason.
            reason, disk_full = str(error), "No space left on device"
            reason = disk_full if disk_full in reason else reason
            raise OSError(
                f"the checkpoint of step {self._last_saved} cannot be written to "
                f"{self._folder}: {reason}. {describe_latest(self)}."
            ) from error

    def _close_manager(self) -> None:
        # If a background thread has failed, `close` raises its error before everything
        # is closed. The next call does not raise it again, and closes the rest.
        for _ in range(8):
            with contextlib.suppress(Exception):
                return self._manager.close()

    def _remove_unfinished(self) -> None:
        if jax.process_index() or self._read_only:
            return
        # After an error, a thread may still be writing files for a moment.
        for _ in range(20):
            unfinished = [*self._folder.glob(f"*{self._unfinished}")]
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
            if not unfinished:
                return
            time.sleep(0.05)


def describe_latest(states: Checkpoints) -> str:
    """Returns a sentence on the last checkpoint, without its full stop."""
    if states.latest is None:
        return "No checkpoint exists"
    return f"The last checkpoint is that of step {states.latest}"


def _expected_shapes(like: State) -> State:
    def add_sharding(x, template):
        sharding = getattr(template, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(add_sharding, jax.eval_shape(unwrap_key, like), like)


def _empty_arrays(shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.empty(x.shape, x.dtype) for name, x in shapes.items()}


def _write_checksums(folder: pathlib.Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    lines = [f"{_hash(folder / n)}  {n}\n" for n in names if n not in _UNCHECKED]
    text = "".join(lines)
    with (folder / _CHECKSUMS).open("x", encoding="utf-8") as file:
        file.write(f"{text}# {hashlib.sha256(text.encode()).hexdigest()}\n")
        # Without this, a power failure could leave a checkpoint without checksums.
        file.flush()
        os.fsync(file.fileno())


def _find_faults(states: pathlib.Path, step: int) -> list[str]:
    # All processes must call this, since each one verifies its share of the files.
    folder = states / str(step)
    hashes, result = {}, _INTACT
    try:
        hashes = _read_checksums(folder)
    except ValueError:
        result = _CHANGED
    except FileNotFoundError:
        result = _MISSING
    except OSError:
        result = _UNREADABLE
    # If one process cannot read the file, the others must not wait for its results.
    result = int(multihost_utils.process_allgather(np.int32(result)).max())
    if result != _INTACT:
        return [f"{_CHECKSUMS} {_FAULTS[result]}"]
    # Files that another process verifies count as intact here. The maximum over all
    # processes is therefore the result for each file.
    names, results = sorted(hashes), np.full(len(hashes), _INTACT, np.int32)
    for index in range(jax.process_index(), len(names), jax.process_count()):
        results[index] = _verify(folder / names[index], hashes[names[index]])
    results = multihost_utils.process_allgather(results).max(axis=0)
    return [f"{n} {_FAULTS[x]}" for n, x in zip(names, results, strict=True) if x]


def _read_checksums(folder: pathlib.Path) -> dict[str, str]:
    text, _, text_hash = (folder / _CHECKSUMS).read_text("utf-8").rpartition("# ")
    if text_hash != hashlib.sha256(text.encode()).hexdigest() + "\n":
        raise ValueError
    # A line is a hash of 64 characters, two spaces, and the name.
    return {line[66:]: line[:64] for line in text.splitlines()}


def _verify(path: pathlib.Path, expected_hash: str) -> int:
    try:
        return _INTACT if _hash(path) == expected_hash else _CHANGED
    except FileNotFoundError:
        return _MISSING
    except OSError:  # such as from a failing disk
        return _UNREADABLE


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
