"""Texts moved between states, and prefixes that one text reads for another."""

import pytest
import torch

from byrote.engine.cache import PAGE, Page, Pages, Text, assemble, leaves, take_up, usable
from byrote.engine.request import SamplingParams
from byrote.errors import ConfigError
from tests.engine.small import answers, drain, engine_of, prompts, said, twin
from tests.model.tiny_models import bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def read(model, state, *chunks):
    for chunk in chunks:
        logits = model(chunk, state=state).logits
    return logits


def states_of(model, lengths, *, drafts):
    """One state for each text, and the texts."""
    new_state = lambda batch: model.new_state(batch, drafts=drafts)  # noqa: E731
    texts = [text(1, length, seed=length) for length in lengths]
    states = [new_state(1) for _ in texts]
    for state, one in zip(states, texts, strict=True):
        read(model, state, one)
    return new_state, texts, states


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("lengths", [(3, 9, 1), (5, 5), (1, 2, 40), (1,)])
def test_texts_put_together_go_on_as_they_would_alone(lengths, drafts):
    model = build(whole())
    new_state, texts, states = states_of(model, lengths, drafts=drafts)
    together = assemble(new_state, [Text(state, 0, state.length) for state in states])
    more = text(len(lengths), 4, seed=99)
    parts = [model(more[:, a:b], state=together).logits for a, b in ((0, 1), (1, 4))]
    for row, one in enumerate(texts):
        alone = model(torch.cat((one, more[row : row + 1]), dim=1)).logits[:, -4:]
        assert_close_fp32(torch.cat(parts, dim=1)[row : row + 1], alone)
    if drafts:
        for row, state in enumerate(states):
            read(model, state, more[row : row + 1])
            assert_bitwise(model.draft(together, more[:, :1], 2)[row : row + 1], model.draft(state, more[:1, :1] * 0 + more[row, 0], 2))


def test_who_leaves_and_who_joins_changes_nothing_for_the_rest():
    model = build(whole())
    new_state, texts, states = states_of(model, (20, 3, 7), drafts=True)
    batch = assemble(new_state, [Text(state, 0, state.length) for state in states[:2]])
    read(model, batch, text(2, 5, seed=1))
    batch = assemble(new_state, [Text(batch, 1, 8), Text(states[2], 0, 7)])
    assert batch.length == 8
    logits = read(model, batch, text(2, 2, seed=2))
    for row, known in enumerate((torch.cat((texts[1], text(2, 5, seed=1)[1:]), dim=1), texts[2])):
        assert_close_fp32(logits[row], model(torch.cat((known, text(2, 2, seed=2)[row : row + 1]), dim=1)).logits[0, -2:])


def test_a_text_taken_out_of_a_padded_batch_is_what_it_was():
    model = build(whole())
    new_state, _, states = states_of(model, (11, 4), drafts=True)
    batch = assemble(new_state, [Text(state, 0, state.length) for state in states])
    back = assemble(new_state, [Text(batch, 1, 4)])
    assert back.length == 4
    for name, leaf in leaves(back).items():
        own = leaves(states[1])[name]
        held = lambda part: part.all() if hasattr(part, "all") else part.values  # noqa: E731
        assert_bitwise(held(leaf), held(own))


def test_the_floor_of_a_batch_is_that_of_its_shortest_reach():
    model = build(whole())
    new_state, _, states = states_of(model, (30, 12), drafts=False)
    states[1].rollback(5)
    batch = assemble(new_state, [Text(states[0], 0, 30), Text(states[1], 0, 7)])
    assert batch.length - batch.floor == states[1].length - states[1].floor
    batch.rollback(batch.length - batch.floor)


def test_a_cache_of_an_unknown_kind_is_refused_by_name():
    class Strange:
        pass

    state = build(bare()).new_state(1)
    state.caches[0] = Strange()
    with pytest.raises(ConfigError, match="type Strange"):
        leaves(state)


