"""A Hugging Face model with something small to train on it, seen as byrote's trainer and byrote's scores see a model.

`Trainer` (train/loop.py) and `bits_per_byte` (eval/bits.py) call `model(tokens_BT, targets_BT=…, document_BT=…)`. Here the call goes to the
host; only what is trained is registered, so the host stays in evaluation mode, frozen, and out of every checkpoint. Packed documents keep
apart as transformers keeps them apart: by position ids that begin anew.

Shapes: B batch, T tokens.
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from byrote.graft.attach import Graft
from byrote.memory.conditional import Memory, Rows
from byrote.model.documents import document_positions
from byrote.model.transformer import Output

IGNORE = -100


class Grafted(nn.Module):
    """`graft` None: the host alone, or with an adapter whose weights are `trained`."""

    host: Any

    def __init__(self, host: Any, graft: Graft | None, trained: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__["host"] = host  # not registered
        self.graft = graft
        self.trained = graft.pack.layers if graft is not None else trained
        self.config = SimpleNamespace(mtp=None)

    @property
    def memory(self) -> Memory | None:
        return None if self.graft is None else self.graft.pack.memory

    @property
    def embed(self) -> nn.Module:
        """The trainer reads the device from it."""
        return self.host.get_input_embeddings()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        targets_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        rows: Rows | None = None,
        want: Iterable[str] = (),
    ) -> Output:
        """Logits, or with `targets_BT` the loss; `want` may name "token_losses"."""
        call: dict[str, Any] = {"input_ids": tokens_BT, "use_cache": False}
        if document_BT is not None:
            call["position_ids"] = document_positions(document_BT)
        if self.graft is None:
            logits_BTV = self.host(**call).logits
        else:
            device = self.graft.pack.memory.store.device
            if rows is None:
                rows = self.graft.pack.memory.fetch(tokens_BT.to(device), None if document_BT is None else document_BT.to(device))
            with self.graft.reading(rows):
                logits_BTV = self.host(**call).logits
        if targets_BT is None:
            return Output(logits_BTV, {}, {}, rows, {})
        losses_BT = token_losses(logits_BTV, targets_BT)
        mean = losses_BT.sum() / (targets_BT != IGNORE).sum().clamp_min(1)
        return Output(None, {"next_token": mean}, {}, rows, {"token_losses": losses_BT.detach()} if "token_losses" in want else {})

    def param_roles(self) -> dict[str, str]:
        """Projections (and adapters) are matrices, gains are norms."""
        return {name: _role(name) for name, _ in self.named_parameters()}

    def update_balance(self, loads: dict[str, Tensor]) -> None:
        assert not loads, "the host's router is frozen with the rest of it"


def _role(name: str) -> str:
    if name.endswith("conv.weight"):
        return "conv"
    return "norm" if name.endswith("gain") else "matrix"


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """float32 [B, T]: nats of each target, 0 where none is scored."""
    losses_N = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return losses_N.view(targets_BT.shape)


@torch.no_grad()
def said(model: Any, lines: Sequence[tuple[list[int], int]], pad: int) -> list[bool]:
    """Whether a model, at its most probable, says the rest of each line; a line is (ids, how many of them are prompt).

    Its call is that of `Grafted`.
    """
    length = max(len(line) for line, _ in lines)
    tokens_BT = torch.full((len(lines), length), pad)
    document_BT = torch.full((len(lines), length), -1)
    for row, (line, _) in enumerate(lines):
        tokens_BT[row, : len(line)] = torch.tensor(line)
        document_BT[row, : len(line)] = 0
    device = model.embed.weight.device
    logits_BTV = model(tokens_BT.to(device), document_BT=document_BT.to(device)).logits
    guess_BT = logits_BTV.argmax(-1).cpu()
    return [guess_BT[row, prompt - 1 : len(line) - 1].tolist() == line[prompt:] for row, (line, prompt) in enumerate(lines)]
