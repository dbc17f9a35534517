"""The harness, on cases whose outcome is known: no speed-up is given for a wrong result, a missed promise is a failure."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from tessera.kernels.linear import delta_rule, ssd

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("tessera_bench", BENCH / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCH))


@pytest.fixture
def case(bench, monkeypatch):
    """A case whose competitors are given times instead of being run: ours 10 ms, the rival 30 ms."""
    monkeypatch.setattr(
        bench, "rounds", lambda runs, device, flush: {n: [10.0 if n == "tessera" else 30.0] * 5 for n in runs}
    )
    x = torch.ones(4)
    return bench.Case("name", "title", lambda: x, lambda: x.clone(), 1e-6, {"rival": lambda: x})


def test_a_right_result_gets_its_speed_up(bench, case):
    row = bench.measure(case, "cpu")
    assert row["error"] == 0 and row["times"]["rival"]["speedup_of_ours"] == 3 and "failed" not in row


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 1, 1, 1.1]), torch.full((4,), torch.nan)], ids=["off", "NaN"])
def test_a_wrong_result_gets_no_times(bench, case, wrong):
    case.ours = lambda: wrong
    row = bench.measure(case, "cpu")
    assert "times" not in row and "no times are given" in row["failed"]


def test_a_missed_promise_fails_and_names_both_numbers(bench, case):
    case.bars = {"rival": 2.5}
    assert "failed" not in bench.measure(case, "cpu")
    case.bars = {"rival": 3.5}
    assert bench.measure(case, "cpu")["failed"] == "3.00x rival, promised 3.5x"


@pytest.mark.parametrize("wrong", [torch.full((4,), 1.1), torch.full((4,), torch.nan)], ids=["off", "NaN"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_output_that_counts_is_compared(bench, case, place, wrong):
    right = torch.ones(4)
    case.truth, case.outputs = lambda: (right, right, right), 2
    case.ours = lambda: tuple(wrong if i == place else right for i in range(3))
    assert ("failed" in bench.measure(case, "cpu")) == (place < 2)


@pytest.mark.parametrize(
    ("facts", "ratio"),
    [({"pairs": 0.25}, 4), ({"pairs": 0.25, "computed": 0.5}, 2), ({"pairs": 0.5, "flops": 0.1}, 10), ({}, None)],
    ids=str,
)
def test_flop_ratio_stands_beside_the_time_ratio(bench, case, facts, ratio, capsys):
    case.facts, case.rivals["dense SDPA"] = facts, case.rivals["rival"]
    row = bench.measure(case, "cpu")
    assert row.get("flop_ratio") == ratio
    bench.show(row)
    dense = next(line for line in capsys.readouterr().out.splitlines() if "dense SDPA" in line)
    assert dense.endswith(f"3.00x  {ratio:6.2f}x in FLOP" if ratio else "3.00x")


def test_no_flop_ratio_without_a_dense_rival(bench, case, capsys):
    case.facts = {"pairs": 0.25}
    row = bench.measure(case, "cpu")
    bench.show(row)
    assert "flop_ratio" not in row and "FLOP" not in capsys.readouterr().out


def test_a_rival_of_the_same_operation_must_agree(bench, case, capsys):
    """Up to ROOM times our tolerance; else it is named instead of being timed, and a promise against it is void."""
    case.tolerance, case.bars = 1e-3, {"near": 2.5, "far": 99}
    case.add("near", lambda: torch.full((4,), 1.002), lambda: torch.ones(4))
    case.add("far", lambda: torch.full((4,), 1.004), lambda: torch.ones(4))
    case.add("other lists", lambda: torch.full((4,), 7.0), lambda: torch.full((4,), 7.0))

    def fails():
        raise MemoryError("not enough\nby far")

    case.add("fails", fails, lambda: torch.ones(4))
    row = bench.measure(case, "cpu")
    assert [*row["times"]] == ["tessera", "rival", "near", "other lists"] and "failed" not in row
    assert row["left_out"]["fails"] == "MemoryError: not enough" and "error 4.0e-03" in row["left_out"]["far"]
    bench.show(row)
    assert "fails            left out, MemoryError: not enough" in capsys.readouterr().out


def test_flash_linear_attention_is_a_rival_where_it_runs(bench, monkeypatch):
    rivals, inputs = sys.modules["rivals"], ssd.example(70, "cpu", torch.float32)
    assert not rivals.known("ssd", "cpu") and rivals.known("ssd", "cuda")
    found = rivals.of("ssd", inputs, "cuda")
    assert [*found.runs] == ["reference"] and found.same == {}
    assert found.left_out["flash-linear-attention"].startswith(
        "RuntimeError: flash-linear-attention needs 16-bit tensors"
    )
    monkeypatch.setattr(ssd, "by_fla", ssd.reference)
    found = rivals.of("ssd", inputs, "cuda")
    assert not found.left_out
    got, want = (run["flash-linear-attention"]() for run in (found.runs, found.same))
    assert torch.equal(got[0], want[0])


def test_flops_of_the_operators_are_counted(bench):
    """Beside dense attention's 4 N^2 D of a head."""
    papers, rivals = sys.modules["papers"], sys.modules["rivals"]
    case = next(papers.sparse_linear_cases(1000, 1, 16, "cpu", torch.float32))
    blocks, n, d = case.facts["pairs"] * 16, 1000, 16
    assert blocks == 1  # 5 % of 16 is less than one
    counted = 4 * n * n * d / 16 + 4 * n * d * d + 2 * n * d * d + 2 * d * (n / 128) * (n / 64)
    assert case.facts["flops"] == pytest.approx(counted / (4 * n * n * d))
    delta = rivals.delta_rule(delta_rule.example(1024, "cpu", torch.float32), "cpu")
    assert delta.facts["flops"] == pytest.approx((6 * 128**2 + 64 * 10 * 128) / (4 * 1024 * 128))


