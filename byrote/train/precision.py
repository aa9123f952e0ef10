"""Which dtype products run in: bf16 autocast over fp32 weights, or plain fp32.

Under bf16 the residual streams are bf16 too, as in V3 and V4. Islands that stay fp32, inside the layers themselves: norms, rotary
angles, router scores, mHC coefficients and Sinkhorn, memory gates, softmax and cross-entropy, every optimizer state.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
