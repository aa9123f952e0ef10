"""`byrote chat RUN`: talk to a run in the terminal; a base model, which has no chat template, continues what is typed."""

import argparse
import secrets
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from byrote.cli.loading import add_weights

if TYPE_CHECKING:
    from byrote.engine.llm import LLM
    from byrote.engine.request import SamplingParams

HELP = "talk to a run in the terminal"

EXAMPLES = """
examples:
  byrote chat runs/v3
  byrote chat runs/v3 --system "Answer in one sentence." --temperature 0.6 --memory law=packs/law
  echo "def read_lines(path):" | byrote chat runs/quickstart

Commands: /reset forgets the conversation, /exit ends it, as does the end of the input. Ctrl-C stops an answer.
"""
COMMANDS = ("/reset", "/exit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="folder made by `byrote train`, `byrote quickstart` or `byrote import`")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=512, help="at most this many tokens an answer (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, metavar="P", default=1.0, help="choose among the most probable that reach share P")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed and messages give the same answers (default: a new one)")
    parser.add_argument("--memory", metavar="[NAME=]PACK", help="a memory pack to talk with")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add_weights(parser)


def run(args: argparse.Namespace) -> int:
    from byrote.engine.llm import LLM
    from byrote.engine.request import SamplingParams
    from byrote.errors import RequestError
    from byrote.tokenizer.chat import ChatTemplate

    seed = secrets.randbits(32) if args.seed is None else args.seed
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=seed)
    llm = LLM(args.run, device=args.device, weights=args.weights)
    if llm.tokenizer is None:
        raise RequestError(f"{args.run} holds a model without a tokenizer, and text needs one; save it again with its tokenizer")
    template = ChatTemplate.of(llm.tokenizer)
    if template is None and args.system:
        raise RequestError(f"{args.run} is a base model without a chat template: it continues text and takes no --system")
    pack = _load_memory(llm, args.memory)
    kind = "a base model without a chat template: it continues what you type" if template is None else "type a message"
    print(f"byrote: {kind}. {', '.join(COMMANDS)}; seed {seed}", file=sys.stderr)
    talk(llm, params, pack, chats=template is not None, system=args.system)
    return 0


def talk(llm: "LLM", params: "SamplingParams", pack: str | None, *, chats: bool, system: str | None) -> None:
    """Read lines and answer them until the end of the input or /exit."""
    from byrote.errors import RequestError

    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(first)
            continue
        if line.startswith("/") and " " not in line:
            print(f"byrote: unknown command {line}; there are {', '.join(COMMANDS)}", file=sys.stderr)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = _answer(llm, llm.chat_ids(asked) if chats else line, params, pack)
        except RequestError as error:  # too long by now, or against the template: the conversation so far stands
            print(f"byrote: {error}. /reset begins anew", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def _load_memory(llm: "LLM", memory: str | None) -> str | None:
    """The name that the pack goes by."""
    if memory is None:
        return None
    name, _, path = memory.rpartition("=")
    name = name or path.rstrip("/").rsplit("/", 1)[-1]
    llm.engine.load_pack(name, path)
    return name


def _lines() -> Iterator[str]:
    """What is typed, without empty lines; with a prompt where somebody sits."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _answer(llm: "LLM", prompt: str | list[int], params: "SamplingParams", pack: str | None) -> str:
    """Print an answer as it comes; what was said, also if Ctrl-C cut it short."""
    said, tokens, start, stream = "", 0, time.perf_counter(), llm.stream(prompt, params, pack=pack)
    try:
        for event in stream:
            print(event.text, end="", flush=True)
            said, tokens = said + event.text, tokens + len(event.tokens)
    except KeyboardInterrupt:
        stream.close()
    print()
    print(f"byrote: {tokens} tokens, {tokens / max(time.perf_counter() - start, 1e-9):.1f} a second", file=sys.stderr)
    return said
