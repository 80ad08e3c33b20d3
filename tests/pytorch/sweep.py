"""Tests tiny random models of the causal language models of transformers.

    PYTHONPATH=.:tests python tests/pytorch/sweep.py [KIND ...]

This tests the given model types, or by default all that have not passed yet, and writes
the results to `docs/reports/torch_models.tsv`. The cells of a type that passed are the
relative differences of logits, loss and gradients (of the adapter with the largest
one), the number of packed weights, and the weights that were merged instead of passed
to PEFT, which cannot adapt weights that several modules share or that another module
reads.

For each model type, the sweep compares the logits of float weights with PyTorch's. It
also compares the loss and the gradients of adapters on packed weights with those that
PEFT computes on the decoded weights.
"""

import argparse
import copy
import pathlib
import re
import signal
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from tiny_models import KINDS, tiny_model
from tolerances import (
    TERMS,
    assert_within_rounding,
    distance,
    measure_rounding,
    norm,
    rounding,
)
from torch_helpers import (
    copy_weights,
    init,
    logits_of,
    loss_of,
    peft_loss_and_gradients,
    random_ids,
    torch_logits,
)

import qlora_jax as ql
from qlora_jax.torch.init import kernel_roles

DOCS = pathlib.Path(__file__).parents[2] / "docs"
ROWS = DOCS / "reports" / "torch_models.tsv"
LARGEST_ERROR = rounding(TERMS)


def check(module, ids, expected):
    """Compares a model with PyTorch, whose logits are `expected`, and with PEFT.

    Returns the cells of its row: the errors of the logits of float weights, and of the
    loss and of the gradients on packed weights; the number of packed weights; and the
    names of those that PEFT cannot adapt.
    """
    # Some modules keep tensors of their last call, which PEFT could not copy.
    in_peft = copy.deepcopy(module)
    model, ids_array = ql.torch.wrap(module), jnp.array(ids)
    params = ql.torch.params(model)
    apply = jax.jit(lambda params, ids: logits_of(model, {"params": params}, ids))
    logits = np.asarray(apply(params, ids_array))

    def logits_in_pytorch(params):
        copy_weights(module, params)
        return {"logits": torch_logits(module, ids)}

    run = logits_in_pytorch, params
    errors = [error_of({"logits": logits}, {"logits": expected}, *run)]
    names = [n for n, _ in kernel_roles(module) if is_target(n, params)]
    model, base, lora = init(module, [re.escape(name) for name in names])

    def compute_loss(lora, base, ids):
        return loss_of(model, {"params": base, "lora": lora}, ids)

    loss, gradients = jax.jit(jax.value_and_grad(compute_loss))(lora, base, ids_array)
    expected_loss, expected, merged = peft_loss_and_gradients(in_peft, base, lora, ids)

    def loss_in_peft(base, lora):
        loss, *_ = peft_loss_and_gradients(in_peft, base, lora, ids)
        return {"loss": np.float32(loss)}

    def gradients_in_peft(base, lora):
        return peft_loss_and_gradients(in_peft, base, lora, ids)[1]

    losses = {"loss": loss}, {"loss": np.float32(expected_loss)}
    errors.append(error_of(*losses, loss_in_peft, base, lora))
    errors.append(error_of(gradients, expected, gradients_in_peft, base, lora))
    patterns = {re.sub(r"\d+", "*", name) for name in merged}
    cells = [f"{error:.1e}" for error in errors]
    return *cells, str(len(names)), " ".join(sorted(patterns)) or "none"


def error_of(got, expected, run, *args):
    """Returns the largest relative error of a leaf of `got`.

    Raises AssertionError if rounding cannot explain the error. `run(*args)` computes
    `expected` again, which shows how far rounding moves it.
    """
    wants = jax.tree.leaves(expected)
    norms = [norm(want) for want in wants]
    # A gradient that would be zero without rounding has the rounding errors of larger
    # gradients. Errors are therefore relative to at least a tenth of the largest one.
    norms = [max(size, 0.1 * max(norms)) for size in norms]
    pairs = zip(jax.tree.leaves(got), wants, norms, strict=True)
    error = np.max([distance(x, want) / size for x, want, size in pairs])
    if not error <= LARGEST_ERROR:  # it may be NaN
        want, rounding_errors = measure_rounding(run, *args)
        assert_within_rounding(got, want, rounding_errors)
    return float(error)


def is_target(name, params):
    """Whether to pack and adapt a weight: a matrix, but no embedding and no head."""
    is_head = re.search(r"embed|lm_head|wte|wpe|output_projection", name)
    return name in params and not is_head and min(params[name].shape[-2:]) > 4


def result_of(kind):
    """Tests a model type. Returns the cells of its row, of which the first is a status.

    The status is "ok"; "differs" if the results differ from PyTorch's; "no model" if
    the model fails in PyTorch; or "fails" for any other error.
    """
    status = "no model"
    try:
        module, ids = tiny_model(kind), random_ids()
        expected = torch_logits(module, ids)
        status = "fails"
        cells = check(module, ids, expected)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = frames[-1]
        location = f"{pathlib.Path(frame.filename).name}:{frame.lineno}"
        reason = re.sub(r"\s+", " ", str(error))[:160]
        is_comparison = any(frame.name == "error_of" for frame in frames)
        status = "differs" if is_comparison else status
        return status, f"{type(error).__name__}: {reason} ({location})"
    return "ok", *cells


def read_rows():
    """Returns the cells of each row, by model type."""
    lines = ROWS.read_text("utf-8").splitlines()
    return {line.partition("\t")[0]: line.split("\t")[1:] for line in lines}


def write_rows(rows):
    lines = ["\t".join([kind, *row]) + "\n" for kind, row in sorted(rows.items())]
    ROWS.write_text("".join(lines), "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="by default, all that have not passed")
    parser.add_argument("--seconds", type=int, default=100, help="CPU time of a model")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    signal.signal(signal.SIGPROF, raise_timeout)
    rows = read_rows()
    not_passed = [kind for kind in KINDS if rows.get(kind, [""])[0] != "ok"]
    for kind in args.kinds or not_passed:
        signal.setitimer(signal.ITIMER_PROF, args.seconds)
        rows[kind] = result_of(kind)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(kind, *rows[kind], flush=True)
        write_rows(rows)


def raise_timeout(*_):
    raise TimeoutError("took too long")


if __name__ == "__main__":
    main()
