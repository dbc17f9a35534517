import math

import pytest
import torch

from tessera.kernels.control import grouped_lora as m

ERROR = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
SCALES = [0.7, -1.2, 2.0]
CASES = [  # B, N, K, M, R, ends, groups, ranks
    (1, 1, 5, 3, 4, [1], [2], None),  # one token
    (2, 70, 72, 130, 40, [10, 45, 45, 70], [-1, 0, 1, 2], [40, 3, 17]),  # an empty segment, ranks in two tiles
    (3, 33, 24, 20, 16, [33], [1, -1, 0], None),  # an adapter for each row of the batch
    (3, 40, 33, 17, 8, [8, 40], [0, 1, 2, 1, 0, -1], [8, 1, 0]),  # each row's own segments; rank 0
]


def make(case, device, dtype=torch.float32, based=True):
    """Slices of wider rows; what pads a rank is NaN: it must not be read."""
    b, n, k, out, r, ends, groups, ranks = case
    x = torch.randn(b, n, k + 3, device=device).to(dtype)[..., 3:]
    down, up = torch.randn(3, r, k, device=device) / k**0.5, torch.randn(3, out, r, device=device) / r**0.5
    for g, rank in enumerate(ranks or []):
        down[g, rank:], up[g, :, rank:] = math.nan, math.nan
    base = torch.randn(b, n, 2, out, device=device).to(dtype)[:, :, 0] if based else None
    return x, down.to(dtype), up.to(dtype), ends, groups, SCALES, ranks, base


def exact(x, down, up, ends, groups, scales, ranks=None, base=None):
    """fp64, one token after another."""
    rows = []
    for b in range(x.shape[0]):
        mine = groups if len(groups) == len(ends) else groups[b * len(ends) : (b + 1) * len(ends)]
        for n in range(x.shape[1]):
            group = mine[next(i for i, end in enumerate(ends) if n < end)]
            y = x.new_zeros(up.shape[1]).double() if base is None else base[b, n].double()
            if group >= 0:
                rank = down.shape[1] if ranks is None else ranks[group]
                low = down[group, :rank].double() @ x[b, n].double()
                y = y + scales[group] * (up[group, :, :rank].double() @ low)
            rows.append(y)
    return torch.stack(rows).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_adapters_token_by_token(case, dtype, serve, device, error):
    given = make(case, device, dtype)
    kept = given[-1].clone()
    got, want = serve(*given), exact(*given)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    assert error(got, want) < ERROR[dtype] and torch.equal(given[-1], kept)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_without_a_base(serve, device, error):
    given = make(CASES[1], device, based=False)
    assert error(serve(*given), exact(*given)) < 3e-6


@pytest.mark.parametrize("serve", [m.launch_add, m.add_reference, m.grouped_lora_add], ids=[*NAMES, "op"])
@pytest.mark.parametrize("columns", [1, 2])
def test_in_place(columns, serve, device, error):
    """Onto a slice of columns: what lies beside it, and tokens without an adapter, keep their bits."""
    *given, base = make(CASES[1], device)
    wide = torch.randn(*base.shape[:2], 3, base.shape[2] * columns, device=device)
    before = wide.clone()
    y = wide[:, :, 1, ::columns]
    want = exact(*given, y)
    assert serve(y, *given) is None and error(y, want) < 3e-6
    beside = torch.ones_like(wide, dtype=torch.bool)
    beside[:, 10:, 1, ::columns] = False
    assert torch.equal(wide[beside], before[beside]) and not torch.equal(wide, before)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_rows_of_a_batch_are_those_of_single_runs(serve, device, error):
    """One picture each with its own adapter."""
    x, down, up, ends, _, scales, *_, base = make(CASES[2], device)
    both = serve(x[:2], down, up, ends, [2, 0], scales, None, base[:2])
    for row, group in enumerate((2, 0)):
        at = slice(row, row + 1)
        assert torch.equal(both[at], serve(x[at], down, up, ends, [group], scales, None, base[at]))


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_gradients(case, device, error):
    given = make(case, device)
    held, found = (0, 1, 2, 7), []
    weight = torch.randn_like(given[-1])
    for fn, kind in ((m.grouped_lora, torch.float32), (exact, torch.float64)):
        mine = [t.detach().to(kind).requires_grad_() if i in held else t for i, t in enumerate(given)]
        found.append(torch.autograd.grad((fn(*mine) * weight).sum(), [mine[i] for i in held]))
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape and error(got, want) < 1e-5


def test_double_stays_double(device, error):
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in make(CASES[1], device)]
    assert error(m.launch(*given), exact(*given)) < 1e-13


def test_custom_ops(device):
    x, *rest = make(CASES[2], device)
    torch.library.opcheck(m.grouped_lora, (x.detach().requires_grad_(), *rest))
    torch.library.opcheck(m.grouped_lora, (x.detach().requires_grad_(), *rest[:-2]))
    torch.library.opcheck(m.grouped_lora_add, (rest[-1].clone(), x, *rest[:-1]))


def test_mismatches_are_named(device):
    x, down, up, ends, groups, scales, ranks, base = make(CASES[1], device)
    cases = [
        ((x[0], down, up, ends, groups, scales), r"\[70, 72\]"),
        ((x, down, up, [10, 71], groups, scales), "70 tok"),
    ]
    cases += [((x, down[:, :, :9], up, ends, groups, scales), r"\[3, 40, 9\]")]
    cases += [((x, down, up[:2], ends, groups, scales), r"\[2, 130, 40\]")]
    cases += [
        ((x, down, up, ends, groups[:3], scales), "4 segments"),
        ((x, down, up, ends, [3] * 4, scales), "from 0 or -1"),
    ]
    cases += [((x, down, up, ends, groups, scales, [41, 1, 1]), "up to 40")]
    cases += [((x, down, up, ends, groups, scales, ranks, base[:, :9]), r"\[2, 9, 130\]")]
    cases += [((x, down.half(), up, ends, groups, scales), "float16")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    got = m.launch(*m.example(9, device, torch.bfloat16))
    assert got.shape == (1, 9, 9216) and got.isfinite().all()
