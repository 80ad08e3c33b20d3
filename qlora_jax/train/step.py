"""One step of training: gradients, and an update unless it is skipped."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from .. import optim
from .arrays import mesh_of, on_mesh, shapes_like


class State(NamedTuple):
    """The state of training.

    Attributes:
        step: Steps made so far.
        skipped: How many of them the optimizer skipped.
        lora: The lora tree.
        opt_state: The optimizer's state.
        key: PRNG key of the run; a step folds its number in.

    Example:
        >>> import jax, optax
        >>> from qlora_jax import train
        >>> lora = {"w": jax.numpy.ones(3)}
        >>> state = train.State.create(lora, optax.adam(0.1), seed=0)
        >>> int(state.step)
        0
        >>> train.State.shapes(lora, optax.adam(0.1)).opt_state[0].mu["w"].shape
        (3,)
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    lora: Any
    opt_state: Any
    key: Any

    @classmethod
    def create(
        cls, lora: Any, optimizer: optax.GradientTransformation, seed: int
    ) -> "State":
        """Returns the state before the first step.

        On a mesh, the optimizer's state is sharded as the adapters are.

        Args:
            lora: The lora tree.
            optimizer: The optimizer.
            seed: Seed of the dropout.
        """
        key, zero = jax.random.key(seed), lambda: jnp.zeros((), jnp.int32)
        state = cls(zero(), zero(), lora, optimizer.init(lora), key)
        mesh = mesh_of(lora)
        return state if mesh is None else on_mesh(state, mesh)

    @classmethod
    def shapes(cls, lora: Any, optimizer: optax.GradientTransformation) -> "State":
        """Returns the shapes and shardings of the state that `create` returns.

        Args:
            lora: The lora tree, of `jax.ShapeDtypeStruct` with shardings.
            optimizer: The optimizer.
        """
        create = lambda lora: cls.create(lora, optimizer, 0)
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lora)
        # The results of `eval_shape` have no memory spaces.
        avals = jax.make_jaxpr(create)(bare).out_avals
        structure = jax.tree.structure(jax.eval_shape(create, bare))
        state: State = jax.tree.unflatten(structure, avals)
        # The optimizer's arrays have the shardings of their adapters.
        like: Any = optax.tree_utils.tree_map_params(
            optimizer,
            lambda x, own: own if x.shape == own.shape else None,
            state.opt_state,
            lora,
            transform_non_params=lambda x: None,
        )
        like = state._replace(step=None, skipped=None, lora=lora, opt_state=like)
        return shapes_like(state, like._replace(key=None), jax.tree.leaves(lora)[0])


