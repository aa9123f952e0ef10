"""A model with int8 weights is the model with rounded weights, however it is called; and what it is not made for is refused."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import byrote
from byrote.engine.engine import EngineConfig
from byrote.engine.request import SamplingParams
from byrote.errors import ConfigError
from byrote.kernels import int8
from byrote.kernels.decode_step import cpu
from byrote.model.capture import capture
from byrote.model.pack import attach, own_memory
from byrote.model.quantize import check_weights, quantize, to_quantize
from byrote.model.transformer import Model
from byrote.optim.groups import build_optimizers
from tests.engine.small import answers, engine_of, prompts, twin
from tests.kernels.twins import need
from tests.model import test_capture, test_csa, test_dsa, test_pack
from tests.model.tiny_models import MOE, bare, build, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

MODELS = test_capture.MODELS | {"dsa": test_dsa.MODELS["whole"], "v4": test_csa.v4_config()}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_end=True)


@pytest.fixture(autouse=True)
def serving():
    with torch.no_grad():
        yield


def quantized(model: Model) -> Model:
    model = copy.deepcopy(model)
    quantize(model)
    return model


def rounded(model: Model) -> Model:
    """The twin: the same in fp32."""
    model = copy.deepcopy(model)
    for _, module in to_quantize(model):
        module.weight.copy_(int8.dequantize(int8.quantize(module.weight)))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_int8_weights_are_rounded_weights(name):
    model, tokens_BT = build(MODELS[name]), text(2, 21)
    want, got = (one(tokens_BT, want=("hidden",)) for one in (rounded(model), quantized(model)))
    assert_close_fp32(got.logits, want.logits)
    assert (want.logits - model(tokens_BT).logits).abs().max() > 1e-4, "rounding must show"
    losses = [one(tokens_BT, targets_BT=next_tokens(tokens_BT), want=("token_losses",)) for one in (rounded(model), quantized(model))]
    assert_close_fp32(losses[1].extras["token_losses"], losses[0].extras["token_losses"])


@pytest.mark.parametrize("name", test_capture.MODELS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5)])
def test_captured_int8_is_ordinary_int8(name, batch, tokens):
    need(cpu.library)
    test_capture.both(quantized(build(MODELS[name])), text(batch, 7 + 3 * tokens), 7, tokens)


def test_a_captured_step_reads_a_byte_a_weight():
    need(cpu.library)
    model = build(bare(num_layers=1))
    plain, small = capture(model).weight_bytes, capture(quantized(model)).weight_bytes
    modules = [module for _, module in to_quantize(model)]
    saved = sum(module.weight.numel() for module in modules) * 3 - sum(4 * module.weight.shape[0] for module in modules)
    assert plain - small == saved


@pytest.mark.parametrize("config", [whole(), test_csa.v4_config(), test_dsa.MODELS["whole"]], ids=["mla", "v4", "dsa"])
def test_all_matrices_are_int8_but_those_that_choose_or_are_absorbed(config):
    model = quantized(build(config))
    floating = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.int8 and "weight" in name.split(".")[-1]}
    linear = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "matmul")}
    assert linear - floating and {name for name in linear & floating if "kv_b" not in name and "indexer" not in name} == set()
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if name.endswith("router"))
    assert "embed.weight" in floating


def test_loading_as_int8_is_quantizing_what_was_loaded(tmp_path):
    byrote.save(build(whole()), tmp_path / "m")
    got, want = byrote.load(tmp_path / "m", weights="int8").model, quantized(byrote.load(tmp_path / "m").model)
    assert_bitwise(got(text(2, 9)).logits, want(text(2, 9)).logits)
    assert got.training is False


def test_what_is_not_int8_is_loaded_as_fp32(tmp_path):
    model = build(whole()).bfloat16()
    byrote.save(model, tmp_path / "m")
    got = byrote.load(tmp_path / "m", weights="int8").model
    assert {parameter.dtype for parameter in got.parameters()} == {torch.int8, torch.float32}
    assert_close_fp32(got(text(2, 9)).logits, rounded(copy.deepcopy(model).float())(text(2, 9)).logits)


def test_what_a_model_holds_is_a_byte_a_weight_and_a_scale_a_row():
    model = build(whole())
    small, modules = quantized(model), dict(to_quantize(model))
    for name, module in modules.items():
        found = small.get_submodule(name)
        held = [found.weight, found.matmul.scale_F]
        assert sum(part.numel() * part.element_size() for part in held) == module.weight.numel() + 4 * module.weight.shape[:-1].numel()
    assert sum(1 for parameter in small.parameters() if parameter.dtype == torch.int8) == len(modules)


@pytest.mark.parametrize("captured", [True, False])
def test_the_engine_says_with_int8_weights_what_the_rounded_model_says(captured):
    model, asked = build(whole(init_std=0.5)), prompts(5, longest=40)
    engine = engine_of(quantized(model), max_batch=4, chunk_tokens=16, captured=captured)
    assert answers(engine, asked, GREEDY) == [twin(rounded(model), ids, 12) for ids in asked]
    assert captured is (engine.runner.why_not == "") or cpu.library() is None


def test_speculation_changes_nothing_with_int8_weights():
    model, asked = quantized(build(whole(init_std=0.5))), prompts(3, longest=30)
    said = [answers(engine_of(model, speculate=how), asked, GREEDY) for how in ("always", "off")]
    assert said[0] == said[1]


def test_python_and_server_take_the_option(tmp_path, monkeypatch):
    from byrote.cli.main import main
    from byrote.engine.llm import LLM
    from byrote.serve import server, worker
    from byrote.serve.config import ServeConfig
    from byrote.tokenizer.bpe import train_bpe

    tokenizer = train_bpe(["some text to learn from"] * 4, 262)
    byrote.save(build(whole(vocab_size=262)), tmp_path / "m", tokenizer=tokenizer)
    want = twin(rounded(byrote.load(tmp_path / "m").model), [5, 6], 12)
    llm = LLM(tmp_path / "m", weights="int8", config=EngineConfig(speculate="off", max_length=64))
    assert list(llm.generate([5, 6], GREEDY)[0].ids) == want
    seen: list[ServeConfig] = []
    monkeypatch.setattr(server, "serve", lambda config: seen.append(config) or 0)
    assert main(["serve", str(tmp_path / "m"), "--weights", "int8"]) == 0
    assert answers(worker._engine(seen[0]), [[5, 6]], GREEDY) == [want]
    with pytest.raises(ConfigError, match="int8 weights are for the CPU, and the device is cuda"):
        ServeConfig(run="m", name="m", device="cuda", weights="int8")


@dataclass
class Optim:
    matrix: str = "muon"


REFUSED = {
    "quantized once": lambda model: quantize(model),
    "saved or exported": lambda model: model.state_dict(),
    "trained": lambda model: build_optimizers(model, Optim()),
    "taken apart": lambda model: own_memory(model, test_pack.facts(build(whole()))),
    "compared with the base of a pack": lambda model: attach(model, test_pack.pack_for(build(whole()))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_int8_weights_cannot_is_refused(what):
    with pytest.raises(ConfigError, match=what):
        REFUSED[what](quantized(build(whole())))


def test_nothing_is_written_when_saving_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="weights 'saved'"):
        byrote.save(quantized(build(whole())), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_pack_of_any_base_speaks():
    model, tokens_BT = build(whole()), text(1, 9)
    small, twin_ = quantized(model), rounded(model)
    for one in (small, twin_):
        attach(one, test_pack.pack_for(model), any_base=True)
    assert_close_fp32(small(tokens_BT).logits, twin_(tokens_BT).logits)


def test_numbers_that_are_not_finite_are_named_and_nothing_is_changed():
    model = build(whole())
    model.head.weight[3, 2] = float("nan")
    with pytest.raises(ConfigError, match=r"head\.weight cannot be int8: a number is not finite"):
        quantize(model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("weights", "device", "message"), [("int4", "cpu", "weights are 'int4'"), ("int8", "cuda", "device is cuda")])
def test_impossible_weights_are_refused_before_anything_is_read(tmp_path, weights, device, message):
    with pytest.raises(ConfigError, match=message):
        byrote.load(tmp_path / "nothing", device=device, weights=weights)


def test_auto_is_the_cpu_for_int8():
    assert check_weights("int8", "auto") == "cpu" and check_weights("saved", "auto") == "auto"


def test_another_device_is_refused_by_the_product():
    model = quantized(build(bare(moe=MOE)))
    modules: list[nn.Module] = [model.head, model.blocks[1].ffn.experts.down]
    for module in modules:
        x = torch.empty(2, module.weight.shape[-1], device="meta")
        with pytest.raises(ConfigError, match="the input is on meta"):
            module(x) if module is model.head else module(x, torch.tensor([2] * 5))
