"""Charts and tables from docs/fidelity.json."""

from collections.abc import Iterable
from typing import Any
from xml.sax.saxutils import escape

from pack import ROOT

PAGE, README, HELP = ROOT / "docs/fidelity.md", ROOT / "README.md", ROOT / "web/docs"
CHARTS = HELP / "fidelity"
BEGIN, END = "<!-- fidelity -->\n", "<!-- end of fidelity -->\n"
NAMES = {"image": "Pictures", "video": "Clips"}
BOX = {"left": 52, "top": 30, "width": 300, "height": 200, "gap": 70, "below": 46}
PAPER = "#fafaf7"
HALO = f'stroke="{PAPER}" stroke-width="2" paint-order="stroke"'  # what lies under a name does not cross it
CHARACTER = 5.8  # pixels of width, at most on average
INK, DIM, MINE, FRONT = "#1c1c1e", "#8a8a8e", "#d9480f", "#0b6ebe"


def write_pages(report: dict[str, Any]) -> None:
    """docs/fidelity.md, the table in README.md, one chart for each node and its place in the node's help page."""
    rows = [row for kind in report["kinds"] for row in kind["rows"]]
    PAGE.write_text(page(report))
    README.write_text(between(README.read_text(), table(report, main=True)))
    CHARTS.mkdir(exist_ok=True)
    for old in CHARTS.glob("*.svg"):
        old.unlink()
    for node in sorted({row["node"] for row in rows if row["node"]}):
        (CHARTS / f"{node}.svg").write_text(chart(report, node))
        help_page = HELP / f"{node}.md"
        help_page.write_text(between(help_page.read_text(), section(report, node)))


def between(text: str, made: str) -> str:
    """The text with what was made between the two marks; at its end where it has none."""
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{BEGIN}{made}{END}"
    before, rest = text.split(BEGIN)
    return before + BEGIN + made + END + rest.split(END)[1]


def section(report: dict[str, Any], node: str) -> str:
    """What a help page shows."""
    title = next(r["title"] for kind in report["kinds"] for r in kind["rows"] if r["node"] == node)
    return (
        "## Fidelity on the digit models\n\n"
        f"![{title}: what is lost against what is computed](fidelity/{node}.svg)\n\n"
        "Samples of each setting from the same noise as the plain run, as many as `docs/fidelity.md` says: 1 - SSIM "
        "against computed work. Orange is this node, grey all others, and the blue line joins what nothing beats. Such small "
        "pictures lose more to sparse attention than large ones. `make fidelity` draws it anew.\n"
    )


def page(report: dict[str, Any]) -> str:
    return (
        "# What every accelerator keeps, and what it computes\n\n"
        "Written by `make fidelity` on the digit models of this repository: Euler, the same noise as the plain run. **work** is the share of the plain run's floating point "
        "operations that are computed (matrix products and attention; a quantized model computes the same "
        "on less weights, whose share of the plain file stands beside). **score** is the share that a classifier of real digits reads as asked (clips: digit and direction), "
        "**difference** that to the plain run in points with its 95 % interval over the same samples. **SSIM** is the mean likeness "
        "to the plain picture (and the worst sample), **latent error** the median of the relative error of the final latent.\n\n"
        + table(report, main=False)
    )


def table(report: dict[str, Any], main: bool) -> str:
    """Of all settings, or of every node's first one."""
    text = ""
    for kind in report["kinds"]:
        text += f"{NAMES[kind['kind']]}, {kind['samples']} samples, {kind['steps']} steps; the plain model: {kind['plain']:.1%} read as asked.\n\n"
        text += "| accelerator | setting | work | score | difference | SSIM (worst) | latent error |\n|---|---|---|---|---|---|---|\n"
        for row in kind["rows"]:
            if main and not row["main"]:
                continue
            text += table_row(row)
        text += "\n"
    return text