class Report(NamedTuple):
    """Results of a step.

    Attributes:
        loss: Mean over the trained tokens, in nats a token.
        grad_norm: Global norm of the gradient, before clipping.
        tokens: The number of trained tokens, or of what else the loss is a sum.
        is_finite: Whether loss, gradient and new adapter are.
        metrics: The means of what else the loss returns, by name.

    Example:
        >>> from qlora_jax import train
        >>> train.Report(2.5, 0.1, 30, True).loss
        2.5
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Float[Array, ""]
    is_finite: Bool[Array, ""]
    metrics: Mapping[str, Float[Array, ""]] = {}


def _all_finite(arrays: Sequence[jax.Array]) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]).all()


class _Sums(NamedTuple):
    loss: Float[Array, ""]
    weight: Float[Array, ""]
    grads: Any
    metrics: list[Any]


def make_step(
    loss: Callable[..., tuple], optimizer: optax.GradientTransformation
) -> "Step":
    """Returns the function that makes one step of training.

    A step may have several batches. Its gradient is that of the mean over all their
    trained tokens, as from one large batch.

    If the loss or the norm of the gradient is not finite, adapter and optimizer are
    left as they were (`ql.optim.skippable`), and only the counts go on. If only the new
    adapter is not finite, it is left as it was, but the optimizer has taken the
    gradient: its state may be in host memory and is updated in place. `fit` stops then.
    Go back to an earlier state, with a smaller learning rate.

    Args:
        loss: A function of the lora tree, the base tree, a batch and a PRNG key that
            returns the sum of the losses of the trained tokens, and their number; and
            perhaps a dict of metrics, each a sum and the number of what it sums.
        optimizer: The optimizer. Its state may be in host memory (`ql.optim.offload`).

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax import train
        >>> def loss(lora, base, batch, key):
        ...     return jnp.sum((lora["w"] - batch) ** 2), batch.size
        >>> state = train.State.create({"w": jnp.zeros(())}, optax.sgd(0.5), seed=0)
        >>> step = train.make_step(loss, optax.sgd(0.5))
        >>> state, report = step(state, {}, [jnp.ones(3), 5 * jnp.ones(1)])
        >>> float(state.lora["w"]), float(report.loss)
        (2.0, 7.0)
    """
    return Step(_Programs(loss, [optimizer]))


def make_joint_step(
    loss: Callable[..., tuple], optimizers: Sequence[optax.GradientTransformation]
) -> "JointStep":
    """Returns the function that makes one step of several adapters over one base.

    Each step is that of `make_step`, of the same batches. The losses are computed
    together, by `jax.vmap` over the adapters, so the base is decoded once for all.

    Args:
        loss: As in `make_step`.
        optimizers: The optimizer of each adapter.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax import train
        >>> def loss(lora, base, batch, key):
        ...     return jnp.sum((lora["w"] - batch) ** 2), batch.size
        >>> optimizers = optax.sgd(0.5), optax.sgd(0.25)
        >>> states = [
        ...     train.State.create({"w": jnp.zeros(())}, x, seed=0) for x in optimizers]
        >>> step = train.make_joint_step(loss, optimizers)
        >>> [float(x.lora["w"]) for x, _ in step(states, {}, [jnp.ones(3)])]
        [1.0, 0.5]
    """
    return JointStep(_Programs(loss, optimizers))


class _Programs:
    """Compiles the steps of states that are trained together."""

    def __init__(self, loss: Callable, optimizers: Sequence[Any]):
        self._loss = loss
        self._optimizers = [optim.skippable(optimizer) for optimizer in optimizers]
        self._compiled = functools.cache(self._compile)

    def __call__(self, states: tuple[State, ...]) -> tuple[Callable, Callable]:
        leaves, structure = jax.tree.flatten(states)
        is_split = mesh_of(states) is not None
        shardings = tuple(x.sharding for x in leaves) if is_split else None
        return self._compiled(shardings, structure)

    # On a mesh, results have the shardings of the arguments: the partitioner may choose
    # others, and the next step would be compiled again.
    def _compile(
        self, shardings: tuple | None, structure: Any
    ) -> tuple[Callable, Callable]:
        any_sharding: Any = None
        sums = out = any_sharding
        if shardings is not None:
            states = jax.tree.unflatten(structure, shardings)
            like = lambda lora: _Sums(any_sharding, any_sharding, lora, any_sharding)
            sums = [like(state.lora) for state in states]
            out = [(state, None) for state in states]
        add = jax.jit(self._gradients, donate_argnums=0, out_shardings=sums)
        return add, jax.jit(self._finish, donate_argnums=1, out_shardings=out)

    def _gradients(
        self, sums: Any, states: tuple[State, ...], base: Any, batch: Any, index: Any
    ) -> list[_Sums]:
        def gradient(lora: Any, key: Any, step: Any) -> _Sums:
            key = jax.random.fold_in(jax.random.fold_in(key, step), index)

            def of_lora(lora: Any) -> tuple[Array, list]:
                total, *aux = self._loss(lora, base, batch, key)
                return total, aux

            (total, aux), grads = jax.value_and_grad(of_lora, has_aux=True)(lora)
            weight, *metrics = aux
            return _Sums(total, jnp.asarray(weight, jnp.float32), grads, metrics)

        each = [(state.lora, state.key, state.step) for state in states]
        if len(each) == 1:
            new = [gradient(*each[0])]
        else:
            stack = jax.tree.map(lambda *x: jnp.stack(x), *each)
            both = jax.vmap(gradient)(*stack)
            new = [jax.tree.map(lambda x, i=i: x[i], both) for i in range(len(each))]
        return new if sums is None else jax.tree.map(jnp.add, sums, new)

    def _finish(
        self, sums: Any, states: tuple[State, ...], base: Any, batch: Any, index: Any
    ) -> list[tuple[State, Report]]:
        found = self._gradients(sums, states, base, batch, index)
        parts = zip(found, states, self._optimizers, strict=True)
        return [_updated(*part) for part in parts]


def _updated(sums: _Sums, state: State, optimizer: Any) -> tuple[State, Report]:
    total, weight, grads, metrics = sums
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    mean, norm = total / weight, optax.tree.norm(grads)
    skip = ~_all_finite([mean, norm])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.lora, skip=skip)
    lora = optax.apply_updates(state.lora, updates)
    is_finite = _all_finite([mean, norm, *jax.tree.leaves(lora)])
    keep = lambda new, old: jnp.where(is_finite, new, old)
    lora = jax.tree.map(keep, lora, state.lora)
    skipped = state.skipped + skip.astype(jnp.int32)
    new = State(state.step + 1, skipped, lora, opt_state, state.key)
    means = {k: x / n for found in metrics for k, (x, n) in found.items()}
    return new, Report(mean, norm, weight, is_finite, means)


@dataclass(frozen=True)
class JointStep:
    """One step of several adapters, from `make_joint_step`.

    Attributes:
        programs: A function of a tuple of states that returns two jitted functions: the
            first adds a batch's gradient, the second takes the last batch and updates.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax import train
        >>> loss = lambda lora, base, batch, key: (lora["w"] * 2.0, batch.size)
        >>> step = train.make_joint_step(loss, [optax.sgd(0.5)] * 2)
        >>> state = train.State.create({"w": jnp.zeros(())}, optax.sgd(0.5), seed=0)
        >>> len(step.lower([state, state], {}, jnp.ones(3)).out_info)
        2
    """

    programs: Callable[[tuple[State, ...]], tuple[Callable, Callable]]

    def __call__(
        self, states: Sequence[State], base: Any, batches: Sequence[Any]
    ) -> list[tuple[State, Report]]:
        """Returns a state and a `Report` for each adapter.

        Args:
            states: The states, which are donated.
            base: The base tree.
            batches: The batches.
        """
        states = tuple(states)
        add, last = self.programs(states)
        sums = None
        for index, batch in enumerate(batches[:-1]):
            sums = add(sums, states, base, batch, np.int32(index))
        return last(sums, states, base, batches[-1], np.int32(len(batches) - 1))

    def lower(
        self, states: Sequence[State], base: Any, batch: Any
    ) -> jax.stages.Lowered:
        """Returns the lowered program of a step of one batch, as `Step.lower` does.

        Args:
            states: The states, or their shapes.
            base: The base tree, or its shapes with shardings.
            batch: The batch, likewise.
        """
        states = tuple(states)
        _, last = self.programs(states)
        return last.lower(None, states, base, batch, np.int32(0))


@dataclass(frozen=True)
class Step:
    """One step of training, from `make_step`.

    Attributes:
        programs: As in `JointStep`, for a tuple of one state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax import train
        >>> loss = lambda lora, base, batch, key: (lora["w"] * 2.0, batch.size)
        >>> step = train.make_step(loss, optax.sgd(0.5))
        >>> state = train.State.create({"w": jnp.zeros(())}, optax.sgd(0.5), seed=0)
        >>> program = step.lower(state, {}, jnp.ones(3)).compile()
        >>> program.memory_analysis().host_temp_size_in_bytes
        0
    """

    programs: Callable[[tuple[State, ...]], tuple[Callable, Callable]]

    def __call__(
        self, state: State, base: Any, batches: Sequence[Any]
    ) -> tuple[State, Report]:
        """Returns the state after a step, and a `Report`.

        Args:
            state: The state, which is donated.
            base: The base tree.
            batches: The batches.
        """
        [found] = JointStep(self.programs)([state], base, batches)
        return found

    def lower(self, state: State, base: Any, batch: Any) -> jax.stages.Lowered:
        """Lowers the program of a step of one batch, as `jax.jit(...).lower` does.

        Args:
            state: The state, or its shapes (`State.shapes`).
            base: The base tree, or its shapes with shardings.
            batch: The batch, likewise.

        Returns:
            The lowered program. It may be for devices that this machine does not have.
        """
        return JointStep(self.programs).lower([state], base, batch)
