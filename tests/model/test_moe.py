"""Experts: sorted and grouped is a loop over experts, nobody is dropped, and balancing moves the choice alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.topk_gate import topk_gate
from byrote.model.config import MoEConfig
from byrote.model.moe import FEW_TOKENS, MoE, balance_loss
from tests.model.tiny_models import MOE, build, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

DIM = 16


def layer(config: MoEConfig, *, limit: float | None = None, seed: int = 0) -> MoE:
    made = MoE(DIM, config, limit)
    generator = torch.Generator().manual_seed(seed)
    for param in made.parameters():
        param.data.normal_(0, 0.4, generator=generator)
    return made


def loop(moe: MoE, x_BTD: Tensor, limit: float | None = None) -> Tensor:
    """Token by token, expert by expert, from the equations (V3 Eq 12–16)."""

    def expert(gate_up: Tensor, down: Tensor, x_D: Tensor) -> Tensor:
        gate, up = (gate_up @ x_D).chunk(2)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return down @ (gate * torch.sigmoid(gate) * up)

    c, rows = moe.config, []
    for x_D in x_BTD.flatten(0, 1):
        logits_E = moe.router @ x_D
        scores_E = torch.sigmoid(logits_E) if c.score == "sigmoid" else torch.log1p(logits_E.exp()).sqrt()
        chosen = choose(scores_E + moe.bias, c)
        gates = {e: scores_E[e] / (sum(scores_E[i] for i in chosen) if c.normalize_gate else 1) * c.route_scale for e in chosen}
        routed = sum(gates[e] * expert(moe.experts.gate_up.weight[e], moe.experts.down.weight[e], x_D) for e in chosen)
        rows.append(routed + expert(moe.shared.gate_up.weight, moe.shared.down.weight, x_D) if moe.shared else routed)
    return torch.stack(rows).view(x_BTD.shape)


def choose(biased_E: Tensor, c: MoEConfig) -> list[int]:
    """Brute force: groups by the sum of their two best, then the best experts of the kept groups; of equals the first."""
    biased = biased_E.tolist()
    size = c.num_experts // c.num_groups
    groups = [list(range(start, start + size)) for start in range(0, c.num_experts, size)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    kept = sorted(e for group in groups[: c.top_groups] for e in group)
    return sorted(kept, key=lambda e: -biased[e])[: c.top_k]


CONFIGS = {
    "plain": MOE,
    "no shared expert, sums kept, scaled": replace(MOE, num_shared=0, normalize_gate=False, route_scale=2.5),
    "two shared experts, sqrt-softplus": replace(MOE, num_shared=2, score="sqrt_softplus", route_scale=1.5),
    "groups": replace(MOE, num_experts=12, num_groups=4, top_groups=2, top_k=3),
    "every expert": replace(MOE, top_k=5),
    "one expert": replace(MOE, num_experts=1, top_k=1),
}


@pytest.mark.parametrize("width", [8, 7], ids=["grouped product", "width that takes the loop"])
@pytest.mark.parametrize("name", CONFIGS)
def test_sorted_and_grouped_is_a_loop_over_experts(name, width):
    config = replace(CONFIGS[name], expert_hidden=width)
    moe, twin = layer(config), layer(config)
    for one in (moe, twin):
        one.bias += torch.linspace(-0.3, 0.3, config.num_experts)
    x_BTD, cotangent = torch.randn(2, 2, 9, DIM).unbind(0)
    x_BTD, twin_x = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    got, want = moe(x_BTD)[0], loop(twin, twin_x)
    assert_close_fp32(got, want)
    (got * cotangent).sum().backward()
    (want * cotangent).sum().backward()
    assert_close_fp32(x_BTD.grad, twin_x.grad)
    for (param_name, param), other in zip(moe.named_parameters(), twin.parameters(), strict=True):
        if param_name != "router" or name != "one expert":  # a lone expert's normalised gate is 1 whatever the router says
            assert_close_fp32(param.grad, other.grad)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_few_tokens_take_another_path_to_the_same_place(name, tokens):
    moe, x_BTD = layer(CONFIGS[name], limit=0.5), torch.randn(1, tokens, DIM)
    with_gradients, notes = moe(x_BTD)
    with torch.no_grad():
        few, few_notes = moe(x_BTD)
    assert_close_fp32(few, with_gradients)
    assert_bitwise(few_notes["load"], notes["load"])


def test_an_injected_product_and_dispatcher_serve_few_tokens_too():
    moe, x_BTD, seen = layer(MOE), torch.randn(1, 1, DIM), []
    plain, local = moe.experts.down.matmul, moe.dispatcher.dispatch
    moe.experts.down.matmul = lambda *given: (seen.append("product"), plain(*given))[1]
    with torch.no_grad():
        moe(x_BTD)
        moe.experts.down.matmul = plain

        class Elsewhere:
            dispatch = staticmethod(lambda *given: (seen.append("dispatch"), local(*given))[1])
            combine = staticmethod(moe.dispatcher.combine)

        moe.dispatcher = Elsewhere()
        moe(x_BTD)
    assert seen == ["product", "dispatch"]


def test_one_expert_of_weight_one_is_a_dense_layer():
    moe = layer(MoEConfig(num_experts=1, top_k=1, expert_hidden=8, num_shared=1))
    dense, x_BTD = moe.shared, torch.randn(2, 7, DIM)
    moe.shared = None
    dense.gate_up.weight.data.copy_(moe.experts.gate_up.weight[0])
    dense.down.weight.data.copy_(moe.experts.down.weight[0])
    assert_close_fp32(moe(x_BTD)[0], dense(x_BTD))


def test_no_token_is_dropped_when_all_want_one_expert():
    moe, x_BTD = layer(MOE), torch.randn(3, 31, DIM)
    moe.bias[3] += 100.0
    out_BTD, notes = moe(x_BTD)
    assert notes["load"][3] == 93
    assert notes["load"].sum() == 93 * MOE.top_k
    assert_close_fp32(out_BTD, loop(moe, x_BTD))


def test_tokens_are_independent_of_their_company():
    moe, x_BTD = layer(MOE), torch.randn(1, 33, DIM)
    with torch.no_grad():
        assert_close_fp32(moe(x_BTD)[0][:, 9:20], moe(x_BTD[:, 9:20])[0])


def test_no_tokens_are_no_trouble():
    moe = layer(MOE)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out_BTD, notes = moe(torch.zeros(2, 0, DIM))
        assert out_BTD.shape == (2, 0, DIM)
        assert notes["load"].tolist() == [0] * 5


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (3, 1), (3, 2), (4, 2), (12, 5)])
def test_group_limited_choice_is_that_of_brute_force(num_groups, top_groups):
    reach = top_groups * 12 // num_groups
    config = MoEConfig(num_experts=12, top_k=min(4, reach), expert_hidden=1, num_groups=num_groups, top_groups=top_groups)
    scores_NE, bias_E = torch.rand(257, 12), torch.randn(12) * 0.2
    choice = topk_gate(scores_NE, bias_E, top_k=config.top_k, num_groups=num_groups, top_groups=top_groups)
    wanted = [sorted(choose(scores_E + bias_E, config)) for scores_E in scores_NE]
    assert choice.experts_NK.sort(dim=1).values.tolist() == wanted


@pytest.mark.parametrize(("experts", "top_k", "num_groups", "top_groups"), [(16, 3, 1, 1), (64, 6, 1, 1), (16, 4, 4, 2), (5, 5, 1, 1)])
def test_of_equal_experts_the_first_are_chosen(experts, top_k, num_groups, top_groups):
    """PyTorch's own topk takes others: of 16 equal numbers experts 10 and 11 for two."""
    config = MoEConfig(num_experts=experts, top_k=top_k, expert_hidden=1, num_groups=num_groups, top_groups=top_groups)
    scores_NE = torch.cat((torch.full((3, experts), 0.5), torch.randint(1, 4, (257, experts)) / 4))
    choice = topk_gate(scores_NE, torch.zeros(experts), top_k=top_k, num_groups=num_groups, top_groups=top_groups)
    assert choice.experts_NK.sort(dim=1).values.tolist() == [sorted(choose(scores_E, config)) for scores_E in scores_NE]
    assert choice.experts_NK[0].sort().values.tolist() == list(range(top_k))


