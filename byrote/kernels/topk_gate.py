"""Which experts a token uses, and with what weight (V3 §2.1.2, Eq 12–16; group limit as released; V4's √softplus scores).

    s = score(logits)              affinities, fp32
    chosen = top-k of (s + bias)   the balancing bias decides the choice only …
    gate = s[chosen] / Σ s[chosen] · route_scale          … and never the weight

Group limit: experts are split into equal groups; a group's score is the sum of its two best biased affinities (the best one if
groups have a single expert); only the `top_groups` best groups stay eligible. Ties go to the lower index. V4's first blocks bring
their choice along (by token id); the weights are the same function of the scores.

Shapes: N tokens, E experts, K chosen experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SCORES = {
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


class Choice(NamedTuple):
    experts_NK: Tensor  # int64
    gates_NK: Tensor  # float32, differentiable


def topk_gate(
    scores_NE: Tensor,
    bias_E: Tensor | None,
    chosen_NK: Tensor | None = None,
    *,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    route_scale: float = 1.0,
) -> Choice:
    """Choose `top_k` experts a token from fp32 `scores_NE`, or take `chosen_NK`; gradients reach the scores through the gates only."""
    experts_NK = _choose(scores_NE, bias_E, top_k, num_groups, top_groups) if chosen_NK is None else chosen_NK
    gates_NK = scores_NE.gather(1, experts_NK)
    if normalize:
        gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)
    return Choice(experts_NK, gates_NK * route_scale)


@torch.no_grad()
def _choose(scores_NE: Tensor, bias_E: Tensor | None, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    biased_NE = scores_NE if bias_E is None else scores_NE + bias_E
    if top_groups < num_groups:
        biased_NE = _keep_best_groups(biased_NE, num_groups, top_groups)
    return _largest(biased_NE, top_k)


def _keep_best_groups(biased_NE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    grouped_NGe = biased_NE.view(biased_NE.shape[0], num_groups, -1)
    group_scores_NG = grouped_NGe.topk(min(2, grouped_NGe.shape[-1]), dim=-1).values.sum(dim=-1)
    kept_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter_(1, _largest(group_scores_NG, top_groups), True)
    return grouped_NGe.masked_fill(~kept_NG[..., None], float("-inf")).flatten(1)


def _largest(values_NE: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, of equals the first. `topk` alone takes any of equals.

    Only a tie at the border changes the set, and one is rare: a sort, five times as slow, settles it. Where looking for one would be
    a wait (an accelerator, a compiled graph) there is nothing but the sort.
    """
    if count == values_NE.shape[1]:
        return values_NE.topk(count, dim=-1).indices
    if values_NE.device.type == "cpu" and not torch.compiler.is_compiling():
        top = values_NE.topk(count + 1, dim=-1)
        if not bool((top.values[:, count - 1] == top.values[:, count]).any()):
            return top.indices[:, :count]
    return values_NE.sort(dim=-1, descending=True, stable=True).indices[:, :count]
