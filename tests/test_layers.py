"""Imports go downward only, and each outside package has its place. Function-level imports count like any other."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = """
__main__
cli
__init__
study | recipes
posttrain | graft
serve | eval | train
engine
parallel | optical
checkpoint | data | optim
model | tokenizer
memory
kernels
config | device | console
errors
"""
HEIGHT = {name: -line for line, names in enumerate(LAYERS.split("\n")) for name in names.split(" | ") if name}
NEVER = {("train", "engine")}  # lies below, and still: a trainer must not need an inference engine
PLACES = {  # outside package → the only places that may import it
    "torch.distributed": ("parallel", "checkpoint", "train"),
    "triton": ("kernels",),
    "fastapi": ("serve",),
    "pydantic": ("serve",),
    "transformers": ("checkpoint", "graft", "eval/harness"),
    "matplotlib": ("study", "eval", "cli"),
}
BARE = {"torch", "numpy", "safetensors", *sys.stdlib_module_names}
ALLOWED = {  # place → all it may import besides byrote
    "kernels": BARE | {"triton"},
    **dict.fromkeys(("memory", "model", "optim", "train/loop"), BARE),
    "device": {"torch", *sys.stdlib_module_names},
    **{place: set(sys.stdlib_module_names) for place in ("config", "console", "errors")},
}
FILES = sorted((ROOT / "byrote").rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names a file imports: `from a import b` gives a.b; `torch.distributed.x` spelled out counts as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction: write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def problems(place: str, names: Iterator[str]) -> Iterator[str]:
    """`place` is a path below byrote/ without its suffix, such as "model/mla"."""
    own = place.split("/")[0]
    allowed = next((packages for where, packages in ALLOWED.items() if lies_in(place, where)), None)
    for name in names:
        top, _, rest = name.partition(".")
        part = rest.split(".")[0] if rest.split(".")[0] in HEIGHT else "__init__"  # import byrote; from byrote import load
        if top == "byrote" and part != own and (HEIGHT[part] >= HEIGHT[own] or (own, part) in NEVER):
            yield f"byrote/{place} imports {name}, which does not lie below it"
        if top != "byrote" and allowed is not None and top not in allowed:
            yield f"byrote/{place} imports {name}; of outside packages it may use only {sorted(allowed - sys.stdlib_module_names)}"
        for package, places in PLACES.items():
            if f"{name}.".startswith(f"{package}.") and not any(lies_in(place, where) for where in places):
                yield f"byrote/{place} imports {name}; only {', '.join(places)} may"


def lies_in(place: str, where: str) -> bool:
    return place == where or place.startswith(f"{where}/")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downward_and_outside_packages_stay_in_their_places(file: Path) -> None:
    place = file.relative_to(ROOT / "byrote").with_suffix("").as_posix()
    assert not list(problems(place, imported(ast.parse(file.read_text())))), "see docs/architecture.md: who may import whom"


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("model/mla", "from byrote.train.loop import Loop"),
        ("train/loop", "def f():\n    import byrote.engine"),
        ("eval/bits", "from byrote.train.run import RunConfig"),
        ("console", "from byrote import device"),
        ("checkpoint/local", "from byrote import Model"),
        ("study/runner", "import byrote"),
        ("study/runner", "import byrote.cli.main"),
        ("model/moe", "import torch; torch.distributed.get_rank()"),
        ("kernels/native", "import fastapi"),
        ("eval/bits", "import transformers.models"),
        ("memory/table", "import importlib; importlib.import_module('pandas')"),
    ],
)
def test_the_rule_notices(place: str, line: str) -> None:
    assert list(problems(place, imported(ast.parse(line))))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("checkpoint/local", "from byrote.model.config import ModelConfig"),
        ("eval/harness", "import transformers"),
        ("model/mla", "import torch"),
    ],
)
def test_the_rule_allows(place: str, line: str) -> None:
    assert not list(problems(place, imported(ast.parse(line))))
