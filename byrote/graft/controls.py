"""Negative controls: what else would have lowered the loss as much? Each is trained like the graft, on the same batches.

    one-row        every n-gram reads the same row of its sub-table: the table has a capacity of one. What is left is a learnt vector
                   behind a gate
    shuffled       a token reads the rows of another token of its line, drawn anew at every call: the table is as large and as busy, and
                   says nothing about the text
    frozen-rows    rows are random and stay so, N(0, 1); projections, gate and convolution train
    no-lookup      no table: projections read a fixed random map of the token's own hidden state
    lora           no memory: low-rank adapters on all linear maps of the host, of about as many weights (package peft)

If a control comes near the graft, its gain was not memory. Shapes: B batch, T tokens, L memory layers, N rows, D width, E memory width.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from byrote.errors import ConfigError
from byrote.memory.ngram import NgramHash
from byrote.model.engram import Engram
from byrote.model.pack import Pack

LORA = "lora"


class _Redirected:
    """A hash whose rows are changed on the way out."""

    def __init__(self, hash_: NgramHash, change: Callable[[Tensor], Tensor]) -> None:
        self._hash, self._change = hash_, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hash, name)

    def to(self, device: torch.device | str) -> "_Redirected":
        self._hash.to(device)
        return self

    def rows(self, ids_BT: Tensor, **context: Any) -> Tensor:
        return self._change(self._hash.rows(ids_BT, **context))


def one_row(pack: Pack, seed: int) -> None:
    """A capacity of one: the first row of every sub-table."""
    hash_ = pack.memory.hash
    firsts = [torch.tensor((0, *primes[:-1])).cumsum(0) for primes in hash_.primes]
    first_LN = torch.stack(firsts).to(pack.memory.store.device)
    pack.memory.hash = _Redirected(hash_, lambda rows_BTLN: first_LN.expand_as(rows_BTLN).contiguous())  # type: ignore[assignment]


def shuffled(pack: Pack, seed: int) -> None:
    """Rows of another place in the same line."""
    generator = torch.Generator().manual_seed(seed)

    def elsewhere(rows_BTLN: Tensor) -> Tensor:
        order_T = torch.randperm(rows_BTLN.shape[1], generator=generator).to(rows_BTLN.device)
        return rows_BTLN[:, order_T]

    pack.memory.hash = _Redirected(pack.memory.hash, elsewhere)  # type: ignore[assignment]


def frozen_rows(pack: Pack, seed: int) -> None:
    """Random rows; the values' projection begins at zero instead, so that a fresh graft says nothing here too."""
    store: Any = pack.memory.store
    store.vectors_NE.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    for engram in pack.layers.values():
        nn.init.zeros_(engram.value.weight)  # type: ignore[union-attr,arg-type]


class _OwnState(nn.Module):
    """An Engram layer that looks nothing up."""

    def __init__(self, engram: Engram, width: int, seed: int) -> None:
        super().__init__()
        self.engram = engram
        nn.init.zeros_(engram.value.weight)
        dim = engram.value.weight.shape[0]
        self.register_buffer("map_DE", torch.randn(dim, width, generator=torch.Generator().manual_seed(seed)) / dim**0.5)

    @property
    def value(self) -> nn.Module:
        return self.engram.value

    @property
    def conv(self) -> nn.Module | None:
        return self.engram.conv

    def speak(self, streams_BTRD: Tensor, rows_BTE: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        hidden_BTD = streams_BTRD[:, :, 0]
        normed_BTD = hidden_BTD * torch.rsqrt(hidden_BTD.square().mean(-1, keepdim=True) + self.engram.eps)
        assert isinstance(self.map_DE, Tensor)
        return self.engram.speak(streams_BTRD, normed_BTD @ self.map_DE, **context)


def no_lookup(pack: Pack, seed: int) -> None:
    """Projections, gate and convolution alone."""
    for slot, block in enumerate(pack.config.layers):
        engram: Any = pack.layers[str(block)]
        pack.layers[str(block)] = _OwnState(engram, pack.config.memory_dim, seed + slot)


PACK_CONTROLS: dict[str, Callable[[Pack, int], None]] = {
    "one-row": one_row,
    "shuffled": shuffled,
    "frozen-rows": frozen_rows,
    "no-lookup": no_lookup,
}
FIXED_TABLE = ("frozen-rows", "no-lookup")  # rows do not train
CONTROLS = (*PACK_CONTROLS, LORA)


@contextlib.contextmanager
def lora(host: Any, weights: int, seed: int) -> Iterator[tuple[nn.Module, int]]:
    """Inside, the host carries adapters of about `weights` numbers; gives their parameters and their rank. Afterwards it is as before."""
    peft = require_peft()
    maps = _linear_maps(host)
    per_rank = sum(inputs + outputs for inputs, outputs in maps.values())
    rank = min(max(1, round(weights / per_rank)), *(min(shape) for shape in maps.values()))
    was = {name: parameter.requires_grad for name, parameter in host.named_parameters()}
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(host, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(maps), task_type="CAUSAL_LM"))
    try:
        adapters = nn.ParameterList(parameter for parameter in host.parameters() if parameter.requires_grad)
        yield adapters, rank
    finally:
        adapted.unload()
        for name, parameter in host.named_parameters():
            parameter.requires_grad_(was[name])


def _linear_maps(host: Any) -> dict[str, tuple[int, int]]:
    """Name → (inputs, outputs) of every linear map between embedding and head; GPT-2 has maps of its own class, stored transposed."""
    head, maps = host.get_output_embeddings(), {}
    for name, module in host.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head and weight is not None and weight.dim() == 2:
            maps[name] = tuple(weight.shape)
    return maps


def require_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("the control lora needs the package peft: pip install byrote[graft]; or leave it out of --controls") from None
    return peft
