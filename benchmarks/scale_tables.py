"""The tables of docs/scale, from the records of `aot_scale.py`."""

from collections.abc import Iterable

from scale_models import CHIPS, HBM, MODELS, chip_of
from scale_paper import break_even, estimate
from scale_rows import NAMES

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


def moved(record: dict) -> str:
    """Returns the GB that collectives move, by operation and element type, as text."""
    collectives = sorted(record.get("collectives", ()), key=lambda x: -x["bytes"])
    shown = [
        f"{x['operation']} {x['dtype']} {gb(x['bytes'])}"
        for x in collectives
        if x["bytes"] >= 5e6
    ]
    return "<br>".join(shown) or "none"


def seconds(record: dict) -> str:
    """Returns the estimated seconds of a step as text, if they can be estimated."""
    # The estimate is only made for TPUs, and for models whose layers are all alike and
    # have no experts. It does not count the packing of merge-aware adapters.
    config = MODELS[record["model"]]
    is_uniform = len({kind.structure for kind in config.layers}) == 1
    is_plain = is_uniform and not record["settings"].get("merge_aware")
    if chip_of(record) not in CHIPS or config.experts or not is_plain:
        return ""
    estimated = estimate(record)

    def show(x):
        return f"{x:.2g}" if x < 100 else f"{x:.0f}"

    return f"{show(estimated.best)} to {show(estimated.worst)}"


def memory_cells(record: dict) -> list[str]:
    """Returns cells: HBM, whether the program fits, and host memory."""
    limit = HBM[chip_of(record)]
    if fits(record):
        return [gb(record["hbm"]), "yes", gb(record["host"])]
    if "hbm" not in record:
        return ["", f"not known: {record['error'][:80]}", ""]
    return [gb(record["hbm"]), f"**no**, {gb(record['hbm'] - limit)} too much", ""]


def models_table(records: list[dict]) -> str:
    """Returns the table by model and chips."""
    heads = ["model", "chips", "mesh", "tokens a row", "base", "turned on", "HBM"]
    heads += ["fits", "host", "collectives, GB a step", "s a step, on paper", "compile"]
    rows = []
    for x in sorted(records, key=_order):
        s = x["settings"]
        base = s.get("fmt", "nf4").replace("none", "bf16 (LoRA)")
        rows.append(
            [
                SHORT[x["model"]],
                f"{x['chips']} {chip_of(x)}",
                s.get("mesh", ""),
                "2 x " * ("objective" in s) + f"{s['max_length']:,}",
                base,
                words(s),
                *memory_cells(x),
                moved(x) if fits(x) else "",
                seconds(x) if fits(x) else "",
                f"{x['compile_seconds']:.0f} s" if fits(x) else "",
            ]
        )
    return markdown(heads, rows)


def _order(record: dict) -> tuple:
    s, models = record["settings"], list(NAMES.values())
    is_lora = s.get("fmt") == "none"
    group_key = models.index(record["model"]), record["chips"], chip_of(record)
    return *group_key, is_lora, s["max_length"], -len(words(s))


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
    heads = ["turned on", "HBM", "fits", "host", "s a step, on paper"]
    rows = [
        [words(x["settings"]), *memory_cells(x), seconds(x) if fits(x) else ""]
        for x in fit_rows(records)
    ]
    return markdown(heads, rows)


def break_even_table() -> str:
    """Returns a table of the tokens from which a streamed base costs no time."""
    rows = [[chip, f"{break_even(chip):,}"] for chip in CHIPS]
    return markdown(["chip", "tokens a step"], rows)


def tables(records: list[dict]) -> dict[str, str]:
    """Returns the tables of docs/scale by name."""
    return {
        "models": models_table(records),
        "fit": fit_table(records),
        "break-even": break_even_table(),
    }


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
