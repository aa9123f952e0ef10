"""Choosing a token: what each parameter allows, and that draws have the distribution they should."""

import math

import pytest
import torch

from byrote.engine.request import Choice, SamplingParams
from byrote.engine.sampler import choose, greedy, preferences, report_prompt, shares
from byrote.errors import RequestError

LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.5, 0.0])


def choice(*, prompt=(0,), output=(), ends=(), mask=None, **params) -> Choice:
    made = Choice(
        request="r",
        index=params.pop("index", 0),
        ids=prompt,
        params=SamplingParams(**params),
        end_ids=ends,
        max_tokens=99,
        stream=None,
        mask=None,
        pack=None,
        arrival=0,
    )
    for token in output:
        made.take(choose(torch.nn.functional.one_hot(torch.tensor(token), 5).float(), choice(temperature=0.0)))
    made.mask = mask
    return made


def allowed(**params) -> set[int]:
    weights_K, ids_K = shares(LOGITS, SamplingParams(**params))
    ids = range(len(weights_K)) if ids_K is None else ids_K.tolist()
    return {token for token, weight in zip(ids, weights_K.tolist(), strict=True) if weight > 0}


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 1e-9}, {3}),
        ({"top_k": 2, "top_p": 0.6}, {3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {3}),
        ({"min_p": 0.1, "top_k": 4}, {0, 1, 3}),
    ],
)
def test_the_limits_leave_just_these_tokens(params, tokens):
    # shares of LOGITS: 0.071 0.319 0.016 0.526 0.043 … 0.55 with top_k 2 renormalises to 0.622
    assert allowed(temperature=1.0, **params) == tokens


def test_shares_are_the_softmax_at_the_temperature():
    for temperature in (0.3, 1.0, 4.0):
        weights_V, ids = shares(LOGITS, SamplingParams(temperature=temperature))
        assert ids is None
        assert (weights_V - torch.softmax(LOGITS.double() / temperature, 0)).abs().max() < 1e-12


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_draws_have_the_distribution_of_the_shares(params):
    """χ² of 4,000 draws, one seed for each: below the 0.999 quantile for 4 degrees of freedom."""
    params = {"temperature": 1.0, **params}
    weights_K, ids_K = shares(LOGITS, SamplingParams(**params))
    want_V = torch.zeros(5, dtype=torch.float64)
    want_V[torch.arange(5) if ids_K is None else ids_K] = weights_K / weights_K.sum()
    drawn = torch.tensor([choose(LOGITS, choice(seed=seed, **params)).id for seed in range(4000)])
    counts_V = torch.bincount(drawn, minlength=5).double()
    assert (counts_V[want_V == 0] == 0).all()
    some = want_V > 0
    chi_squared = ((counts_V - 4000 * want_V)[some] ** 2 / (4000 * want_V[some])).sum()
    assert chi_squared < 18.47


def test_a_seed_repeats_its_draws_and_choices_of_one_seed_differ():
    def draws(**which):
        one = choice(temperature=2.0, **which)
        return [choose(LOGITS, one).id for _ in range(40)]

    assert draws(seed=1) == draws(seed=1)
    assert len({tuple(draws(**which)) for which in ({"seed": 1}, {"seed": 2}, {"seed": 1, "index": 1}, {"seed": -1}, {})}) == 5


def test_greedy_takes_the_largest_whatever_the_limits():
    assert greedy(LOGITS[None]) == [3]
    assert choose(LOGITS, choice(temperature=0.0, top_k=4, top_p=0.1, min_p=0.9)).id == 3


@pytest.mark.parametrize(
    ("made", "change"),
    [
        (choice(logit_bias=((0, 2.0), (3, -100.0))), {0: 2.0, 3: -100.0}),
        (choice(output=(1, 1, 4), presence_penalty=0.5), {1: -0.5, 4: -0.5}),
        (choice(output=(1, 1, 4), frequency_penalty=0.5), {1: -1.0, 4: -0.5}),
        (choice(prompt=(3, 2), output=(1,), repetition_penalty=2.0), {3: -1.25, 2: -1.0, 1: -1.0}),
        (choice(min_tokens=1, ends=(4,), stop_ids=(1,)), {4: -math.inf, 1: -math.inf}),
        (choice(min_tokens=1, ends=(4,), ignore_end=True), {}),
        (choice(output=(0,), min_tokens=1, ends=(4,)), {}),
    ],
    ids=["bias", "presence", "frequency", "repetition in prompt and output", "not the end yet", "no end to forbid", "the end allowed"],
)
def test_what_each_parameter_does_to_the_logits(made, change):
    before, got = LOGITS.clone(), preferences(LOGITS, made)
    want = LOGITS.clone()
    for token, amount in change.items():
        want[token] += amount
    assert torch.equal(got, want)
    assert torch.equal(LOGITS, before)


def test_log_probabilities_are_the_models_own():
    token = choose(LOGITS, choice(temperature=0.0, logprobs=2, logit_bias=((2, 50.0),), repetition_penalty=1.5))
    logprobs_V = torch.log_softmax(LOGITS, 0)
    assert (token.id, token.logprob) == (2, float(logprobs_V[2]))
    assert token.top == ((3, float(logprobs_V[3])), (1, float(logprobs_V[1])))
    assert choose(LOGITS, choice(temperature=0.0, logprobs=0)) == (3, float(logprobs_V[3]), (), None)
    assert choose(LOGITS, choice(temperature=0.0)).logprob is None


def test_the_prompts_tokens_are_reported_from_the_positions_before_them():
    tokens = report_prompt(torch.stack([LOGITS, LOGITS.flip(0)]), [1, 2], 1)
    assert [token.id for token in tokens] == [1, 2]
    assert tokens[1].logprob == float(torch.log_softmax(LOGITS.flip(0), 0)[2])
    assert tokens[1].top[0][0] == 1


class Nothing:
    def forbid(self, logits_V):
        logits_V.fill_(-math.inf)

    def accept(self, token):
        raise AssertionError("nothing can be accepted")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_allowed_it_says_so(temperature):
    with pytest.raises(RequestError, match="no token is allowed"):
        choose(LOGITS, choice(temperature=temperature, mask=Nothing(), min_tokens=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((1, math.inf),)),
        ("seed", 2**63),
        ("n", 0),
        ("min_tokens", 300),
        ("stop", ("",)),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"{field} is .*allowed"):
        SamplingParams(**{field: value})
