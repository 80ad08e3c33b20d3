"""Saves and restores training state, with Orbax."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from .arrays import by_name, compare, copy, mesh_of, shapes_of
from .checksums import find_faults, write_checksums
from .step import State

_UNFINISHED = ".orbax-checkpoint-tmp*"


class Checkpoints:
    """The newest states of a run, and perhaps its best, in a folder.

    A state is written in the background under a temporary name, with checksums of its
    files, and then renamed. The checksums are compared before it is read. The state of
    the step `best`, None at first, is kept too.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax
        >>> from qlora_jax import train
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
        """Opens a folder, and deletes what a killed run left unfinished.

        Args:
            folder: The folder, which is made if there is none.
            keep: How many states to keep.
            read_only: Whether to delete and make nothing, as a run may use the folder.

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
        self._pending: int | None = None  # the last step that was to be saved
        self._checked: set[int] = set()  # the states whose checksums were compared
        self._open()

    def _open(self) -> None:
        import orbax.checkpoint as ocp

        self._remove_unfinished()
        policy: Any = SimpleNamespace(should_preserve=self._are_kept)
        # Several runs may save states of one step at a time.
        name = "/".join(self._folder.parts[-2:])
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            save_root_metadata=False,
            lightweight_initialize=True,  # reads nothing that may be damaged
            create=False,
            multiprocessing_options=processes,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._args = ocp.args
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
            "about": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        }
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *unused: Any) -> None:
        # The first error is the one to show.
        with contextlib.suppress(*[OSError] * (kind is not None)):
            self.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the states, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the newest state; None if there is none."""
        return self._manager.latest_step()

    def about(self, step: int | None = None) -> dict[str, Any]:
        """Returns the JSON object saved with a state.

        Args:
            step: The state's step; by default that of the newest.

        Raises:
            ValueError: If there is no state, or if it is damaged: the message names
                each damaged file, and the newest state that is not.
        """
        step = self._find(step)
        return self._restore(step, about=self._args.JsonRestore())["about"]

    def save(self, state: State, about: Mapping[str, Any]) -> None:
        """Saves a state; the writing goes on in the background.

        Args:
            state: The state, which may be donated as soon as this returns.
            about: What else to save: a JSON object.

        Raises:
            OSError: If it, or the one before, cannot be written. Unfinished files are
                deleted, and the last complete state stays.
        """
        step = int(state.step)
        state = state._replace(key=jax.random.key_data(state.key))
        arrays = {name: copy(x) for name, x in by_name(state).items()}
        composite = self._args.Composite(
            state=self._args.StandardSave(arrays),
            about=self._args.JsonSave(dict(about)),
        )
        self.wait()
        self._pending = step
        with self._errors():
            self._manager.save(step, args=composite, force=True)

    def restore(
        self, like: State, step: int | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Returns a saved state, in the memory that `like` has, and its JSON object.

        Args:
            like: A state of the same structure, arrays or shapes.
            step: The state's step; by default that of the newest.

        Raises:
            ValueError: If there is no state, if it is damaged (see `about`), or if it
                has other arrays than `like`; all that differ are named.
        """
        step = self._find(step)
        shapes = shapes_of(like)
        want = by_name(shapes)
        compare(self._arrays(step), want, self._folder)
        # On a mesh, Orbax reads each array onto its devices; else into NumPy arrays.
        is_split = mesh_of(like) is not None
        target: Any = want
        if not is_split:
            target = {k: np.empty(x.shape, x.dtype) for k, x in want.items()}
        found = self._restore(
            step,
            state=self._args.StandardRestore(target),
            about=self._args.JsonRestore(),
        )
        put = lambda x, to: x if is_split else jax.device_put(x, to.sharding)
        leaves = [put(found["state"][name], x) for name, x in want.items()]
        state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        key = jax.random.wrap_key_data(state.key)
        return state._replace(key=key), found["about"]

    def restore_lora(self, like: Any, step: int | None = None) -> Any:
        """Returns only the lora tree of a state, in NumPy arrays.

        Args:
            like: A lora tree of the same structure, arrays or shapes.
            step: The state's step; by default that of the newest.

        Raises:
            ValueError: As `restore`.
        """
        step = self._find(step)
        want, have = by_name({"lora": like}), self._arrays(step)
        lora = {k: x for k, x in have.items() if k.startswith("lora.")}
        compare(lora, want, self._folder)
        # Orbax reads all arrays of a state or none.
        target = {k: np.empty(x.shape, x.dtype) for k, x in have.items()}
        found = self._restore(step, state=self._args.StandardRestore(target))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [found[k] for k in want])

    def remove_after(self, step: int) -> list[int]:
        """Returns the steps of later states, after deleting them.

        Args:
            step: The step that a run continues from.
        """
        later = [x for x in self.steps if x > step]
        for x in later:
            self._manager.delete(x)
        self._checked -= {*later}
        return later

    def wait(self) -> None:
        """Waits until the last state is written.

        Raises:
            OSError: If it cannot be.
        """
        with self._errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait`, and ends the threads.

        Raises:
            OSError: As `wait`.
        """
        try:
            self.wait()
        finally:
            self._close_manager()
            self._remove_unfinished()

    def _are_kept(self, states: Sequence[Any], **unused: Any) -> list[bool]:
        kept = [*[x.step for x in states][-self._keep :], self.best]
        return [x.step in kept for x in states]

    def _seal(self) -> None:
        """Writes checksums in Orbax's thread, after the data, before the rename."""
        [folder] = self._folder.glob(f"{self._pending}{_UNFINISHED}")
        write_checksums(folder)

    def _find(self, step: int | None) -> int:
        """Returns the step of an undamaged state: by default the newest."""
        steps = self.steps
        if not steps:
            raise ValueError(f"{self._folder} must hold a state. Got none.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"`step` must be that of a state in {self._folder}: {steps}. Got "
                f"{step}."
            )
        faults = [] if step in self._checked else find_faults(self._folder / str(step))
        if not faults:
            self._checked.add(step)
            return step
        others = [x for x in reversed(steps) if x != step]
        right = (x for x in others if not find_faults(self._folder / str(x)))
        last = next(right, None)
        advice = "No other one is whole"
        if last is not None:
            advice = (
                f"The newest whole one is that of {last}: give `step={last}`, or "
                f"`--resume_step {last}` on the command line"
            )
        raise ValueError(
            f"the state of step {step} in {self._folder} is damaged: "
            f"{'; '.join(faults)}. {advice}."
        )

    def _arrays(self, step: int) -> dict[str, Any]:
        return dict(self._manager.item_metadata(step)["state"] or {})

    def _restore(self, step: int, **args: Any) -> Any:
        return self._manager.restore(step, args=self._args.Composite(**args))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns all errors of Orbax and TensorStore into OSError, and tidies up."""
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:  # others would have to open it too
                self._close_manager()
                self._open()
            reason, full = str(error), "No space left on device"
            last = self.latest
            rest = (
                "There is none" if last is None else f"The last one is that of {last}"
            )
            raise OSError(
                f"the state of step {self._pending} cannot be written in "
                f"{self._folder}: {full if full in reason else reason}. {rest}."
            ) from error

    def _close_manager(self) -> None:
        """Waits for all threads. An error stops `close`, but is raised only once."""
        for _ in range(8):
            with contextlib.suppress(Exception):
                return self._manager.close()

    def _remove_unfinished(self) -> None:
        if jax.process_index() or self._read_only:
            return
        # Again while a thread whose error was not waited for still writes.
        for _ in range(20):
            unfinished = [*self._folder.glob(f"*{_UNFINISHED}")]
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
            if not unfinished:
                return
            time.sleep(0.05)