def table_row(row: dict[str, Any]) -> str:
    middle, low, high = (100 * x for x in row["difference"])
    weights = f", weights {row['weights']:.0%}" if row.get("weights") else ""
    cells = (
        row["title"], plain_words(row["setting"]), f"{row['work']:.1%}{weights}", f"{row['score']:.1%}",
        f"{middle:+.1f} ({low:+.1f} to {high:+.1f})", f"{row['ssim']:.3f} ({row['ssim_worst']:.3f})",
        f"{row['latent_error']:.3f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def chart(report: dict[str, Any], node: str) -> str:
    """SVG of one node among the others, a field for each kind that it was measured on."""
    kinds = [kind for kind in report["kinds"] if any(r["node"] == node for r in kind["rows"])]
    across = BOX["left"] + len(kinds) * (BOX["width"] + BOX["gap"])
    tall = BOX["top"] + BOX["height"] + BOX["below"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {tall}" font-family="sans-serif" font-size="11">',
             f'<rect width="{across}" height="{tall}" fill="{PAPER}"/>']  # fmt: skip
    for n, kind in enumerate(kinds):
        parts += field(kind, node, BOX["left"] + n * (BOX["width"] + BOX["gap"]))
    return "\n".join([*parts, "</svg>", ""])


def field(kind: dict[str, Any], node: str, left: int) -> Iterable[str]:
    """One field: work across, loss down."""
    rows, top, width, height = kind["rows"], BOX["top"], BOX["width"], BOX["height"]
    worst = max(0.01, *(1 - r["ssim"] for r in rows)) * 1.05
    most = max(1.0, *(r["work"] for r in rows)) * 1.05
    x = lambda r: left + r["work"] / most * width  # noqa: E731
    y = lambda r: top + (1 - r["ssim"]) / worst * height  # noqa: E731
    yield f'<text x="{left}" y="{top - 12}" fill="{INK}" font-weight="bold">{NAMES[kind["kind"]]}</text>'
    for part in (0, 0.25, 0.5, 0.75, 1):
        at = top + part * height
        yield f'<line x1="{left}" x2="{left + width}" y1="{at}" y2="{at}" stroke="#e1e1de"/>'
        yield f'<text x="{left - 5}" y="{at + 4}" text-anchor="end" fill="{DIM}">{part * worst:.2f}</text>'
        along = left + part / most * width
        yield f'<text x="{along:.1f}" y="{top + height + 15}" text-anchor="middle" fill="{DIM}">{part:.0%}</text>'
    yield f'<text x="{left}" y="{top + height + 34}" fill="{DIM}">computed work, left is less · 1 - SSIM, down is worse</text>'
    leading = sorted((r for r in rows if not any(_beats(o, r) for o in rows)), key=lambda r: r["work"])
    path = " ".join(f"{x(r):.1f},{y(r):.1f}" for r in leading)
    yield f'<polyline points="{path}" fill="none" stroke="{FRONT}" stroke-width="1.2"/>'
    for row in sorted(rows, key=lambda r: r["node"] == node):
        mine = row["node"] == node
        name = escape(f"{row['title']}, {row['setting']}: work {row['work']:.1%}, SSIM {row['ssim']:.3f}")
        yield f'<circle cx="{x(row):.1f}" cy="{y(row):.1f}" r="{4.5 if mine else 3}" fill="{MINE if mine else "#c4c4c8"}"><title>{name}</title></circle>'
    yield from labels([(x(r), y(r), plain_words(r["setting"])) for r in rows if r["node"] == node], left)


def labels(points: list[tuple[float, float, str]], left: int) -> Iterable[str]:
    """The name of each point (x, y, name) where it covers neither another name nor a point; a line leads to one far off."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    floor, end = BOX["top"] + BOX["height"], left + BOX["width"] + BOX["gap"] - 34  # where the next axis begins
    for x, y, name in sorted(points):
        wide = CHARACTER * len(name)
        sides = (x + 8, x - 8 - wide, max(left, min(x - wide / 2, end - wide)))  # right, left, above or below
        places = [(at, y + 4 + shift) for away in range(0, 200, 4) for shift in (-away, away) for at in sides]
        inside = [(at, base) for at, base in places if left <= at <= end - wide and BOX["top"] <= base <= floor]
        free = [spot for spot in inside if not any(_overlap(_box(*spot, wide), other) for other in taken)]
        at, base = (free or inside or places)[0]
        taken.append(_box(at, base, wide))
        anchor, edge = ("start", at) if at > x else ("end", at + wide) if at + wide < x else ("middle", at + wide / 2)
        if abs(base - 4 - y) > 16:
            near = min(max(x, at), at + wide)
            yield f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{base - 4:.1f}" stroke="{DIM}" stroke-width="0.6"/>'
        yield f'<text x="{edge:.1f}" y="{base:.1f}" text-anchor="{anchor}" fill="{INK}" {HALO}>{escape(name)}</text>'


def _box(at: float, base: float, wide: float) -> tuple[float, float, float, float]:
    return at, base - 10, at + wide, base + 4


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plain_words(setting: str) -> str:
    """Without the threshold that these small pictures need everywhere."""
    return (
        setting.replace(", min_tokens 0", "")
        .replace("min_tokens 0", "default")
        .replace(", round_to 8", "")
        .replace("round_to 8", "default")
    )


def _beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    no_worse = a["work"] <= b["work"] and a["ssim"] >= b["ssim"]
    return no_worse and (a["work"] < b["work"] or a["ssim"] > b["ssim"])
