"""Code books: identities first, then the errors that they are worth their bits for."""

import dataclasses

import pytest
import torch
from quant_helper import KINDS, q4_k_bytes, relative_mse, rows

from tessera.kernels.quant.packed import Packed, decode, pack_codes, unpack_codes
from tessera.methods.quant import codebook
from tessera.methods.quant._assign import Book, search_scale
from tessera.methods.quant.codebook import MUS, rowwise_int8, symmetric_int4, twin_log, twin_log_table


def uniform(weight, group, levels=7):
    """Symmetric integers by their definition, scales in fp16."""
    w = weight.reshape(weight.shape[0], -1, group)
    scale = (w.abs().amax(-1) / levels).half().float()[..., None]
    return ((w / scale).round().clamp(-levels, levels) * scale).flatten(1)


@pytest.mark.parametrize("bits", [4, 3])
def test_mu_zero_without_refit_is_the_symmetric_integers(bits):
    w = rows("gauss", 24, 256)
    packed, fit = twin_log(w, bits, 64, mu=0, rounds=0)
    assert torch.equal(decode(packed), uniform(w, 64, 2 ** (bits - 1) - 1))
    assert torch.equal(packed.table, torch.arange(2.0**bits) - 2 ** (bits - 1)) and fit.mu == 0
    if bits == 4:
        plain, _ = symmetric_int4(w)
        assert torch.equal(plain.data, packed.data) and torch.equal(plain.scale, packed.scale)


