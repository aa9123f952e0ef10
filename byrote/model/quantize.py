"""A model for serving on the CPU with weights of int8 and numbers of fp32: a quarter of the bytes, of which decoding is made.

`quantize` exchanges, one after the other, the weight of every linear map for int8 with a scale per output (`kernels/int8`), and injects
the product that reads it. It stays floating point where the numbers are few and decide, or are read otherwise than by a product:

    int8   attention's projections, feed-forwards, experts, memory's keys and values, MTP, head
    fp     kv_b (attention absorbs it), routers and indexers (they choose), norms, mixing, convolutions, embedding, table rows

What comes out generates, scores and drafts; it is neither trained, nor saved, nor moved to a GPU, and its packs are put on before.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from byrote.errors import ConfigError
from byrote.kernels import int8
from byrote.kernels.int8 import Int8
from byrote.model.linear import GroupedLinear, Linear

WEIGHTS = ("saved", "int8")  # what `load` and the command line offer
_FLOATING = ("kv_b", "indexer")  # parts of names


class HasParameters(Protocol):
    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


class Int8Matmul:
    """`Linear.matmul` of an int8 weight."""

    def __init__(self, scale_F: Tensor) -> None:
        self.scale_F = scale_F

    def __call__(self, x: Tensor, weight_FD: Tensor) -> Tensor:
        _check_device(x)
        return int8.product(x, Int8(weight_FD, self.scale_F))


class GroupedInt8Matmul:
    """`GroupedLinear.matmul` of an int8 weight."""

    def __init__(self, scale_EF: Tensor) -> None:
        self.scale_F = scale_EF

    def __call__(self, x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        _check_device(x_ND)
        return int8.grouped_product(x_ND, Int8(weight_EFD, self.scale_F), ends_E)


def check_weights(weights: str, device: str | torch.device) -> str | torch.device:
    """The device to load to. ConfigError for weights that are not offered, or not on this device."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights are {weights!r}; allowed: {', '.join(WEIGHTS)}")
    if weights == "saved":
        return device
    if str(device) not in ("auto", "cpu"):
        raise ConfigError(
            f"int8 weights are for the CPU, and the device is {device}: give cpu (or auto), or leave the weights as they were saved"
        )
    return "cpu"


def to_quantize(model: nn.Module) -> Iterator[tuple[str, Linear | GroupedLinear]]:
    """(name, module) of what gets int8 weights."""
    for name, module in model.named_modules():
        if type(module) in (Linear, GroupedLinear) and not set(name.split(".")) & {*_FLOATING}:
            yield name, module


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Exchange the weights in place. ConfigError for what cannot be; nothing is changed then."""
    found = [(module, _quantized(name, module)) for name, module in to_quantize(model)]
    for module, (values, scale) in found:
        module.weight = nn.Parameter(values, requires_grad=False)
        module.matmul = Int8Matmul(scale) if isinstance(module, Linear) else GroupedInt8Matmul(scale)
    model.register_state_dict_pre_hook(_refuse_saving)


def _quantized(name: str, module: Linear | GroupedLinear) -> Int8:
    if not module.is_plain:
        raise ConfigError(f"{name} has a product of its own, {module.matmul!r}: a model is quantized once, as it was loaded")
    if module.weight.device.type != "cpu":
        raise ConfigError(f"{name}.weight is on {module.weight.device}; int8 weights are for the CPU: load the model there")
    try:
        return int8.quantize(module.weight)
    except ValueError as error:
        raise ConfigError(f"{name}.weight cannot be int8: {error}; take an earlier checkpoint") from None


def _refuse_saving(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    refuse_quantized(model, "saved or exported")


def refuse_quantized(model: HasParameters, what: str) -> None:
    """ConfigError if weights are int8."""
    if any(parameter.dtype == torch.int8 for _, parameter in model.named_parameters()):
        raise ConfigError(f"this model has int8 weights and cannot be {what}; load it with weights 'saved' (the default) for that")


def _check_device(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ConfigError(
            f"int8 weights are for the CPU, and the input is on {x.device}; load the model with weights 'saved' for that device"
        )