def test_the_bias_decides_the_choice_and_never_the_weight():
    moe, x_BTD = layer(MOE), torch.randn(1, 50, DIM)
    before, notes = moe(x_BTD)
    moe.bias += 0.7  # the same for all: the same choice
    after, same = moe(x_BTD)
    assert_bitwise(same["experts"], notes["experts"])
    assert_bitwise(after, before)
    moe.bias[2] += 5
    assert (moe(x_BTD)[1]["experts"] == 2).any(-1).all()


def test_the_bias_has_no_gradient_and_is_no_parameter():
    moe = layer(MOE)
    assert "bias" in dict(moe.named_buffers())
    moe(torch.randn(1, 9, DIM))[0].sum().backward()
    assert moe.bias.grad is None


def test_the_bias_moves_by_exactly_gamma_towards_balance():
    moe = layer(replace(MOE, bias_rate=0.001))
    moe.update_bias(torch.tensor([10, 0, 5, 6, 4]))
    gamma = torch.tensor(0.001)
    assert_bitwise(moe.bias, torch.stack([-gamma, gamma, 0 * gamma, -gamma, gamma]))
    moe.update_bias(torch.tensor([3, 3, 3, 3, 3]))
    assert_bitwise(moe.bias, torch.stack([-gamma, gamma, 0 * gamma, -gamma, gamma]))


