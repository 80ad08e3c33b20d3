"""Writes the table of the devices that `qlora-jax check` reported on.

Loaded by mkdocs.yml as a hook. The reports are in docs/reports, as the command wrote
them: nothing else fills the table.
"""

import json
import pathlib
from typing import Any

MARK = "<!-- ran on -->"
HEADER = "device", "versions", "products right", "training"


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Puts the table in the place of its mark."""
    del unused
    return markdown.replace(MARK, table(pathlib.Path(__file__).parent / "reports"))


def table(folder: pathlib.Path) -> str:
    """Returns the table of the reports in a folder."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [HEADER, ["---"] * len(HEADER), *map(row, reports)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(report: dict[str, Any]) -> list[str]:
    """Returns the cells of a report."""
    devices, products, step = report["devices"], report["products"], report["step"]
    versions = report["versions"]
    kind = devices["kind"]
    return [
        report["machine"].rpartition(", ")[2] if kind == "cpu" else kind,
        ", ".join(f"{name} {versions[name]}" for name in ("qlora_jax", "jax")),
        f"{sum(x['is_right'] for x in products)} of {len(products)}",
        "right" if step["is_right"] else "wrong",
    ]
