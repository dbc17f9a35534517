"""A drawing of a workflow, for the template browser: the thumbnail of one whose weights are not at hand."""

from typing import Any

from canvas import NOTE, widget_values
from PIL import Image, ImageDraw, ImageFont

PITCH, WIDTH, HEAD, LINE, GAP, MARGIN = 208, 168, 26, 17, 22, 24  # pixels: columns, and the boxes in them
SIDE = 1024  # of the picture's longer side at most
COLUMNS, WIDGETS = 4, 3  # columns in a row, values in a box, at most
BACK, BOX, TITLE, OURS = "#202020", "#353535", "#4a4a4a", "#1f6f6b"
TEXT, VALUE = "#f0f0f0", "#b8b8b8"
COLOURS = {"MODEL": "#b39ddb", "CLIP": "#ffd54f", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
           "IMAGE": "#64b5f6"}  # fmt: skip


def draw(canvas: dict[str, Any], info: dict[str, Any]) -> Image.Image:
    """Boxes with titles and first values in the columns of a canvas file, some to a row, and its links. info:
    /object_info."""
    nodes = [node for node in canvas["nodes"] if node["type"] != NOTE]
    boxes = _boxes(nodes)
    size = max(x + w for x, _, w, _ in boxes.values()) + MARGIN, max(y + h for _, y, _, h in boxes.values()) + MARGIN
    picture = Image.new("RGB", (2 * size[0], 2 * size[1]), BACK)
    pen = ImageDraw.Draw(picture)
    for _, source, output, target, slot, kind in canvas["links"]:
        x, y, w, _ = boxes[source]
        start, end = (x + w, y + HEAD / 2 + 6 * output), (boxes[target][0], boxes[target][1] + HEAD / 2 + 6 * slot)
        pen.line(_curve(start, end), fill=COLOURS.get(kind, VALUE), width=5)
    for node in nodes:
        title = node.get("title") or info[node["type"]]["display_name"] or node["type"]
        _box(pen, title, node["type"].startswith("Tessera"), _values(node), boxes[node["id"]])
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


def _boxes(nodes: list[dict[str, Any]]) -> dict[int, tuple[int, int, int, int]]:
    """(x, y, width, height) by node id: columns as on the canvas, each centred on the tallest."""
    columns: dict[float, list[dict[str, Any]]] = {}
    for node in sorted(nodes, key=lambda n: n["pos"][1]):
        columns.setdefault(node["pos"][0], []).append(node)
    heights = {n["id"]: HEAD + LINE * len(_values(n)) + (8 if _values(n) else 0) for n in nodes}
    tall = {x: sum(heights[n["id"]] + GAP for n in column) - GAP for x, column in columns.items()}
    order, boxes, top = sorted(columns), {}, MARGIN
    for row in (order[i : i + COLUMNS] for i in range(0, len(order), COLUMNS)):
        height = max(tall[x] for x in row)
        for place, x in enumerate(row):
            y = top + (height - tall[x]) // 2
            for node in columns[x]:
                boxes[node["id"]] = (MARGIN + place * PITCH, y, WIDTH, heights[node["id"]])
                y += heights[node["id"]] + GAP
        top += height + 2 * MARGIN
    return boxes


def _values(node: dict[str, Any]) -> list[str]:
    """The first of its widgets' values; of numbers also what they are."""
    values = widget_values(node).items()
    return [v if isinstance(v, str) else f"{n} {v}" for n, v in values if v not in ("", None)][:WIDGETS]


def _curve(start, end, points: int = 24) -> list[tuple[float, float]]:
    """A cubic that leaves and arrives level, on the doubled picture."""
    reach = max(MARGIN, (end[0] - start[0]) / 2)
    corners = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    return [tuple(2 * sum(w * corner[axis] for w, corner in zip(_weights(i / points), corners, strict=True))
                  for axis in (0, 1)) for i in range(points + 1)]  # fmt: skip


def _weights(t: float) -> tuple[float, float, float, float]:
    return (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3


def _box(pen: ImageDraw.ImageDraw, title: str, ours: bool, values: list[str], box: tuple[int, int, int, int]) -> None:
    x, y, w, h = (2 * value for value in box)
    pen.rounded_rectangle((x, y, x + w, y + h), 12, BOX)
    pen.rounded_rectangle((x, y, x + w, y + 2 * HEAD), 12, OURS if ours else TITLE)
    pen.text((x + 16, y + HEAD), _fitted(title, 26, w - 32), TEXT, ImageFont.load_default(26), "lm")
    for i, value in enumerate(values):
        place = x + 16, y + 2 * HEAD + 8 + 2 * LINE * i + LINE
        pen.text(place, _fitted(value, 22, w - 32), VALUE, ImageFont.load_default(22), "lm")


def _fitted(text: str, size: int, width: float) -> str:
    """The text, or its beginning with an ellipsis."""
    font = ImageFont.load_default(size)
    if font.getlength(text) <= width:
        return text
    return next(text[:end] + "…" for end in range(len(text), -1, -1) if font.getlength(text[:end] + "…") <= width)
