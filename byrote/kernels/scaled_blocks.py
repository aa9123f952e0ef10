"""What weights are worth that are stored as small codes with a scale for each block of them.

    FP8    E4M3, a byte a code; a scale for R × C codes                  w[o, i] = code[o, i] · scale[o // R, i // C]
    FP4    E2M1, two codes a byte, the even column in the low nibble;    w[o, i] = code[o, i] · scale[o, i // 32]
           a scale for 32 codes of a row

E2M1 has a sign, two exponent bits and one of mantissa: 0, ½, 1, 1½, 2, 3, 4, 6. Blocks at the edge are as large as what is left. Scales are
fp32 (V3: largest / 448) or E8M0, the byte b for 2^(b − 127) (V4). A product is taken in fp32 and rounded once; with E8M0 and bf16 it is
exact. (V3 §3.3.2; V4's report on FP4; OCP Microscaling formats 1.0 for E2M1 and E8M0.)

Shapes: O rows, I columns, P = I / 2 bytes of packed columns; more dims in front (stacked experts) are matrices behind one another.
"""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_BLOCK = (1, 32)
_STRIP = 1 << 18  # numbers worked on at a time: they stay in the cache, and what fp32 needs stays small


def dequantize_reference(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`dtype` [.., O, I] of E4M3 codes [.., O, I] or packed E2M1 codes (int8 [.., O, P]); scale [.., ⌈O/R⌉, ⌈I/C⌉], block (R, C)."""
    values = codes.float() if codes.dtype == torch.float8_e4m3fn else _unpack_reference(codes)
    rows, columns = values.shape[-2:]
    spread = scale.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return (values * spread).to(dtype)


def _unpack_reference(packed: Tensor) -> Tensor:
    """fp32 [.., I]"""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    code = packed.view(torch.uint8).long()
    return torch.stack((table[code % 16], table[code // 16]), -1).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The reference's result, strip by strip: beyond the result it needs a few megabytes."""
    per_byte = 1 if codes.dtype == torch.float8_e4m3fn else 2
    out = torch.empty(*codes.shape[:-1], per_byte * codes.shape[-1], dtype=dtype, device=codes.device)
    rows = block[0] * max(1, _STRIP // max(1, block[0] * out.shape[-1]))
    for matrices in zip(*(part.flatten(0, -3) if part.dim() > 2 else part[None] for part in (out, codes, scale.float())), strict=True):
        strips = (matrix.split(size) for matrix, size in zip(matrices, (rows, rows, rows // block[0]), strict=True))
        for out_SI, codes_SI, scales in zip(*strips, strict=True):
            _scale_strip(codes_SI, scales, block, out_SI)
    return out


def _scale_strip(codes: Tensor, scale: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """Into `out`, whose first row is the first of a block."""
    values, (rows, columns), width = _values(codes), out.shape, block[1]
    scale, whole = scale.repeat_interleave(block[0], 0)[:rows], columns // width * width
    if whole:
        values[:, :whole].unflatten(1, (-1, width)).mul_(scale[:, : whole // width, None])
    if whole < columns:
        values[:, whole:].mul_(scale[:, -1:])
    out.copy_(values)


def _values(codes: Tensor) -> Tensor:
    """fp32 [S, I]. The codes' bits are put where fp16 has its own, subnormals too; by a power of two that is too small."""
    if codes.dtype != torch.float8_e4m3fn:
        bits = codes.short()
        low, high = (bits << 12 >> 3).bitwise_and_(-0x7200), (bits << 5).bitwise_and_(-0x7200)  # keeps s...eem.........
        return torch.stack((low, high), -1).flatten(-2).view(torch.float16).float().mul_(2.0**14)
    if codes.numel() and (codes.view(torch.int8).amax() == 0x7F or codes.view(torch.uint8).amax() == 0xFF):
        return codes.float()  # NaN, which fp16 has elsewhere
    bits = codes.view(torch.int8).short().bitwise_left_shift_(7).bitwise_and_(-0x4001)  # keeps s.eeeemmm.......
    return bits.view(torch.float16).float().mul_(2.0**8)
