"""Inner products by factors, norm balance and symmetric orthogonalisation, against dense deltas."""

import pytest
import torch

from tessera.methods.control import lora_gram as m

N, K = 96, 70


def factors(seed, rank=5, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return m.Factors(size * torch.randn(N, rank, generator=g), torch.randn(rank, K, generator=g))


def dense(piece):
    return piece.up.double() @ piece.down.double() if isinstance(piece, m.Factors) else piece.double()


def deltas(sizes=(1.0, 3.0, 0.2), alike=0.5):
    """Deltas of one weight that share a part; ranks differ."""
    common = factors(9, 2)
    return [
        {"weight": m.joined([factors(i, 3 + i, s), m.Factors(alike * s * common.up, common.down)])}
        for i, s in enumerate(sizes)
    ]


def vectors(held):
    return torch.stack([torch.cat([dense(p).flatten() for p in d.values()]) for d in held])


def test_products_of_factors_are_those_of_dense_deltas():
    held = deltas()
    v = vectors(held)
    want = v @ v.T
    assert ((m.gram(held) - want).abs() / want.diagonal().max()).max() < 1e-6
    assert ((m.norms(m.gram(held)) - v.norm(dim=1)) / v.norm(dim=1)).abs().max() < 1e-6


def test_dense_and_missing_tensors():
    g = torch.Generator().manual_seed(4)
    held = deltas()
    held[1] = {"weight": torch.randn(N, K, generator=g), "bias": torch.randn(N, generator=g)}
    held[2] = {"bias": torch.randn(N, generator=g)}
    got = m.gram(held)
    w0, w1 = dense(held[0]["weight"]), held[1]["weight"].double()
    b1, b2 = held[1]["bias"].double(), held[2]["bias"].double()
    assert abs(got[0, 1] - (w0 * w1).sum()) < 1e-6 * w0.norm() * w1.norm()
    assert got[1, 1] == pytest.approx(float(w1.square().sum() + b1.square().sum()), rel=1e-6)
    assert got[1, 2] == pytest.approx(float((b1 * b2).sum()), rel=1e-6) and got[0, 2] == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["factors", "dense", "bias"])
def test_features_are_what_a_layer_adds_to_its_output(kind, bias):
    g = torch.Generator().manual_seed(8)
    rows, b = torch.randn(12, K, generator=g), torch.randn(N, generator=g)
    held = deltas()[0] if kind == "factors" else {"weight": torch.randn(N, K, generator=g)} if kind == "dense" else {}
    weight = dense(held["weight"]) if held else torch.zeros(N, K, dtype=torch.float64)
    want = rows.double() @ weight.T + (b.double() if bias else 0)
    got = m.features({**held, **({"bias": b} if bias else {})}, rows)
    if not held and not bias:
        assert got == {}
        return
    made = dense(got["output"])
    assert isinstance(got["output"], m.Factors) == (kind != "dense")
    assert (made.T * 12**0.5 - want).norm() < 1e-5 * want.norm()
    assert float(m.norms(m.gram([got]))[0]) == pytest.approx(float(want.square().sum(1).mean().sqrt()), rel=1e-5)


