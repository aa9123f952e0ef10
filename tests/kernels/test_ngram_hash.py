"""The hash in C and in PyTorch are the same integers, for every shape, border and constant."""

import pytest
import torch

from byrote.kernels.ngram_hash import cpu, reference
from tests.kernels.twins import need
from tests.tolerances import assert_bitwise

VOCAB = 99_092


def constants(layers: int, orders: int, heads: int) -> dict:
    random = torch.Generator().manual_seed(layers + 10 * orders)
    bound = (2**63 - 1) // VOCAB // 2
    return {
        "pad": 2,
        "vocab": VOCAB,
        "multipliers_LM": torch.randint(bound, (layers, orders), generator=random) * 2 + 1,
        "primes_LNH": torch.randint(1, 10**9, (layers, orders - 1, heads), generator=random),
        "starts_LN": torch.randint(10**12, (layers, (orders - 1) * heads), generator=random),
    }


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 7), (2, 0), (2, 257)])
@pytest.mark.parametrize(("layers", "orders", "heads"), [(1, 2, 1), (2, 3, 4), (3, 5, 8)])
@pytest.mark.parametrize("documents", [None, 1, 3])
def test_the_twins_agree(batch, tokens, layers, orders, heads, documents):
    need(cpu.library)
    shape, random = (batch, orders - 1 + tokens), torch.Generator().manual_seed(tokens)
    ids_BS = torch.randint(VOCAB, shape, generator=random)
    document_BS = None if documents is None else torch.randint(-1, documents, shape, generator=random)
    numbers = constants(layers, orders, heads)
    want = reference.hash_rows(ids_BS, document_BS, **numbers)
    assert_bitwise(cpu.hash_rows(ids_BS, document_BS, **numbers), want)
    strewn = ids_BS.int().t().contiguous().t()
    assert_bitwise(cpu.hash_rows(strewn, None if document_BS is None else document_BS.int(), **numbers), want)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_both_refuse_an_id_outside_the_vocabulary(bad):
    for back_end in (reference, *([cpu] if cpu.library() else [])):
        assert back_end.hash_rows(torch.tensor([[3, 5, bad, 7]]), None, **constants(1, 3, 2)) is None
