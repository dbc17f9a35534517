"""The formats of Quantize Model, as data: what each stores, and what may go with it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """bits: of a code. group: columns that share a scale, 0 for a whole row, -1 for the whole weight; groups: those that
    may be asked for, () where it is fixed. scale_bits: of a scale. owner: "tessera", or "core" where ComfyUI's own layout
    stores it. activations: what its input may be rounded to, a token a scale. rotates, smooths: whether the layer's input
    may be rotated or divided. branch: whether a low-rank product in 16 bit stands beside it."""

    name: str
    stores: str
    bits: int
    group: int
    scale_bits: int
    activations: tuple[str, ...]
    groups: tuple[int, ...] = ()
    owner: str = "tessera"
    rotates: bool = True
    smooths: bool = True
    branch: bool = False

    def effective_bits(self, rows: int, columns: int, group: int | None = None, rank: int = 0) -> float:
        """Bits of a weight [rows, columns] with its scales, a last group that is not full counting whole, and its branch.
        Tables (64 bytes a layer at most) and smoothing do not count."""
        size = self.check_group(group) or columns
        count = rows * columns
        if size < 0:
            codes, scales = count, 1
        elif self.bits <= 4:
            groups = -(-columns // size)
            codes, scales = rows * groups * size, rows * groups
        else:
            codes, scales = count, rows * -(-columns // size)
        side = 16 * rank * (rows + columns) if self.branch else 0
        return (codes * self.bits + scales * self.scale_bits + side) / count

    def check_group(self, group: int | None) -> int:
        """The group to use. ValueError for one that this format does not have."""
        if group is None or group == self.group:
            return self.group
        if group not in self.groups:
            sizes = " or ".join(str(size) for size in self.groups) or f"only {self.group}"
            raise ValueError(f"{self.name} has groups of {sizes}, not {group}.")
        return group

    def check_activations(self, kind: str) -> str:
        """The kind. ValueError for one that does not go with this format."""
        if kind not in self.activations:
            raise ValueError(f"{self.name} takes activations {' or '.join(self.activations)}, not {kind}.")
        return kind


ANY = ("none", "int8", "fp8", "int4")
GROUPS = (16, 32, 64, 128, 256)
FORMATS = {
    format.name: format
    for format in (
        Format("tlq4", "4-bit codes of a table fitted to the layer, fp16 scales", 4, 64, 16, ANY, GROUPS),
        Format("tlq3", "3-bit codes of a table fitted to the layer, fp16 scales", 3, 64, 16, ANY, GROUPS),
        Format("int4_g64", "symmetric 4-bit integers, fp16 scales", 4, 64, 16, ANY, GROUPS),
        Format("int8_row", "8-bit integers, one fp32 scale a row", 8, 0, 32, ("none", "int8")),
        Format(
            "fp8_e4m3", "E4M3, one fp32 scale", 8, -1, 32, ("none", "fp8"), owner="core", rotates=False, smooths=False
        ),
        Format(
            "nvfp4",
            "E2M1 in blocks of 16 with E4M3 scales",
            4,
            16,
            8,
            ("none",),
            owner="core",
            rotates=False,
            smooths=False,
        ),
        Format(
            "mxfp8",
            "E4M3 in blocks of 32 with E8M0 scales",
            8,
            32,
            8,
            ("none",),
            owner="core",
            rotates=False,
            smooths=False,
        ),
        Format(
            "svdquant_int4",
            "symmetric 4-bit integers of what a 16-bit low-rank branch leaves, smoothed",
            4,
            64,
            16,
            ANY,
            branch=True,
        ),
    )
}


def find(name: str) -> Format:
    """ValueError for a format that does not exist."""
    if name not in FORMATS:
        raise ValueError(f"Unknown format {name!r}. Known are {', '.join(FORMATS)}.")
    return FORMATS[name]
