"""What memory does to the residual streams: a gate per stream, one value for all, a short convolution. The definition: reference.py.

Shapes: B batch, T tokens, R streams, D model, W taps of the convolution.
"""

from torch import Tensor

from byrote.kernels.engram_gate import cpu, reference
from byrote.kernels.engram_gate.reference import Conv, Extend, gate

__all__ = ["Conv", "Extend", "engram_add", "gate"]


def engram_add(
    streams_BTRD: Tensor,
    keys_BTRD: Tensor,
    value_BTD: Tensor,
    gain_RD: Tensor,
    conv: Conv | None,
    *,
    eps: float,
    hard: bool = False,
    document_BS: Tensor | None = None,
    extend: Extend | None = None,
) -> tuple[Tensor, Tensor]:
    """(streams with memory added, in their own dtype; gates α [B, T, R], float32).

    `document_BS`: documents of all tokens so far, of which the last T are these; None: each row is one. `extend` puts the
    normed values of earlier calls before these, [B, reach + T, R, D]; None: this call begins the text. ValueError: shapes.
    """
    _check(streams_BTRD, keys_BTRD, value_BTD, gain_RD, conv)
    tensors = (streams_BTRD, keys_BTRD, value_BTD, gain_RD)
    backend = cpu if extend is None and cpu.can_run(*tensors, conv, document_BS) else reference
    return backend.engram_add(*tensors, conv, eps=eps, hard=hard, document_BS=document_BS, extend=extend)


def _check(streams: Tensor, keys: Tensor, value: Tensor, gain: Tensor, conv: Conv | None) -> None:
    if streams.dim() != 4:
        raise ValueError(f"streams have shape {tuple(streams.shape)}; [batch, tokens, streams, dim] is needed")
    B, T, R, D = streams.shape
    wanted = {"keys": (keys, (B, T, R, D)), "value": (value, (B, T, D)), "gain": (gain, (R, D))}
    if conv is not None:
        wanted |= {"conv.weight": (conv.weight_RDW, (R, D, conv.weight_RDW.shape[-1])), "conv.gain": (conv.gain_RD, (R, D))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; streams of shape {tuple(streams.shape)} need {shape}")
