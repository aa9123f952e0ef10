"""Text that must follow a grammar: before each draw, the tokens that cannot go on are forbidden. The work is done by `xgrammar`.

A grammar is compiled once for a tokenizer and kept; every choice walks a matcher of its own. What a token is to the grammar is its
exact bytes; special tokens have none and are never allowed, but the end of the document where the grammar is complete. JSON is written
with one space behind commas and colons and no other, since a model that may write white space anywhere can go on with it for ever.
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from byrote.engine.request import ByteTokenizer, Grammar, TokenMask
from byrote.errors import ConfigError, RequestError

_ANY_OBJECT = '{"type": "object"}'
INSTALL = 'install it with: pip install "byrote[grammar]"'


class Grammars:
    """All grammars of one tokenizer. `vocab_size`: the model's, which may be larger than the tokenizer's."""

    def __init__(self, tokenizer: ByteTokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiler: Any = None
        self._compiled: dict[Grammar, Any] = {}

    def mask(self, grammar: Grammar, ends: Collection[int]) -> TokenMask:
        """A matcher at the start of `grammar`. Raises RequestError for one that cannot be compiled, ConfigError without xgrammar."""
        try:
            import xgrammar
        except ImportError as error:
            raise ConfigError(f"a grammar needs the extra package xgrammar; {INSTALL}") from error
        if grammar not in self._compiled:
            self._compiled[grammar] = self._compile(xgrammar, grammar)
        return _Matcher(xgrammar, self._compiled[grammar], self._vocab_size, tuple(ends))

    def _compile(self, xgrammar: Any, grammar: Grammar) -> Any:
        if self._compiler is None:
            self._compiler = xgrammar.GrammarCompiler(self._tokens(xgrammar), max_threads=1)
        compilers = {
            "json_schema": partial(self._compiler.compile_json_schema, any_whitespace=False),
            "regex": self._compiler.compile_regex,
            "ebnf": self._compiler.compile_grammar,
        }
        kind, text = ("json_schema", _ANY_OBJECT) if grammar.kind == "json" else (grammar.kind, grammar.text)
        try:
            return compilers[kind](text)
        except Exception as error:  # the library's errors have no common type
            raise RequestError(f"the {grammar.kind} grammar cannot be used: {_said(error)}") from error

    def _tokens(self, xgrammar: Any) -> Any:
        known = len(self._tokenizer.token_strings())
        spelled = [self._tokenizer.token_bytes(token) if token < known else b"" for token in range(self._vocab_size)]
        return xgrammar.TokenizerInfo(
            spelled, vocab_type=xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=[self._tokenizer.end_id]
        )


def _said(error: Exception) -> str:
    """The first line of an error of the library, without the place in its sources."""
    return re.sub(r"^\[[^\]]*\] \S+:\d+: ", "", str(error).strip().splitlines()[0])


class _Matcher:
    def __init__(self, xgrammar: Any, compiled: Any, vocab_size: int, ends: tuple[int, ...]) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(ends) or None)
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def forbid(self, logits_V: Tensor) -> None:
        self._matcher.fill_next_token_bitmask(self._bits)
        logits_V.masked_fill_(~self._allowed(len(logits_V)), float("-inf"))

    def accept(self, token: int) -> None:
        assert self._matcher.is_terminated() or self._matcher.accept_token(token), f"token {token} was chosen against the grammar"

    def _allowed(self, vocab_size: int) -> Tensor:
        """bool [V] from one bit a token, 32 to a word."""
        bits = torch.arange(32, dtype=torch.int32)
        return ((self._bits[0][:, None] >> bits) & 1).flatten()[:vocab_size].bool()
