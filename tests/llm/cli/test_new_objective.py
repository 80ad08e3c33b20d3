"""The registry of objectives, and one that a user registers."""

import pathlib
import re

import commands
import jax.numpy as jnp
import pytest
from commands import rows_of, settings

import qlora_jax as ql
from qlora_jax.llm import app, train
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.llm.train.objectives import OBJECTIVES, sft

LLM = pathlib.Path(ql.__file__).parent / "llm"


def test_only_the_registry_names_objectives():
    names = "|".join(OBJECTIVES)
    registry = LLM / "train/objectives"
    for path in LLM.rglob("*.py"):
        if registry not in path.parents:
            quoted = re.findall(rf"""["'](?:{names})["']""", path.read_text())
            # The default of the option.
            assert quoted == ['"sft"'] * (path.name == "train_config.py"), path


def confident_loss(model, beta):
    """Returns the cross entropy plus `beta` times its square, with a metric."""
    compute_losses = sft.make_token_losses(model)

    def loss(*arguments):
        _, _, batch, _ = arguments
        [losses] = compute_losses(*arguments)
        square, count = jnp.sum(losses**2 * batch.weights), jnp.sum(batch.weights)
        total = jnp.sum(losses * batch.weights) + beta * square
        return total, count, {"square": (square, count)}

    return loss


@pytest.fixture
def confident():
    objective = train.Objective(
        name="confident",
        rows="texts",
        loss=confident_loss,
        settings=("beta",),
        metrics=("square",),
        may_train_on_all=True,
    )
    train.register_objective(objective)
    yield objective
    del OBJECTIVES[objective.name]


def test_a_registered_objective_is_trained(confident, tmp_path, capsys):
    folder, data = save_tiny(tmp_path / "base"), tmp_path / "data"
    data.mkdir()
    commands.write_letters(data)
    options = dict(objective="confident", beta=0.5, steps=12, eval_examples=0)
    result = app.train(settings(folder, data, tmp_path / "run", **options))
    rows = rows_of(tmp_path / "run")
    assert result.valid_loss == rows[-1]["valid_loss"] < rows[0]["valid_loss"]
    assert all("square" in row for row in rows[1:]) and "valid_square" in rows[0]
    assert "valid_perplexity" not in rows[0]
    # Its name and its settings are part of the identity of the run.
    resume = ["--config", tmp_path / "run/config.yaml", "--resume", "--beta", 1]
    status, _, err = commands.run(capsys, "train", *resume)
    assert status == 1 and "beta was 0.5, is 1" in err, err
