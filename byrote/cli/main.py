"""`byrote VERB …`: finds the module of a verb, hands it the arguments, turns errors of the tree into one clear message.

A verb is a module with `HELP` (one line), `add_arguments(parser)` and `run(args) -> exit status`. It imports torch, and
whatever else is slow, inside `run`, so that `byrote --help` answers at once. Exit status: 0 done, 2 an error that says what
to do, 130 interrupted.
"""

import argparse
import importlib
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn

from byrote.config import nearest
from byrote.errors import ByroteError, ConfigError

VERBS = {
    "doctor": "byrote.cli.doctor",
    "quickstart": "byrote.cli.quickstart",
    "train": "byrote.cli.train",
    "generate": "byrote.cli.generate",
    "chat": "byrote.cli.chat",
    "serve": "byrote.cli.serve",
    "eval": "byrote.cli.eval",
    "plan": "byrote.cli.plan",
    "compare": "byrote.cli.compare",
    "graft": "byrote.cli.graft",
    "memory": "byrote.cli.memory",
    "extend": "byrote.cli.extend",
    "import": "byrote.cli.import_model",
    "export": "byrote.cli.export_model",
}

ABOUT = "byrote trains, judges and runs sparse language models with memory."
HINT = "byrote VERB --help explains one verb; --traceback shows the full trace of an error."


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError, never guesses abbreviations, and names the nearest option."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See `{self.prog} --help`")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        args, extra = self.parse_known_args(argv)
        options = [option.split("=")[0] for option in extra if option.startswith("-")]
        if options:
            known = [name for name in self._options() if name.startswith("--")]
            self.error("; ".join(f"unknown option {option}; nearest: {nearest(option, known)}" for option in options))
        if extra:
            self.error(f"unexpected argument: {' '.join(extra)}. Text with spaces needs quotes")
        return args

    def _options(self) -> Iterator[str]:
        """Of this parser and of those of its actions."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    yield from sub._options()


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    full_trace = "--traceback" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets "?" instead of a crash
    try:
        return _dispatch([argument for argument in argv if argument != "--traceback"])
    except SystemExit as stop:  # argparse, after it printed --help
        return int(stop.code or 0)
    except ByroteError as error:
        if full_trace:
            traceback.print_exc()
        print(f"byrote: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbyrote: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone (`byrote … | head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def verbs() -> dict[str, str]:
    """The verbs whose module is there: name → module path."""
    return {verb: path for verb, path in VERBS.items() if importlib.util.find_spec(path) is not None}


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    verb, *rest = argv
    available = verbs()
    if verb not in available:
        kind = "option" if verb.startswith("-") else "verb"
        raise ConfigError(f"unknown {kind} {verb!r}; nearest verb: {nearest(verb, available)}. See `byrote --help`")
    module = importlib.import_module(available[verb])
    return module.run(_parser(verb, module).parse(rest))


def _parser(verb: str, module: ModuleType) -> Parser:
    parser = Parser(f"byrote {verb}", module.HELP)
    module.add_arguments(parser)
    return parser


def _overview() -> str:
    lines = [f"  {verb:<12}{importlib.import_module(path).HELP}" for verb, path in verbs().items()]
    return "\n".join([f"usage: byrote VERB …\n\n{ABOUT}\n", *lines, f"\n{HINT}"])


if __name__ == "__main__":
    sys.exit(main())