@pytest.mark.parametrize("group", [8, 24, 64])
@pytest.mark.parametrize("bits", [4, 3])
def test_packing_and_back_is_exact(bits, group):
    codec = {4: "table4", 3: "table3"}[bits]
    codes = torch.randint(2**bits, (5, 3 * group), dtype=torch.uint8)
    data = pack_codes(codes, codec, group)
    assert data.shape == (5, 3 * group * bits // 8) and torch.equal(unpack_codes(data, codec, group), codes)
    scale, table = torch.randn(5, 3), torch.randn(2**bits)
    want = table[codes.long()] * scale.repeat_interleave(group, 1)
    assert torch.equal(decode(Packed(codec, 3 * group, data, scale, table, group)), want)
    if bits == 4:
        assert torch.equal(data[:, 0], codes[:, 0] | codes[:, group // 2] << 4)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("bits", [4, 3])
def test_the_table_is_the_companded_one_and_bounds_each_error(bits, mu):
    """Rounding in the log domain errs by s ((1 + mu)^(1 / 2L) - 1) (|near| / s + 1 / mu) at most, the nearest entry by less
    than that rounding."""
    length = 2 ** (bits - 1) - 1
    w = rows("laplace", 16, 256)
    packed, _ = twin_log(w, bits, 64, mu=mu, rounds=0)
    s = w.reshape(16, -1, 64).abs().amax(-1, keepdim=True)
    u = w.reshape(16, -1, 64) / s
    if mu == 0:
        logs = (length * u).round() / length
        bound = torch.full_like(u, 0.5 / length)
    else:
        q = (length * u.sign() * torch.log1p(mu * u.abs()) / torch.log1p(torch.tensor(mu))).round()
        logs = q.sign() * ((1 + mu) ** (q.abs() / length) - 1) / mu
        bound = ((1 + mu) ** (0.5 / length) - 1) * (logs.abs() + 1 / mu)
    near = decode(packed).reshape(16, -1, 64)
    slack = 1e-3 * s  # the scale is rounded to fp16
    assert ((logs * s - near).abs() <= s + slack).all()
    assert ((u - logs).abs() <= bound + 1e-5).all()
    assert ((near - s * u).abs() <= (s * u - s * logs).abs() + slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_mu_is_never_worse_than_uniform(kind):
    w = rows(kind, 64, 512)
    errors = {mu: twin_log(w, mu=mu, rounds=0)[1].error for mu in MUS}
    chosen = twin_log(w, rounds=0)[1]
    assert errors[chosen.mu] == chosen.error == min(errors.values()) <= relative_mse(uniform(w, 64), w) * (1 + 1e-6)
    assert (kind == "gauss") or chosen.mu > 0


@pytest.mark.parametrize("table", ["twin", "fitted", "crowded"])
def test_codes_are_the_nearest_entries(table):
    w = rows("student5", 32, 128)
    entries = {
        "twin": twin_log_table(4, 64),
        "fitted": twin_log(w)[0].table,
        "crowded": torch.linspace(-1, 1, 16) ** 3 * 1e-2 + torch.linspace(0, 7, 16) * (torch.arange(16) > 13),
    }[table]
    book = Book.of(entries)
    assert book.single == (table != "crowded")
    scale = torch.linspace(-0.3, 0.4, 32)
    codes = book.codes(w, scale)
    miss = (w[..., None] - scale[:, None, None] * entries).abs()
    assert torch.allclose(miss.gather(-1, codes[..., None].long()).squeeze(-1), miss.amin(-1), rtol=1e-5, atol=1e-7)
    assert (book.codes(w, torch.zeros(32)) == entries.abs().argmin()).all() or table == "crowded"


def test_a_searched_scale_is_at_least_as_good_as_that_of_the_largest_weight():
    w, entries = rows("gauss", 500, 64), twin_log_table(4, 4, True)
    book = Book.of(entries)

    def miss(scale):
        return (w - entries[book.codes(w, scale).long()] * scale[:, None]).square().sum(1)

    peak = w.gather(1, w.abs().argmax(1, keepdim=True)).squeeze(1)
    plain, found = miss(peak / entries[-1]), miss(search_scale(w, None, book))
    assert (found <= plain * 1.001).all() and found.sum() < 0.93 * plain.sum()
    turned = search_scale(-w, None, book)
    assert torch.allclose(turned, -search_scale(w, None, book)), "a scale may take either sign"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_group_64_beats_symmetric_int4(kind, seed):
    w = rows(kind, 128, 2048, seed)
    packed, fit = twin_log(w)
    assert relative_mse(decode(packed), w) <= 0.7 * relative_mse(decode(symmetric_int4(w)[0]), w)
    assert fit.error == pytest.approx(relative_mse(decode(packed), w), rel=1e-4)
    assert fit.bits == pytest.approx(4.25, abs=0.01) and fit.bits / 16 <= 0.29


@pytest.mark.parametrize(("kind", "bar"), [*zip(KINDS, (1.1, 0.95, 0.95), strict=True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_group_32_beside_q4_k_at_the_same_bits(kind, bar, seed):
    w = rows(kind, 128, 2048, seed)
    rival = q4_k_bytes(w)
    packed, fit = twin_log(w, group=32)
    assert fit.bits == pytest.approx(rival.numel() * 8 / w.numel(), abs=0.01) and packed.scale.dtype == torch.float16
    assert relative_mse(decode(packed), w) <= bar * relative_mse(decode(Packed("q4_k", 2048, rival)), w)


def test_our_q4_k_reads_the_same_elsewhere():
    gguf = pytest.importorskip("gguf")
    w = torch.cat((rows("laplace", 4, 512), torch.zeros(1, 512), rows("gauss", 1, 512).abs(), torch.ones(1, 512)))
    made = q4_k_bytes(w)
    theirs = torch.from_numpy(gguf.dequantize(made.numpy(), gguf.GGMLQuantizationType.Q4_K))
    assert torch.equal(theirs, decode(Packed("q4_k", 512, made)))
    assert relative_mse(theirs, w) < 0.01 and torch.equal(theirs[4], torch.zeros(512))


@pytest.mark.parametrize("kind", KINDS)
def test_searched_integers_stay_integers_and_err_less(kind):
    w = rows(kind, 64, 1024)
    packed, fit = symmetric_int4(w, search=True)
    assert fit.error < 0.9 * symmetric_int4(w)[1].error and fit.error == pytest.approx(
        relative_mse(decode(packed), w), rel=1e-3
    )
    assert (packed.scale > 0).all() and torch.equal(packed.table, torch.arange(16.0) - 8)
    assert unpack_codes(packed.data, "table4", 64).min() == 1


def test_three_bits():
    w = rows("gauss", 64, 1024)
    packed, fit = twin_log(w, 3)
    assert packed.codec == "table3" and fit.bits == pytest.approx(3.25, abs=0.01)
    assert fit.error < 0.75 * twin_log(w, 3, rounds=0)[1].error
    assert set(unpack_codes(packed.data, "table3", 64).unique().tolist()) == set(range(8))


def test_importance_lowers_the_error_that_it_weighs():
    w = rows("gauss", 64, 1024)
    importance = torch.rand(1024).pow(6) * 100
    plain, weighted = twin_log(w)[0], twin_log(w, importance=importance)

    def miss(packed):
        return float(((decode(packed) - w).square() * importance).sum() / (w.square() * importance).sum())

    assert miss(weighted[0]) < 0.85 * miss(plain)
    assert weighted[1].weighted_error == pytest.approx(miss(weighted[0]), rel=0.01)
    assert twin_log(w, importance=torch.full((1024,), 3.0))[1].error == pytest.approx(twin_log(w)[1].error, rel=0.02)


@pytest.mark.parametrize("make", [twin_log, symmetric_int4], ids=["tlq4", "int4"])
def test_padding_chunks_and_strides_change_nothing(make, monkeypatch):
    w = rows("gauss", 40, 150)  # three groups, the last of 22
    whole, fit = make(w)
    assert whole.data.shape == (40, 3 * 32) and decode(whole).shape == (40, 150)
    assert fit.error == pytest.approx(relative_mse(decode(whole), w), rel=1e-4)
    monkeypatch.setattr(codebook, "CHUNK", {"cpu": 7 * 150})
    assert torch.equal(make(w)[0].data, whole.data)
    assert torch.equal(make(w.T.contiguous().T)[0].data, whole.data)
    assert make(w[:1])[1].error < 0.02


def test_a_large_weight_is_sampled_alike_each_time(monkeypatch):
    monkeypatch.setattr(codebook, "SAMPLE", 1 << 13)
    w = rows("gauss", 64, 1000)
    (one, fit), (two, _) = twin_log(w), twin_log(w)
    assert torch.equal(one.data, two.data) and torch.equal(one.table, two.table)
    assert fit.error < 0.0075  # 0.0065 with the table of all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype):
    w = rows("gauss", 32, 256).to(dtype)
    packed, fit = twin_log(w)
    assert fit.error == pytest.approx(relative_mse(decode(packed), w), rel=1e-3) and fit.error < 0.008


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e-4, torch.bfloat16), (0.02, torch.float16), (1e6, torch.bfloat16), (1e-12, torch.bfloat16)]
)
def test_scales_that_fp16_cannot_hold(size, dtype):
    w = rows("gauss", 16, 256) * size
    packed, fit = twin_log(w)
    assert packed.scale.dtype == dtype and fit.error < 0.008 and decode(packed).isfinite().all()
    assert symmetric_int4(w)[0].scale.dtype == dtype


def test_zeros_come_back_as_zeros():
    w = rows("gauss", 8, 256)
    w[3], w[5, 64:128] = 0, 0
    for make in (twin_log, symmetric_int4, rowwise_int8):
        near = decode(make(w)[0])
        assert not near[3].any() and (make is rowwise_int8 or not near[5, 64:128].any()) and near.isfinite().all()
        packed, fit = make(torch.zeros(4, 64))
        assert not decode(packed).any() and fit.error == 0


def test_int8_rows():
    w = rows("student5", 16, 300)
    packed, fit = rowwise_int8(w)
    scale = w.abs().amax(1, keepdim=True) / 127
    assert ((decode(packed) - w).abs() <= scale * 0.5001).all() and torch.equal(packed.scale, scale)
    assert fit.bits == pytest.approx(8 + 32 / 300) and fit.error == pytest.approx(
        relative_mse(decode(packed), w), rel=1e-3
    )


@pytest.mark.parametrize(
    ("weight", "importance", "words"),
    [
        (torch.ones(4), None, "a floating [N, K], got float32 [4]"),
        (torch.ones(4, 64, dtype=torch.int32), None, "got int32 [4, 64]"),
        (torch.ones(0, 64), None, "got float32 [0, 64]"),
        (torch.full((4, 64), torch.nan), None, "not finite"),
        (torch.tensor([[torch.inf] * 64]), None, "not finite"),
        (torch.tensor([[-1e30] * 64]), None, "not finite or above 1e+15"),
        (torch.ones(4, 64), torch.ones(63), "Importances of 64 input channels must be finite and >= 0, got [63]"),
        (torch.ones(4, 64), torch.full((64,), -1.0), "must be finite and >= 0"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight, importance, words):
    for make in (twin_log, symmetric_int4, rowwise_int8):
        with pytest.raises(ValueError) as error:
            make(weight, importance=importance)
        assert words in str(error.value)


def test_a_fit_is_plain_numbers():
    _, fit = twin_log(rows("gauss", 8, 64))
    assert all(isinstance(value, float) for value in dataclasses.asdict(fit).values())


@pytest.mark.gpu
def test_the_same_on_the_gpu():
    w = rows("laplace", 256, 1024)
    (_, fit), (there, fit_there) = twin_log(w), twin_log(w.cuda())
    assert there.data.is_cuda and fit_there.error == pytest.approx(fit.error, rel=0.02)
    assert relative_mse(decode(there).cpu(), w) == pytest.approx(fit_there.error, rel=1e-3)
