"""Runs Python files that the user names, and says in one line what went wrong in them."""

import sys
import traceback
import types

_MOST = 200  # characters of an error's message


def run_file(file: str, source: bytes, name: str) -> types.ModuleType:
    """Runs a Python file with all rights of the user. Its errors pass unchanged.

    Args:
        file: its path, for tracebacks and `__file__`.
        source: its contents. Compiled code and archives do not run, whatever the file's name.
        name: name of the module, which stays in `sys.modules`: dataclasses that the file declares look it up there.
    """
    module = types.ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    return module


def what_failed(error: BaseException, file: str | None) -> tuple[str, int | None]:
    """The type and the message of an error in one line, and the number of the line of `file` where it arose, if any."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno or 1)
    try:
        text = " ".join(str(error).split())[:_MOST]
    except Exception:  # the file's own exception class may fail in `__str__`
        text = ""
    return type(error).__name__ + (f": {text}" if text else ""), lines[-1] if lines else None
