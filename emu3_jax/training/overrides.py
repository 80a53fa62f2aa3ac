"""`--set path.to.field=value`: fields of a config that are changed from the command line.

All changes are gathered first, and each config on the way is made, and so validated, once with all of its own: in which
order they were given does not matter, and two fields that are legal only together can be changed together.
"""

import ast
import dataclasses
import difflib
import math
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu3_jax.data.sequences import TASKS
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import FieldError, is_number, is_whole
from emu3_jax.foreign import step_number
from emu3_jax.printable import shown

_UNSET: Any = object()
_MAX_SHOWN = 80  # characters of an override in an error line


@dataclasses.dataclass
class _Change:
    """What is to become of one place in a config.

    Attributes:
        value: that was given for the place itself, or `_UNSET`.
        below: changes of its fields or entries, by name or index.
        said: the overrides that named this place or one below it.
    """

    value: Any = _UNSET
    below: dict[str, "_Change"] = dataclasses.field(default_factory=dict)
    said: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Made:
    """`Class(field=value)` as it was written: the object is made when all changes of its fields are known."""

    cls: type
    fields: dict[str, Any]


class _Blamed(Emu3Error):
    """An error whose line names its overrides already."""


def override(config: Any, overrides: Sequence[str]) -> Any:
    """`config` with fields changed.

    Args:
        config: a frozen dataclass; its fields may be such, and tuples of such.
        overrides: "path.to.field=value", with indices for tuples: `data.sources.0.path=prepared`. A value is a Python
            literal, a call of a config's class with literals (`adapter=Adapter(rank=16)`), or else text. A field of a
            config that is absent makes it, with defaults for the rest: `adapter.rank=16`. The last value that is given
            for a place counts.

    Raises:
        Emu3Error: an override that is not legal, or all of them together are not.
    """
    found = (*_annotated(type(config), set()), *_present(config), *TASKS)
    classes = {cls.__name__: cls for cls in found if dataclasses.is_dataclass(cls)}
    root = _Change()
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise Emu3Error(f"--set {text}: write path.to.field=value")
        change = root
        change.said.append(text)
        for name in path.split("."):
            change = change.below.setdefault(name, _Change())
            change.said.append(text)
        try:
            change.value = _parse(value, classes)
        except Emu3Error as error:
            raise _blame(error, change) from error
    return _apply(config, root, None)


# ------------------------------------------------------------------------------------------------ changes


def _apply(old: Any, change: _Change, hint: Any) -> Any:
    """`old` with `change`; `hint` is the annotation of the field that holds it."""
    try:
        return _changed(old if change.value is _UNSET else change.value, change.below, hint)
    except _Blamed:
        raise
    except FieldError as error:
        # Of the fields that were changed together, the one that is not legal.
        culprit = change.below.get(error.field)
        raise _blame(error, culprit or change) from error
    except Emu3Error as error:
        raise _blame(error, change) from error
    except Exception as error:  # a value of a kind that a config's own checks do not expect
        raise _blame(Emu3Error(f"{type(error).__name__}: {error}; correct the value"), change) from error


