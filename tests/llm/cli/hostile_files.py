"""Makes folders of hostile files, as a stranger could publish them.

Each function writes files into a folder, and returns the folder. Tests run the commands
of `commands_on` on it: no command may run code from it, read other files than those in
it, write or delete anything outside the output folder, or work without end.
"""

import json
import pathlib
import textwrap

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizer_helpers import write_rows

from qlora_jax.llm.models.tiny import save_tiny


def make_model(folder, **changes):
    """Writes a harmless tiny model. `changes` are values of its config.json."""
    return pathlib.Path(save_tiny(folder, **changes))


def change_json(file, **changes):
    """Changes values of the JSON object in a file, which is new if it is missing."""
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))
    return file.parent


def change_settings(file, **changes):
    """Changes settings in the config.yaml of a run."""
    settings = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(settings | changes))


def make_adapter(folder, **changes):
    """Writes a harmless adapter for `make_model`, whose B is zero.

    `changes` are values of its adapter_config.json.
    """
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    settings |= {"target_modules": ["o_proj"], "layers_to_transform": [0]}
    change_json(folder / "adapter_config.json", **settings | changes)
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (64, 2)}
    tensors = {name.format(x): np.zeros(shapes[x], np.float32) for x in shapes}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def commands_on(model, work):
    """Returns a command line for each command that opens a model, by its name.

    `work` is an existing folder for the rows that the commands read, and for what they
    write. The commands are quick: they compute few tokens.
    """
    rows = write_rows(work / "rows.jsonl", [{"prompt": "in", "completion": "in"}])
    train = ["train", "--model", model, "--data", rows, "--steps", 1, "--rank", 2]
    return {
        "train": [*train, "--out", work / "run"],
        "preview": [*train, "--out", work / "run", "--preview", 1],
        "generate": ["generate", "--model", model, "--prompt", "in"]
        + ["--max-new-tokens", 1],
        "score": ["score", "--model", model, "--data", rows],
        "merged": ["export", "--model", model, "--format", "merged"]
        + ["--out", work / "merged"],
        "gguf": ["export", "--model", model, "--format", "gguf"]
        + ["--out", work / "model.gguf"],
    }


def add_code(folder, file, marker):
    """Names a module of the folder in `file`, which makes the file `marker`.

    This is how models name code of their own for each of transformers' classes.
    """
    code = f"""
        import pathlib
        import transformers
        pathlib.Path({str(marker)!r}).touch()
        class Config(transformers.PreTrainedConfig):
            model_type = "evil"
        class Model(transformers.PreTrainedModel):
            config_class = Config
        class Tokenizer(transformers.PreTrainedTokenizerFast): ...
        class Processor(transformers.ProcessorMixin): ...
    """
    (folder / "evil.py").write_text(textwrap.dedent(code))
    classes = {"AutoConfig": "Config", "AutoTokenizer": ["Tokenizer"] * 2}
    classes |= {"AutoModelForCausalLM": "Model", "AutoProcessor": "Processor"}
    references = {
        name: [f"evil.{x}" for x in value] if type(value) is list else f"evil.{value}"
        for name, value in classes.items()
    }
    return change_json(folder / file, auto_map=references)


def link_outside(folder, name, outside):
    """Moves a file or a folder, which may be missing, and leaves a link to it.

    `outside` is the folder to move it to, and is made.
    """
    path, target = folder / name, outside / "target"
    outside.mkdir()
    if path.exists():
        path.rename(target)
    else:
        target.write_text("{}")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    return folder