# --- pages ------------------------------------------------------------------------------------------------------------


def tree(model, tokens, ends, *, drafts=True):
    """Pages of a text that was read up to each of `ends`."""
    pages, state = Pages(), model.new_state(1, drafts=drafts)
    for end in ends:
        read(model, state, torch.tensor([tokens[state.length : end]]))
        pages.publish(b"root", tokens[:end], Text(state, 0, end))
    return pages


def test_a_prefix_taken_up_is_the_state_that_read_it_bitwise():
    model, tokens = build(whole()), text(1, 3 * PAGE)[0].tolist()
    new_state = lambda batch: model.new_state(batch, drafts=True)  # noqa: E731
    pages = tree(model, tokens, (PAGE, 3 * PAGE))
    taken = take_up(new_state, usable(pages.match(b"root", tokens), 3 * PAGE + 1))
    own = new_state(1)
    read(model, own, torch.tensor([tokens[:PAGE]]), torch.tensor([tokens[PAGE:]]))
    assert (taken.length, taken.floor) == (own.length, own.floor)
    more = text(1, 5, seed=7)
    assert_bitwise(read(model, taken, more), read(model, own, more))
    assert_bitwise(model.draft(taken, more[:, :1], 3), model.draft(own, more[:, :1], 3))
    taken.rollback(8)
    own.rollback(8)
    assert_bitwise(read(model, taken, more), read(model, own, more))


def test_pages_of_a_padded_row_are_those_of_the_text_alone():
    model, tokens = build(whole()), text(1, PAGE)[0].tolist()
    new_state, _, (longer,) = states_of(model, (PAGE + 9,), drafts=True)
    own = new_state(1)
    read(model, own, torch.tensor([tokens]))
    batch = assemble(new_state, [Text(longer, 0, PAGE + 9), Text(own, 0, PAGE)])
    one, other = Pages(), Pages()
    one.publish(b"root", tokens, Text(batch, 1, PAGE))
    other.publish(b"root", tokens, Text(own, 0, PAGE))
    (a,), (b,) = one.match(b"root", tokens), other.match(b"root", tokens)
    assert a.pieces.keys() == b.pieces.keys()
    for name, piece in a.pieces.items():
        assert_bitwise(piece, b.pieces[name])


def test_a_prefix_is_used_up_to_a_border_that_leaves_something_to_read():
    model, tokens = build(bare()), text(1, 4 * PAGE)[0].tolist()
    pages = tree(model, tokens, (PAGE, 3 * PAGE, 4 * PAGE), drafts=False)
    found = pages.match(b"root", tokens)
    assert len(found) == 4
    assert [len(usable(found, length)) for length in (4 * PAGE + 1, 4 * PAGE, 3 * PAGE, PAGE + 1, PAGE, 1)] == [4, 3, 1, 1, 0, 0]
    assert len(pages.match(b"root", [*tokens[: 2 * PAGE], tokens[2 * PAGE] ^ 1, *tokens[2 * PAGE + 1 :]])) == 2
    assert pages.match(b"other", tokens) == []


def test_the_least_recently_used_leaf_goes_first_and_no_parent_before_its_child():
    model, pages = build(bare()), Pages()
    shared, roads = text(1, PAGE)[0].tolist(), [text(1, PAGE, seed=seed)[0].tolist() for seed in (1, 2, 3)]
    for road in roads:
        state = model.new_state(1)
        read(model, state, torch.tensor([shared + road]))
        pages.publish(b"root", shared + road, Text(state, 0, 2 * PAGE))
    assert len(pages) == 4
    pages.match(b"root", shared + roads[0])
    pages.shrink(3)
    assert [len(pages.match(b"root", shared + road)) for road in roads] == [2, 1, 2]
    pages.check()
    pages.shrink(1)
    assert len(pages.match(b"root", shared)) == 1
    pages.check()
    pages.shrink(-3)
    assert len(pages) == 0