def test_balancing_evens_out_a_lopsided_router():
    moe, x_BTD = layer(replace(MOE, bias_rate=0.02)), torch.randn(1, 300, DIM) + 1.0
    with torch.no_grad():
        first = moe(x_BTD)[1]["load"].float()
        for _ in range(80):
            moe.update_bias(moe(x_BTD)[1]["load"])
        last = moe(x_BTD)[1]["load"].float()
    assert last.max() / last.mean() < 1.2 < first.max() / first.mean()


def test_the_balance_loss_is_v3s_formula():
    scores_BTE, top_k, alpha = torch.rand(3, 11, 7), 2, 0.01
    experts_BTK = scores_BTE.topk(top_k, dim=-1).indices
    real_BT = torch.rand(3, 11) < 0.7
    for real in (None, real_BT):
        total = 0.0
        for sequence in range(3):
            kept = [t for t in range(11) if real is None or real[sequence, t]]
            for expert in range(7):
                f = 7 / (top_k * len(kept)) * sum(int(expert in experts_BTK[sequence, t]) for t in kept)
                p = sum(scores_BTE[sequence, t, expert] / scores_BTE[sequence, t].sum() for t in kept) / len(kept)
                total = total + f * p
        assert_close_fp32(balance_loss(scores_BTE, experts_BTK, alpha, real), torch.as_tensor(alpha * total / 3))


def test_an_even_load_costs_alpha_and_a_lopsided_one_more():
    even = torch.full((1, 10, 5), 0.3)
    spread = (torch.arange(10)[:, None] * 2 + torch.arange(2)) % 5
    assert_close_fp32(balance_loss(even, spread[None], 1.0), torch.tensor(1.0))
    lopsided = torch.tensor([1.0, 1.0, 0.1, 0.1, 0.1]).expand(1, 10, 5)
    assert balance_loss(lopsided, torch.tensor([0, 1]).expand(1, 10, 2), 1.0) > 2


def test_the_clamp_bounds_what_a_feed_forward_can_say():
    limit = 0.5
    moe, x_BTD = layer(MOE, limit=limit), torch.randn(1, 20, DIM) * 100
    moe.router.data *= 0.01  # affinities that do not saturate: ties would be broken one way or the other
    assert_close_fp32(moe(x_BTD)[0], loop(moe, x_BTD, limit))
    assert moe(x_BTD)[0].abs().max() < moe.experts.down.weight.abs().max() * limit * limit * 8 * 3


def test_a_model_counts_real_tokens_only_and_names_the_modules():
    model, tokens_BT = build(whole()).train(), text(2, 9)
    document_BT = torch.tensor([[0] * 9, [0] * 4 + [-1] * 5])
    loads = model(tokens_BT, document_BT=document_BT, targets_BT=next_tokens(tokens_BT, document_BT)).loads
    assert sorted(loads) == ["blocks.1.ffn", "blocks.2.ffn", "mtp.0.block.ffn", "mtp.1.block.ffn"]
    assert all(load.sum() == 13 * MOE.top_k for load in loads.values())
    before = {name: model.get_submodule(name).bias.clone() for name in loads}
    model.update_balance(loads)
    for name, load in loads.items():
        assert_bitwise(model.get_submodule(name).bias, before[name] + 0.001 * torch.sign(load.float().mean() - load))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 6}, r"1\.\.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_groups": 2}, "must divide"),
        ({"num_experts": 6, "num_groups": 3, "top_groups": 4}, r"1\.\.3"),
        ({"num_experts": 6, "num_groups": 3, "top_groups": 1, "top_k": 3}, r"leaves \(2\)"),
        ({"score": "softmax"}, "sqrt_softplus"),
    ],
)
def test_routing_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(MOE, **changes)
