"""Memory on transformers models, by hooks: says what it should, remembers what it must, and leaves nothing behind."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from byrote.errors import ConfigError, MemoryPackError, RequestError
from byrote.graft.attach import attach, detach, grafts
from byrote.graft.host import base_fingerprint
from tests.graft.hosts import LAYOUTS, ROPE, VOCAB, host, logits, pack_for, tokens
from tests.tolerances import assert_bitwise, assert_close_fp32

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def grafted(layout: str, **changes: Any) -> Any:
    model = host(layout)
    attach(model, pack_for(model, **changes))
    return model


def in_chunks(model: Any, ids_BT: Tensor, cuts: tuple[int, ...], cache: Any = None) -> Tensor:
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [logits(model, ids_BT[:, a:b], past_key_values=cache, use_cache=True) for a, b in zip((0, *cuts), (*cuts, None), strict=True)]
    return torch.cat(parts, dim=1)


class EditedByHand(nn.Module):
    """A block whose code was changed: the slow twin of a hook."""

    def __init__(self, block: nn.Module, pack: Any, number: int, ids_BT: Tensor) -> None:
        super().__init__()
        self.block, self.engram = block, pack.layers[str(number)]
        self.rows_BTE = pack.memory.fetch(ids_BT).layer(pack.config.layers.index(number))

    def __getattr__(self, name: str) -> Any:  # Gemma's decoder asks its blocks for their kind of attention
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(self.engram.speak(hidden_states[:, :, None], self.rows_BTE)[0][:, :, 0], *args, **kwargs)


@every_layout
def test_a_grafted_model_equals_one_edited_by_hand(layout: str) -> None:
    model, ids_BT = host(layout), tokens(2, 11)
    pack = pack_for(model)
    attach(model, pack)
    got = logits(model, ids_BT)
    detach(model)
    blocks = next(child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList))
    for number in pack.config.layers:
        blocks[number] = EditedByHand(blocks[number], pack, number, ids_BT)
    assert_close_fp32(got, logits(model, ids_BT, use_cache=False))


@every_layout
def test_unplugged_is_bitwise_the_base_and_so_is_a_fresh_graft(layout: str) -> None:
    model, ids_BT = host(layout), tokens(2, 11)
    base, state = logits(model, ids_BT), copy.deepcopy(model.state_dict())
    attach(model, pack_for(model, table_std=0.0))
    assert_bitwise(logits(model, ids_BT), base)
    attach(model, pack_for(model, seed=1))
    assert (logits(model, ids_BT) - base).abs().max() > 0.1, "a trained memory must be heard"
    detach(model)
    assert_bitwise(logits(model, ids_BT), base)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("byrote" in name for name in model.__dict__)
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items()) and len(state) == len(model.state_dict())


@every_layout
def test_cached_chunks_equal_the_whole(layout: str) -> None:
    model, ids_BT = grafted(layout), tokens(3, 19)
    assert_close_fp32(in_chunks(model, ids_BT, (1, 6, 7, 8, 13)), logits(model, ids_BT, use_cache=False))


@every_layout
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_equal_each_alone(layout: str, side: str) -> None:
    model, texts = grafted(layout), [tokens(1, length, seed=length) for length in (13, 1, 7)]
    ids_BT, mask_BT = torch.zeros(3, 13, dtype=torch.int64), torch.zeros(3, 13, dtype=torch.int64)
    places = [slice(13 - text.shape[1], 13) if side == "left" else slice(0, text.shape[1]) for text in texts]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids_BT[row, place], mask_BT[row, place] = text[0], 1
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    got = logits(model, ids_BT, attention_mask=mask_BT, position_ids=position_BT)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        assert_close_fp32(got[row, place], logits(model, text)[0])


@every_layout
def test_packed_documents_equal_each_alone(layout: str) -> None:
    model, texts = grafted(layout), [tokens(1, length, seed=length) for length in (5, 1, 8)]
    position_BT = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    got = logits(model, torch.cat(texts, dim=1), position_ids=position_BT, use_cache=False)
    assert_close_fp32(got[0], torch.cat([logits(model, text)[0] for text in texts]))


@every_layout
def test_generate_writes_what_whole_forward_passes_would(layout: str) -> None:
    model, ids_BT = grafted(layout), tokens(3, 5)
    made = model.generate(ids_BT, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for _ in range(6):
        scores = logits(model, ids_BT, use_cache=False)[:, -1]
        scores[:, 2] = -torch.inf  # the end token, as min_new_tokens has it
        ids_BT = torch.cat((ids_BT, scores.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, ids_BT)


@every_layout
def test_generation_from_left_padded_prompts_equals_each_alone(layout: str) -> None:
    model, texts = grafted(layout), [tokens(1, length, seed=length) for length in (7, 3)]
    ids_BT, mask_BT = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, 7 - text.shape[1] :], mask_BT[row, 7 - text.shape[1] :] = text[0], 1
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    made = model.generate(ids_BT, attention_mask=mask_BT, **options)
    for row, text in enumerate(texts):
        assert torch.equal(made[row, 7:], model.generate(text, **options)[0, text.shape[1] :])


@pytest.mark.parametrize("layout", ["gpt2", "llama", "mistral", "gemma"])
def test_beam_search_with_a_cache_equals_beam_search_without(layout: str) -> None:
    model, ids_BT = grafted(layout), tokens(2, 5)
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids_BT, **options), model.generate(ids_BT, use_cache=False, **options))


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_assisted_and_static_cache_decoding_equal_greedy(layout: str) -> None:
    model, ids_BT = grafted(layout), tokens(1, 9).repeat(1, 2)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    greedy = model.generate(ids_BT, **options)
    assert torch.equal(model.generate(ids_BT, prompt_lookup_num_tokens=3, **options), greedy), "cropping"
    assert torch.equal(model.generate(ids_BT, cache_implementation="static", **options), greedy), "a cache of fixed size"


def test_a_static_cache_tells_padding_by_its_four_dimensional_mask() -> None:
    model, texts = grafted("llama"), [tokens(1, length, seed=length) for length in (7, 3)]
    ids_BT, mask_BT = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, 7 - text.shape[1] :], mask_BT[row, 7 - text.shape[1] :] = text[0], 1
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    padded = model.generate(ids_BT, attention_mask=mask_BT, cache_implementation="static", **options)
    assert torch.equal(padded, model.generate(ids_BT, attention_mask=mask_BT, **options))


def test_whatever_is_done_to_the_cache_is_done_to_the_history() -> None:
    model, ids_BT = grafted("llama"), tokens(3, 14)
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids_BT[:, :9], (4,), cache)
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([2, 0, 2]))
    copied.batch_repeat_interleave(2)
    copied.batch_select_indices(torch.tensor([0, 3, 5]))
    copied.crop(-3)
    order = torch.tensor([2, 0, 2])
    whole = logits(model, ids_BT[order], use_cache=False)
    assert_close_fp32(logits(model, ids_BT[order, 6:], past_key_values=copied, use_cache=True), whole[:, 6:])
    assert_close_fp32(logits(model, ids_BT[:, 9:], past_key_values=cache, use_cache=True), logits(model, ids_BT, use_cache=False)[:, 9:])
    cache.reset()
    assert_close_fp32(logits(model, ids_BT, past_key_values=cache, use_cache=True), logits(model, ids_BT, use_cache=False))


def test_decoding_goes_on_behind_right_padding() -> None:
    model, texts = grafted("llama"), [tokens(1, 9, seed=1), tokens(1, 5, seed=2)]
    ids_BT, mask_BT = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    lengths = (6, 2)
    for row, length in enumerate(lengths):
        ids_BT[row, :length], mask_BT[row, :length] = texts[row][0, :length], 1
    cache = DynamicCache(config=model.config)
    logits(model, ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True)
    for step in range(3):
        next_B1 = torch.stack([texts[row][0, length + step, None] for row, length in enumerate(lengths)])
        mask_BT = torch.cat((mask_BT, torch.ones(2, 1, dtype=torch.int64)), dim=1)
        position_B1 = mask_BT.sum(1, keepdim=True) - 1
        got = logits(model, next_B1, attention_mask=mask_BT, position_ids=position_B1, past_key_values=cache, use_cache=True)
        for row, length in enumerate(lengths):
            assert_close_fp32(got[row, 0], logits(model, texts[row][:, : length + step + 1])[0, -1])


def test_the_newest_of_old_style_lazy_caches_and_a_cache_by_default_work() -> None:
    model, ids_BT = grafted("llama"), tokens(2, 8)
    assert_close_fp32(in_chunks(model, ids_BT, (3,), DynamicCache()), logits(model, ids_BT, use_cache=False))
    with torch.no_grad():
        first = model(ids_BT[:, :5])  # makes its own cache, as its configuration says
        second = model(ids_BT[:, 5:], past_key_values=first.past_key_values)
    assert_close_fp32(second.logits, logits(model, ids_BT, use_cache=False)[:, 5:])
    assert_close_fp32(in_chunks(model, ids_BT, (3,), StaticCache(config=model.config, max_cache_len=16)), logits(model, ids_BT))


def test_packs_stack_and_come_off_in_any_order() -> None:
    model, ids_BT = host("qwen"), tokens(2, 9)
    base = logits(model, ids_BT)
    first, second = pack_for(model, seed=1), pack_for(model, seed=2, layers=(1, 2))
    alone = attach(model, second)
    only_second = logits(model, ids_BT)
    detach(model, alone)
    one, two = attach(model, first), attach(model, second)
    both = logits(model, ids_BT)
    assert_close_fp32(in_chunks(model, ids_BT, (4, 5)), both)
    assert (both - only_second).abs().max() > 0.01
    assert detach(model, one) == [first]
    assert_bitwise(logits(model, ids_BT), only_second)
    assert grafts(model) == [two]
    detach(model)
    assert_bitwise(logits(model, ids_BT), base)


def test_compiled_models_agree_and_reading_stays_outside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds a call, so this is one block, and what a compiled prefill left in the cache goes on uncompiled."""
    model, ids_BT = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(ROPE | {"num_hidden_layers": 1}))).eval(), tokens(2, 9)
    base, pack = logits(model, ids_BT), pack_for(model, layers=(0,))
    attach(model, pack)
    whole = logits(model, ids_BT, use_cache=False)
    reads: list[bool] = []
    fetch = pack.memory.fetch
    monkeypatch.setattr(pack.memory, "fetch", lambda *args: (reads.append(torch.compiler.is_compiling()), fetch(*args))[1])
    compiled, cache = torch.compile(model, backend="eager"), DynamicCache(config=model.config)
    assert_close_fp32(logits(compiled, ids_BT, use_cache=False), whole)
    assert_close_fp32(logits(compiled, ids_BT[:, :5], past_key_values=cache, use_cache=True), whole[:, :5])
    assert reads == [False, False]
    assert_close_fp32(logits(model, ids_BT[:, 5:], past_key_values=cache, use_cache=True), whole[:, 5:])
    detach(model)
    assert_close_fp32(logits(compiled, ids_BT, use_cache=False), base)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_bf16_models_work_and_are_bitwise_themselves_without_memory(layout: str) -> None:
    model, ids_BT = host(layout).to(torch.bfloat16), tokens(2, 9)
    base = logits(model, ids_BT)
    attach(model, pack_for(model, table_std=0.0))
    assert_bitwise(logits(model, ids_BT), base)
    detach(model)
    attach(model, pack_for(model))
    got = logits(model, ids_BT)
    assert got.dtype == torch.bfloat16
    wide = model.float()
    assert_close_bf16_loss(got, logits(wide, ids_BT), ids_BT)


