"""A comparison as files: all of it as JSON, one row a model as CSV."""

import csv
import json
from pathlib import Path
from typing import Any

from ..files.shelf import free, plain_name

FOLDER = "tessera_compare"  # in ComfyUI's output folder
COLUMNS = ("label", "seconds", "speedup", "ssim", "psnr", "latent_error", "identical", "evaluations", "forwards",
           "blocks_computed", "blocks_total", "pairs_fraction", "held_bytes", "peak_bytes", "architecture")  # fmt: skip
TRUTH = {True: "yes", False: "no", None: ""}


def rows(report: dict[str, Any]) -> list[list[Any]]:
    """COLUMNS of every model, seconds as the median; then the error after every step."""
    steps = max((len(side["per_step_error"]) for side in report["models"]), default=0)
    table: list[list[Any]] = [[*COLUMNS, *(f"error_step_{n + 1}" for n in range(steps))]]
    for side in report["models"]:
        told = {**side, "seconds": side["seconds"]["median"]}
        values = [told[name] for name in COLUMNS] + list(side["per_step_error"])
        table.append([TRUTH.get(v, v) if v is None or isinstance(v, bool) else _safe(v) for v in values])
    return table


def _safe(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def save(folder: Path, name: str, report: dict[str, Any]) -> list[Path]:
    """Writes name_00001.json and .csv, the first number that is free."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = free(folder, plain_name(name, ".json", "file name"), ".json")
    whole.write_text(json.dumps(report, indent=1), encoding="utf-8")
    flat = whole.with_suffix(".csv")
    with flat.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows(report))
    return [whole, flat]
