"""Options of commands: one field gives a flag, a key of a file, help and a stamp."""

import dataclasses
import pathlib
import sys

import pytest
from commands import settings

from qlora_jax.llm import app
from qlora_jax.llm.app.options import COUNT, option, options_of
from qlora_jax.llm.app.train_config import TrainConfig
from qlora_jax.llm.cli import parser
from qlora_jax.llm.models.tiny import save_tiny

PATHS = {"model": "m", "data": "d", "out": "o"}


@dataclasses.dataclass(frozen=True)
class Longer(app.TrainingConfig):
    """Trains longer.

    Attributes:
        patience: How long
            to wait.
    """

    patience: int = option(3, section="new", aliases=("wait",), limit=COUNT)


@dataclasses.dataclass(frozen=True)
class LongerTrain(TrainConfig):
    training: Longer = Longer()


def test_an_option_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parser.COMMANDS, "train", LongerTrain)
    file = tmp_path / "run.yaml"
    command = ["train", "--model=m", "--data=d", "--out=o"]

    def parse(*arguments):
        return parser.parse([*command, *arguments])[1].training.patience

    assert (parse(), parse("--patience=5"), parse("--wait", "6")) == (3, 5, 6)
    for text in ("patience: 7", "wait: 7", "training: {patience: 7}"):
        file.write_text(text)
        assert parse("--config", str(file)) == 7
        assert parse("--config", str(file), "--patience=8") == 8
    for value, message in (("0", "positive"), ("x", "an integer")):
        with pytest.raises(SystemExit):
            parse(f"--patience={value}")
        assert f"`patience` must be {message}. Got {value}." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    # Before Python 3.13, argparse repeats the name of the value.
    words = words.replace("--patience PATIENCE, --wait", "--patience, --wait")
    assert "new: --patience, --wait PATIENCE How long to wait. (an integer" in words
    assert not options_of(LongerTrain)["patience"].may_change
    config = LongerTrain.from_settings(PATHS)
    assert config.to_settings()["patience"] == 3
    assert config.replace(patience=4).training == Longer(patience=4)


def test_names_and_values_are_those_of_a_file_or_of_python():
    flat = {"lora_r": 8, "dropout": "0.5", "data": {"a.jsonl": 1}, "seed": "1,2"}
    nested = {"adapter": {"rank": "8", "dropout": 0.5}, "training": {"seed": [1, 2]}}
    nested["data"] = {"path": '{"a.jsonl": 1}'}
    config = TrainConfig.from_settings(PATHS | flat)
    assert config == TrainConfig.from_settings(PATHS | nested)
    assert config == TrainConfig.from_settings(config.to_settings())
    assert config.training.seed == [1, 2] and config.data.path == {"a.jsonl": 1.0}
    assert {*flat, *PATHS} - {"dropout"} <= {*config.to_settings()}
    assert config.replace(rank=2).adapter.rank == 2  # also under its other name
    # A list with one value is not a sweep.
    assert TrainConfig.from_settings(PATHS | {"seed": [3]}).training.seed == 3
    # Version 0.2 had this setting.
    old = TrainConfig.from_settings(PATHS | {"tensorboard": True})
    assert old.output.loggers == ["tensorboard"]
    assert not TrainConfig.from_settings(PATHS | {"tensorboard": False}).output.log


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"nothing": 1, "rnk": 2}, r"Got \['nothing', 'rnk'\]"),
        ({"adapter": {"rnk": 2}}, r"Got \['adapter.rnk'\]"),
        ({"lora_r": 8, "rank": 4}, "set each option once. Got lora_r and rank"),
        ({"rank": 8, "adapter": {"rank": 8}}, "Got rank and adapter.rank"),
        ({"steps": 1.5}, "`steps` must be an integer. Got 1.5"),
        ({"steps": True}, "`steps` must be an integer. Got True"),
        ({"remat": 1}, "`remat` must be true or false or offload. Got 1"),
        ({"keys": [1]}, "`keys` must be a mapping"),
        ({"model": None}, "`model` must be text. Got None"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_settings(PATHS | settings)
    with pytest.raises(ValueError, match="`model` and `data` must be given"):
        TrainConfig.from_settings({"out": "o"})


def test_few_functions_pass_on_the_settings_before_training(tmp_path):
    """All settings together reach few functions, which others get parts from.

    The functions are counted that `train` calls up to the first step. Methods of the
    settings themselves are left out.
    """
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "five"}\n')
    config = settings(save_tiny(tmp_path / "base"), data, tmp_path / "run", steps=2)
    functions, package = set(), str(pathlib.Path(app.__file__).parent.parent)

    def count_calls(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        if code.co_qualname == "fit":  # training begins
            sys.setprofile(None)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = [frame.f_locals.get(name) for name in names]
        has_config = any(isinstance(x, app.TrainConfig) for x in arguments)
        if has_config and names[0] != "self":
            functions.add(code.co_qualname)

    sys.setprofile(count_calls)
    try:
        app.train(config)
    finally:
        sys.setprofile(None)
    assert {"train", "make_run", "make_program"} < functions
    assert len(functions) <= 12
