"""Loss by position: what a longer context is worth, and where it stops helping.

Texts are read in windows of `context` tokens that do not overlap; a token's position is its place in the window, and positions are
gathered into octaves (1–63, 64–127, 128–255 …). A model that uses its context has a loss that falls with the position; one that was
never trained so far has a loss that jumps behind the length it knows. Only whole windows count, so all octaves see the same texts.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from byrote.errors import DataError
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import Tokenizer

FIRST_OCTAVE = 64
BATCH_TOKENS = 8192


class Octave(NamedTuple):
    first: int  # positions of the targets, counted from 1: the begin token has none
    last: int
    loss: float  # nats a token
    tokens: int


@torch.no_grad()
def loss_by_position(model: Model, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[Octave]:
    """Mean loss of every octave of positions. DataError where no text fills a window."""
    lines = [[tokenizer.begin_id, *ids] for ids in tokenizer.encode_batch(texts)]
    windows = [line[start : start + context + 1] for line in lines for start in range(0, len(line) - context, context)]
    if not windows:
        raise DataError(f"no text has {context} tokens; give longer texts or a shorter context")
    model.eval()
    sums_T = torch.zeros(context, dtype=torch.float64)
    step = max(1, BATCH_TOKENS // context)
    for first in range(0, len(windows), step):
        tokens_BT = torch.tensor(windows[first : first + step], device=model.embed.weight.device)
        out = model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:], want=("token_losses",))
        sums_T += out.extras["token_losses"].double().sum(0).cpu()
    edges = [0]
    while edges[-1] < context:
        edges.append(min(context, max(FIRST_OCTAVE - 1, 2 * edges[-1] + 1)))
    return [
        Octave(low + 1, high, sums_T[low:high].mean().item() / len(windows), (high - low) * len(windows))
        for low, high in itertools.pairwise(edges)
    ]
