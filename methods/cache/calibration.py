"""What a plain run tells a cache: how alike the features of its steps are, MagCache's ratios and TeaCache's polynomial.

Every step's feature is kept as at most 1,024 tokens of 64 numbers, a random projection that preserves lengths and
angles. The errors of any forecast that is linear in earlier features follow from the products of these features alone:
    |sum_i w_i F_i - F_c|^2 = (w, -1) G (w, -1)'   with   G_ij = F_i . F_j,
so the Gram matrix [N, N] stands for the order-1 forecast errors of all triples of steps.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .taylor import weights

FORMAT = "tessera-calibration/1"
TOKENS, WIDTH = 1024, 64
DEGREE = 4  # of TeaCache's polynomial
PLACES = 7  # of ratios and changes in a file; the products keep all, their differences are what is used
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Calibration:
    """model: fingerprint of the weights. sampler: name of its function. sigmas: where each of the N steps starts.

    variable:     what order-1 forecasts extrapolate over, "sigma" or "step".
    level:        "last_block" or, where the blocks are unknown, "output": the model's whole prediction.
    signal:       what TeaCache's input change is of: "modulated" input of the first block, or its plain "input".
    gram, cosine: [N, N], products of the features (of mean length 1) and mean cosine of their tokens.
    rel_l1:       [N, N], row i column j: mean |F_i - F_j| / mean |F_j|, the error of using i in the place of j.
    mag_ratios:   [N], MagCache's gamma, mean over tokens of |r_i| / |r_{i-1}| of the residual of the stack; the first is 1.
    signal_change, output_change: [N], mean |a_i - a_{i-1}| / mean |a_{i-1}|; the first is 0.
    tea_coefficients: polynomial from one to the other, highest power first; empty for runs too short to fit one.
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    variable: str
    level: str
    signal: str
    gram: Matrix
    cosine: Matrix
    rel_l1: Matrix
    mag_ratios: tuple[float, ...]
    signal_change: tuple[float, ...]
    output_change: tuple[float, ...]
    tea_coefficients: tuple[float, ...]

    def __post_init__(self):
        n = len(self.sigmas)
        rows = (self.mag_ratios, self.signal_change, self.output_change)
        squares = (self.gram, self.cosine, self.rel_l1)
        right = all(len(row) == n for row in rows) and all(
            len(square) == n and all(len(row) == n for row in square) for square in squares
        )
        if not n or not right or self.variable not in ("sigma", "step"):
            raise ValueError(f"A calibration of {n} steps needs {n} ratios and changes and matrices of {n} x {n}.")

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    @property
    def places(self) -> tuple[float, ...]:
        """Where each step stands in the variable of forecasts."""
        return self.sigmas if self.variable == "sigma" else tuple(float(i) for i in range(self.steps))

    def forecast_error(self, sources: Sequence[int], target: int) -> float:
        """Error of the forecast of step `target` from computed steps `sources` (newest first), relative to its length."""
        w = np.zeros(self.steps)
        places = self.places
        w[list(sources)] = weights("taylor_paper", [places[i] for i in sources], places[target])
        w[target] -= 1
        gram = np.asarray(self.gram)
        return float(np.sqrt(max(w @ gram @ w, 0.0) / max(gram[target, target], 1e-30)))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Calibration":
        """ValueError where the text is no calibration."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**{name: _tuples(value) for name, value in found.items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"This is no cache calibration ({error}). Make one with Calibrate Cache.") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class Sketch:
    """Draws the same tokens and directions at every step: tokens [n, D] -> rows [t, D] and features [t, width]."""

    def __init__(self, seed: int):
        self.seed = seed
        self._kept: torch.Tensor | None = None
        self._directions: torch.Tensor | None = None
        self._shape: torch.Size | None = None

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """A copy of at most 1,024 of the tokens [n, D], fp32. ValueError where their number or width changed."""
        if self._shape is None:
            self._begin(tokens)
        if tokens.shape != self._shape or self._kept is None:
            raise ValueError(
                f"Calibrate Cache met tokens {tuple(tokens.shape)} after {tuple(self._shape or ())}; it needs a run "
                f"whose size stays the same."
            )
        return tokens.detach().index_select(0, self._kept.to(tokens.device)).float()

    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [t, D] -> [t, 64] on the CPU; as they are where D <= 64."""
        if self._directions is not None:
            rows = rows @ self._directions.to(rows.device)
        return rows.cpu()

    def _begin(self, tokens: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        count, width = tokens.shape
        self._shape = tokens.shape
        self._kept = torch.randperm(count, generator=generator)[:TOKENS].sort().values
        if width > WIDTH:
            self._directions = torch.randn(width, WIDTH, generator=generator) / WIDTH**0.5


class Recorder:
    """Takes the steps of a plain run in their order and makes a Calibration of them. Holds two steps' rows and all
    steps' features: N x 1,024 x 64 numbers."""

    def __init__(self, seed: int = 0):
        self._output, self._signal = Sketch(seed), Sketch(seed)
        self.features: list[torch.Tensor] = []
        self._last: dict[str, torch.Tensor] = {}
        self.ratios: list[float] = []
        self.signal_change: list[float] = []
        self.output_change: list[float] = []

    def keep(self, before: torch.Tensor) -> torch.Tensor:
        """The rows of a stack's input [n, D] that `add` wants."""
        return self._output.rows(before)

    def keep_signal(self, signal: torch.Tensor) -> torch.Tensor:
        """The rows of the first block's modulated input [m, D], of which there may be fewer."""
        return self._signal.rows(signal)

    def add(self, before: torch.Tensor, signal: torch.Tensor, after: torch.Tensor) -> None:
        """before, signal: rows kept of this step; after: the stack's whole output [n, D]."""
        rows = self._output.rows(after)
        residual = rows - before
        length = residual.norm(dim=-1)
        earlier = self._last.get("length")
        sound = earlier is not None and bool((earlier > 0).any())
        self.ratios.append(float((length / earlier)[earlier > 0].mean()) if earlier is not None and sound else 1.0)
        self.signal_change.append(self._change("signal", signal))
        self.output_change.append(self._change("output", rows))
        self._last["length"] = length
        self.features.append(self._output.features(rows))

    def _change(self, name: str, new: torch.Tensor) -> float:
        old = self._last.get(name)
        self._last[name] = new
        return 0.0 if old is None else float((new - old).abs().mean() / old.abs().mean().clamp_min(1e-30))

    def finish(self, model: str, sampler: str, sigmas: Sequence[float], variable: str, level: str, signal: str):
        """The Calibration of the steps that were added, one a sigma."""
        z = torch.stack(self.features)  # [N, t, width]
        flat = z.flatten(1).double()
        gram = flat @ flat.T
        unit = torch.nn.functional.normalize(z.double(), dim=-1).flatten(1)
        cosine = (unit @ unit.T) / z.shape[1]
        size = z.abs().mean((1, 2)).clamp_min(1e-30)
        rel_l1 = torch.stack([(z - one).abs().mean((1, 2)) / size[j] for j, one in enumerate(z)], 1)
        return Calibration(
            model,
            sampler,
            tuple(float(s) for s in sigmas),
            variable,
            level,
            signal,
            _matrix(gram / gram.diagonal().mean().clamp_min(1e-30)),
            _matrix(cosine, PLACES),
            _matrix(rel_l1, PLACES),
            tuple(round(r, PLACES) for r in self.ratios),
            tuple(round(c, PLACES) for c in self.signal_change),
            tuple(round(c, PLACES) for c in self.output_change),
            polynomial(self.signal_change[1:], self.output_change[1:]),
        )


def polynomial(signal: Sequence[float], output: Sequence[float]) -> tuple[float, ...]:
    """TeaCache's fit of degree 4, highest power first: from the change of the signal to that of the output. Empty for
    fewer than 5 different changes, which do not fix one."""
    if len(set(signal)) <= DEGREE:
        return ()
    with np.errstate(all="ignore"):
        fit = np.polyfit(np.asarray(signal, dtype=np.float64), np.asarray(output, dtype=np.float64), DEGREE)
    return tuple(float(c) for c in fit) if np.isfinite(fit).all() else ()


def _matrix(values: torch.Tensor, places: int | None = None) -> Matrix:
    rows = values.tolist()
    return tuple(tuple(v if places is None else round(v, places) for v in row) for row in rows)