def test_speed_up_is_the_median_over_rounds(bench):
    """One round in which the machine was busy with something else does not count."""
    found = bench.summary({"tessera": [1.0, 1, 1, 50, 1], "rival": [2.0, 2, 2, 2, 2]}, "tessera")
    assert found["rival"]["speedup_of_ours"] == 2 and found["tessera"]["ms"] == 1


def test_every_example_is_found_and_local_window_promises(bench):
    cases = sys.modules["cases"]
    assert {"block_sparse", "forecast"} <= {stem for stem, _ in cases.kernels()}
    first = next(cases.operators.method_cases("cpu"))
    assert first.bars == {"dense SDPA": 1.5} and 0.1 < first.facts["pairs"] < 0.115


def test_slope_of_known_costs(bench):
    growth = sys.modules["growth"]
    sizes = [1024, 2048, 4096, 8192]
    assert growth.slope(sizes, [n * 3e-6 for n in sizes]) == pytest.approx(1)
    assert growth.slope(sizes, [n**2 * 3e-6 for n in sizes]) == pytest.approx(2)


def test_growth_that_is_too_steep_fails(bench, monkeypatch):
    growth = sys.modules["growth"]
    monkeypatch.setattr(growth, "rounds", lambda runs, device, flush: {n: [float(n) ** 1.5, 1e9] for n in runs})
    case = growth.Growth("name", lambda tokens: lambda: None, (1024, 2048, 4096), 1.15)
    row = growth.measure_growth(case, "cpu")
    assert row["slope"] == pytest.approx(1.5) and row["failed"] == "slope 1.50, promised at most 1.15"
    case.most = None
    assert "failed" not in growth.measure_growth(case, "cpu")


def test_truths_of_the_operators_agree_with_dense_attention(bench):
    """Brute force against torch where everything is kept; a window of its own against an explicit mask."""
    operators = sys.modules["operators"]
    q, k, v = operators.heads(64, 2, 8, "cpu", torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert bench.distance(operators.by_rows(q, k, v, lambda at: None, 24), dense) < 1e-6
    assert bench.distance(operators.windowed(q, k, v, 8, 8), dense) < 1e-6
    assert bench.distance(operators.windowed(q, k, v, 8, 4), dense) > 1e-2
    assert bench.distance(operators.windows(8, 4, "cpu")(q, k, v), operators.windowed(q, k, v, 8, 4)) < 1e-6


def test_ceilings_are_positive(bench):
    found = sys.modules["ceilings"].ceilings("cpu")
    assert len(found) == 4 and all(value > 0 for value in found.values())


def test_every_attention_method_is_called_as_a_model_calls_it(bench):
    """Each of them serves, sparsely, and again and again; one that remembers is timed at a reuse."""
    methods = sys.modules["attention_methods"]
    nodes = {file.stem for file in (BENCH.parent / "nodes/attention").glob("[a-z]*.py")} - {"resonance_yarn_rope"}
    named = {re.sub(r"[ -]", "_", title.split(", ")[0].lower()) for title in methods.METHODS}
    assert named == nodes
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2048, 16) for _ in range(3))
    for title, method in methods.METHODS.items():
        grid = (16, 8, 16) if title.startswith("Attention Tile") else (1, 32, 64)
        attend, share = methods.prepared(method, q, k, v, grid)
        assert 0 < share < 1, title
        first, again = attend(), attend()
        assert first.out.shape == q.shape and bool(first.out.isfinite().all()), title
        assert again.pairs == first.pairs == share * again.dense_pairs, title
