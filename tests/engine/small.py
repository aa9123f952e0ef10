"""Small models behind an engine, and the slow twin of all it does: one text, one token at a time, everything read anew."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from byrote.engine.engine import Engine, EngineConfig
from byrote.engine.request import Event, SamplingParams
from byrote.model.transformer import Model
from tests.model.tiny_models import VOCAB, build, whole

BEGIN, END = 256, 257


class Bytes:
    """A tokenizer whose tokens are bytes."""

    begin_id, end_id = BEGIN, END

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < BEGIN else b""

    def token_strings(self) -> list[str]:
        return [f"<{token}>" for token in range(END + 1)]


class Speaker(Model):
    """A model that says what it is told, whatever it reads; `script` maps the number of known tokens to the logits behind them."""

    def __init__(self, text: bytes) -> None:
        super().__init__(whole(vocab_size=END + 1, mtp=None, engram=None))
        self.script, self.prompt = [*text, END], 0
        self.eval()

    def forward(self, tokens_BT: Tensor, **others: Any) -> Any:
        output = super().forward(tokens_BT, **others)
        said = others["state"].length - self.prompt
        logits_BTV = torch.full_like(output.logits, -1e9)
        logits_BTV[..., self.script[min(said, len(self.script) - 1)]] = 0.0
        return output._replace(logits=logits_BTV)


def engine_of(model: Model, tokenizer: Any = None, **config: Any) -> Engine:
    return Engine(model, tokenizer, EngineConfig(**({"max_length": 2048, "speculate": "off"} | config)))


def prompts(count: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def drain(engine: Engine) -> list[Event]:
    """All events until nothing is left to do."""
    events = []
    while engine.has_work():
        events += engine.step()
        engine.check_integrity()
    return events


def said(events: Iterable[Event]) -> dict[tuple[str, int], list[int]]:
    """Ids by request and choice. Raises the first error."""
    ids: dict[tuple[str, int], list[int]] = {}
    for event in events:
        if event.error is not None:
            raise event.error
        ids.setdefault((event.request, event.index), []).extend(token.id for token in event.tokens)
    return ids


def text_of(events: Iterable[Event], request: str, index: int = 0) -> str:
    return "".join(event.text for event in events if (event.request, event.index) == (request, index))


def answers(
    engine: Engine, ids: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], **more: Any
) -> list[list[int]]:
    """What each prompt is answered with, all asked at once."""
    each = params if isinstance(params, Sequence) else [params] * len(ids)
    names = [engine.add_request(one, some, **more) for one, some in zip(ids, each, strict=True)]
    found = said(drain(engine))
    return [found[name, 0] for name in names]


@torch.inference_mode()
def twin(model: Model, ids: Sequence[int], new: int, **call: Any) -> list[int]:
    """Greedy, without caches."""
    known = list(ids)
    for _ in range(new):
        known.append(int(model(torch.tensor([known]), **call).logits[0, -1].argmax()))
    return known[len(ids) :]


@torch.inference_mode()
def closest_calls(model: Model, ids: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """For every token of a greedy answer whether two logits, or two experts, were so close that another order of sums may decide."""
    known = torch.tensor([[*ids, *answer]])
    output = model(known, want=("router",))
    best_T2 = output.logits[0].topk(2).values
    close_T = (best_T2[:, 0] - best_T2[:, 1]) < 1e-4
    for scores_TE in router_scores(model, known):
        ranked_TE = scores_TE.sort(-1, descending=True).values
        close_T |= (ranked_TE[:, 1] - ranked_TE[:, 2]) < 1e-5  # of the tiny models' top-2
    close = close_T.cummax(0).values.tolist()  # a choice of experts is felt by all that follow
    return close[len(ids) - 1 : -1]


def router_scores(model: Model, tokens_BT: Tensor) -> list[Tensor]:
    """Biased scores [T, E] of every router, as `topk_gate` compares them."""
    found: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        if hasattr(block.ffn, "router"):
            hooks.append(block.ffn.register_forward_hook(lambda module, _, out: found.append(out[1]["scores"][0] + module.bias)))
    model(tokens_BT)
    for hook in hooks:
        hook.remove()
    return found


def tiny() -> Model:
    return build(whole())
