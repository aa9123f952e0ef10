"""N-grams of canonical ids → rows of the memory table. The definition: reference.py."""

from torch import Tensor

from byrote.kernels.ngram_hash import cpu, reference


def hash_rows(
    ids_BS: Tensor, document_BS: Tensor | None, *, pad: int, vocab: int, multipliers_LM: Tensor, primes_LNH: Tensor, starts_LN: Tensor
) -> Tensor | None:
    """int64 [B, T, L, N]: the row of every (order, head), counted from `starts_LN`. The first M − 1 ids are history; where `document_BS`
    changes, and from there back, an n-gram sees `pad`. None: an id lies outside [0, vocab)."""
    tensors = (ids_BS, multipliers_LM) if document_BS is None else (ids_BS, document_BS, multipliers_LM)
    backend = cpu if cpu.can_run(*tensors) else reference
    return backend.hash_rows(
        ids_BS, document_BS, pad=pad, vocab=vocab, multipliers_LM=multipliers_LM, primes_LNH=primes_LNH, starts_LN=starts_LN
    )