def list_files(folder):
    """Returns the bytes of all files in a folder by path, to detect changes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files}


def _loop(body, start='"x"'):
    # 60 steps, each of which may double `n.x`.
    return (
        "{% set n = namespace(x="
        + start
        + ") %}{% for _ in range(60) %}"
        + body
        + "{% endfor %}{{ n.x }}"
    )


# Chat templates that take more time or memory than any computer has.
ENDLESS_TEMPLATES = {
    "repeated text": '{{ "x" * 10**10 }}',
    "repeated list": "{{ ([0] * 10**9)|length }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}"
    "{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "percent": '{{ "%1000000000d" % 1 }}',
    "percent star": '{{ "%*d" % (10**9, 1) }}',
    "format filter": '{{ "%1000000000d"|format(1) }}',
    "format": '{{ "{:1000000000d}".format(1) }}',
    "format width": '{{ "{:{}}".format(1, 10**9) }}',
    "format_map": '{{ "{a:{w}}".format_map({"a": 1, "w": 10**9}) }}',
    "format all": '{{ ("%(a)s" * 10**5) % {"a": "x" * 10**6} }}',
    "center": '{{ "x"|center(10**10) }}',
    "indent": '{{ ("a\n" * 10**4)|indent(10**6) }}',
    "indent by text": '{{ ("a\n" * 10**4)|indent("x" * 10**6) }}',
    "join": '{{ (["a"] * 10**5)|join("x" * 10**6) }}',
    "join map": '{{ range(99999)|map("string")|join("x" * 10**6) }}',
    "join method": '{{ ("x" * 10**6).join(["a"] * 10**5) }}',
    "replace": '{{ ("a" * 10**6)|replace("a", "b" * 10**6) }}',
    "replace method": '{{ ("a" * 10**6).replace("", "b" * 10**6) }}',
    "translate": '{{ ("a" * 10**6).translate({97: "b" * 10**6}) }}',
    "ljust": '{{ "x".ljust(10**10) }}',
    "zfill": '{{ "x".zfill(10**10) }}',
    "expandtabs": '{{ "\t".expandtabs(10**10) }}',
    "tojson": "{{ range(99999)|list|tojson(indent=10**6) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list|length }}",
    "slice": "{{ [1]|slice(10**9)|list|length }}",
    "sum": "{{ ([range(99999)|list] * 10**5)|sum(start=[])|length }}",
    "split": '{{ ("ab " * 10**8).split(" ")|length }}',
    "list of text": '{{ ("a" * 4 * 10**8)|list|length }}',
    "to_bytes": '{{ (1).to_bytes(10**10, "big") }}',
    "codec": '{{ ("é" * 10**6).encode("punycode") }}',
    "power": "{{ 10**(10**10) }}",
    "squares": _loop("{% set n.x = n.x * n.x %}", "3"),
    "round": "{{ 5|round(-10**9) }}",
    "round up": '{{ 5.5|round(10**9, "ceil") }}',
    "doubled by ~": _loop("{% set n.x = n.x ~ n.x %}"),
    "doubled by +": _loop("{% set n.x = n.x + n.x %}"),
    "doubled block": _loop(
        "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
    ),
    "doubled list": _loop("{% set n.x = n.x + n.x %}", "[1]"),
    "nested lists": _loop("{% set n.x = [n.x, n.x] %}"),
    "nested dicts": _loop("{% set n.x = dict(a=n.x, b=n.x) %}"),
    "nested keys": _loop("{% set n.x = {}.fromkeys(range(9), n.x) %}"),
    "nested batches": _loop(
        "{% set n.x = (n.x|batch(99)|list) + (n.x|batch(99)|list) %}", "[1]"
    ),
    "kept slices": '{% set n = namespace(x="x" * 10**6) %}{% for _ in range(99999) %}'
    "{% set n.y = [n.y, n.x[1:]] %}{% endfor %}",
    "kept lists": "{% set n = namespace() %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% set n.x = [n.x, [], [], [], []] %}"
    "{% endfor %}{% endfor %}",
}


_ENDLESS = "(([a-z_.0-9])+)+!"
_NAMES = [f"name_{i}" for i in range(100_000)]
# Settings of adapters, by the setting that an error names. Matching takes years, or
# time that is quadratic in the length of a list.
ENDLESS_ADAPTERS = {
    "target_modules": {"target_modules": _ENDLESS, "layers_to_transform": None},
    "exclude_modules": {"exclude_modules": _ENDLESS},
    "rank_pattern": {"rank_pattern": {_ENDLESS: 1}},
    "alpha_pattern": {"alpha_pattern": {_ENDLESS: 1}},
    "layers_pattern": {"layers_pattern": _ENDLESS},
    "layers_to_transform": {"layers_to_transform": [*range(100_000)]},
    "target_modules: 'name_7'": {"target_modules": _NAMES, "layers_to_transform": None},
    "exclude_modules: 'name_7'": {"exclude_modules": _NAMES},
    "modules_to_save: 'name_7'": {"modules_to_save": _NAMES},
    "rank_pattern: 'name_7'": {"rank_pattern": dict.fromkeys(_NAMES, 1)},
    "rank_pattern: many": {"rank_pattern": {f"{x}.*": 1 for x in _NAMES}},
}


# It clears the screen, renames the window, and begins a line: by ESC, by the one
# character that stands for it, and by a carriage return.
TERMINAL_CODES = "\x1b[2J\x1b]0;evil\x07\x9b31m\x08\rok\nfine\x7f"
