"""Batch: all that a block needs to know about the tokens besides their hidden states, so that a pipeline stage can be handed it whole.

Documents: a number per token, −1 is padding, None means that every row is one document. Attention, positions, n-grams and the
Engram convolution stop where the number changes. In a `Batch` they are numbered by their runs (`documents.py`).

Shapes: B batch, T tokens of this call, S keys (T plus what the state held before).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.cross_entropy import IGNORE
from byrote.memory.conditional import Rows
from byrote.model.documents import document_positions
from byrote.model.rope import Rotation
from byrote.model.state import DecodeState


class Batch(NamedTuple):
    tokens_BT: Tensor
    document_BT: Tensor | None
    keys_document_BS: Tensor | None  # documents of all keys
    position_BT: Tensor
    turn: Rotation
    mask_B1TS: Tensor | None  # True where a query may look; None: see `causal`
    causal: bool
    rows: Rows | None
    state: DecodeState | None

    def without_memory(self, sequences: int) -> "Batch":
        """The first `sequences` sequences, for blocks that read no memory (MTP)."""
        part = slice(sequences)
        return self._replace(
            tokens_BT=self.tokens_BT[part],
            document_BT=None if self.document_BT is None else self.document_BT[part],
            keys_document_BS=None if self.keys_document_BS is None else self.keys_document_BS[part],
            position_BT=self.position_BT[part],
            turn=Rotation(self.turn.cos[part], self.turn.sin[part]),
            mask_B1TS=None if self.mask_B1TS is None else self.mask_B1TS[part],
            rows=None,
        )


def positions(tokens_BT: Tensor, document_BT: Tensor | None, state: DecodeState | None) -> Tensor:
    """Positions inside each document, going on from the state's last token where its document goes on."""
    batch, length = tokens_BT.shape
    if document_BT is None:
        fresh = torch.arange(length, device=tokens_BT.device).expand(batch, length)
    else:
        fresh = document_positions(document_BT)
    if state is None or state.length == 0 or length == 0:
        return fresh
    next_B1 = state.positions.all()[:, -1:] + 1
    if document_BT is None:
        return fresh + next_B1
    last_B1 = torch.zeros_like(next_B1) if state.documents is None else state.documents.all()[:, -1:]
    leading_BT = (document_BT == last_B1).to(torch.int64).cumprod(dim=1)
    return fresh + leading_BT * next_B1


def attention_mask(
    document_BT: Tensor | None, keys_BS: Tensor | None, queries: int, keys: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """(mask, causal) for `kernels.attention`."""
    if keys_BS is None and queries == keys:
        return None, True
    if keys_BS is None and queries == 1:
        return None, False
    order_TS = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if keys_BS is None:
        return order_TS[None, None], False
    assert document_BT is not None
    same_BTS = (document_BT[:, :, None] == keys_BS[:, None, :]) & (document_BT >= 0)[:, :, None]
    return (same_BTS & order_TS)[:, None], False


def check_tokens(tokens_BT: Tensor, vocab_size: int, *, targets_BT: Tensor | None, **others: Tensor | None) -> None:
    """Refuse what would index out of range or broadcast by mistake. `others`, by name: one number a token each.

    Values are looked at on the CPU only: on an accelerator that would wait for it.
    """
    if tokens_BT.dim() != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"tokens must be integers [batch, tokens]; got {tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}")
    for name, other in {"targets_BT": targets_BT, **others}.items():
        if other is not None and other.shape != tokens_BT.shape:
            raise ConfigError(f"{name} has shape {tuple(other.shape)}, tokens {tuple(tokens_BT.shape)}; they must agree")
    _check_range(tokens_BT, vocab_size, "token ids")
    if targets_BT is not None:
        _check_range(targets_BT.masked_fill(targets_BT == IGNORE, 0), vocab_size, f"targets other than {IGNORE} (not scored)")


def _check_range(ids_BT: Tensor, vocab_size: int, what: str) -> None:
    if ids_BT.numel() == 0 or ids_BT.device.type != "cpu":
        return
    low, high = (int(end) for end in torch.aminmax(ids_BT))
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"{what} span {low}..{high}, the model's vocabulary is 0..{vocab_size - 1}; was the text encoded with another tokenizer?"
        )
