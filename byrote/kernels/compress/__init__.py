"""V4's compressor: one entry for every M tokens, a softmax per channel over their gates. The definition: reference.py.

Back ends: C for the CPU (cpu.py), else the reference.
Shapes: B batch, S tokens, E entries, M tokens of a group, W width of an entry, X = W, or 2W when overlapping.
"""

import torch
from torch import Tensor

from byrote.kernels.compress import cpu, reference


def compress(values_BSX: Tensor, gates_BSX: Tensor, bias_MX: Tensor, last_BE: Tensor, opens_BE: Tensor, *, overlap: bool) -> Tensor:
    """Entries [B, E, W] in the dtype of the values.

    `last_BE`: the last token of the group behind each entry, −1 where a row has no such entry (zeros come back). The group's M tokens,
    and when overlapping the M before them, lie side by side; `opens_BE` is True where there is no group before.
    ValueError: shapes or dtypes that do not fit.
    """
    _check(values_BSX, gates_BSX, bias_MX, last_BE, opens_BE, overlap)
    backend = cpu if cpu.can_run(values_BSX, gates_BSX, bias_MX) else reference
    return backend.compress(values_BSX, gates_BSX, bias_MX, last_BE, opens_BE, overlap=overlap)


def _check(values: Tensor, gates: Tensor, bias: Tensor, last: Tensor, opens: Tensor, overlap: bool) -> None:
    widths = values.dim() == 3 and values.shape == gates.shape and bias.dim() == 2 and bias.shape[1] == values.shape[2]
    indices = last.dim() == 2 and last.shape == opens.shape and last.dtype == torch.int64 and opens.dtype == torch.bool
    if not (widths and indices and last.shape[0] == values.shape[0] and (not overlap or bias.shape[1] % 2 == 0)):
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in (values, gates, bias, last, opens))
        raise ValueError(f"compress got {shapes}; needed: values and gates [B, S, X], bias [M, X], int64 and bool [B, E]")
