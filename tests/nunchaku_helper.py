"""Packs layers as Nunchaku's kernels load them, lane by lane, from the description of the tiles; the unpacking under test
moves whole axes instead."""

import torch


def words(codes: torch.Tensor) -> torch.Tensor:
    """int8 [N, K / 2] of codes [N, K] in -8..7: the operand of an m16n8k64 product as 32 lanes hold it."""
    n, k = codes.shape
    table, made = codes.tolist(), []
    for tile_n in range(0, n, 128):
        for tile_k in range(0, k, 64):
            for group in range(0, 128, 16):
                for lane in range(32):
                    for down in (0, 8):
                        row = table[tile_n + group + down + lane // 4]
                        for right in (0, 32):
                            at = tile_k + right + lane % 4 * 8
                            for i in range(0, 8, 2):
                                made.append((row[at + i] & 15) | (row[at + i + 1] & 15) << 4)
    return torch.tensor(made, dtype=torch.uint8).view(torch.int8).view(n, k // 2)


def lanes(values: torch.Tensor) -> torch.Tensor:
    """[G, N] or [N] in tiles of 128: lane i of 32 holds four elements of a run of 16."""
    groups, made = values.reshape(-1, values.shape[-1]), []
    for tile in range(0, values.shape[-1], 128):
        order = []
        for lane in range(32):
            at = tile + lane // 4 * 16 + lane % 4 * 2
            order += [at, at + 1, at + 8, at + 9]
        made += [row[order] for row in groups]
    return torch.cat(made).view(values.shape)


def branch(matrix: torch.Tensor, down: bool) -> torch.Tensor:
    """[C, R]: blocks of 16 x 16, the first ones along R; operand rows are the rank for down and C for up."""
    order = []  # (row, column) in an operand
    for lane in range(32):
        for below in (0, 8):
            for right in (0, 8):
                order += [(below + lane // 4, right + lane % 4 * 2 + pair) for pair in (0, 1)]
    rows, columns = (list(places) for places in zip(*order, strict=True))
    made = []
    for block_c in range(0, matrix.shape[0], 16):
        for block_r in range(0, matrix.shape[1], 16):
            block = matrix[block_c : block_c + 16, block_r : block_r + 16]
            made.append((block.t() if down else block)[rows, columns])
    return torch.cat(made).view(matrix.shape)


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [N / 4, K / 2] of codes [N, K] in 0..15: 16-bit words of columns j, j + 8, j + 16, j + 24."""
    n, k = codes.shape
    table, made = codes.tolist(), []
    for rows in range(0, n, 4):
        for chunk in range(0, k, 64):
            for row in table[rows : rows + 4]:
                for half in (0, 32):
                    for j in range(8):
                        at = chunk + half + j
                        word = sum(row[at + 8 * i] << 4 * i for i in range(4))
                        made += [word & 255, word >> 8]
    return torch.tensor(made, dtype=torch.uint8).view(torch.int32).view(n // 4, k // 2)


def svd_parts(n: int, k: int, rank: int = 16, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """A random layer in natural order; scales, smoothing and branch are powers of two times small whole numbers, so that
    its dense weight is exact."""
    return {
        "codes": torch.randint(-8, 8, (n, k), dtype=torch.int8),
        "scale": 2.0 ** torch.randint(-9, -6, (k // 64, n)).to(dtype),
        "smooth": 2.0 ** torch.randint(-2, 3, (k,)).to(dtype),
        "down": torch.randint(-2, 3, (k, rank)).to(dtype) / 32,
        "up": torch.randint(-2, 3, (n, rank)).to(dtype) / 32,
        "bias": torch.randint(-9, 10, (n,)).to(dtype) / 64,
    }


def svd_packed(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the file has it, under the names of nunchaku's modules."""
    return {
        "qweight": words(parts["codes"]),
        "wscales": lanes(parts["scale"]),
        "smooth_factor": lanes(parts["smooth"]),
        "smooth_factor_orig": lanes(parts["smooth"]),
        "proj_down": branch(parts["down"], True),
        "proj_up": branch(parts["up"], False),
        "bias": lanes(parts["bias"]),
    }


def svd_dense(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [N, K] in fp64."""
    scale = parts["scale"].double().t().repeat_interleave(64, dim=1)
    return (
        parts["codes"].double() * scale / parts["smooth"].double() + parts["up"].double() @ parts["down"].double().t()
    )


def awq_parts(n: int, k: int, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Codes 0..15, scales and nunchaku's zeros of w = q scale + zeros, bias."""
    scale = 2.0 ** torch.randint(-7, -4, (k // 64, n)).to(dtype)
    return {
        "codes": torch.randint(0, 16, (n, k)),
        "scale": scale,
        "zeros": -scale * torch.randint(5, 9, (k // 64, n)).to(dtype),
        "bias": torch.randint(-9, 10, (n,)).to(dtype) / 64,
    }


def awq_packed(parts: dict[str, torch.Tensor], splits: int = 1) -> dict[str, torch.Tensor]:
    """As the file has it: chunks interleaved, 1 added to the bias of the scales (the second chunk, and the last but one
    of six)."""
    n = len(parts["bias"])
    order = torch.arange(n).view(splits, -1).t().reshape(-1)
    bias = parts["bias"].clone()
    if splits > 1:
        for chunk in {1, splits - 2}:
            bias.view(splits, -1)[chunk] += 1
    return {
        "qweight": awq_words(parts["codes"][order]),
        "wscales": parts["scale"][:, order],
        "wzeros": parts["zeros"][:, order],
        "bias": bias[order],
    }


def awq_dense(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    scale, zeros = (parts[key].double().t().repeat_interleave(64, dim=1) for key in ("scale", "zeros"))
    return parts["codes"].double() * scale + zeros
