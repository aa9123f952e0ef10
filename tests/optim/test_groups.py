"""Roles to optimizers, and a state that resumes bitwise through safetensors and JSON."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from byrote.errors import CheckpointError, ConfigError
from byrote.optim.groups import Optimizers, OptimizerState, build_optimizers, treatment
from byrote.optim.muon import Muon
from tests.tolerances import assert_bitwise, assert_close_fp32

ROLES = {
    "plain": ("matrix", (8, 12)),
    "q_b": ("matrix_rows:3", (12, 8)),
    "o": ("matrix_cols:3", (8, 12)),
    "gate_up": ("matrix_pair", (10, 8)),
    "experts": ("experts", (3, 8, 5)),
    "experts_gate_up": ("experts_pair", (3, 10, 8)),
    "router": ("router", (3, 8)),
    "embed": ("embedding", (17, 8)),
    "head": ("head", (17, 8)),
    "norm": ("norm", (8,)),
    "streams": ("mix", (4, 4)),
    "conv": ("conv", (8, 1, 4)),
}
MATRICES = ("plain", "q_b", "o", "gate_up", "experts", "experts_gate_up", "router")
DECAYED = (*MATRICES, "embed", "head")


@dataclass(frozen=True)
class Settings:
    matrix: str = "muon"
    lr: float = 0.02
    adam_lr: float = 0.002
    muon_momentum: float = 0.95
    newton_schulz: str = "quintic5"
    muon_rms: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


class Model(nn.Module):
    """Parameters with roles and no layers."""

    def __init__(self, names: tuple[str, ...] = tuple(ROLES)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in names:
            setattr(self, name, nn.Parameter(torch.randn(ROLES[name][1], generator=generator)))

    def param_roles(self) -> dict[str, str]:
        return {name: ROLES[name][0] for name, _ in self.named_parameters()}


def _train(model: Model, optimizers: Optimizers, steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, param in model.named_parameters():
            param.grad = None if name == "conv" else torch.randn(param.shape, generator=generator)
        optimizers.set_lr(1 / (1 + step))
        optimizers.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def _by_name(model: Model, optimizers: Optimizers) -> dict[str, tuple[torch.optim.Optimizer, dict]]:
    owners = {}
    for optimizer in optimizers.optimizers.values():
        for group in optimizer.param_groups:
            for param in group["params"]:
                assert param not in owners
                owners[param] = (optimizer, group)
    return {name: owners[param] for name, param in model.named_parameters()}


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_with_the_rate_and_decay_of_its_role(matrix):
    model = Model()
    owners = _by_name(model, build_optimizers(model, Settings(matrix=matrix)))
    for name in ROLES:
        optimizer, group = owners[name]
        assert isinstance(optimizer, Muon) == (matrix == "muon" and name in MATRICES)
        assert group["lr"] == (0.02 if name in MATRICES else 0.002)
        assert group["weight_decay"] == (0.1 if name in DECAYED else 0.0)


def test_splits_follow_the_roles():
    assert [treatment(ROLES[name][0]).split for name in ("plain", "q_b", "o", "gate_up", "experts", "experts_gate_up", "router")] == [
        None,
        ("rows", 3),
        ("cols", 3),
        ("rows", 2),
        None,
        ("rows", 2),
        None,
    ]


def test_parameters_outside_muon_move_like_torch_adamw():
    model, twin = Model(("embed", "norm")), Model(("embed", "norm"))
    ours = _train(model, build_optimizers(model, Settings()), range(1))
    adamw = torch.optim.AdamW(
        [{"params": [twin.embed], "weight_decay": 0.1}, {"params": [twin.norm], "weight_decay": 0.0}], lr=0.002, betas=(0.9, 0.95), eps=1e-8
    )
    generator = torch.Generator().manual_seed(0)
    for param in (twin.embed, twin.norm):
        param.grad = torch.randn(param.shape, generator=generator)
    adamw.step()
    for name, param in twin.named_parameters():
        assert_close_fp32(ours[name], param)


def test_set_lr_scales_every_peak_and_zero_stops_all_movement():
    model = Model()
    optimizers = build_optimizers(model, Settings())
    optimizers.set_lr(0.5)
    optimizers.set_lr(0.25)
    assert {group["lr"] for _, group in _by_name(model, optimizers).values()} == {0.005, 0.0005}
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizers.set_lr(0.0)
    optimizers.step()
    for name, param in model.named_parameters():
        assert_bitwise(param, before[name])


def test_zero_grad_drops_every_gradient():
    model = Model()
    optimizers = build_optimizers(model, Settings())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizers.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_frozen_parameters_belong_to_no_optimizer():
    model = Model(("plain", "norm"))
    model.plain.requires_grad_(False)
    optimizers = build_optimizers(model, Settings())
    assert list(optimizers.optimizers) == ["adamw"]


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(matrix, tmp_path):
    settings = Settings(matrix=matrix)
    model = Model()
    expected = _train(model, build_optimizers(model, settings), range(6))

    model = Model()
    optimizers = build_optimizers(model, settings)
    weights = _train(model, optimizers, range(3))
    tensors, meta = optimizers.state_dict()
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "optimizer.json").write_text(json.dumps(meta))

    resumed = Model()
    resumed.load_state_dict(weights)
    optimizers = build_optimizers(resumed, settings)
    optimizers.load_state_dict(
        OptimizerState(load_file(tmp_path / "optimizer.safetensors"), json.loads((tmp_path / "optimizer.json").read_text()))
    )
    got = _train(resumed, optimizers, range(3, 6))
    for name in expected:
        assert_bitwise(got[name], expected[name])


def test_state_is_named_after_parameters_and_absent_without_gradients():
    model = Model()
    optimizers = build_optimizers(model, Settings())
    assert optimizers.state_dict().tensors == {}
    _train(model, optimizers, range(1))
    tensors, _ = optimizers.state_dict()
    assert tensors["momentum/plain"].shape == (8, 12)
    assert tensors["step/norm"].item() == 1
    assert not any(key.endswith("/conv") for key in tensors)


def test_loading_copies():
    model = Model(("plain",))
    optimizers = build_optimizers(model, Settings())
    _train(model, optimizers, range(1))
    saved = optimizers.state_dict()
    optimizers.load_state_dict(saved)
    saved.tensors["momentum/plain"].zero_()
    assert optimizers.state_dict().tensors["momentum/plain"].any()


def _damage(kind: str, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    if kind == "shape":
        tensors["momentum/plain"] = torch.zeros(3)
    elif kind == "partial":
        del tensors["exp_avg_sq/norm"]
    elif kind == "extra":
        tensors["momentum/ghost"] = torch.zeros(3)
    elif kind == "format":
        meta["format"] = 2
    elif kind == "kind":
        meta["optimizers"]["plain"] = "adamw"
    elif kind == "absent":
        del meta["optimizers"]["norm"]


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("shape", r"momentum/plain has shape \(3,\).*\(8, 12\)"),
        ("partial", "norm has only step, exp_avg; it needs"),
        ("extra", "no parameter: momentum/ghost"),
        ("format", "format 2; this version reads format 1"),
        ("kind", "plain: adamw there, muon here"),
        ("absent", "norm: absent there, adamw here"),
    ],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(kind, match):
    model = Model(("plain", "norm"))
    optimizers = build_optimizers(model, Settings())
    _train(model, optimizers, range(2))
    tensors, meta = optimizers.state_dict()
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    _damage(kind, tensors, meta)
    with pytest.raises(CheckpointError, match=match):
        optimizers.load_state_dict(OptimizerState(tensors, meta))
    after = optimizers.state_dict().tensors
    for key in before:
        assert_bitwise(after[key], before[key])


@pytest.mark.parametrize("role", ["", "matrices", "matrix_rows", "matrix_rows:", "matrix_rows:-1", "experts:3"])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(ConfigError, match="allowed: matrix, router"):
        treatment(role)


def test_a_parameter_without_a_role_is_refused_by_name():
    model = Model(("plain", "norm"))
    model.param_roles = lambda: {"plain": "matrix"}
    with pytest.raises(ConfigError, match="says nothing about norm; give"):
        build_optimizers(model, Settings())
