"""Frozen dataclasses to and from plain values: for files, for the command line, for help texts.

A configuration is a tree of frozen dataclasses whose leaves are int, float, bool, str, None and tuples of these, with unions
such as `int | tuple[int, ...]`. The annotations are the schema; nothing is declared twice:

    to_dict(config)  ⇄  from_dict(RunConfig, data)                          what run.json and every checkpoint hold
    apply_overrides(config, {"model.moe.top_k": "4"})                       what `--model.moe.top_k 4` means
    describe(config)                                                        what `byrote train --help` prints

Text on the command line is read by the field's type: `1e-3`, `true`, `none`, `1,4` for a tuple; a part of the model is
switched off with `--model.engram none`; lists of parts are given as JSON, or by their one required field
(`--data.sources notes/,code/`). All overrides of one dataclass are applied at once, so that fields which constrain each
other (`num_experts`, `top_k`) can be changed together in any order.
"""

import ast
import difflib
import functools
import inspect
import io
import json
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

from byrote.errors import ConfigError

Config = TypeVar("Config")

REQUIRED = MISSING  # stands where a field has no default

NONE_WORDS = ("none", "null")
BOOL_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Option(NamedTuple):
    """One field that can be set from the command line."""

    name: str  # dotted: "model.moe.top_k"
    type: str  # as a user would say it: "int", "int or int,int,…", "none or JSON"
    default: object  # the value in this configuration, or REQUIRED
    doc: str  # the comment behind the field


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that looks most like `name`; "" if there is none to choose from."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), "")


# --- dataclass → plain values → dataclass -----------------------------------------------------------------------------


def to_dict(config: Any) -> Any:
    """`config` as dictionaries, lists and scalars, ready for JSON."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(element) for element in config]
    return config


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. ConfigError names every unknown or missing key, or the dotted path of a wrong type."""
    return _convert(cls, data, "")


def _convert(hint: Any, value: Any, path: str) -> Any:
    fitting = [member for member in _members(hint) if _fits(member, value)]
    if not fitting:
        raise ConfigError(f"{path or 'the configuration'} is {value!r} ({type(value).__name__}); allowed: {_type_name(hint)}")
    if isinstance(value, Mapping):  # of several dataclasses the one whose keys these are
        return _build(min(fitting, key=lambda part: len(_key_problems(part, value, path))), value, path)
    if typing.get_origin(fitting[0]) is tuple:
        return _convert_tuple(fitting[0], value, path)
    return float(value) if fitting[0] is float else value


def _build(cls: type, data: Mapping[str, Any], path: str) -> Any:
    problems = _key_problems(cls, data, path)
    if problems:
        raise ConfigError(f"{cls.__name__} cannot be read: {', '.join(problems)}")
    return cls(**{key: _convert(_hints(cls)[key], value, _dotted(path, key)) for key, value in data.items()})


def _key_problems(cls: type, data: Mapping[str, Any], path: str) -> list[str]:
    names = _hints(cls)
    problems = [f"unknown key {_dotted(path, key)} (nearest: {_dotted(path, nearest(key, names))})" for key in data if key not in names]
    return problems + [f"missing key {_dotted(path, name)}" for name in _missing(cls, data)]


def _convert_tuple(hint: Any, values: Iterable[Any], path: str) -> tuple[Any, ...]:
    values = list(values)
    element_hints = _element_hints(hint, len(values), path)
    return tuple(_convert(element, value, f"{path}[{i}]") for i, (element, value) in enumerate(zip(element_hints, values, strict=True)))


def _fits(member: Any, value: Any) -> bool:
    if member is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(member) is tuple:
        return isinstance(value, (list, tuple))
    if _is_part(member):
        return isinstance(value, Mapping)
    return isinstance(value, member)


# --- text from the command line → fields ------------------------------------------------------------------------------


