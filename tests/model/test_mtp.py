"""Multi-token prediction: who is given which token, who is asked for which, and where asking stops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from byrote.errors import ConfigError, RequestError
from byrote.model.config import MTPConfig
from byrote.model.mtp import MTPModule, shift_targets, tokens_ahead
from byrote.model.state import DecodeState
from byrote.model.transformer import Model
from tests.model.tiny_models import RESIDUALS, VOCAB, bare, build, gradients, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

IGNORE = -100
WANT = ("mtp_logits", "mtp_losses")


def targets_of(row: Tensor) -> Tensor:
    """Targets of all but the last token of `row`: every one is known."""
    return row[:, 1:]


class Listening:
    """What each MTP module was given: hidden states and embeddings."""

    def __init__(self, model: Model) -> None:
        self.given: list[tuple[Tensor, Tensor]] = []
        for module in model.mtp:
            module.register_forward_pre_hook(lambda _module, args: self.given.append(args[:2]))


def test_module_k_at_position_i_gets_token_i_plus_k_and_is_asked_for_the_next():
    model, row = build(whole()), text(1, 10)
    heard = Listening(model)
    out = model(row[:, :-1], targets_BT=targets_of(row), want=("hidden", *WANT))
    for k in (1, 2):
        embedded = model.embed(row)[0]
        given_hidden, given_token = heard.given[k - 1]
        known = 9 - (k - 1)  # positions whose token i + k lies in the row
        assert_bitwise(given_token[0, :known], embedded[k : k + known])
        said = model.head(out.extras["hidden"]) if k == 1 else out.extras["mtp_logits"][k - 2]
        assert_close_fp32(model.head(given_hidden), said)  # it goes on from what was said before, after its norm
        log_p = out.extras["mtp_logits"][k - 1][0].log_softmax(-1)
        asked = [i for i in range(9) if i + k + 1 <= 9]
        losses_T = out.extras["mtp_losses"][k - 1][0]
        for i in range(9):
            want = -log_p[i, row[0, i + k + 1]] if i in asked else torch.tensor(0.0)
            assert_close_fp32(losses_T[i], want)
    means = [losses.sum() / (9 - k) for k, losses in enumerate(out.extras["mtp_losses"], 1)]
    assert_close_fp32(out.losses["mtp"], torch.stack(means).mean())


def test_one_module_in_equations():
    model, row = build(bare(mtp=MTPConfig())), text(1, 8)
    heard = Listening(model)
    out = model(row[:, :-1], targets_BT=targets_of(row), want=WANT)
    module, (hidden, embedded) = model.mtp[0], heard.given[0]
    joined = torch.cat((module.embed_norm(embedded), module.hidden_norm(hidden)), dim=-1)  # embedding first, as released
    batch = model._batch(row[:, :-1], None, None, None, None)
    streams, _ = module.block((joined @ module.project.weight.T)[:, :, None], batch)
    assert_close_fp32(out.extras["mtp_logits"][0], module.norm(streams[:, :, 0]) @ model.head.weight.T)


def test_shifted_targets_end_with_the_row_and_the_document():
    targets = torch.tensor([[1, 2, IGNORE, 4, 5, 6]])
    documents = torch.tensor([[0, 0, 0, 7, 7, 7]])
    assert shift_targets(targets, None, 1).tolist() == [[2, IGNORE, 4, 5, 6, IGNORE]]
    assert shift_targets(targets, documents, 1).tolist() == [[2, IGNORE, IGNORE, 5, 6, IGNORE]]
    assert shift_targets(targets, documents, 2).tolist() == [[IGNORE, IGNORE, IGNORE, 6, IGNORE, IGNORE]]
    for places in (6, 7):
        assert shift_targets(targets, documents, places).tolist() == [[IGNORE] * 6]


def test_tokens_ahead_are_the_rows_own_and_end_with_the_document():
    tokens, targets = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, IGNORE, 5, 6]])
    documents = torch.tensor([[0, 0, 0, 7, 7]])
    assert tokens_ahead(tokens, targets, None, 1).tolist() == [[2, 3, 4, 5, 6]]
    assert tokens_ahead(tokens, targets, documents, 1).tolist() == [[2, 3, 0, 5, 6]]
    assert tokens_ahead(tokens, targets, documents, 2).tolist() == [[3, 0, 0, 6, 0]]
    for places in (6, 7):
        assert tokens_ahead(tokens, targets, documents, places).tolist() == [[0] * 5]


def test_masked_targets_do_not_change_what_the_modules_read():
    """In fine-tuning the prompt is not scored; later tokens attend to it all the same."""
    model, row = build(whole()), text(1, 12)
    masked = targets_of(row).clone()
    masked[:, :6] = IGNORE
    whole_row, some = (model(row[:, :-1], targets_BT=targets, want=WANT).extras for targets in (targets_of(row), masked))
    for depth in (0, 1):
        assert_bitwise(some["mtp_logits"][depth], whole_row["mtp_logits"][depth])
        kept = slice(6 - (depth + 1), None)
        assert_bitwise(some["mtp_losses"][depth][:, kept], whole_row["mtp_losses"][depth][:, kept])
        assert not some["mtp_losses"][depth][:, : 6 - (depth + 1)].any()


def test_modules_look_at_no_token_beyond_their_own():
    model, row = build(whole()), text(1, 12)
    other = row.clone()
    other[0, 8] = (other[0, 8] + 1) % VOCAB
    logits = [model(one[:, :-1], targets_BT=targets_of(one), want=WANT).extras["mtp_logits"] for one in (row, other)]
    for k in (1, 2):
        difference_T = (logits[0][k - 1] - logits[1][k - 1]).abs().amax(-1)[0]
        assert difference_T[: 8 - k].max() < 1e-5 < difference_T[8 - k]


def test_the_main_model_is_the_same_with_and_without_modules():
    model, row = build(whole()), text(2, 9)
    bare_model = Model(replace(model.config, mtp=None)).eval()
    bare_model.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")})
    with torch.no_grad():
        assert_bitwise(model(row).logits, bare_model(row).logits)


def test_embedding_and_head_are_shared_and_every_weight_of_a_module_learns():
    model, row = build(whole()), text(2, 12)
    assert not any(isinstance(part, torch.nn.Embedding) for module in model.mtp for part in module.modules())
    model(row, targets_BT=next_tokens(row), want=("mtp_losses",)).losses["mtp"].backward()
    learnt = gradients(model)
    for name, _ in model.named_parameters():
        if name.startswith("mtp.") and "experts" not in name:
            assert learnt[name].abs().max() > 0, name
    assert learnt["embed.weight"].abs().max() > 0 < learnt["head.weight"].abs().max()


def test_evaluation_skips_the_modules_unless_asked():
    model, row = build(whole()), text(1, 6)
    assert "mtp" not in model(row, targets_BT=next_tokens(row)).losses
    assert "mtp" in model(row, targets_BT=next_tokens(row), want=("mtp_losses",)).losses
    assert "mtp" in model.train()(row, targets_BT=next_tokens(row)).losses


@pytest.mark.parametrize(("fraction", "sequences"), [(0.5, 2), (0.01, 1), (1.0, 4)])
def test_a_share_of_the_sequences_trains_as_if_the_others_were_not_there(fraction, sequences):
    config = whole(mtp=MTPConfig(depth=2, train_fraction=fraction))
    row, documents = text(4, 9), torch.tensor([[0] * 5 + [1] * 4] * 4)
    out = build(config).train()(row, targets_BT=next_tokens(row, documents), document_BT=documents)
    few = build(config).eval()(
        row[:sequences], targets_BT=next_tokens(row, documents)[:sequences], document_BT=documents[:sequences], want=("mtp_losses",)
    )
    assert_close_fp32(out.losses["mtp"], few.losses["mtp"])
    assert out.loads["mtp.0.block.ffn"].sum() == sequences * 9 * 2
    assert out.loads["blocks.1.ffn"].sum() == 4 * 9 * 2


@pytest.mark.parametrize("length", [1, 2])
def test_texts_too_short_to_ask_cost_nothing(length):
    model, row = build(whole()).train(), text(2, length)
    losses = model(row, targets_BT=next_tokens(row)).losses
    assert losses["mtp"] == 0
    sum(losses.values()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_state_and_modules_do_not_go_together():
    model, row = build(whole()).train(), text(1, 6)
    with pytest.raises(ConfigError, match="leave the state out"):
        model(row, targets_BT=next_tokens(row), state=model.new_state())


@pytest.mark.parametrize(("changes", "message"), [({"depth": 0}, "mtp = none"), ({"train_fraction": 0.0}, "train_fraction")])
def test_modules_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        MTPConfig(**changes)


@pytest.mark.parametrize("kind", RESIDUALS)
def test_modules_have_the_residual_of_the_model(kind):
    module = MTPModule(whole(residual=RESIDUALS[kind]), 0)
    assert module.num_streams == RESIDUALS[kind].streams


# --- drafting from a state ---------------------------------------------------------------------------------------------

FORMS = ("joined", "streams")


def drafting(form: str, depth: int = 2) -> Model:
    return build(whole(mtp=MTPConfig(depth=depth, form=form)))


def said_by(model: Model, row: Tensor, module: int) -> Tensor:
    """What module `module` expects at the last place where it knows enough of `row`: [B]."""
    out = model(row[:, :-1], targets_BT=targets_of(row), want=WANT)
    return out.extras["mtp_logits"][module][:, -1 - module].argmax(-1)


def read_in_pieces(model: Model, row: Tensor, cuts: tuple[int, ...], document_BT: Tensor | None = None) -> DecodeState:
    state = model.new_state(len(row), drafts=True)
    documents = [None] * (len(cuts) + 1) if document_BT is None else document_BT.tensor_split(cuts, dim=1)
    for piece, numbers in zip(row.tensor_split(cuts, dim=1), documents, strict=True):
        model(piece, document_BT=numbers, state=state)
    return state


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [(), (1, 2), (3, 7, 8), tuple(range(1, 11))])
def test_drafts_are_what_the_modules_say_of_the_whole_text(form, cuts):
    model, row = drafting(form), text(3, 12)
    drafts_BN = model.draft(read_in_pieces(model, row[:, :-1], cuts), row[:, -1:], count=2)
    assert_bitwise(drafts_BN[:, 0], said_by(model, row, 0))
    assert_bitwise(drafts_BN[:, 1], said_by(model, torch.cat((row, drafts_BN[:, :1]), dim=1), 1))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_even_the_shortest_text_can_be_drafted_from(length):
    model, row = drafting("streams", depth=3), text(2, length + 1)
    state = read_in_pieces(model, row[:, :-1], ())
    assert_bitwise(model.draft(state, row[:, -1:], count=3)[:, 0], said_by(model, row, 0))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_draft_leaves_the_state_as_it_was_and_roll_back_takes_drafts_along(form):
    model, row = drafting(form), text(2, 14)
    state, twin = (read_in_pieces(model, row[:, :9], (4,)) for _ in range(2))
    first = model.draft(state, row[:, 9:10], count=4)
    assert_bitwise(model.draft(state, row[:, 9:10], count=4), first)
    model(text(2, 3, seed=8), state=state)
    state.rollback(3)
    assert_bitwise(model.draft(state, row[:, 9:10], count=4), first)
    snapshot = state.snapshot()
    model(text(2, 2, seed=8), state=state)
    state.restore(snapshot)
    assert_bitwise(model(row[:, 9:12], state=state).logits, model(row[:, 9:12], state=twin).logits)
    state.select(torch.tensor([1, 1]))
    twin_draft = model.draft(twin, row[:, 12:13], count=2)
    assert_bitwise(model.draft(state, row[[1, 1], 12:13], count=2), twin_draft[[1, 1]])


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_drafts_of_a_padded_row_are_those_of_its_text_alone(form):
    model, row = drafting(form), text(1, 9)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), row[:, :-1]), dim=1)
    document_BT = torch.tensor([[-1] * 4 + [3] * 8])
    want = model.draft(read_in_pieces(model, row[:, :-1], ()), row[:, -1:], count=2)
    assert_bitwise(model.draft(read_in_pieces(model, padded, (2, 6), document_BT), row[:, -1:], count=2), want)


@torch.no_grad()
def test_beyond_the_last_module_it_goes_on_from_its_own_output():
    model, row = drafting("joined", depth=1), text(1, 8)
    state = read_in_pieces(model, row, ())
    given, said = [], []
    model.mtp[0].register_forward_hook(lambda _module, args, out: given.append(args[:2]) or said.append(out[0]))
    drafts_BN = model.draft(state, row[:, :1], count=3)
    assert len(given) == 3
    for step in (1, 2):
        assert_bitwise(given[step][0], said[step - 1])
        assert_bitwise(given[step][1], model.embed(drafts_BN[:, step - 1 : step]))


def test_drafts_that_cannot_be_are_refused():
    model = drafting("joined")
    with pytest.raises(ConfigError, match="drafts=True"):
        model.draft(model.new_state(), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RequestError, match="after the prompt was read"):
        model.draft(model.new_state(drafts=True), torch.zeros(1, 1, dtype=torch.int64))
    state = read_in_pieces(model, text(1, 3), ())
    with pytest.raises(RequestError, match="ask for 1 to 16"):
        model.draft(state, torch.zeros(1, 1, dtype=torch.int64), count=17)
    with pytest.raises(ConfigError, match="mtp is none"):
        build(bare()).new_state(drafts=True)
