"""The table of formats against what the quantizers really store."""

import pytest
from quant_helper import rows

from tessera.methods.quant.formats import FORMATS, find
from tessera.methods.quant.round_trip import ACTIVATIONS, CORE, PACKED, quantize

ALL = {"tlq4", "tlq3", "int4_g64", "int8_row", "fp8_e4m3", "nvfp4", "mxfp8", "svdquant_int4"}


def test_every_format_is_there_and_can_be_rounded_to():
    assert set(FORMATS) == ALL == {*PACKED, *CORE}
    assert {name for name, format in FORMATS.items() if format.owner == "core"} == set(CORE)
    assert all(
        set(format.activations) <= set(ACTIVATIONS) and format.activations[0] == "none" for format in FORMATS.values()
    )
    assert not any(FORMATS[name].rotates for name in CORE) and [n for n in ALL if FORMATS[n].branch] == [
        "svdquant_int4"
    ]


@pytest.mark.parametrize("shape", [(40, 256), (8, 150)])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("name", ["tlq4", "tlq3", "int4_g64"])
def test_effective_bits_are_the_bytes(name, group, shape):
    packed, fit = quantize(rows("gauss", *shape), name, group)
    bits = FORMATS[name].effective_bits(*shape, group)
    assert 8 * (packed.data.numel() + 2 * packed.scale.numel()) / (shape[0] * shape[1]) == pytest.approx(bits)
    assert fit.bits == pytest.approx(bits + 32 * packed.table.numel() / (shape[0] * shape[1]))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("tlq4", 4.25), ("tlq3", 3.25), ("int4_g64", 4.25), ("int8_row", 8.0078125), ("fp8_e4m3", 8.0), ("nvfp4", 4.5),
     ("mxfp8", 8.25), ("svdquant_int4", 4.25)],
)  # fmt: skip
def test_bits_of_a_large_layer(name, bits):
    assert FORMATS[name].effective_bits(4096, 4096) == pytest.approx(bits, abs=1e-3)


def test_a_branch_costs_its_factors():
    assert find("svdquant_int4").effective_bits(1024, 4096, rank=32) == pytest.approx(
        4.25 + 16 * 32 * 5120 / (1024 * 4096)
    )
    assert find("tlq4").effective_bits(1024, 4096, rank=32) == 4.25


def test_what_a_format_does_not_have_is_refused():
    with pytest.raises(ValueError, match="Unknown format 'int2'. Known are tlq4, tlq3"):
        find("int2")
    with pytest.raises(ValueError, match="nvfp4 has groups of only 16, not 32"):
        find("nvfp4").check_group(32)
    with pytest.raises(ValueError, match="tlq4 has groups of 16 or 32 or 64 or 128 or 256, not 48"):
        find("tlq4").check_group(48)
    with pytest.raises(ValueError, match="mxfp8 takes activations none, not int8"):
        find("mxfp8").check_activations("int8")
    assert find("tlq4").check_group(None) == 64 and find("int8_row").check_activations("int8") == "int8"