def apply_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """A copy of `config` with the dotted fields set from text, each read by its type. Raises ConfigError."""
    known = [option.name for option in describe(config)]
    unknown = [f"{name} (nearest: {nearest(name, known)})" for name in overrides if name not in known]
    if unknown:
        raise ConfigError(f"unknown option: {', '.join(unknown)}")
    return _override(type(config), config, _tree(overrides), "")


def _tree(overrides: Mapping[str, str]) -> dict[str, Any]:
    """{"a.b": "1", "a.c": "2"} → {"a": {"b": "1", "c": "2"}}"""
    root: dict[str, Any] = {}
    for name in sorted(overrides, key=lambda name: name.count("."), reverse=True):  # fields before the part they lie in
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf in node:
            inner = ", ".join(other for other in overrides if other.startswith(name + "."))
            raise ConfigError(f"{name} is set as a whole and {inner} inside it; give only one of the two")
        node[leaf] = overrides[name]
    return root


def _override(cls: type, current: Any, tree: dict[str, Any], path: str) -> Any:
    hints, changes = _hints(cls), {}
    for field in fields(cls):
        if field.name not in tree:
            continue
        node, dotted = tree[field.name], _dotted(path, field.name)
        if isinstance(node, str):
            changes[field.name] = _parse(hints[field.name], node, dotted)
        else:
            inner = _default(field) if current is None else getattr(current, field.name)
            part = type(inner) if is_dataclass(inner) else _parts(hints[field.name])[0]
            changes[field.name] = _override(part, inner if is_dataclass(inner) else None, node, dotted)
    return _switch_on(cls, changes, path) if current is None else replace(current, **changes)


def _switch_on(cls: type, values: dict[str, Any], path: str) -> Any:
    missing = _missing(cls, values)
    if missing:
        needed = " ".join(f"--{path}.{name} {_type_name(_hints(cls)[name]).upper()}" for name in missing)
        raise ConfigError(f"{path} is none, that is switched off; to switch it on also give {needed}")
    return cls(**values)


def _parse(hint: Any, text: str, path: str) -> Any:
    members = _members(hint)
    if types.NoneType in members and text.strip().lower() in NONE_WORDS:
        return None
    if text.lstrip()[:1] in ("{", "[") and str not in members:
        return _convert(hint, _json(text, path), path)
    problems = []
    for member in members:
        try:
            return _parse_member(member, text, path)
        except ValueError:
            continue
        except ConfigError as error:  # more exact than ours, unless text was tried as several things
            problems.append(str(error))
    alternatives = [member for member in members if member is not types.NoneType]
    raise ConfigError(problems[0] if problems and len(alternatives) == 1 else f"{path} is {text!r}; allowed: {_type_name(hint)}")


def _parse_member(member: Any, text: str, path: str) -> Any:
    """Raises ValueError if `text` is no such value, ConfigError if it clearly means one but a wrong one."""
    if member is str:
        return text
    if member is int:
        return int(text)
    if member is float:
        return _finite(text)
    if member is bool:
        return _boolean(text)
    if _is_part(member):
        return _parse_part(member, text, path)
    if typing.get_origin(member) is tuple:
        return _parse_tuple(member, text, path)
    raise ValueError  # NoneType: its words were looked at before


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _boolean(text: str) -> bool:
    if text.strip().lower() not in BOOL_WORDS:
        raise ValueError
    return BOOL_WORDS[text.strip().lower()]


def _parse_part(cls: type, text: str, path: str) -> Any:
    """A dataclass from the value of its only required field."""
    required = _missing(cls, ())
    if len(required) != 1:
        raise ValueError
    return cls(**{required[0]: _parse(_hints(cls)[required[0]], text, _dotted(path, required[0]))})


def _parse_tuple(hint: Any, text: str, path: str) -> tuple[Any, ...]:
    """A tuple from the parts between commas: `1,4`; `1,` has one element."""
    pieces = text.split(",")
    if pieces[-1].strip() == "":
        pieces.pop()
    element_hints = _element_hints(hint, len(pieces), path)
    return tuple(
        _parse(element, piece.strip(), f"{path}[{i}]") for i, (element, piece) in enumerate(zip(element_hints, pieces, strict=True))
    )


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} starts like JSON but is not: {error}. Got {text!r}") from None


