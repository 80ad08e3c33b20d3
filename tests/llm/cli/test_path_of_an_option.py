"""The way of an option from a file to `ql.init`, and files of earlier versions."""

import pathlib
import shutil
import sys

import pytest
import yaml
from tokenizer_helpers import write_rows

import qlora_jax as ql
from qlora_jax.llm.app.options import convert
from qlora_jax.llm.app.run_folder import read_run_config
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.models.tiny import save_tiny

RANK = 7
EARLIER = pathlib.Path(__file__).parents[2] / "data" / "earlier_config.yaml"
PACKAGE = str(pathlib.Path(ql.__file__).parent)


def carries(value):
    """Returns whether a value is the rank, or has it under its name."""
    if isinstance(value, dict):
        value = value.get("rank")
    return value == RANK if isinstance(value, int) else hasattr(value, "rank")


def path_of_rank(call):
    """Returns the functions that the rank passes through from `call` to `ql.init`.

    They are the named functions that have it, alone or in settings, and are being
    executed when it is converted, and when `QLoRAConfig` and `ql.init` get it.
    """
    path = {}

    def profile(frame, event, _):
        name, values = frame.f_code.co_qualname, frame.f_locals
        is_step = (
            (frame.f_code is convert.__code__ and values["value"] == RANK)
            or (name == "QLoRAConfig.__post_init__" and values["self"].rank == RANK)
            or frame.f_code is ql.init.__code__
        )
        if event != "call" or not is_step:
            return
        stack = []
        while frame is not None:
            code = frame.f_code
            is_named = not code.co_name.startswith(("<", "__"))
            if code.co_filename.startswith(PACKAGE) and is_named:
                if any(map(carries, frame.f_locals.values())):
                    file = code.co_filename.removeprefix(PACKAGE + "/")
                    stack.append(f"{file}:{code.co_qualname}")
            frame = frame.f_back
        if not any("init_shapes" in function for function in stack):  # a check
            path.update(dict.fromkeys(reversed(stack)))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [*path]


def test_the_rank_passes_few_functions(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "five"}])
    settings = {"model": save_tiny(tmp_path / "base"), "data": str(data), "steps": 1}
    settings |= {"rank": RANK, "out": str(tmp_path / "run"), "chat": False}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    path = path_of_rank(lambda: main(["train", "--config", str(file)]))
    print("\n".join(path))
    assert path[-1] == "trees/init.py:init"
    assert len(path) <= 10
    files = {function.split(":")[0] for function in path}
    # The command line, which `app.train` does without, hands the settings on.
    assert len(files - {"llm/cli/main.py", "llm/cli/parser.py"}) <= 5


def test_settings_of_an_earlier_version_say_what_to_change(tmp_path):
    file = shutil.copy(EARLIER, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="`rank` instead of `lora_r`") as caught:
        read_run_config(file)
    settings = yaml.safe_load(file.read_text())
    names = eval(str(caught.value).partition("Got ")[2].partition("]")[0] + "]")
    assert {"lora_r", "recode", "resume_step"} < {*names}
    settings |= {"rank": settings["lora_r"], "too_long": "error"}
    kept = {name: x for name, x in settings.items() if name not in names}
    file.write_text(yaml.safe_dump(kept))
    config = read_run_config(file)
    assert (config.rank, config.lora_alpha, config.fmt) == (4, 4.0, "nf4")
