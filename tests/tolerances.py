"""How close is the same? Four grades, named here once, chosen and not tuned; no test brings its own.

bitwise       hashes, routing, packing, resumed runs, tables on different storage: every bit
fp32          two ways to compute the same in fp32: |got − want| ≤ 1e-5 of the largest |want|
bf16          one kernel on the same bf16 inputs, against fp32: ≤ 2⁻⁷ of the largest |want|, and Σ(got − want)² ≤ 1e-5 Σ want²
distribution  samples: a stated test at a stated n (the test that needs it says which)

Distances are taken from the largest value of the tensor, not from each value: where terms cancel, a value near zero has no
correct digits of its own. A tolerance is never raised to make a test pass.
"""

import torch

FP32 = 1e-5
BF16 = 2.0**-7
BF16_SQUARED = 1e-5


def assert_bitwise(got: torch.Tensor, want: torch.Tensor) -> None:
    """Same dtype, shape and bits. Any NaN equals the same NaN; 0 and −0 differ."""
    _assert_same_form(got, want)
    assert got.dtype == want.dtype, f"dtype {got.dtype}, wanted {want.dtype}"
    differ = _bits(got) != _bits(want)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} bytes differ"


def assert_close_fp32(got: torch.Tensor, want: torch.Tensor) -> None:
    """Largest difference at most 1e-5 of the largest value of `want` (all zero: `got` must be all zero)."""
    worst, largest, _ = _distances(got, want)
    assert worst <= FP32 * largest, f"off by {worst:.3e} where the largest value is {largest:.3e}: {_ratio(worst, largest)} > {FP32:.0e}"


def assert_close_bf16(got: torch.Tensor, want: torch.Tensor) -> None:
    """The bf16 grade; `want` is the fp32 result for the same bf16 inputs."""
    worst, largest, squared = _distances(got, want)
    assert worst <= BF16 * largest, f"off by {worst:.3e} where the largest value is {largest:.3e}: {_ratio(worst, largest)} > 2^-7"
    assert squared <= BF16_SQUARED, f"relative squared error {squared:.3e} > {BF16_SQUARED:.0e}"


def _distances(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float, float]:
    """Largest difference, largest wanted value, relative squared error; in fp64, so that measuring adds nothing."""
    _assert_same_form(got, want)
    got, want = got.detach().double(), want.detach().double()
    assert want.isfinite().all(), "the wanted values are not finite"
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    if want.numel() == 0:
        return 0.0, 0.0, 0.0
    error = got - want
    energy = want.square().sum().item()
    squared = error.square().sum().item()
    return error.abs().max().item(), want.abs().max().item(), squared / energy if energy else float(squared > 0)


def _assert_same_form(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _ratio(worst: float, largest: float) -> str:
    return f"{worst / largest:.2e}" if largest else "infinite"