def format_value(value: Any) -> str:
    """`value` as the command line would take it: the inverse of how overrides are read."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and value and all(isinstance(element, (int, float)) for element in value):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return json.dumps(to_dict(value), ensure_ascii=False)


# --- what can be set, with its documentation --------------------------------------------------------------------------


def describe(config: Any) -> list[Option]:
    """Every field below `config`, in order of declaration; a part that may be None, or of several kinds, also by itself.

    Of an instance the defaults are its values; of a dataclass they are those of the declaration, and of a part with several
    kinds the fields of all kinds are listed.
    """
    found = _describe(config, None, "") if isinstance(config, type) else _describe(type(config), config, "")
    return list({option.name: option for option in found}.values())


def _describe(cls: type, value: Any, path: str) -> Iterator[Option]:
    hints, docs = _hints(cls), _field_docs(cls)
    for field in fields(cls):
        hint, dotted = hints[field.name], _dotted(path, field.name)
        current = _default(field) if value is None else getattr(value, field.name)
        parts = _parts(hint)
        if not parts or len(_members(hint)) > 1:
            yield Option(dotted, _type_name(hint), current, docs.get(field.name) or (_summary(parts[0]) if parts else ""))
        inner = current if is_dataclass(current) else None
        if isinstance(current, tuple):  # one part for each of several things: set as a whole
            continue
        for part in parts if inner is None else [type(inner)]:
            yield from _describe(part, inner, dotted)


@functools.cache
def _field_docs(cls: type) -> Mapping[str, str]:
    """Field name → the comment at the end of its line, or the string literal below it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # no source here (an interactive session, a frozen application): help texts are shorter, no more
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    definition = ast.parse(source).body[0]
    docs, name = {}, ""
    for node in definition.body if isinstance(definition, ast.ClassDef) else []:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            docs[name] = comments.get(node.end_lineno or node.lineno, "")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) and name:
            docs[name] = docs[name] or inspect.cleandoc(node.value.value)
    return docs


def _summary(cls: type) -> str:
    """First line of the docstring; nothing for the one that dataclasses generate."""
    doc = cls.__doc__ or ""
    return "" if doc.startswith(cls.__name__ + "(") else doc.strip().split("\n")[0]


# --- annotations ------------------------------------------------------------------------------------------------------


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _parts(hint: Any) -> list[type]:
    """The dataclasses that `hint` admits."""
    return [member for member in _members(hint) if _is_part(member)]


def _is_part(hint: Any) -> bool:
    return is_dataclass(hint)


def _element_hints(hint: Any, count: int, path: str) -> tuple[Any, ...]:
    arguments = typing.get_args(hint)
    if arguments[-1] is Ellipsis:
        return (arguments[0],) * count
    if len(arguments) != count:
        raise ConfigError(f"{path} has {count} values; it needs exactly {len(arguments)}: {_type_name(hint)}")
    return arguments


def _type_name(hint: Any) -> str:
    if len(_members(hint)) > 1:
        names = [_type_name(member) for member in _members(hint) if member is not types.NoneType]
        return " or ".join(dict.fromkeys([*names, "none"] if types.NoneType in _members(hint) else names))
    if typing.get_origin(hint) is not tuple:
        return "JSON" if _is_part(hint) else hint.__name__
    first, *rest = typing.get_args(hint)
    if len(_parts(first)) > 1:  # of several kinds no one field can stand for the whole
        return "JSON"
    if _parts(first):
        return "JSON or " + ",".join(["/".join(_missing(first, ())).upper()] * 2) + ",…"
    return f"{_type_name(first)},…" if rest[-1:] == [Ellipsis] else ",".join(map(_type_name, typing.get_args(hint)))


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _missing(cls: type, given: Iterable[str]) -> list[str]:
    return [field.name for field in fields(cls) if _default(field) is REQUIRED and field.name not in given]


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
