"""`--set path.to.field=value`: changes fields of a config from the command line.

All changes are collected first. Then each config object is built, and so validated, once with all its changes. So the
order of different fields does not matter, and two fields that are legal only together can be changed together.
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
    """The changes to one place in a config: a field, a tuple entry, or the whole config.

    Attributes:
        value: new value of the place itself, or `_UNSET`.
        below: changes of the place's fields or tuple entries, by name or index.
        said: texts of the overrides that named this place or a place below it, for error lines.
    """

    value: Any = _UNSET
    below: dict[str, "_Change"] = dataclasses.field(default_factory=dict)
    said: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Made:
    """A parsed call `Class(field=value)`. The object is built later, when all changes of its fields are known."""

    cls: type
    fields: dict[str, Any]


class _Blamed(Emu3Error):
    """An error whose line already names the overrides that caused it."""


def override(config: Any, overrides: Sequence[str]) -> Any:
    """Returns a copy of `config` with some fields changed.

    Args:
        config: a frozen dataclass. Its fields may hold frozen dataclasses and tuples of them.
        overrides: texts "path.to.field=value". Tuple entries are named by index: `data.sources.0.path=prepared`. A
            value is a Python literal or a call of a config class with literals (`adapter=Adapter(rank=16)`). Any other
            value is taken as text. Setting a field of a config that is None creates that config, with defaults for
            its other fields: `adapter.rank=16`. If several overrides name the same place, the last one counts.

    Raises:
        Emu3Error: one override is not legal, or the overrides are not legal together.
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
    """Returns `old` with `change` applied. `hint` is the annotation of the field that holds `old`."""
    try:
        return _changed(old if change.value is _UNSET else change.value, change.below, hint)
    except _Blamed:
        raise
    except FieldError as error:
        # Several fields were changed together: blame only the illegal one.
        culprit = change.below.get(error.field)
        raise _blame(error, culprit or change) from error
    except Emu3Error as error:
        raise _blame(error, change) from error
    except Exception as error:  # a config's own checks may fail in any way on a value of an unexpected type
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
                raise _blame(Emu3Error(f"{shown(name)} is not an index from 0 to {len(entries) - 1}"), change)
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
    """Builds the object of a parsed call, with the changes of its fields."""
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
    """Yields name, annotation and change of each changed field of `cls`."""
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
    """Turns a whole number into a float if the old value was a float."""
    return float(new) if isinstance(old, float) and is_whole(new, -math.inf) and is_number(new) else new


# ------------------------------------------------------------------------------------------------ values


def _parse(text: str, classes: Mapping[str, type]) -> Any:
    """Parses a Python literal or a call of one of the classes. Any other text is returned as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about invalid escapes in a value, such as "\d"
            return _value(ast.parse(text.strip(" \t"), mode="eval").body, classes)
    except Emu3Error:  # `Emu3Error` is a `ValueError`, which the next clause would swallow
        raise
    # The parser raises `MemoryError` for deeply nested brackets, and `TypeError` for `{[]}`.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _value(node: ast.expr, classes: Mapping[str, type]) -> Any:
    """The value of a parsed expression. Raises `ValueError` if it is neither a literal nor a call of a class."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
        cls = classes[node.func.id]
        names = [field.name for field in dataclasses.fields(cls)]
        if len(node.args) > len(names):
            raise Emu3Error(f"{cls.__name__} has {len(names)} fields, but gets {len(node.args)} values: remove some")
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
    """`cls` and all dataclasses in the annotations of its fields, at any depth."""
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
    """The annotations of the fields of `cls`. A config file's own class may have unreadable ones: then none."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # annotations in quotes are evaluated, so anything may be raised
        return {}


def _present(config: Any) -> Iterator[type]:
    """Yields the classes of all config objects inside `config`, including classes that the config file defines."""
    if isinstance(config, tuple):
        for entry in config:
            yield from _present(entry)
    elif dataclasses.is_dataclass(config):
        yield type(config)
        for value in vars(config).values():
            yield from _present(value)
