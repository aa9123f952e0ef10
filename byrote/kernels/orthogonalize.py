"""Orthogonalisation by Newton–Schulz: a matrix keeps its singular vectors, its singular values go to one.

    X₀ = G / (‖G‖_F + 1e-7)
    A = X Xᵀ,    X ← a X + (b A + c A²) X        for each triple (a, b, c)

Write G = U S Vᵀ. Every step is an odd polynomial in X, so U and V never move and each singular value s is mapped by the scalar
a s + b s³ + c s⁵; dividing by the Frobenius norm first puts all of them into [0, 1]. Two tables of triples:

    quintic5      five times (3.4445, −4.7750, 2.0315)       [Muon; Moonlight §2.2]   0.01 ≤ s ≤ 1 lands in [0.6818, 1.1344]
    hybrid8+2     eight times the same, then twice (2, −1.5, 0.5)   [V4 Alg. 1]       3e-5 ≤ s ≤ 1 lands in [1.0000, 1.0021]

The first triple is steep at zero (×3.44 a step) but has no fixed point at one; the second converges to one from wherever the first
leaves s. Example, one singular value of 0.1: 0.7121 after quintic5, 1.000061 after hybrid8+2.

Everything is batched, because matrix products of a few hundred rows do not fill a machine one by one, and the Gram matrix A is the
small one: a tall matrix is handled through its transpose. The norm is taken in fp32; only the products run in `dtype`. In bf16 the
bands widen by less than 0.01 at either end.

Shapes: B matrices, M rows ≤ N columns (after transposing).
"""

import torch
from torch import Tensor

EPS = 1e-7

_QUINTIC = (3.4445, -4.7750, 2.0315)
_FINISH = (2.0, -1.5, 0.5)

COEFFICIENTS = {
    "quintic5": (_QUINTIC,) * 5,
    "hybrid8+2": (_QUINTIC,) * 8 + (_FINISH,) * 2,
}


def newton_schulz(x_BMN: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The iteration alone; singular values must already lie in [0, 1]. Returns [B, M, N]."""
    for a, b, c in steps:
        gram_BMM = x_BMN @ x_BMN.mT
        polynomial_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, polynomial_BMM, x_BMN, beta=a)
    return x_BMN


def orthogonalize(update: Tensor, *, coefficients: str = "quintic5", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Orthogonalises the last two dimensions of `update` [..., rows, cols]; every matrix of the stack on its own.

    `coefficients` names an entry of `COEFFICIENTS`. The result has the shape of `update` and `dtype`, in which the products were
    computed. A zero matrix stays zero.
    """
    if update.shape[-2] > update.shape[-1]:
        return orthogonalize(update.mT, coefficients=coefficients, dtype=dtype).mT
    exact = torch.promote_types(update.dtype, torch.float32)
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True, dtype=exact)
    x_BMN = (update / (norm + EPS)).to(dtype).reshape(-1, *update.shape[-2:])
    return newton_schulz(x_BMN, COEFFICIENTS[coefficients]).view(update.shape)


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which the products are fastest on `device`: bf16 wherever the hardware multiplies bf16, else fp32.

    Decided from the instruction set and not from the clock, so that a resumed run repeats it. Measured on two cores of a Zen 4
    EPYC with AVX-512 BF16, 96 matrices of 256 × 256: 312 GFLOP/s in bf16, 170 in fp32; a processor without such instructions
    emulates bf16 and is slower than in fp32.
    """
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16
