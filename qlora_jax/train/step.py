"""One step of training: gradients, and an update unless it is skipped."""

import functools
from collections.abc import Callable, Sequence
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
        tokens: The number of trained tokens.
        is_finite: Whether loss, gradient and new adapter are.

    Example:
        >>> from qlora_jax import train
        >>> train.Report(2.5, 0.1, 30, True).loss
        2.5
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Float[Array, ""]
    is_finite: Bool[Array, ""]


def _all_finite(arrays: Sequence[jax.Array]) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]).all()


class _Sums(NamedTuple):
    loss: Float[Array, ""]
    weight: Float[Array, ""]
    grads: Any


def make_step(
    loss: Callable[..., tuple[Float[Array, ""], Float[Array, ""]]],
    optimizer: optax.GradientTransformation,
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
            returns the sum of the losses of the trained tokens, and their number.
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
    optimizer = optim.skippable(optimizer)

    def gradient(
        sums: _Sums | None, state: State, base: Any, batch: Any, index: Any
    ) -> _Sums:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)
        of_lora = lambda lora: loss(lora, base, batch, key)
        (total, weight), grads = jax.value_and_grad(of_lora, has_aux=True)(state.lora)
        new = _Sums(total, jnp.asarray(weight, jnp.float32), grads)
        return new if sums is None else jax.tree.map(jnp.add, sums, new)

    def finish(
        sums: _Sums | None, state: State, base: Any, batch: Any, index: Any
    ) -> tuple[State, Report]:
        total, weight, grads = gradient(sums, state, base, batch, index)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        mean, norm = total / weight, optax.tree.norm(grads)
        skip = ~_all_finite([mean, norm])
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.lora, skip=skip
        )
        lora = optax.apply_updates(state.lora, updates)
        is_finite = _all_finite([mean, norm, *jax.tree.leaves(lora)])
        keep = lambda new, old: jnp.where(is_finite, new, old)
        lora = jax.tree.map(keep, lora, state.lora)
        skipped = state.skipped + skip.astype(jnp.int32)
        new = State(state.step + 1, skipped, lora, opt_state, state.key)
        return new, Report(mean, norm, weight, is_finite)

    # On a mesh, results have the shardings of the arguments: the partitioner may choose
    # others, and the next step would be compiled again.
    @functools.cache
    def compiled(shardings: tuple | None, structure: Any) -> tuple[Callable, Callable]:
        unspecified: Any = None
        sums = out = unspecified
        if shardings is not None:
            state = jax.tree.unflatten(structure, shardings)
            sums = _Sums(unspecified, unspecified, state.lora)
            out = state, None
        add = jax.jit(gradient, donate_argnums=0, out_shardings=sums)
        return add, jax.jit(finish, donate_argnums=1, out_shardings=out)

    def programs(state: State) -> tuple[Callable, Callable]:
        leaves, structure = jax.tree.flatten(state)
        is_split = mesh_of(state) is not None
        shardings = tuple(x.sharding for x in leaves) if is_split else None
        return compiled(shardings, structure)

    return Step(programs)


@dataclass(frozen=True)
class Step:
    """One step of training, from `make_step`.

    Attributes:
        programs: A function of a state that returns two jitted functions: the first
            adds a batch's gradient, the second takes the last batch and updates.

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

    programs: Callable[[State], tuple[Callable, Callable]]

    def __call__(
        self, state: State, base: Any, batches: Sequence[Any]
    ) -> tuple[State, Report]:
        """Returns the state after a step, and a `Report`.

        Args:
            state: The state, which is donated.
            base: The base tree.
            batches: The batches.
        """
        add, last = self.programs(state)
        sums = None
        for index, batch in enumerate(batches[:-1]):
            sums = add(sums, state, base, batch, np.int32(index))
        return last(sums, state, base, batches[-1], np.int32(len(batches) - 1))

    def lower(self, state: State, base: Any, batch: Any) -> jax.stages.Lowered:
        """Lowers the program of a step of one batch, as `jax.jit(...).lower` does.

        Args:
            state: The state, or its shapes (`State.shapes`).
            base: The base tree, or its shapes with shardings.
            batch: The batch, likewise.

        Returns:
            The lowered program. It may be for devices that this machine does not have.
        """
        _, last = self.programs(state)
        return last.lower(None, state, base, batch, np.int32(0))
