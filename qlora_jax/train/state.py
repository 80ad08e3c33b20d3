"""The state of a run on disk, written by Orbax: what a killed run goes on from."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .devices import copy_parts, mesh_of
from .step import State


class Checkpoints:
    """The states of a run in a folder: the newest ones, each whole or not there.

    A state is written in the background under a temporary name and renamed.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax
        >>> from qlora_jax import train
        >>> state = train.State.create({"w": jnp.ones(3)}, optax.adam(0.1), seed=0)
        >>> with train.Checkpoints(tempfile.mkdtemp(), keep=2) as states:
        ...     states.save(state, {"seed": 0})
        ...     states.wait()
        ...     states.latest, states.about()
        (0, {'seed': 0})
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        """Opens a folder, and deletes what a killed run left unfinished.

        Args:
            folder: The folder, which is made where there is none.
            keep: How many states to keep.

        Raises:
            ValueError: If `keep` is not positive.
        """
        if keep < 1:
            raise ValueError(f"`keep` must be positive. Got {keep}.")
        self._folder, self._keep = pathlib.Path(folder).absolute(), keep
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pending: int | None = None  # the last step that was to be saved
        self._open()

    def _open(self) -> None:
        import orbax.checkpoint as ocp

        self._remove_unfinished()
        policies = ocp.checkpoint_managers.preservation_policy
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.LatestN(self._keep), save_root_metadata=False
        )
        self._args = ocp.args
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
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
    def latest(self) -> int | None:
        """The step of the newest state; None if there is none."""
        return self._manager.latest_step()

    def about(self) -> dict[str, Any]:
        """Returns what was saved beside the newest state.

        Returns:
            A JSON object.

        Raises:
            ValueError: If there is no state.

        Example:
            >>> import tempfile
            >>> from qlora_jax import train
            >>> train.Checkpoints(tempfile.mkdtemp()).about()
            Traceback (most recent call last):
            ValueError: the folder must hold a state. Got none in ...
        """
        return self._restore(about=self._args.JsonRestore())["about"]

    def save(self, state: State, about: Mapping[str, Any]) -> None:
        """Saves a state; the writing goes on in the background.

        Args:
            state: The state, which may be donated as soon as this returns.
            about: What else to save: a JSON object.

        Raises:
            OSError: If it, or the one before, cannot be written. What was written of it
                is deleted, and the last whole state stays.

        Example:
            >>> import tempfile, optax
            >>> from qlora_jax import train
            >>> with train.Checkpoints(tempfile.mkdtemp()) as states:
            ...     states.save(train.State.create({}, optax.sgd(0.1), seed=0), {})
        """
        step = int(state.step)
        state = state._replace(key=jax.random.key_data(state.key))
        arrays = {name: _copy(x) for name, x in _by_name(state).items()}
        composite = self._args.Composite(
            state=self._args.StandardSave(arrays),
            about=self._args.JsonSave(dict(about)),
        )
        self.wait()
        self._pending = step
        with self._errors():
            self._manager.save(step, args=composite, force=True)

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Reads the newest state.

        Args:
            like: A state of the same structure, arrays or shapes.

        Returns:
            The state, each array in the memory that it has in `like`, and what was
            saved beside it.

        Raises:
            ValueError: If there is no state, or if it has other arrays than `like`; all
                that differ are named.

        Example:
            >>> import tempfile, jax.numpy as jnp, optax
            >>> from qlora_jax import train
            >>> state = train.State.create({"w": jnp.ones(3)}, optax.sgd(0.1), seed=0)
            >>> with train.Checkpoints(tempfile.mkdtemp()) as states:
            ...     states.save(state, {})
            ...     states.wait()
            ...     states.restore(state)[0].lora["w"].tolist()
            [1.0, 1.0, 1.0]
        """
        step = self._newest()
        shapes = _shapes(like)
        want = _by_name(shapes)
        have = dict(self._manager.item_metadata(step)["state"] or {})
        kind = lambda x: f"{np.dtype(x.dtype)}{list(x.shape)}"
        text = lambda arrays, name: kind(arrays[name]) if name in arrays else "nothing"
        if problems := [
            f"{name} was {text(have, name)}, is {text(want, name)}"
            for name in sorted({*want, *have})
            if text(have, name) != text(want, name)
        ]:
            raise ValueError(
                f"the state in {self._folder} must be that of this run. Got others: "
                f"{'; '.join(problems)}."
            )
        # On a mesh, Orbax reads each array onto its devices; else into NumPy arrays.
        is_split = mesh_of(like) is not None
        target: Any = want
        if not is_split:
            target = {k: np.empty(x.shape, x.dtype) for k, x in want.items()}
        found = self._restore(
            state=self._args.StandardRestore(target), about=self._args.JsonRestore()
        )
        put = lambda x, to: x if is_split else jax.device_put(x, to.sharding)
        leaves = [put(found["state"][name], x) for name, x in want.items()]
        state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        key = jax.random.wrap_key_data(state.key)
        return state._replace(key=key), found["about"]

    def wait(self) -> None:
        """Waits until the last state is written.

        Raises:
            OSError: If it cannot be.

        Example:
            >>> import tempfile
            >>> from qlora_jax import train
            >>> train.Checkpoints(tempfile.mkdtemp()).wait()
        """
        with self._errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait`, and ends the threads.

        Raises:
            OSError: As `wait`.

        Example:
            >>> import tempfile
            >>> from qlora_jax import train
            >>> train.Checkpoints(tempfile.mkdtemp()).close()
        """
        try:
            self.wait()
        finally:
            self._close_manager()
            self._remove_unfinished()

    def _newest(self) -> int:
        if self.latest is None:
            raise ValueError(
                f"the folder must hold a state. Got none in {self._folder}."
            )
        return self.latest

    def _restore(self, **args: Any) -> Any:
        composite = self._args.Composite(**args)
        return self._manager.restore(self._newest(), args=composite)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns whatever Orbax and TensorStore raise into an OSError, and tidies up."""
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
        """Waits for all threads. What one raises stops `close`, but is raised once."""
        for _ in range(8):
            with contextlib.suppress(Exception):
                return self._manager.close()

    def _remove_unfinished(self) -> None:
        if jax.process_index():
            return
        # Again while a thread whose error was not waited for still writes.
        for _ in range(20):
            unfinished = [*self._folder.glob("*.orbax-checkpoint-tmp*")]
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
            if not unfinished:
                return
            time.sleep(0.05)


def _copy(x: jax.Array) -> Any:
    """Copies an array: the next step overwrites the donated state while it is written.

    On a mesh, Orbax copies an accelerator's arrays to the host before `save` returns.
    It may keep views of a CPU's, and of those in host memory.
    """
    if mesh_of(x) is None:
        return np.array(x)
    is_cpu = next(iter(x.sharding.device_set)).platform == "cpu"
    return copy_parts(x) if is_cpu or x.sharding.memory_kind != "device" else x


def _by_name(state: State) -> dict[str, Any]:
    """Returns the leaves of a state by names such as "lora.layers.kernel.a"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): x for path, x in leaves}


def _shapes(like: State) -> State:
    """Returns the shapes of a state as it is saved, with the key's numbers.

    Each has the sharding of its array, if it is one, with the kind of its memory.
    """
    data = jax.eval_shape(jax.random.key_data, like.key)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    of_key = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=like.key.sharding)
    return jax.tree.map(shape, like._replace(key=of_key))
