"""Kernels of papers' authors as rivals, from a folder .ref/ that holds stand-ins here: plain torch behind the names and
arguments of the released sources. Right ones are timed; absent, broken and wrong ones are left out with one line."""

import importlib.util
import sys
import textwrap
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"

CORE = """
    import torch
    from .utils import get_block_map

    class SparseLinearAttention(torch.nn.Module):
        def __init__(self, head_dim, topk, feature_map="softmax", BLKQ=64, BLKK=64, use_bf16=True, tie_feature_map_qk=True):
            super().__init__()
            self.topk, self.sizes = topk, (BLKQ, BLKK)
            self.proj_l = torch.nn.Linear(head_dim, head_dim)

        def forward(self, q, k, v, return_sparsity=False):
            assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
            kept = get_block_map(q, k, self.topk, *self.sizes)[0].bool()
            for dim, size in enumerate(self.sizes, 2):
                kept = kept.repeat_interleave(size, dim).narrow(dim, 0, q.shape[2])
            score = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~kept, -torch.inf)
            c, d = q.softmax(-1), k.softmax(-1)
            linear = (c @ (d.mT @ v)) / (1e-5 + (c * d.sum(2, keepdim=True)).sum(-1, keepdim=True))
            return score.softmax(-1) @ v * FACTOR + self.proj_l(linear)
"""
UTILS = """
    import torch

    def get_block_map(q, k, topk_ratio, BLKQ=64, BLKK=64):
        a, b = (torch.stack([p.mean(2) for p in x.split(n, 2)], 2) for x, n in ((q, BLKQ), (k, BLKK)))
        score = a @ (b - k.mean(2, keepdim=True)).mT
        topk = min(score.shape[-1], int(topk_ratio * score.shape[-1]))
        lut = torch.topk(score, topk, dim=-1, sorted=False).indices
        return torch.zeros_like(score, dtype=torch.int8).scatter_(-1, lut, 1), lut, topk
"""
ATTENTION = """
    import torch
    from ..triton.mean_pool import mean_pool1d
    from ..triton.topk import compute_topk_indices_sparse, gen_sparse_indices

    def llsa_l2(q, k, v, topk1=8, topk2=8, block_size=16):
        fine = [mean_pool1d(x, block_size) for x in (q, k, v)]
        coarse = [mean_pool1d(x, block_size) for x in fine]
        above = gen_sparse_indices(coarse[0], coarse[1], topk2)
        chosen = compute_topk_indices_sparse(fine[0], fine[1], above, topk1, topk2, block_size)
        parts = []
        for keys, lists, span, weight in ((k, chosen, 16, 1), (fine[1], above, 256, 16), (coarse[1], None, 0, 256)):
            score = q @ keys.mT * q.shape[3] ** -0.5 + torch.tensor(float(weight)).log()
            if lists is not None:
                nodes = -(-keys.shape[2] // 16)
                seen = torch.zeros(*lists.shape[:3], nodes, dtype=torch.bool).scatter_(3, lists.long(), True)
                seen = seen.repeat_interleave(span, 2).repeat_interleave(16, 3)
                score = score.masked_fill(~seen, -torch.inf)
            parts.append(score)
        return torch.cat(parts, 3).softmax(-1) @ torch.cat((v, fine[2], coarse[2]), 2) * FACTOR
"""
TOPK = """
    import torch

    def gen_sparse_indices(pq, pk, topk):
        score = pq @ pk.mT
        return torch.topk(score, min(topk, score.shape[-1])).indices

    def compute_topk_indices_sparse(pq, pk, p_indices, topk=8, p_topk=8, block_size=16):
        score = pq @ pk.mT
        seen = torch.zeros(*p_indices.shape[:3], pk.shape[2] // block_size, dtype=torch.bool).scatter_(3, p_indices, True)
        seen = seen.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
        return torch.topk(score.masked_fill(~seen, -torch.inf), topk).indices.int()
"""
POOL = """
    def mean_pool1d(x, k, format="bhsc"):
        return x.unflatten(2, (-1, k)).mean(3)
"""
SLA = {"core": CORE, "utils": UTILS}
LLSA = {"torch_op/flash_sparse_attention_res_2": ATTENTION, "triton/topk": TOPK, "triton/mean_pool": POOL}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("tessera_bench", BENCH / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(bench, monkeypatch, tmp_path):
    """write(files of SLA, files of LLSA, FACTOR): the folder .ref/ as the bench finds it."""
    monkeypatch.setattr(sys.modules["official"], "REF", tmp_path)

    def write(sla: dict[str, str], llsa: dict[str, str], factor: float = 1.0) -> None:
        for folder, files in (("SLA/sparse_linear_attention", sla), ("LLSA/src/llsa/kernel", llsa)):
            for name, text in files.items():
                path = tmp_path / folder / f"{name}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"FACTOR = {factor}\n{textwrap.dedent(text)}")

    return write


@pytest.fixture
def rows(bench, monkeypatch):
    """Reports of SLA and LLSA, each forwards and backwards, on small inputs; times are given, every rival is called."""

    def rounds(runs, device, flush):
        return {name: [run() is not None and (10.0 if name == "tessera" else 30.0)] * 5 for name, run in runs.items()}

    def measured() -> list[dict]:
        papers = sys.modules["papers"]
        monkeypatch.setattr(bench, "rounds", rounds)
        monkeypatch.setattr(papers, "KEPT", 0.4)
        monkeypatch.setattr(papers, "LLSA_TOPK", 3)
        with torch.inference_mode():  # as the bench runs
            cases = [*papers.sparse_linear_cases(300, 2, 32, "cpu", torch.float32)]
            cases += papers.log_linear_cases(2048, 1, 16, "cpu", torch.float32)
            return [bench.measure(case, "cpu") for case in cases]

    return measured


def test_sources_at_hand_are_rivals(sources, rows):
    sources(SLA, LLSA)
    path, names = [*sys.path], {*sys.modules}
    found = rows()
    for row, name in zip(found, ("SLA", "SLA", "LLSA", "LLSA"), strict=True):
        assert row["times"][f"official {name}"]["speedup_of_ours"] == 3 and "left_out" not in row, row
        assert row["times"]["dense SDPA"] and row["flop_ratio"] > 1
    assert found[0]["error"] < 4e-6 and found[1]["error"] < 6e-6
    assert sys.path == path
    assert not {"core", "utils", "triton.topk", "torch_op"} & ({*sys.modules} - names)


def test_absent_sources_say_how_to_get_them(sources, rows, bench, capsys):
    sources({}, {})
    repositories = [("SLA", "thu-ml/SLA")] * 2 + [("LLSA", "SingleZombie/LLSA")] * 2
    for row, (name, repository) in zip(rows(), repositories, strict=True):
        line = f"not here: git clone https://github.com/{repository} .ref/{name}"
        assert row["left_out"] == {f"official {name}": line} and "failed" not in row
        assert [*row["times"]] == ["tessera", "dense SDPA"]
        bench.show(row)
        assert f"official {name}" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("raise OSError('no driver\\nsecond line')", "OSError: no driver"),
        ("def core(:", "SyntaxError: "),
        ("import a_module_that_is_not_here", "ModuleNotFoundError: No module named 'a_module_that_is_not_here'"),
        ("", "AttributeError: "),
    ],
    ids=["raises", "syntax", "import", "empty"],
)
def test_sources_that_break_are_left_out(broken, line, sources, rows):
    sources({**SLA, "core": broken}, {**LLSA, "torch_op/flash_sparse_attention_res_2": broken})
    for row in rows():
        (why,) = row["left_out"].values()
        assert why.startswith(line) and "\n" not in why and "failed" not in row
        assert [*row["times"]] == ["tessera", "dense SDPA"]


def test_a_rival_that_computes_something_else_is_left_out(sources, rows):
    sources(SLA, LLSA, 1.01)
    for row in rows():
        (why,) = row["left_out"].values()
        assert why.startswith("ValueError: error ") and "is allowed" in why and "failed" not in row
        assert [*row["times"]] == ["tessera", "dense SDPA"]
