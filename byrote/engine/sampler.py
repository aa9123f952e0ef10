"""From logits to a token, for every row by itself: nothing here depends on a neighbour.

    logits ─ repetition penalty ─ + bias ─ presence, frequency ─ end not yet, grammar: −∞ ─▶ preferences
    temperature 0: the largest
    else: softmax(preferences / temperature) ─ top_k ─ top_p ─ min_p ─▶ shares ─▶ one draw

`top_p` keeps the smallest set of most probable tokens that reaches it (the one that crosses it included), of those that `top_k`
left; `min_p` is a share of the most probable one. A draw is one number u of the choice's own stream: the token at which the sum of
shares, in order of id, or of probability where a limit sorted them, passes u. So the i-th token of a choice takes the i-th number of
its stream whether tokens come one at a time, in drafts (`speculative.py`) or again after a preemption; in fp64 on the CPU, so
that a seed means the same on every device, up to differences in the logits.

Reported log-probabilities are the model's own: before penalties, bias, grammar and temperature.

Shapes: M rows, V vocabulary, K tokens that may be drawn.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from byrote.engine.request import Choice, SamplingParams, TokenOut
from byrote.errors import RequestError


def greedy(logits: Tensor) -> Any:
    """The largest of each row [..., V]: ids, in lists as deep as there are dimensions before V."""
    return logits.argmax(-1).tolist()


def choose(logits_V: Tensor, choice: Choice, gate: float | None = None) -> TokenOut:
    """One token from fp32 `logits_V` on the CPU, which stay as they are. Raises RequestError where nothing is allowed."""
    params = choice.params
    if params.is_plain_greedy:
        return TokenOut(greedy(logits_V), gate=gate)
    token = _pick(preferences(logits_V, choice), params, choice.generator)
    return report(logits_V, token, params.logprobs, gate)


def report(logits_V: Tensor, token: int, logprobs: int | None, gate: float | None = None) -> TokenOut:
    """`token` with its log-probability and the most probable ones, as far as asked for."""
    if logprobs is None:
        return TokenOut(token, gate=gate)
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    values, ids = logprobs_V.topk(logprobs) if logprobs else (logprobs_V[:0], logprobs_V[:0])
    return TokenOut(token, float(logprobs_V[token]), tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True)), gate)


def report_prompt(logits_TV: Tensor, following: Sequence[int], logprobs: int) -> list[TokenOut]:
    """What `report` says of each of the tokens that follow positions of a prompt."""
    return [report(logits_V, token, logprobs) for logits_V, token in zip(logits_TV, following, strict=True)]


def preferences(logits_V: Tensor, choice: Choice) -> Tensor:
    """The logits that penalties, bias and bans leave; a copy."""
    params, wanted_V = choice.params, logits_V.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(choice.prompt) | choice.counts.keys()))
        values = wanted_V[seen]
        wanted_V[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    for token, bias in params.logit_bias:
        wanted_V[token] += bias
    if choice.counts and (params.presence_penalty or params.frequency_penalty):
        ids, times = (torch.tensor(list(part)) for part in (choice.counts.keys(), choice.counts.values()))
        wanted_V[ids] -= params.presence_penalty + params.frequency_penalty * times
    if len(choice.output) < params.min_tokens and choice.ends:
        wanted_V[sorted(choice.ends)] = float("-inf")
    if choice.mask is not None:
        choice.mask.forbid(wanted_V)
    return wanted_V


def shares(wanted_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """(fp64 shares [K] that need not sum to one, ids [K] they belong to or None for all in order): the distribution drawn from."""
    scaled_V = wanted_V.double()
    scaled_V = (scaled_V - scaled_V.max()) / params.temperature
    if params.top_k == 0 and params.top_p == 1:
        weights_V = torch.softmax(scaled_V, dim=0)
        return weights_V.where(weights_V >= params.min_p * weights_V.max(), 0.0), None
    values_K, ids_K = torch.sort(scaled_V, descending=True, stable=True)
    weights_K = torch.softmax(values_K[: params.top_k or None], dim=0)
    before_K = weights_K.cumsum(0) - weights_K  # what more probable tokens already hold
    kept_K = ((before_K < params.top_p) | (params.top_p == 1)) & (weights_K >= params.min_p * weights_K[0])
    return weights_K.where(kept_K, 0.0), ids_K[: len(weights_K)]


def _pick(wanted_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    best = int(wanted_V.argmax())
    if not float(wanted_V[best]) > float("-inf"):
        raise RequestError("no token is allowed here: logit_bias and grammar together forbid all; loosen one of them")
    if params.temperature == 0:
        return best
    weights_K, ids_K = shares(wanted_V, params)
    reached_K = weights_K.cumsum(0)
    drawn = torch.rand(1, generator=generator, dtype=torch.float64) * reached_K[-1]
    place = int(torch.searchsorted(reached_K, drawn, right=True).clamp_max(int(weights_K.nonzero()[-1])))
    return place if ids_K is None else int(ids_K[place])
