"""DeepSeekMoE (V3 §2.1.2, Eq 12–20): many narrow experts, a few chosen per token, some always on; balanced without an auxiliary loss.

    out = Σ_chosen gate_e · expert_e(x) + shared(x)

Balancing: a bias per expert is added to its affinity for the choice only; after each optimizer step it moves by ±γ towards equal
load (`update_bias`). A small sequence-wise loss α Σ f_e P_e guards single sequences. No capacity, no dropped token: tokens are
sorted by expert and multiplied in one grouped product. V4's first blocks look a token's experts up by its id; the gate still weighs
them.

Shapes: B batch, T tokens, N = B·T, D model, E experts, K experts a token, F expert width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from byrote.kernels.permute import combine, dispatch, sort_by_expert
from byrote.kernels.swiglu import swiglu
from byrote.kernels.topk_gate import SCORES, Choice, topk_gate
from byrote.model.config import MoEConfig
from byrote.model.linear import GroupedLinear, Linear

FEW_TOKENS = 4  # a call; beyond it sorting is cheaper


class Sorted(NamedTuple):
    """Tokens on their way through the experts: one entry per (token, expert) pair, ordered by expert."""

    x_MD: Tensor  # M = N·K
    gates_M: Tensor
    ends_E: Tensor  # int32, inclusive prefix sum of tokens per expert
    order_M: Tensor  # flat (token, slot) index of each entry
    place_M: Tensor  # the inverse: where each (token, slot) went


class Dispatcher(Protocol):
    """Takes tokens to experts and back; local by default, all-to-all under expert parallelism."""

    def dispatch(self, x_ND: Tensor, choice: Choice, load_E: Tensor) -> Sorted: ...
    def combine(self, out_MD: Tensor, sorted_: Sorted, tokens: int) -> Tensor: ...


class LocalSort:
    """All experts are here: sort by expert, sum back."""

    def dispatch(self, x_ND: Tensor, choice: Choice, load_E: Tensor) -> Sorted:
        order_M, place_M = sort_by_expert(choice.experts_NK.flatten(), load_E.shape[0])
        top_k = choice.experts_NK.shape[1]
        x_MD = dispatch(x_ND, order_M, place_M, top_k)
        gates_M = choice.gates_NK.flatten().index_select(0, order_M)
        return Sorted(x_MD, gates_M, load_E.cumsum(0).to(torch.int32), order_M, place_M)

    def combine(self, out_MD: Tensor, sorted_: Sorted, tokens: int) -> Tensor:
        return combine(out_MD, sorted_.order_M, sorted_.place_M, tokens)


class FeedForward(nn.Module):
    """A dense SwiGLU; gate and linear part are one projection."""

    def __init__(self, dim: int, hidden: int, limit: float | None) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x), limit=self.limit))


class Experts(nn.Module):
    """The routed experts, stacked [E, out, in]. The gate weighs the hidden state, before the down projection."""

    def __init__(self, dim: int, config: MoEConfig, limit: float | None) -> None:
        super().__init__()
        self.gate_up = GroupedLinear(config.num_experts, dim, 2 * config.expert_hidden)
        self.down = GroupedLinear(config.num_experts, config.expert_hidden, dim)
        self.limit = limit

    def forward(self, x_MD: Tensor, gates_M: Tensor, ends_E: Tensor) -> Tensor:
        hidden_MF = swiglu(self.gate_up(x_MD, ends_E), limit=self.limit, weight_N=gates_M)
        return self.down(hidden_MF, ends_E)

    def can_take_few(self, tokens: int) -> bool:
        """Whether `few` may stand in: some tokens but not many, no gradients, and the products are the plain ones."""
        plain = self.gate_up.is_plain and self.down.is_plain
        return 0 < tokens <= FEW_TOKENS and plain and not torch.is_grad_enabled()

    def few(self, x_ND: Tensor, choice: Choice) -> Tensor:
        """The same for a handful of tokens (decoding): one small product per chosen expert, nothing sorted."""
        rows = []
        for x_D, experts, gates_K in zip(x_ND, choice.experts_NK.tolist(), choice.gates_NK, strict=True):
            parts = [self._one(x_D, expert, gates_K[slot]) for slot, expert in enumerate(experts)]
            rows.append(sum(parts[1:], start=parts[0]))
        return torch.stack(rows)

    def _one(self, x_D: Tensor, expert: int, gate: Tensor) -> Tensor:
        wide = functional.linear(x_D[None], self.gate_up.weight[expert])
        return functional.linear(swiglu(wide, limit=self.limit, weight_N=gate[None]), self.down.weight[expert])[0]


class MoE(nn.Module):
    """With `vocabulary`, experts are chosen by token id (`table_VK`), without a bias."""

    def __init__(self, dim: int, config: MoEConfig, limit: float | None, vocabulary: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.empty(config.num_experts, dim))
        self.register_buffer("bias", None if vocabulary else torch.zeros(config.num_experts))
        self.register_buffer("table_VK", torch.zeros(vocabulary, config.top_k, dtype=torch.int64) if vocabulary else None)
        self.experts = Experts(dim, config, limit)
        self.shared = FeedForward(dim, config.num_shared * config.expert_hidden, limit) if config.num_shared else None
        self.dispatcher: Dispatcher = LocalSort()
        self.bias: Tensor | None
        self.table_VK: Tensor | None

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(output [B, T, D], notes: `scores` [B, T, E] unless chosen by token id, `experts` [B, T, K], `load` [E])."""
        x_ND = x_BTD.flatten(0, 1)
        choice, scores_NE = self._route(x_ND, tokens_BT)
        load_E = torch.bincount(choice.experts_NK.flatten(), minlength=self.config.num_experts)
        if isinstance(self.dispatcher, LocalSort) and self.experts.can_take_few(x_ND.shape[0]):
            out_ND = self.experts.few(x_ND, choice)
        else:
            sorted_ = self.dispatcher.dispatch(x_ND, choice, load_E)
            out_ND = self.dispatcher.combine(self.experts(sorted_.x_MD, sorted_.gates_M, sorted_.ends_E), sorted_, x_ND.shape[0])
        if self.shared is not None:
            out_ND = out_ND + self.shared(x_ND)
        notes = {"experts": choice.experts_NK, "load": load_E} | ({} if self.bias is None else {"scores": scores_NE})
        return out_ND.view(x_BTD.shape), {
            name: part if name == "load" else part.unflatten(0, x_BTD.shape[:2]) for name, part in notes.items()
        }

    def _route(self, x_ND: Tensor, tokens_BT: Tensor | None) -> tuple[Choice, Tensor]:
        c, work = self.config, torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = SCORES[c.score](functional.linear(x_ND.to(work), self.router.to(work)))
        choice = topk_gate(
            scores_NE,
            self.bias,
            self._look_up(tokens_BT),
            top_k=c.top_k,
            num_groups=c.num_groups,
            top_groups=c.top_groups,
            normalize=c.normalize_gate,
            route_scale=c.route_scale,
        )
        return choice, scores_NE

    def _look_up(self, tokens_BT: Tensor | None) -> Tensor | None:
        if self.table_VK is None:
            return None
        assert tokens_BT is not None, "experts that are chosen by token id need the tokens"
        return self.table_VK.index_select(0, tokens_BT.flatten())

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """One balancing step from the load of the whole (global) batch: ±γ, nothing where the load is exactly even."""
        if self.bias is None:
            return
        load = load_E.float()
        self.bias += self.config.bias_rate * torch.sign(load.mean() - load)


def balance_loss(scores_BTE: Tensor, experts_BTK: Tensor, alpha: float, real_BT: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss (V3 Eq 17–20): α Σ_e f_e P_e, mean over sequences; padding is left out.

    f_e is expert e's share of choices times E / K … so that an even load has f_e = 1, P_e its mean normalised affinity.
    """
    experts, top_k = scores_BTE.shape[-1], experts_BTK.shape[-1]
    share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
    chosen_BTE = torch.zeros_like(scores_BTE).scatter_(2, experts_BTK, 1.0)
    if real_BT is not None:
        share_BTE, chosen_BTE = share_BTE * real_BT[..., None], chosen_BTE * real_BT[..., None]
        tokens_B1 = real_BT.sum(1, keepdim=True).clamp_min(1)
    else:
        tokens_B1 = scores_BTE.new_full((1, 1), scores_BTE.shape[1])
    fraction_BE = chosen_BTE.sum(1) * (experts / top_k) / tokens_B1
    probability_BE = share_BTE.sum(1) / tokens_B1
    return alpha * (fraction_BE * probability_BE).sum(-1).mean()
