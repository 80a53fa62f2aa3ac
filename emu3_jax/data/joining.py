"""Joins the directories that hosts prepared apart into one, with one index. This is the work of `prepare --join`.

All parts are checked before anything is written: each shard is there once, all were made with the same entries,
settings and model, and their records can be counted.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emu3_jax import files, storage
from emu3_jax.data.shard_directory import Facts, Outcome, ShardDirectory, held
from emu3_jax.data.shards import Shard
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path, read_json, reading

_NAME = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.json")
_NAMED = 5  # most missing shards that an error line names


class _Part(NamedTuple):
    """A finished shard: its voucher and what that says."""

    voucher: Path
    number: int
    total: int
    job: str
    facts: Facts
    shard: Shard

    @property
    def file(self) -> Path:
        return self.voucher.with_name(self.shard.file)


def join(parts: Sequence[Path], output: Path, *, inside: Sequence[str] = ("",)) -> dict[str, Outcome]:
    """Makes one directory of prepared data of those that several hosts wrote.

    Args:
        parts: the directories, local. The shards stay there; where the file system can, the new directory links them.
        output: a new directory, local or in a bucket; or the only part, which then gets its index.
        inside: directories of prepared data inside the parts, such as "validation"; "" is a part itself. Those that no
            part has are left out.

    Returns:
        What was written, by its name in `inside`.

    Raises:
        Emu3Error: a shard is missing, there twice, damaged, or of other data than the first one; `output` exists, or
            cannot be written.
    """
    parts = [local_path(part) for part in parts]
    for part in parts:
        if not part.is_dir():
            raise Emu3Error(f"{part} is no directory: give the directories that emu3-jax prepare wrote on each host")
    found = {name: _found([part / name for part in parts]) for name in inside}
    if not found.get("", True):
        raise Emu3Error(f"{parts[0]} has no finished shards: give the directories that emu3-jax prepare wrote")
    complete = {name: _complete(shards) for name, shards in found.items() if shards}
    if len(parts) == 1 and not storage.is_remote(output) and _same(parts[0], local_path(output)):
        with held(output, 0, 1, "joined"):
            return {name: _index(output / name, shards) for name, shards in complete.items()}
    with files.new_directory(output, sum(one.shard.bytes for shards in complete.values() for one in shards)) as new:
        for name, shards in complete.items():
            (new / name).mkdir(exist_ok=True)
            for one in shards:
                for file in (one.file, one.voucher):
                    _link(file, new / name / file.name)
        made = {name: _index(new / name, shards) for name, shards in complete.items()}
    return made


def _found(directories: Sequence[Path]) -> list[_Part]:
    """The finished shards of these directories. A directory need not exist."""
    return [
        _read(file)
        for directory in directories
        for file in sorted(directory.glob("shard-*.json"))
        if _NAME.fullmatch(file.name)
    ]


def _read(voucher: Path) -> _Part:
    """Reads a voucher, and checks that its shard is whole."""
    remedy = "delete it and run the same emu3-jax prepare again"
    data: Any = read_json(voucher, remedy)
    match = _NAME.fullmatch(voucher.name)
    assert match is not None  # `_found` gives no others
    with reading(voucher, remedy):
        shard, job = Shard.from_json(data, voucher), data["job"]
        if not isinstance(job, str) or shard.file != voucher.with_suffix(".arrayrecord").name:
            raise Emu3Error(f"{voucher} is damaged (job or file is not its own): {remedy}")
        facts = Facts.from_json(data, voucher)
    part = _Part(voucher, int(match[1]), int(match[2]), job, facts, shard)
    facts.check(part.file, shard, part.number, part.total)
    return part


def _complete(parts: Sequence[_Part]) -> list[_Part]:
    """Returns the shards in order. Raises an `Emu3Error` unless they are all those of one job, each once."""
    first = parts[0]
    by_number: dict[int, _Part] = {}
    for part in parts:
        if (part.job, part.total, part.facts) != (first.job, first.total, first.facts):
            raise Emu3Error(
                f"{part.file} was prepared from another source, or with other options or another model than "
                f"{first.file}: prepare both with the same arguments, or leave one out"
            )
        twin = by_number.setdefault(part.number, part)
        if twin is not part:
            raise Emu3Error(f"shard {part.number} is there twice, {twin.file} and {part.file}: give each part once")
    missing = sorted(set(range(first.total)) - set(by_number))
    if missing:
        some = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
        raise Emu3Error(
            f"{len(missing)} of {first.total} shards are missing ({some}): give the directories of all hosts, or run "
            "emu3-jax prepare on the missing ones again"
        )
    if not any(part.shard.records for part in parts):
        raise Emu3Error(
            f"none of {first.facts.entries} records can be used; the first: {next(iter(first.shard.skipped), 'none')}"
        )
    return [by_number[number] for number in range(first.total)]


def _index(directory: Path, parts: Sequence[_Part]) -> Outcome:
    first = parts[0]
    return ShardDirectory(directory, first.job, first.total, facts=first.facts).merge(first.facts.codebook)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(one, other)


def _link(source: Path, target: Path) -> None:
    """Links a file, or copies it where the file system cannot. Shards never change, they are only replaced."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
