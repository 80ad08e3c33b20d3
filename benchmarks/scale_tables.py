"""The tables of docs/scale, from the records of `aot_scale.py`."""

from collections.abc import Callable, Iterable
from typing import Any

from scale_rows import HBM, NAMES, chip_of

SHORT = {long: short for short, long in NAMES.items()}
# Names in the tables for the options that a row has turned on, by setting and value.
WORDS = {
    ("engine", "torch"): "PyTorch's code",
    ("objective", "dpo"): "dpo",
    ("merge_aware", True): "merge-aware",
    ("dtype", "float16"): "float16",
    ("attention", "splash"): "splash",
    ("attention", "blocks"): "blocks of scores",
    ("attention", "cudnn"): "cuDNN",
    ("stream_dtype", "bfloat16"): "bf16 stream",
    ("remat", "offload"): "inputs on host",
    ("mlp_tile", 2048): "MLP tiles",
    ("offload_optimizer", True): "Adam on host",
    ("base_memory", "host"): "base on host",
}
FIT_TOKENS = 8192
# The numbers of the options in docs/scale/fit.md.
FIT = {
    "splash": 2,
    "bf16 stream": 3,
    "inputs on host": 4,
    "MLP tiles": 5,
    "Adam on host": 6,
    "base on host": 7,
}


def fits(record: dict) -> bool:
    """Returns whether the program compiled, and so fits."""
    return "error" not in record


def gb(size: float) -> str:
    """Formats bytes in units of 1e9."""
    return f"{size / 1e9:.2f}" if size < 100e9 else f"{size / 1e9:.0f}"


def turned_on(settings: dict) -> list[str]:
    """Returns the options that a row has turned on."""
    return [word for (key, value), word in WORDS.items() if settings.get(key) == value]


def words(settings: dict) -> str:
    """Returns the options that a row has turned on, as text."""
    return ", ".join(turned_on(settings)) or "nothing"


def markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    """Returns a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def memory_cells(record: dict) -> list[str]:
    """Returns cells: HBM, whether the program fits, and host memory."""
    limit = HBM[chip_of(record)]
    if fits(record):
        return [gb(record["hbm"]), "yes", gb(record["host"])]
    if "hbm" not in record:
        return ["", f"not known: {record['error'][:80]}", ""]
    return [gb(record["hbm"]), f"**no**, {gb(record['hbm'] - limit)} too much", ""]


def models_table(records: list[dict]) -> str:
    """Returns the table by model and chips, of the records of `largest`."""
    heads = ["model", "chips", "base", "tokens", "settings", "HBM", "host"]
    heads.append("LoRA on bfloat16")
    groups: dict[tuple, dict[bool, dict]] = {}
    for x in largest(records):
        is_lora = x["settings"].get("fmt") == "none"
        models = list(NAMES.values())
        key = models.index(x["model"]), chip_of(x), x["chips"]
        groups.setdefault(key, {})[is_lora] = x
    rows = []
    for _, group in sorted(groups.items()):
        x = group.get(False) or group[True]
        settings = x["settings"]
        mesh = settings.get("mesh", "")
        cells = [settings.get("fmt", "nf4"), f"{settings['max_length']:,}"]
        cells += [numbers(settings), gb(x["hbm"]), gb(x["host"])]
        rows.append(
            [
                SHORT[x["model"]],
                f"{x['chips']} {chip_of(x)}" + f" ({mesh})" * bool(mesh),
                *(cells if False in group else [""] * len(cells)),
                lora_cell(group[True]) if True in group else "",
            ]
        )
    return markdown(heads, rows)


def numbers(settings: dict) -> str:
    """Returns the numbers that docs/scale/fit.md gives to the settings of a row."""
    on_gpu = {"blocks of scores": "2 (blocks)", "cuDNN": "2 (cuDNN)"}
    texts = on_gpu | {word: str(number) for word, number in FIT.items()}
    return ", ".join(texts.get(word, word) for word in turned_on(settings)) or "none"


def lora_cell(record: dict) -> str:
    """Returns whether LoRA on a bfloat16 base fits, with its tokens and HBM."""
    tokens, limit = record["settings"]["max_length"], HBM[chip_of(record)]
    if fits(record):
        return f"{tokens:,}: {gb(record['hbm'])}"
    return f"**no**, {gb(record['hbm'] - limit)} too much at {tokens:,}"


def largest(records: list[dict]) -> list[dict]:
    """Returns the record of most tokens that fits, for each model, chips and base.

    Where none fits, that of fewest bytes. Records of DPO, PyTorch's code and the
    notebook are left out.
    """
    special = {"objective", "engine", "merge_aware"}
    chosen = (x for x in records if "hbm" in x and not special & {*x["settings"]})

    def group_of(record):
        names = "model", "topology", "chips"
        return *(record[name] for name in names), record["settings"].get("fmt")

    return best_by(group_of, chosen)


def best_by(group_of: Callable, records: Iterable[dict]) -> list[dict]:
    """Returns the record of each group of most tokens, or else of fewest bytes.

    Of records with equal tokens, it is the one with the fewest options turned on.
    """
    best: dict[Any, dict] = {}
    for record in records:
        group = group_of(record)
        if group not in best or _rank(record) > _rank(best[group]):
            best[group] = record
    return [*best.values()]


def _rank(record: dict) -> tuple:
    settings = record["settings"]
    if fits(record):
        return True, settings["max_length"], -len(turned_on(settings))
    return False, -record["hbm"], 0


def fit_rows(records: list[dict]) -> list[dict]:
    """Returns records of an 8B model on one v5e chip; each turns one more option on."""
    chosen = [
        x
        for x in records
        if (x["model"], x["topology"], x["chips"]) == (NAMES["8B"], "v5e:2x2", 1)
        and x["settings"]["max_length"] == FIT_TOKENS
    ]
    return sorted(chosen, key=lambda x: len(turned_on(x["settings"])))


def fit_table(records: list[dict]) -> str:
    """Returns the table of `fit_rows`."""
    rows = [[words(x["settings"]), *memory_cells(x)] for x in fit_rows(records)]
    return markdown(["turned on", "HBM", "fits", "host"], rows)


def tables(records: list[dict]) -> dict[str, str]:
    """Returns the tables of docs/scale by name."""
    return {"models": models_table(records), "fit": fit_table(records)}


def fill(page: str, tables: dict[str, str]) -> str:
    """Returns a page with its tables, by name, replaced.

    A page has a table between the lines `<!-- NAME -->` and `<!-- end -->`.
    """
    for name, table in tables.items():
        start = f"<!-- {name} -->\n"
        if start in page:
            before, remainder = page.split(start)
            after = remainder.split("<!-- end -->", 1)[1]
            page = f"{before}{start}\n{table}\n\n<!-- end -->{after}"
    return page