def _blame(error: Emu3Error, change: _Change) -> _Blamed:
    said = [text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..." for text in dict.fromkeys(change.said)]
    return _Blamed(f"{' '.join(f'--set {text}' for text in said[:3])}: {error}")


def _changed(base: Any, below: Mapping[str, _Change], hint: Any) -> Any:
    if base is None and below:
        of_hint = [cls for cls in typing.get_args(hint) if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
        if len(of_hint) == 1:
            base = _Made(of_hint[0], {})
    if isinstance(base, _Made):
        return _made(base, below)
    if isinstance(base, list | tuple):
        base = type(base)(_changed(entry, {}, None) for entry in base)
    if not below:
        return base
    if isinstance(base, tuple):
        entries = list(base)
        for name, change in below.items():
            index = step_number(name)
            if index is None or index >= len(entries):
                raise _blame(Emu3Error(f"{shown(name)} is no index from 0 to {len(entries) - 1}"), change)
            entries[index] = _apply(entries[index], change, None)
        return tuple(entries)
    if not dataclasses.is_dataclass(base) or isinstance(base, type):
        name, change = next(iter(below.items()))
        raise _blame(Emu3Error(f"{shown(name)} is inside {shown(base)}, which has no fields"), change)
    new = {}
    for name, hint, change in _fields(type(base), below):
        new[name] = _as_before(getattr(base, name), _apply(getattr(base, name), change, hint))
    return dataclasses.replace(base, **new)


def _made(made: _Made, below: Mapping[str, _Change]) -> Any:
    """The object that `made` says, with the changes of its fields."""
    fields = {field.name: field for field in dataclasses.fields(made.cls)}
    new = {name: _changed(value, {}, None) for name, value in made.fields.items() if name not in below}
    for name, hint, change in _fields(made.cls, below):
        default = fields[name].default
        old = made.fields.get(name, None if default is dataclasses.MISSING else default)
        new[name] = _as_before(default, _apply(old, change, hint))
    for name, field in fields.items():
        if name not in new and field.default is field.default_factory is dataclasses.MISSING:
            raise Emu3Error(f"{made.cls.__name__} needs the field {name}: set it too")
    return made.cls(**new)


def _fields(cls: type, below: Mapping[str, _Change]) -> Iterator[tuple[str, Any, _Change]]:
    """Name, annotation and change of the fields that are changed."""
    hints = _hints(cls)
    for name, change in below.items():
        try:
            _check_name(cls, name)
        except Emu3Error as error:
            raise _blame(error, change) from error
        yield name, hints.get(name), change


def _check_name(cls: type, name: str) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]
    if name not in fields:
        near = difflib.get_close_matches(name[:100], fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(fields)}"
        raise Emu3Error(f"{cls.__name__} has no field {shown(name)}; {hint}")


def _as_before(old: Any, new: Any) -> Any:
    """A whole number is a float where one stood."""
    return float(new) if isinstance(old, float) and is_whole(new, -math.inf) and is_number(new) else new


# ------------------------------------------------------------------------------------------------ values


def _parse(text: str, classes: Mapping[str, type]) -> Any:
    """A Python literal or a call of one of the classes where the text is one, else the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes and such
            return _value(ast.parse(text.strip(" \t"), mode="eval").body, classes)
    except Emu3Error:  # a `ValueError` too
        raise
    # Deep brackets are a `MemoryError` of the parser, `{[]}` is a `TypeError`.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _value(node: ast.expr, classes: Mapping[str, type]) -> Any:
    """Raises `ValueError` for what is neither a literal nor a call."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
        cls = classes[node.func.id]
        names = [field.name for field in dataclasses.fields(cls)]
        if len(node.args) > len(names):
            raise Emu3Error(f"{cls.__name__} has {len(names)} fields, {len(node.args)} values are given")
        given = [*zip(names, node.args, strict=False), *((word.arg or "", word.value) for word in node.keywords)]
        for name, _ in given:
            _check_name(cls, name)
        twice = [name for name in names if sum(name == other for other, _ in given) > 1]
        if twice:
            raise Emu3Error(f"{cls.__name__} gets its field {twice[0]} twice: give it once")
        return _Made(cls, {name: _value(value, classes) for name, value in given})
    if isinstance(node, ast.Tuple):
        return tuple(_value(entry, classes) for entry in node.elts)
    return ast.literal_eval(node)


def _annotated(cls: type, seen: set[type]) -> set[type]:
    """`cls` and the dataclasses that annotations of its fields name, at any depth."""
    if cls not in seen:
        seen.add(cls)
        waiting = list(_hints(cls).values())
        while waiting:
            hint = waiting.pop()
            waiting += typing.get_args(hint)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                _annotated(hint, seen)
    return seen


def _hints(cls: type) -> dict[str, Any]:
    """The annotations of the fields of `cls`; none where they cannot be told, in a class of the config file's own."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # an annotation in quotes is run
        return {}


def _present(config: Any) -> Iterator[type]:
    """The classes of the configs in `config`, a config file's own among them."""
    if isinstance(config, tuple):
        for entry in config:
            yield from _present(entry)
    elif dataclasses.is_dataclass(config):
        yield type(config)
        for value in vars(config).values():
            yield from _present(value)