def assert_close_bf16_loss(got: Tensor, want: Tensor, ids_BT: Tensor) -> None:
    """Whole models are compared by their loss, to half a percent."""
    losses = [nn.functional.cross_entropy(x[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten()) for x in (got, want)]
    assert abs(losses[0] - losses[1]) <= 0.005 * losses[1]


def test_one_checkpoint_has_one_fingerprint_whatever_its_dtype() -> None:
    model = host("llama")
    before = base_fingerprint(model)
    assert base_fingerprint(model.to(torch.bfloat16)) == before
    assert base_fingerprint(model.float()) == before
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert base_fingerprint(model) != before


def test_gradients_reach_the_pack_through_hooks_as_they_do_by_hand() -> None:
    model, ids_BT = host("llama").requires_grad_(False), tokens(2, 7)
    pack = pack_for(model)
    graft = attach(model, pack)
    rows = pack.memory.fetch(ids_BT)
    weight = torch.randn(2, 7, VOCAB, generator=torch.Generator().manual_seed(1))
    with graft.reading(rows):
        (model(ids_BT, use_cache=False).logits * weight).sum().backward()
    got = [rows.vectors_UE.grad, *(parameter.grad for parameter in pack.parameters())]
    detach(model)
    again = pack_for(model)
    blocks = model.get_decoder().layers
    for number in again.config.layers:
        blocks[number] = EditedByHand(blocks[number], again, number, ids_BT)
        blocks[number].rows_BTE = (rows := rows._replace(vectors_UE=rows.vectors_UE.detach().requires_grad_())).layer(
            again.config.layers.index(number)
        )
    (model(ids_BT, use_cache=False).logits * weight).sum().backward()
    want = [parameter.grad for parameter in again.parameters()]
    for mine, theirs in zip(got[1:], want, strict=True):
        assert_close_fp32(mine, theirs)
    assert got[0] is not None and got[0].abs().sum(1).gt(0).all(), "every row that was read has a gradient"


def test_ids_are_needed_and_a_text_is_followed_from_its_start() -> None:
    model, ids_BT = host("llama"), tokens(2, 6)
    cache = DynamicCache(config=model.config)
    logits(model, ids_BT, past_key_values=cache, use_cache=True)
    attach(model, pack_for(model))
    with pytest.raises(RequestError, match="input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids_BT))
    with pytest.raises(RequestError, match="6 tokens, of which memory has seen 0"):
        model(ids_BT, past_key_values=cache, use_cache=True)
    fresh = DynamicCache(config=model.config)
    logits(model, ids_BT, past_key_values=fresh, use_cache=True)
    with pytest.raises(RequestError, match="holds 2 texts and 1 go on"):
        model(ids_BT[:1], past_key_values=fresh, use_cache=True)
    with pytest.raises(RequestError, match="attention mask of type list"):
        model.get_decoder()(ids_BT, attention_mask=[1, 1])


def test_gradient_checkpointing_is_refused_where_it_would_call_blocks_again() -> None:
    model = grafted("llama")
    model.gradient_checkpointing_enable()
    assert logits(model, tokens(1, 4)).isfinite().all(), "in evaluation nothing is called again"
    with pytest.raises(ConfigError, match="gradient_checkpointing_disable"):
        model.train()(tokens(1, 4))


def test_a_pack_of_another_model_is_refused_and_nothing_changes() -> None:
    model, ids_BT = host("llama"), tokens(2, 6)
    base, pack = logits(model, ids_BT), pack_for(host("qwen"))
    with pytest.raises(MemoryPackError, match="base"):
        attach(model, pack)
    with pytest.raises(MemoryPackError, match=r"layers \[3\]"):
        attach(model, pack_for(model, layers=(1, 3)))
    with pytest.raises(MemoryPackError, match="tokenizer"):
        attach(model, pack_for(model), tokenizer=type("Text", (), {"fingerprint": lambda self: "1" * 64})())
    with pytest.raises(ConfigError, match="transformers causal LM"):
        attach(nn.Linear(2, 2), pack)
    assert_bitwise(logits(model, ids_BT), base)
    graft = attach(model, pack, any_base=True)
    detach(model, graft)
    with pytest.raises(MemoryPackError, match="not on the model"):
        detach(model, graft)
    assert_bitwise(logits(model, ids_BT), base)


def test_gates_are_recorded() -> None:
    model, ids_BT = host("gpt2"), tokens(2, 6)
    graft = attach(model, pack_for(model))
    with graft.recording() as gates:
        logits(model, ids_BT)
    assert [tuple(gate.shape) for gate in gates] == [(2, 6, 1)] * 2
    assert all(gate.min() > 0 and gate.max() < 1 for gate in gates)
