"""Muon against torch.optim.Muon, against itself one matrix at a time, and against its own lemmas."""

import pytest
import torch
from torch import nn

from byrote.errors import ConfigError
from byrote.kernels.orthogonalize import orthogonalize
from byrote.optim import muon as muon_file
from byrote.optim.muon import Muon
from tests.tolerances import BF16, FP32, assert_bitwise, assert_close_fp32


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _train(optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    """Some steps with fixed random gradients; returns the parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        for number, param in enumerate(params):
            param.grad = _randn(*param.shape, seed=100 * step + number)
        optimizer.step()
    return [param.detach() for param in params]


def _params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(_randn(*shape, seed=1000 + number)) for number, shape in enumerate(shapes)]


def _distance(ours: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return sum((mine - other).square().sum().item() for mine, other in zip(ours, others, strict=True)) ** 0.5


SHAPES = ((8, 24), (24, 8), (7, 40), (1, 5), (8, 24))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_all_but_the_iteration_is_torch_muon(momentum, monkeypatch):
    # torch iterates in bf16 only; with our iteration in fp32 put into both, the rest must agree to fp32.
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda grad, *_: orthogonalize(grad, dtype=torch.float32))
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": 0.1}
    ours = _train(Muon(_params(*SHAPES), ns_dtype=torch.float32, **settings), steps=5)
    torchs = _train(torch.optim.Muon(_params(*SHAPES), adjust_lr_fn="match_rms_adamw", **settings), steps=5)
    for mine, twin in zip(ours, torchs, strict=True):
        assert_close_fp32(mine, twin)


def test_bf16_steps_are_as_close_to_exact_as_those_of_torch_muon():
    settings = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1}
    exact = _train(Muon(_params(*SHAPES), ns_dtype=torch.float32, **settings), steps=5)
    ours = _train(Muon(_params(*SHAPES), ns_dtype=torch.bfloat16, **settings), steps=5)
    torchs = _train(torch.optim.Muon(_params(*SHAPES), adjust_lr_fn="match_rms_adamw", **settings), steps=5)
    assert 0 < _distance(ours, exact) <= 1.25 * _distance(torchs, exact)


@pytest.mark.parametrize(("rms", "coefficients", "low", "high"), [(0.2, "quintic5", 0.6818, 1.1344), (0.18, "hybrid8+2", 1.0, 1.0021)])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (3, 12, 40)])
def test_an_update_has_the_chosen_rms(rms, coefficients, low, high, shape):
    (param,) = _params(shape)
    before = param.detach().clone()
    (after,) = _train(Muon([param], lr=1.0, weight_decay=0.0, rms=rms, coefficients=coefficients, ns_dtype=torch.float32), steps=1)
    assert low - FP32 <= (after - before).square().mean().sqrt() / rms <= high + FP32


@pytest.mark.parametrize(
    ("shape", "split", "blocks"),
    [
        ((3, 7, 5), None, lambda p: [p[0], p[1], p[2]]),
        ((12, 5), ("rows", 3), lambda p: [p[:4], p[4:8], p[8:]]),
        ((5, 12), ("cols", 3), lambda p: [p[:, :4], p[:, 4:8], p[:, 8:]]),
        ((2, 6, 5), ("rows", 2), lambda p: [p[0, :3], p[0, 3:], p[1, :3], p[1, 3:]]),
    ],
)
def test_blocks_of_a_parameter_move_like_parameters_of_their_own(shape, split, blocks):
    (param,) = _params(shape)
    alone = [nn.Parameter(block.detach().clone()) for block in blocks(param)]
    together = Muon([{"params": [param], "split": split}], lr=0.1, ns_dtype=torch.float32)
    apart = Muon(alone, lr=0.1, ns_dtype=torch.float32)
    for step in range(3):
        param.grad = _randn(*shape, seed=step)
        for block, grad in zip(alone, blocks(param.grad), strict=True):
            block.grad = grad.clone()
        together.step()
        apart.step()
    for block, lone in zip(blocks(param.detach()), alone, strict=True):
        assert_close_fp32(block, lone)


@pytest.mark.parametrize("numbers", [1, 300, 1 << 20])
def test_the_batch_size_does_not_change_the_steps(numbers, monkeypatch):
    shapes = (*SHAPES, (5, 8, 24), (2, 24, 8))
    monkeypatch.setattr(muon_file, "_batch_numbers", lambda device: numbers)
    got = _train(Muon(_params(*shapes), lr=0.1, ns_dtype=torch.float32), steps=2)
    monkeypatch.setattr(muon_file, "_batch_numbers", lambda device: 1 << 30)
    whole = _train(Muon(_params(*shapes), lr=0.1, ns_dtype=torch.float32), steps=2)
    for mine, twin in zip(got, whole, strict=True):
        assert_close_fp32(mine, twin)


def test_rates_and_decays_are_those_of_the_group():
    frozen, decayed = _params((8, 24), (8, 24))
    before = decayed.detach().clone()
    optimizer = Muon([{"params": [frozen], "lr": 0.0}, {"params": [decayed], "weight_decay": 0.5}], lr=0.1)
    frozen.grad, decayed.grad = torch.ones(8, 24), torch.zeros(8, 24)
    start = frozen.detach().clone()
    optimizer.step()
    assert_bitwise(frozen, start)
    assert_close_fp32(decayed, 0.95 * before)


def test_a_parameter_without_gradient_is_left_alone():
    idle, busy = _params((8, 24), (8, 24))
    before = idle.detach().clone()
    optimizer = Muon([idle, busy], lr=0.1)
    busy.grad = torch.ones(8, 24)
    optimizer.step()
    assert_bitwise(idle, before)
    assert idle not in optimizer.state


def test_bf16_momentum_stays_close_to_fp32_momentum():
    fp32 = _train(Muon(_params((8, 24)), lr=0.1, ns_dtype=torch.float32), steps=5)[0]
    halved = Muon(_params((8, 24)), lr=0.1, ns_dtype=torch.float32, momentum_dtype=torch.bfloat16)
    bf16 = _train(halved, steps=5)[0]
    (state,) = halved.state.values()
    assert state["momentum"].dtype == torch.bfloat16
    assert 0 < (bf16 - fp32).norm() <= BF16 * (fp32 - _params((8, 24))[0].detach()).norm()


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({"params": [nn.Parameter(torch.zeros(3))]}, "AdamW"),
        ({"params": [nn.Parameter(torch.zeros(7, 4))], "split": ("rows", 2)}, r"\(7, 4\).*2 equal"),
        ({"params": [nn.Parameter(torch.zeros(4, 7))], "split": ("cols", 2)}, r"\(4, 7\).*2 equal"),
        ({"params": [nn.Parameter(torch.zeros(4, 4))], "split": ("heads", 2)}, "rows, cols"),
    ],
)
def test_what_is_no_matrix_is_refused(group, match):
    with pytest.raises(ConfigError, match=match):
        Muon([group], lr=0.1)


def test_an_unknown_iteration_is_refused():
    with pytest.raises(ConfigError, match=r"quintic5, hybrid8\+2"):
        Muon(_params((2, 2)), lr=0.1, coefficients="cubic")