def test_cosines_of_a_zero_delta():
    got = m.cosines(m.gram([*deltas()[:2], {}]))
    assert got[2].tolist() == [0, 0, 0] and got[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("target", m.TARGETS)
@pytest.mark.parametrize("n", [(2.0, 2.0, 2.0), (5.0,), (5.0, 0.0)])
def test_balancing_equal_norms_changes_nothing(target, n):
    assert m.balance(n, target, 1.0) == pytest.approx([1.0] * len(n), abs=1e-12)
    assert len(n) == 3 or m.balance(n, target, 1.0) == [1.0] * len(n), "exact where there is nothing to balance"


@pytest.mark.parametrize("target", ["geomean", "first"])
def test_balanced_norms_are_equal(target):
    n = [0.3, 0.0, 12.0, 2.0]
    factors = m.balance(n, target, 1.0)
    got = [a * b for a, b in zip(n, factors, strict=True)]
    wanted = 0.3 if target == "first" else (0.3 * 12 * 2) ** (1 / 3)
    assert [got[i] for i in (0, 2, 3)] == pytest.approx([wanted] * 3, rel=1e-5) and got[1] == 0


def test_beta_goes_part_of_the_way():
    half, whole = (m.balance([1.0, 4.0], "geomean", beta) for beta in (0.5, 1.0))
    assert [f * f for f in half] == pytest.approx(whole) and m.balance([1.0, 4.0], "geomean", 0.0) == [1.0, 1.0]
    assert m.balance([1.0, 4.0], "none", 1.0) == [1.0, 1.0] and m.balance([0.0, 4.0], "first", 1.0) == [1.0, 1.0]


def test_orthogonal_deltas_with_their_norms_kept():
    held = deltas()
    made = m.orthogonal(m.gram(held))
    before = vectors(held)
    after = made @ before
    cos = m.cosines(after @ after.T)
    assert m.cosines(before @ before.T)[0, 1].abs() > 0.05, "they overlap at first"
    assert (cos - torch.eye(3)).abs().max() < 1e-5
    assert ((after.norm(dim=1) - before.norm(dim=1)) / before.norm(dim=1)).abs().max() < 1e-5


def test_no_delta_is_preferred():
    """Symmetric, unlike Gram-Schmidt: another order gives the same deltas."""
    held, order = deltas(), [2, 0, 1]
    made, turned = m.orthogonal(m.gram(held)), m.orthogonal(m.gram([held[i] for i in order]))
    assert torch.allclose(made[order][:, order], turned, atol=1e-9)
    scaled = m.orthogonal(m.gram(deltas((1.0, 3.0, 20.0))))
    ratio = torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64)
    assert torch.allclose(scaled, made * ratio[:, None] / ratio[None], atol=1e-5), "nor by its size"


def test_orthogonal_ones_stay():
    products = torch.diag(torch.tensor([1.0, 9.0, 0.0], dtype=torch.float64))
    assert torch.allclose(m.orthogonal(products), torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert m.orthogonal(m.gram([deltas()[0]])).tolist() == [[1.0]]


def test_parallel_ones_cannot_be():
    held = deltas()[0]
    assert m.orthogonal(m.gram([held, held])) is None
    turned = {"weight": m.Factors(-2 * held["weight"].up, held["weight"].down)}
    assert m.orthogonal(m.gram([held, turned])) is None
    weighed = m.weigh(m.gram([held, turned]), [1.0, 0.5], "none", 1.0, True)
    assert weighed.parallel and weighed.factors == (1.0, 1.0)


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("target", m.TARGETS)
def test_strengths_that_come_to_the_fused_deltas(target, orthogonalize):
    """The sum of D'_i is the sum of the deltas at their strengths times the factors."""
    held, strengths = deltas(), [1.0, -0.5, 2.0]
    weighed = m.weigh(m.gram(held), strengths, target, 1.0, orthogonalize)
    v = vectors(held)
    fused = weighed.fused @ v
    got = sum(s * f * row for s, f, row in zip(strengths, weighed.factors, v, strict=True))
    assert (got - fused.sum(0)).norm() < 1e-9 * fused.sum(0).norm()
    n = fused.norm(dim=1) / torch.tensor(strengths).abs()
    if target != "none":
        assert (n / n[0] - 1).abs().max() < 1e-5
    if orthogonalize:
        assert (m.cosines(fused @ fused.T) - torch.eye(3)).abs().max() < 1e-5


def test_one_lora_is_left_as_it_is():
    weighed = m.weigh(m.gram([deltas()[1]]), [0.7], "geomean", 1.0, True)
    assert weighed.factors == (1.0,)
