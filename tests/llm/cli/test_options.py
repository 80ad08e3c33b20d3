"""Options of commands: one field gives a flag, a key of a file, help and a stamp."""

import dataclasses

import pytest

from qlora_jax.llm.app.options import COUNT, option, options_of
from qlora_jax.llm.app.train_config import TrainConfig
from qlora_jax.llm.cli import parser

PATHS = {"model": "m", "data": "d", "out": "o"}


@dataclasses.dataclass(frozen=True)
class LongerTrain(TrainConfig):
    """Trains longer.

    Attributes:
        cycles: How long
            to wait.
    """

    cycles: int = option(3, section="new", limit=COUNT)


def test_an_option_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parser.COMMANDS, "train", LongerTrain)
    file = tmp_path / "run.yaml"
    command = ["train", "--model=m", "--data=d", "--out=o"]

    def parse(*arguments):
        return parser.parse([*command, *arguments])[1].cycles

    assert (parse(), parse("--cycles=5"), parse("--cycles", "6")) == (3, 5, 6)
    file.write_text("cycles: 7")
    assert parse("--config", str(file)) == 7
    assert parse("--config", str(file), "--cycles=8") == 8
    for value, message in (("0", "positive"), ("x", "an integer")):
        with pytest.raises(SystemExit):
            parse(f"--cycles={value}")
        assert f"`cycles` must be {message}. Got {value}." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help_all")
    words = " ".join(capsys.readouterr().out.split())
    assert "new: --cycles CYCLES How long to wait. (an integer" in words
    assert not options_of(LongerTrain)["cycles"].may_change
    config = LongerTrain.from_settings(PATHS)
    assert config.to_settings()["cycles"] == 3
    assert config.replace(cycles=4).cycles == 4


def test_names_and_values_are_those_of_a_file_or_of_python():
    text = {"rank": "8", "lora_dropout": "0.5", "data": '{"a.jsonl": 1}'}
    config = TrainConfig.from_settings(PATHS | text)
    assert config == TrainConfig("m", {"a.jsonl": 1.0}, "o", rank=8, lora_dropout=0.5)
    assert config == TrainConfig.from_settings(config.to_settings())
    assert config.replace(rank=2).rank == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"nothing": 1, "rnk": 2}, r"Got \['nothing', 'rnk'\]"),
        ({"rnk": 2}, "Did you mean `rank`?"),
        ({"lora_r": 2}, "Did you mean `rank`?"),
        ({"max_steps": 2}, "Did you mean `steps`?"),
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