def test_a_page_under_a_wrong_key_or_with_a_wrong_count_is_noticed():
    for harm in ("key", "children"):
        pages = tree(build(bare()), text(1, 2 * PAGE)[0].tolist(), (2 * PAGE,), drafts=False)
        page: Page = next(iter(pages._pages.values()))
        page.tokens = (*page.tokens[1:], 0, 1)[:PAGE] if harm == "key" else page.tokens
        page.children += harm == "children"
        with pytest.raises(AssertionError, match="another text" if harm == "key" else "counts 1 children and has 0"):
            pages.check()


# --- prefixes in the engine -------------------------------------------------------------------------------------------


def conversation():
    shared = text(1, 3 * PAGE + 20, seed=5)[0].tolist()
    return shared, [shared + one for one in prompts(3, longest=30, seed=6)]


def test_a_hit_answers_as_a_miss_does():
    model, (_, asked) = build(whole()), conversation()
    cached, fresh = engine_of(model, chunk_tokens=256), engine_of(model, prefix_cache=False)
    for one in asked:
        assert answers(cached, [one], GREEDY) == answers(fresh, [one], GREEDY)
    assert cached.stats().prefix_hit_tokens == 2 * 3 * PAGE
    assert fresh.stats().prefix_hit_tokens == 0
    name = cached.add_request(asked[0], GREEDY)
    assert [event.usage.cached_tokens for event in drain(cached) if event.usage] == [3 * PAGE]
    assert name not in cached.running()


def test_a_conversation_goes_on_from_what_was_generated():
    model, ids = build(whole()), text(1, 100)[0].tolist()
    params = SamplingParams(max_tokens=60, temperature=0.0)
    for speculate in ("off", "always"):
        engine = engine_of(model, speculate=speculate)
        answer = answers(engine, [ids], params)[0]
        again = [*ids, *answer, 7, 8, 9]
        assert answers(engine, [again], GREEDY) == [twin(model, again, 12)]
        assert engine.stats().prefix_hit_tokens == PAGE


def test_where_texts_part_a_border_is_made_for_the_next():
    model, shared = build(bare()), text(1, 5 * PAGE, seed=8)[0].tolist()
    engine = engine_of(model)
    hits = []
    for tail in prompts(4, longest=3, seed=9):
        before = engine.stats().prefix_hit_tokens
        answers(engine, [[*shared, *tail, *([tail[0]] * 2 * PAGE)]], GREEDY)
        hits.append((engine.stats().prefix_hit_tokens - before) // PAGE)
    assert hits[0] == hits[1] == 0
    assert hits[2] == hits[3] == 5


def test_new_weights_and_another_model_name_share_no_prefix():
    model, (_, asked) = build(whole()), conversation()
    engine = engine_of(model)
    answers(engine, [asked[0]], GREEDY)
    engine.weights_changed()
    answers(engine, [asked[0]], GREEDY)
    assert engine.stats().prefix_hit_tokens == 0


def test_prompt_log_probabilities_are_complete_after_a_hit():
    model, (_, asked) = build(whole()), conversation()
    engine = engine_of(model)
    answers(engine, [asked[0]], GREEDY)
    engine.add_request(asked[0], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True))
    events = drain(engine)
    assert len(events[0].prompt) == len(asked[0])


def test_kept_prefixes_give_way_to_running_requests():
    model = build(bare())
    engine = engine_of(model, cache_tokens=6 * PAGE, max_batch=4)
    for seed in range(4):
        answers(engine, [text(1, 2 * PAGE + 5, seed=seed)[0].tolist()], GREEDY)
    assert 0 < len(engine._loop.pages) <= 6
    for one in prompts(4, longest=120, seed=3):
        engine.add_request(one, SamplingParams(max_tokens=100, temperature=0.0))
    said(drain(engine))
    assert engine.stats().preemptions > 0
