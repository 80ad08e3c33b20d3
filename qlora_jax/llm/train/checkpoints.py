"""Saves and restores training states with Orbax."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .arrays import check_same_arrays, copy_to_save, leaves_by_name, mesh_of
from .step import State, unwrap_key, wrap_key

_KEPT = 2  # the number of newest states that are kept


class Checkpoints:
    """The newest states of a run, and optionally its best state, in a folder.

    A state is written in the background, into a folder with a temporary name, which is
    renamed when all files are written. A killed run therefore leaves only whole states.

    To keep one more state, such as the best one, set the attribute `best` to its step.
    At first, `best` is None.
    """

    def __init__(self, folder: str | pathlib.Path, *, read_only: bool = False):
        """Opens a folder, and deletes unfinished states of a killed run.

        A run may be using a folder that is opened with `read_only`.
        """
        import orbax.checkpoint as ocp

        self._folder = pathlib.Path(folder).absolute()
        self._read_only = read_only
        self.best: int | None = None
        self._last_saved: int | None = None  # the step that was saved last
        self._unfinished = f"*{ocp.utils.TMP_DIR_SUFFIX}*"  # the temporary names
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        policy: Any = SimpleNamespace(should_preserve=self._should_preserve)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            save_root_metadata=False,
            lightweight_initialize=True,  # reads no files of states
            create=False,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),  # the JSON object of a state
        }
        self._args = ocp.args
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
        """The steps of the whole states, in order."""
        if not self._folder.is_dir():
            return []
        names = (path.name for path in self._folder.iterdir())
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def latest(self) -> int | None:
        """The step of the newest whole state, or None if there is none."""
        return max(self.steps, default=None)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Returns the JSON object that was saved with a state."""
        step = self._find(step)
        return self._restore(step, about=self._args.JsonRestore())["about"]

    def save(self, state: State, metadata: Mapping[str, Any]) -> None:
        """Saves a state, which may be donated as soon as this returns.

        It is written in the background. Raises OSError if the previous one could not be
        written; the last whole state stays.
        """
        leaves = leaves_by_name(unwrap_key(state))
        items = self._args.Composite(
            state=self._args.StandardSave({k: copy_to_save(leaves[k]) for k in leaves}),
            about=self._args.JsonSave(dict(metadata)),
        )
        self.wait()  # for the previous state, whose errors are raised here
        self._last_saved = int(state.step)
        with self._convert_errors():
            self._manager.save(self._last_saved, args=items, force=True)

    def restore(
        self, like: State, step: int | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Returns a saved state and its JSON object.

        The state gets the structure, the shardings and the memory spaces of `like`.
        """
        step = self._find(step)
        shapes = _expected_shapes(like)
        expected = leaves_by_name(shapes)
        check_same_arrays(self._read_shapes(step), expected, self._folder)
        # On a mesh, Orbax reads arrays onto their devices; otherwise into NumPy arrays.
        is_sharded = mesh_of(like) is not None
        target = expected if is_sharded else _empty_arrays(expected)
        state_args = self._args.StandardRestore(target)
        items = self._restore(step, about=self._args.JsonRestore(), state=state_args)
        leaves = [items["state"][name] for name in expected]
        if not is_sharded:
            shardings = [leaf.sharding for leaf in expected.values()]
            leaves = [*map(jax.device_put, leaves, shardings)]
        state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        return wrap_key(state), items["about"]

    def restore_lora(self, like: PyTree, step: int | None = None) -> PyTree:
        """Returns only the lora tree of a state, in NumPy arrays."""
        step = self._find(step)
        expected, saved = leaves_by_name({"lora": like}), self._read_shapes(step)
        saved_lora = {k: x for k, x in saved.items() if k.startswith("lora.")}
        check_same_arrays(saved_lora, expected, self._folder)
        # Orbax can read only a whole state, so the state of the optimizer is read, too,
        # and dropped.
        target = self._args.StandardRestore(_empty_arrays(saved))
        arrays = self._restore(step, state=target)["state"]
        return jax.tree.structure(like).unflatten([arrays[name] for name in expected])

    def remove_after(self, step: int) -> None:
        """Deletes the states after the step from which a run resumes."""
        for later_step in self.steps:
            if later_step > step:
                self._manager.delete(later_step)

    def wait(self) -> None:
        """Waits until the last state is written. Raises OSError if it cannot be."""
        with self._convert_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until the last state is written, and ends the threads."""
        try:
            self.wait()
        finally:
            # If a background thread has failed, `close` raises its error before
            # everything is closed. Later calls close the rest.
            for _ in range(8):
                with contextlib.suppress(Exception):
                    self._manager.close()
                    break
            self._remove_unfinished()

    def _should_preserve(self, states: Sequence[Any], **_: object) -> list[bool]:
        # Orbax deletes the states for which this returns False.
        steps = [state.step for state in states]
        return [step in (*steps[-_KEPT:], self.best) for step in steps]

    def _find(self, step: int | None) -> int:
        """Returns `step`, by default the newest one, if there is a state of it."""
        self.wait()  # for a state that is still being written
        if not (steps := self.steps):
            raise ValueError(f"no checkpoint exists in {self._folder}.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"`step` must be the step of a checkpoint in {self._folder}: {steps}. "
                f"Got {step}."
            )
        return step

    def _read_shapes(self, step: int) -> dict[str, Any]:
        return dict(self._manager.item_metadata(step)["state"] or {})

    def _restore(self, step: int, **items: object) -> Mapping[str, Any]:
        return self._manager.restore(step, args=self._args.Composite(**items))

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Turns the many errors of Orbax and TensorStore into OSError."""
        try:
            yield
        except Exception as error:
            # The message of TensorStore is long, and this is its usual reason.
            reason, disk_full = str(error), "No space left on device"
            reason = disk_full if disk_full in reason else reason
            raise OSError(
                f"the checkpoint of step {self._last_saved} cannot be written to "
                f"{self._folder}: {reason}. {describe_latest(self)}."
            ) from error

    def _remove_unfinished(self) -> None:
        if jax.process_index() or self._read_only:
            return
        # After an error, a thread may still be writing files for a moment.
        for _ in range(20):
            unfinished = [*self._folder.glob(self._unfinished)]
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
