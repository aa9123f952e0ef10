"""A row as bytes: how vectors, optimizer state and visits of one row lie behind one another in a file.

    float32, bfloat16    E numbers                          4E or 2E bytes
    fp8                  E numbers as E4M3, then one exponent byte b per 32 of them: a number is worth value · 2^(b − 127)
                         (OCP microscaling's E8M0): 264 bytes for 256 numbers. Read-only, as its steps are coarser than updates.
    then, where kept     S numbers of state, float32; visits, int32
    then                 zeros up to a multiple of 4 bytes, so that state is aligned

All little-endian, as every machine is that PyTorch supports. A group of 32 is scaled by the smallest power of two with which its largest
number stays within E4M3's 448, so scaling itself rounds nothing and the error is E4M3's own, at most 1/16 of a normal number.

Shapes: U rows, E numbers in a row, S numbers of state, G groups of 32, B bytes in a record.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.memory.table import Slab

GROUP = 32
_ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float32}  # of decoded vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """The layout of one record."""

    dim: int
    dtype: str = "float32"  # "float32" | "bfloat16" | "fp8"
    state_dim: int = 0
    counted: bool = False  # whether visits are kept

    def __post_init__(self) -> None:
        if self.dtype not in _ROW_DTYPES:
            raise ConfigError(f"rows cannot be stored as {self.dtype!r}; allowed: {', '.join(_ROW_DTYPES)}")

    @property
    def tensor_dtype(self) -> torch.dtype:
        """Of the vectors that `decode` gives."""
        return _ROW_DTYPES[self.dtype]

    @property
    def vector_bytes(self) -> int:
        if self.dtype == "fp8":
            return self.dim + -(-self.dim // GROUP)
        return self.dim * self.tensor_dtype.itemsize

    @property
    def bytes(self) -> int:
        """Of a whole record."""
        return self._aligned + 4 * self.state_dim + 4 * self.counted

    @property
    def _aligned(self) -> int:
        return -(-self.vector_bytes // 4) * 4

    def encode(self, vectors_UE: Tensor, state_US: Tensor | None = None, visits_U: Tensor | None = None) -> Tensor:
        """uint8 [U, B]. State and visits must be given exactly where the format keeps them. ConfigError: fp8 of numbers not finite."""
        raw_UB = encode_fp8(vectors_UE) if self.dtype == "fp8" else _bytes(vectors_UE.to(self.tensor_dtype))
        parts = [raw_UB, raw_UB.new_zeros(len(raw_UB), self._aligned - self.vector_bytes)]
        if self.state_dim:
            assert state_US is not None, "this format keeps state"
            parts.append(_bytes(state_US))
        if self.counted:
            assert visits_U is not None, "this format keeps visits"
            parts.append(_bytes(visits_U[:, None]))
        return torch.cat(parts, dim=1)

    def decode(self, records_UB: Tensor) -> Slab:
        """The inverse; what the format does not keep is zero."""
        vectors_UE = self.decode_vectors(records_UB)
        split = self._aligned + 4 * self.state_dim
        state_US = _numbers(records_UB[:, self._aligned : split], torch.float32)
        visits_U = (
            _numbers(records_UB[:, split : split + 4], torch.int32).flatten() if self.counted else records_UB.new_zeros(len(records_UB))
        )
        return Slab(vectors_UE, state_US, visits_U.to(torch.int32))

    def decode_vectors(self, records_UB: Tensor) -> Tensor:
        """[U, E] alone."""
        raw_UB = records_UB[:, : self.vector_bytes]
        return decode_fp8(raw_UB, self.dim) if self.dtype == "fp8" else _numbers(raw_UB, self.tensor_dtype)


def encode_fp8(vectors_UE: Tensor) -> Tensor:
    """uint8 [U, E + G]: E4M3 numbers, then exponents. Raises ConfigError for numbers that are not finite."""
    if not vectors_UE.isfinite().all():
        raise ConfigError("rows with infinite or undefined numbers cannot be stored as fp8; look for what made them, or keep float32")
    U, E = vectors_UE.shape
    groups_UGK = torch.nn.functional.pad(vectors_UE.float(), (0, -E % GROUP)).view(U, -1, GROUP)
    mantissa_UG, exponent_UG = torch.frexp(groups_UGK.abs().amax(2))  # largest = mantissa · 2^exponent, 448 = 0.875 · 2^9
    exponent_UG = (exponent_UG - 9 + (mantissa_UG > 0.875).int() + 127).clamp(1, 254)
    scaled_UE = (groups_UGK / _scale(exponent_UG)[:, :, None]).view(U, -1)[:, :E]
    return torch.cat((scaled_UE.to(torch.float8_e4m3fn).view(torch.uint8), exponent_UG.to(torch.uint8)), dim=1)


def decode_fp8(raw_UB: Tensor, dim: int) -> Tensor:
    """float32 [U, E]."""
    scale_UG = _scale(raw_UB[:, dim:])
    return raw_UB[:, :dim].contiguous().view(torch.float8_e4m3fn).float() * scale_UG.repeat_interleave(GROUP, dim=1)[:, :dim]


def _scale(exponent_UG: Tensor) -> Tensor:
    """2^(b − 127), put together from its bits."""
    return (exponent_UG.to(torch.int32) << 23).view(torch.float32)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _numbers(bytes_UB: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_UB.contiguous().view(dtype)
