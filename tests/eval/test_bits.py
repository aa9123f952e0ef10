"""Bits per byte against direct computations with models small enough to know by heart."""

import lzma
import math
import random
import shutil
import subprocess
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from byrote.errors import ConfigError, DataError
from byrote.eval.bits import bits_per_byte, xz_bits_per_byte


class ByteTokenizer:
    """One token per byte, behind begin and padding."""

    begin_id, pad_id = 256, 257

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]


class Fake(nn.Module):
    """A model whose loss at each scored position is a formula; it notes what it was given."""

    def __init__(self, formula: str = "unigram") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.formula = formula
        self.log_p = torch.log_softmax(torch.randn(258, 258, generator=torch.Generator().manual_seed(0)), -1)
        self.shapes: list[tuple[int, int]] = []

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor, document_BT: Tensor | None, want: tuple[str, ...]) -> SimpleNamespace:
        assert want == ("token_losses",)
        assert not self.training
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(tokens_BT.shape))
        document_BT = torch.zeros_like(tokens_BT) if document_BT is None else document_BT
        assert ((document_BT == 0) | (tokens_BT == 257)).all()
        assert (targets_BT[document_BT < 0] == -100).all()
        assert (document_BT.diff(dim=1) <= 0).all()  # padding on the right
        scored = targets_BT != -100
        losses = self.losses(tokens_BT, targets_BT.clamp_min(0))
        return SimpleNamespace(extras={"token_losses": torch.where(scored, losses, 0.0)})

    def losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if self.formula == "unigram":
            return -self.log_p[0][targets_BT]
        if self.formula == "bigram":
            return -self.log_p[tokens_BT, targets_BT]
        return torch.arange(1, tokens_BT.shape[1] + 1).expand(tokens_BT.shape).float()  # "history": tokens seen


def make_texts(seed: int = 0) -> list[tuple[str, str]]:
    choose = random.Random(seed)
    sizes = (0, 1, 2, 7, 8, 9, 15, 16, 17, 100, 257)
    return [(f"t{size}", "".join(choose.choices("abc é🦜\n", k=size))) for size in sizes]


def by_hand(model: Fake, text: str) -> float:
    """Bits of `text` as one sequence, without windows."""
    ids = torch.tensor([[256, *text.encode("utf-8")]])
    return float(model.losses(ids[:, :-1], ids[:, 1:]).double().sum()) / math.log(2)


@pytest.mark.parametrize("formula", ["unigram", "bigram"])
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (7, 1), (1, 1), (64, 33), (1000, 500)])
def test_windows_score_every_token_once_after_its_own_predecessor(formula: str, context: int, stride: int) -> None:
    model, texts = Fake(formula), make_texts()
    result = bits_per_byte(model, ByteTokenizer(), texts, context=context, stride=stride, batch_windows=3)
    for (name, text), (got_name, num_bytes, bits) in zip(texts, result.per_text, strict=True):
        assert (got_name, num_bytes) == (name, len(text.encode("utf-8")))
        assert bits == pytest.approx(by_hand(model, text), rel=1e-5)
    total = sum(len(text.encode("utf-8")) for _, text in texts)
    assert result.tokens == total
    assert result.bits_per_byte == pytest.approx(sum(bits for _, _, bits in result.per_text) / total)


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (9, 2)])
def test_every_token_sees_the_history_it_was_promised(context: int, stride: int) -> None:
    """The fake's loss is the number of tokens before the target; the tokens seen must never be fewer than the rule says."""
    text = "x" * 50
    result = bits_per_byte(Fake("history"), ByteTokenizer(), [("t", text)], context=context, stride=stride, batch_windows=1)
    seen = []
    while len(seen) < len(text):
        start = max(0, len(seen) - (context - stride))
        end = min(start + context, len(text))
        seen += [position - start + 1 for position in range(len(seen), end)]
    assert all(have > min(position, context - stride) for position, have in enumerate(seen))
    assert result.per_text[0].bits * math.log(2) == pytest.approx(sum(seen))


def test_the_example_of_the_docstring() -> None:
    model = Fake("history")
    result = bits_per_byte(model, ByteTokenizer(), [("t", "1234567")], context=4, stride=2, batch_windows=1)
    assert model.shapes == [(1, 4), (1, 4), (1, 3)]
    assert result.per_text[0].bits * math.log(2) == pytest.approx((1 + 2 + 3 + 4) + (3 + 4) + 3)


@pytest.mark.parametrize("batch_windows", [1, 2, 5, 1000])
def test_the_batch_size_changes_nothing(batch_windows: int) -> None:
    texts = make_texts()
    one = bits_per_byte(Fake("bigram"), ByteTokenizer(), texts, context=16, stride=8, batch_windows=1)
    other = bits_per_byte(Fake("bigram"), ByteTokenizer(), texts, context=16, stride=8, batch_windows=batch_windows)
    assert [text.bits for text in other.per_text] == pytest.approx([text.bits for text in one.per_text], rel=1e-6)


def test_full_windows_go_together_so_that_little_is_padding() -> None:
    model, texts = Fake(), make_texts()
    steps: list[tuple[int, int]] = []
    bits_per_byte(model, ByteTokenizer(), texts, context=16, stride=8, batch_windows=4, progress=lambda *step: steps.append(step))
    assert [length for _, length in model.shapes] == sorted((length for _, length in model.shapes), reverse=True)
    assert steps[-1][0] == steps[-1][1] == sum(rows for rows, _ in model.shapes)


def test_bf16_runs_under_autocast_and_fp32_does_not() -> None:
    seen = []

    class Spy(Fake):
        def losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().losses(tokens_BT, targets_BT)

    for precision in ("fp32", "bf16"):
        bits_per_byte(Spy(), ByteTokenizer(), [("t", "text")], precision=precision)
    assert seen == [False, True]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_even_by_an_error(training: bool) -> None:
    model = Fake("bigram").train(training)
    bits_per_byte(model, ByteTokenizer(), [("t", "text")])
    assert model.training is training
    model.log_p = torch.zeros(0)
    with pytest.raises(IndexError):
        bits_per_byte(model, ByteTokenizer(), [("t", "text")])
    assert model.training is training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, r"stride is 0; it must lie in 1\.\.1024"),
        ({"context": 8, "stride": 9}, r"stride is 9; it must lie in 1\.\.8"),
        ({"batch_windows": 0}, "batch_windows is 0"),
        ({"precision": "fp8"}, "allowed: fp32, bf16"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bits_per_byte(Fake(), ByteTokenizer(), [("t", "text")], **options)


@pytest.mark.parametrize("texts", [[], [("t", "")]])
def test_no_text_is_an_error(texts: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError, match="no text to score"):
        bits_per_byte(Fake(), ByteTokenizer(), texts)


def test_xz_compresses_the_texts_one_after_the_other() -> None:
    noise = random.Random(0).randbytes(10_000)
    assert 8.0 < xz_bits_per_byte([noise]) < 8.2
    assert 4.0 < xz_bits_per_byte([noise, noise]) < 4.2  # the second is a copy of the first
    assert xz_bits_per_byte([noise[:5000], noise[5000:]]) == xz_bits_per_byte([noise])
    with pytest.raises(DataError, match="no bytes to compress"):
        xz_bits_per_byte([b""])


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz program is not installed")
def test_xz_is_the_program_at_level_nine() -> None:
    content = lzma.__doc__.encode() * 50 + random.Random(1).randbytes(100)
    program = subprocess.run(["xz", "-9", "--threads=1", "--stdout"], input=content, capture_output=True, check=True).stdout
    assert xz_bits_per_byte([content]) == 8 * len(program) / len(content)
