"""Which optimizer moves which parameter: read from the roles the model declares, never from its layers.

    role                                        optimizer     weight decay
    matrix, router                              Muon          yes     one matrix
    matrix_rows:H, matrix_cols:H                Muon          yes     H matrices side by side (heads)
    matrix_pair                                 Muon          yes     gate and up in one parameter
    experts, experts_pair                       Muon          yes     stacks of the above
    embedding, head                             AdamW         yes
    norm, mix, conv                             AdamW         no      gains, mHC mappings, short convolutions

With `optim.matrix == "adamw"` the upper half goes to AdamW too, at the same `optim.lr`: a Muon update has the RMS of an AdamW
update, so the rates are comparable. Memory tables are no parameters; `byrote.optim.rowwise` moves them.

`optim` is anything with the fields of `OptimConfig`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from byrote.errors import CheckpointError, ConfigError
from byrote.model.quantize import refuse_quantized
from byrote.optim.muon import Muon, Split

_MATRIX_SPLITS: dict[str, Split] = {
    "matrix": None,
    "router": None,
    "matrix_pair": ("rows", 2),
    "experts": None,
    "experts_pair": ("rows", 2),
}
_HEAD_SPLITS = {"matrix_rows": "rows", "matrix_cols": "cols"}
_ELEMENTWISE_DECAYS = {"embedding": True, "head": True, "norm": False, "mix": False, "conv": False}
_FUSED_DEVICES = ("cpu", "cuda", "mps")
_STATE_KEYS = {"muon": ("momentum",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


class HasRoles(Protocol):
    def param_roles(self) -> dict[str, str]: ...
    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


class OptimizerState(NamedTuple):
    """`tensors` fit a safetensors file, `meta` fits JSON; names are those of the parameters."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Treatment(NamedTuple):
    """What a role means for the optimizer."""

    is_matrix: bool
    decays: bool
    split: Split = None


def treatment(role: str) -> Treatment:
    """Reads a role; raises ConfigError for one that is not in the table above."""
    if role in _MATRIX_SPLITS:
        return Treatment(True, True, _MATRIX_SPLITS[role])
    if role in _ELEMENTWISE_DECAYS:
        return Treatment(False, _ELEMENTWISE_DECAYS[role])
    kind, _, count = role.partition(":")
    if kind in _HEAD_SPLITS and count.isdecimal():
        return Treatment(True, True, (_HEAD_SPLITS[kind], int(count)))
    allowed = [*_MATRIX_SPLITS, *(f"{kind}:H" for kind in _HEAD_SPLITS), *_ELEMENTWISE_DECAYS]
    raise ConfigError(f"parameter role {role!r} is unknown; allowed: {', '.join(allowed)}")


def build_optimizers(model: HasRoles, optim: Any) -> "Optimizers":
    """Every trainable parameter of `model` in exactly one optimizer. Learning rates are the peaks until `set_lr`."""
    refuse_quantized(model, "trained")
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    roles = model.param_roles()
    missing = [name for name in params if name not in roles]
    if missing:
        raise ConfigError(
            f"param_roles() says nothing about {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; give every parameter a role"
        )
    treated = {name: treatment(roles[name]) for name in params}
    by_muon = {name for name in params if optim.matrix == "muon" and treated[name].is_matrix}
    kinds = {name: "muon" if name in by_muon else "adamw" for name in params}
    groups: dict[tuple[str, Treatment], list[nn.Parameter]] = {}
    for name, param in params.items():
        groups.setdefault((kinds[name], treated[name]), []).append(param)
    return Optimizers(params, kinds, {kind: _build(kind, groups, optim) for kind in sorted(set(kinds.values()))})


def _build(kind: str, groups: dict[tuple[str, Treatment], list[nn.Parameter]], optim: Any) -> Optimizer:
    mine = [
        {
            "params": params,
            "lr": optim.lr if how.is_matrix else optim.adam_lr,
            "weight_decay": optim.weight_decay if how.decays else 0.0,
        }
        | ({"split": how.split} if kind == "muon" else {})
        for (owner, how), params in groups.items()
        if owner == kind
    ]
    if kind == "muon":
        return Muon(mine, lr=optim.lr, momentum=optim.muon_momentum, rms=optim.muon_rms, coefficients=optim.newton_schulz)
    fused = all(param.device.type in _FUSED_DEVICES for group in mine for param in group["params"])
    return AdamW(mine, lr=optim.adam_lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


class Optimizers:
    """Muon and AdamW side by side, stepped, scaled, saved and loaded as one."""

    def __init__(self, params: dict[str, nn.Parameter], kinds: dict[str, str], optimizers: dict[str, Optimizer]) -> None:
        self._params, self._kinds, self.optimizers = params, kinds, optimizers
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> Iterable[dict[str, Any]]:
        return (group for optimizer in self.optimizers.values() for group in optimizer.param_groups)

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, scale: float) -> None:
        """Every learning rate becomes its peak × `scale`."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * scale

    def state_dict(self) -> OptimizerState:
        """The live state, keyed `state/parameter`; parameters that never had a gradient have none. Rates are not part of it."""
        tensors = {
            f"{key}/{name}": self.optimizers[kind].state[self._params[name]][key]
            for name, kind in self._kinds.items()
            if self.optimizers[kind].state[self._params[name]]
            for key in _STATE_KEYS[kind]
        }
        return OptimizerState(tensors, {"format": 1, "optimizers": dict(self._kinds)})

    def load_state_dict(self, state: OptimizerState) -> None:
        """Continues bitwise where `state` was taken. Raises CheckpointError, and changes nothing, if it is of other parameters."""
        self._check_meta(state.meta)
        tensors = dict(state.tensors)
        loaded = {name: self._read(name, tensors) for name in self._params}
        if tensors:
            raise CheckpointError(f"optimizer state has tensors of no parameter: {', '.join(sorted(tensors)[:3])}")
        for name, entry in loaded.items():
            self.optimizers[self._kinds[name]].state[self._params[name]] = entry

    def _check_meta(self, meta: dict[str, Any]) -> None:
        if meta.get("format") != 1:
            raise CheckpointError(f"optimizer state has format {meta.get('format')!r}; this version reads format 1")
        for name in {**meta["optimizers"], **self._kinds}:
            there, here = (kinds.get(name, "absent") for kinds in (meta["optimizers"], self._kinds))
            if there != here:
                raise CheckpointError(
                    f"optimizer state and model disagree on {name}: {there} there, {here} here; "
                    "resume with the model and the optim.matrix of the saved run"
                )

    def _read(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the state of one parameter out of `tensors`; empty if it has none."""
        keys = _STATE_KEYS[self._kinds[name]]
        found = {key: tensors.pop(f"{key}/{name}") for key in keys if f"{key}/{name}" in tensors}
        if found and len(found) < len(keys):
            raise CheckpointError(f"optimizer state of {name} has only {', '.join(found)}; it needs {', '.join(keys)}")
        return {key: self._place(name, key, tensor) for key, tensor in found.items()}

    def _place(self, name: str, key: str, tensor: Tensor) -> Tensor:
        param = self._params[name]
        expected = torch.Size(()) if key == "step" else param.shape
        if tensor.shape != expected:
            raise CheckpointError(f"{key}/{name} has shape {tuple(tensor.shape)}; the parameter needs {tuple(expected)}")
        on_host = key == "step" and param.device.type not in _FUSED_DEVICES
        return tensor.detach().to("cpu" if on_host else param.device, copy=True)
