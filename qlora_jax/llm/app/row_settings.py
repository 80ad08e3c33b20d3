"""Reads rows for an adapter, as the run that trained it read them."""

import datetime
import pathlib
from typing import NamedTuple

from ..data.chat_tokenizer import Tokenizer, open_tokenizer
from ..data.dataset import read_rows
from ..data.encode import Row
from ..data.kinds import TrainOn
from ..data.readers import describe_path
from ..train.objectives import find_objective
from .as_trained import ConfigWithAdapter, run_config_of
from .configs import ExportConfig, GenerateConfig, ScoreConfig
from .open_model import OpenModel
from .run_folder import read_system_message
from .train_config import TrainConfig


class RowSettings(NamedTuple):
    """How rows are read: the options of `train` with these names."""

    train_on: TrainOn = TrainConfig.train_on
    keys: dict[str, str] | None = None
    chat: bool = TrainConfig.chat
    template: str | None = None
    date: str | None = None


def read_rows_like_run(config: ScoreConfig, model: OpenModel) -> list[Row]:
    """Returns the rows of a file as tokens, with the settings of the adapter's run.

    Options of the config, such as `train_on`, replace those settings. A .txt file is
    split into rows of `batch_tokens` tokens.
    """
    tokenizer, settings = open_tokenizer_like_run(config, model)
    return read_rows(
        str(config.data),
        tokenizer,
        vocab_size=model.engine.vocab_size,
        max_length=config.batch_tokens,
        keys=settings.keys or None,
        train_on=settings.train_on,
        chat=settings.chat,
    )


def open_tokenizer_like_run(
    config: ConfigWithAdapter, model: OpenModel
) -> tuple[Tokenizer, RowSettings]:
    """Returns the tokenizer of a model, and the settings with which rows are read.

    Both are as in the adapter's run, unless the config sets other values. However,
    `generate` uses today's date instead of the run's, as a server does.
    """
    settings = _row_settings(config)
    check_template(settings.template)
    date = None if isinstance(config, GenerateConfig) else settings.date
    now = None if date is None else datetime.datetime.fromisoformat(date)
    tokenizer = open_tokenizer(model.path, template=settings.template, now=now)
    return tokenizer, settings


def find_system_message(config: GenerateConfig | ExportConfig) -> str | None:
    """Returns the system message on whose conversations the adapter was trained.

    It is None if there is no run, or if the rows of the run do not share a message.
    """
    run_config = run_config_of(config)
    return None if run_config is None else read_system_message(run_config)


def check_template(template: str | None) -> None:
    """Raises ValueError if the file of a chat template does not exist."""
    if template is not None and not pathlib.Path(template).is_file():
        raise ValueError(f"`template` must be a file. Got {describe_path(template)}.")


def _row_settings(config: ConfigWithAdapter) -> RowSettings:
    """Returns the settings of the adapter's run, or those that `config` sets."""
    # `generate` renders prompts alone, and its option `chat` has another meaning.
    is_generate = isinstance(config, GenerateConfig)
    names = ("template",) if is_generate else ("template", "train_on", "keys", "chat")
    options = {name: getattr(config, name, None) for name in names}
    set_options = {name: value for name, value in options.items() if value is not None}
    run_config = run_config_of(config)
    settings = RowSettings() if run_config is None else _row_settings_of_run(run_config)
    return settings._replace(**set_options)


def _row_settings_of_run(config: TrainConfig) -> RowSettings:
    settings = {name: getattr(config, name) for name in RowSettings._fields}
    if find_objective(config.objective).rows != "texts":
        # The rows of preferences have other keys and targets than those read here.
        settings |= {"train_on": TrainConfig.train_on, "keys": None}
    return RowSettings(**settings)
