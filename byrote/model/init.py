"""Every initial distribution, in one place. Reproducible from a seed on any device: numbers are drawn on the CPU in module order.

matrices, embedding, head, router     N(0, init_std)
experts of a token id (V4)            K different ones, drawn evenly
norms, gains                          1
V4's gate biases, sinks               0
convolution of memory                 0 (Engram §4.1)
mHC, HC                               as the plain residual (see hyper_connection.py)
table rows                            N(0, engram.table_std), in memory/table.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from byrote.model.csa import GroupedProjection
from byrote.model.hyper_connection import FreeSite, ManifoldReadOut, ManifoldSite
from byrote.model.linear import GroupedLinear, Linear
from byrote.model.moe import MoE


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made inside have shapes and no numbers: storage is to come from elsewhere."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Drawing into no storage does nothing, but PyTorch imports its compiler for that, which takes seconds."""

    def __torch_function__(self, function: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Fill all parameters in place, where they have storage."""
    if next(model.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, ManifoldSite | ManifoldReadOut | FreeSite):
            module.reset(generator)
        elif isinstance(module, Linear | GroupedLinear | GroupedProjection | nn.Embedding):
            module.weight.data.normal_(0, std, generator=generator)
        elif isinstance(module, MoE):
            module.router.data.normal_(0, std, generator=generator)
            if module.table_VK is not None:
                _draw_experts(module.table_VK, module.config.num_experts, generator)


def _draw_experts(table_VK: Tensor, experts: int, generator: torch.Generator) -> None:
    for part_VK in table_VK.split(4096):
        part_VK.copy_(torch.rand(len(part_VK), experts, generator=generator).topk(part_VK.shape[1], dim=1).indices)
