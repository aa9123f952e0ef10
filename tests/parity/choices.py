"""What two models' indexers choose, side by side.

Between keys whose scores agree to 1e-5 no choice is wrong, and such a choice moves logits.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GAP = 1e-5  # scores closer than this, relative to the largest of their row, are equal


@contextmanager
def choices(attention: ModuleType, indexers: Iterable[torch.nn.Module]) -> Iterator[tuple[list[Any], list[Tensor]]]:
    """What each side chooses, call by call: (chosen, arguments of `select`) of our `attention`'s module, indices of their indexers."""
    mine: list[Any] = []
    other: list[Tensor] = []
    select = attention.select

    def noted(*args: Any) -> Any:
        chosen = select(*args)
        mine.append((chosen, args))
        return chosen

    attention.select = noted  # type: ignore[attr-defined]
    hooks = [indexer.register_forward_hook(lambda _module, _args, out: other.append(out)) for indexer in indexers]
    try:
        yield mine, other
    finally:
        attention.select = select  # type: ignore[attr-defined]
        for hook in hooks:
            hook.remove()


def joined(parts: list[Tensor]) -> Tensor:
    """Indices [B, T, K] of calls for one piece of the text after the other, which may have chosen fewer; −1 is no key."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=-1) for part in parts], dim=1)


def assert_same_choices(mine: list[Any], other: list[Tensor]) -> int:
    """Every query's set is the other's, but for keys whose scores almost tie; returns in how many rows they do differ."""
    differ = 0
    for (chosen, (q, k, weight, spans, _)), indices in zip(mine, other, strict=True):
        keys = k.shape[1]
        ours = torch.zeros(*q.shape[:2], keys, dtype=torch.int64).scatter_add_(2, chosen.index_BTK, chosen.valid_BTK.long()) > 0
        theirs = ours.new_zeros(*q.shape[:2], keys + 1).scatter_(2, indices.long() % (keys + 1), True)[..., :keys] & spans.mask(keys)
        for row, query in ((ours != theirs).any(-1)).nonzero().tolist():
            scores = (q[row, query].double() @ k[row].double().T).relu().mul(weight[row, query].double()[:, None]).sum(0)
            swapped = scores[ours[row, query] != theirs[row, query]]
            assert swapped.max() - swapped.min() <= GAP * scores.abs().max().clamp_min(1)
            differ += 1
    return differ
