"""docs/attention_quality.md from the record that attention_quality.py makes."""

from typing import Any

HEAD = """# What the training-free attention nodes keep

Written by `make attention-quality` on the digit models that this repository carries, at the sizes that they were trained
on: `digits_flux` (16 x 16 image tokens and 4 of text) and `moving_digits_wan` (8 frames of 4 x 4). Each node acts with
`min_tokens` 0, else at its defaults, where the row names no inputs. Beside it plain top-k attention computes at least as
many query-key pairs: for each block of 16 queries the key blocks of 16 whose means score highest, softmax over these
alone, text always seen, all blocks and steps alike. Without weights that is what Sparse-Linear Attention is on such a picture.

How to read it: **pairs** are those that reach the softmax, of 100 in dense attention, over all image self-attention calls of
a run, dense steps and blocks included. **computed** is the node's own report on a CPU: where it is more, a list names
whole blocks; above 100 it computes dense attention and its pattern too. **right** is the share of
the samples that a classifier of real digits reads as asked, clips: and the share that moves as asked. **SSIM** is the mean
likeness to what the plain model draws from the same noise, 1 is equal. The last column is the difference of both SSIM with
its 95 % interval over the same samples: above 0 the node is closer to the plain model than plain top-k.

{samples} samples, {curve} of settings in italics, and {steps} steps: so few that one core does it in less than half an hour. That is
enough for the SSIM and too little for shares read right, which are only good to a tenth or two
(`bootstrap/attention_quality.py --samples 400 --curve 100 --steps 25` takes hours).
"default, scaled": the default spans such a small picture; the row takes the same part of it as the default of a large one.
A block of these pictures is a large part of them, so that these numbers say little about how far a large picture drifts.
"""


def page(report: dict[str, Any]) -> str:
    """The whole file."""
    text = HEAD.format(samples=report["samples"], curve=report["curve"], steps=report["steps"])
    names = {"image": "Pictures", "video": "Clips"}
    for kind in sorted(report["plain"], key=list(names).index):
        rows = [row for row in report["rows"] if row["kind"] == kind]
        plain = report["plain"][kind]
        text += f"\n## {names[kind]}\n\nThe plain model: {right(plain)} of {report['samples']} read right.\n\n"
        text += table(rows)
    return text


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row, the nodes in their order, densities ascending within a node."""
    head = ("node", "setting", "pairs", "computed", "right", "SSIM", "top-k pairs", "right", "SSIM", "SSIM over top-k")
    order = list(dict.fromkeys(row["title"] for row in rows))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda r: (order.index(r["title"]), r["pairs"])):
        lines.append(f"| {' | '.join((row['title'], setting(row), *measures(row), gap(row)))} |")
    return "\n".join(lines) + "\n"


def setting(row: dict[str, Any]) -> str:
    """What is not the default; settings with fewer samples in italics."""
    inputs = ", ".join(f"{name} {value}" for name, value in row["inputs"].items())
    if not row["main"]:
        return f"*{inputs}*"
    return f"{inputs} ({row['note']})" if inputs else row["note"]


def measures(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the node, then of top-k."""
    rival = row["topk"]
    own = f"{100 * row['pairs']:.1f}", f"{100 * row['computed']:.1f}", right(row), f"{row['ssim']:.3f}"
    return *own, f"{100 * rival['pairs']:.1f}", right(rival), f"{rival['ssim']:.3f}"


def right(side: dict[str, Any]) -> str:
    own = f"{100 * side['right']:.0f} %"
    return own if side["turned"] is None else f"{own} / {100 * side['turned']:.0f} %"


def gap(row: dict[str, Any]) -> str:
    return f"{row['ssim_over_topk']:+.3f} ± {row['interval']:.3f}"
