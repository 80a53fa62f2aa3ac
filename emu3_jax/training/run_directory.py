"""The directory of a run: its lock, what it trains, and its checkpoints by Orbax.

run.json          what is trained; a run with other weights is refused
checkpoints/N/    after step N: weights, optimiser, step and key (`state`), positions in the data (`data`)
metrics.jsonl  tensorboard/  samples/  profile/  model/  adapter/

The directory may lie in a bucket. There Orbax ends a checkpoint by writing a file into it, `commit_success.txt`.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from emu3_jax import files, storage
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import step_number
from emu3_jax.printable import shown
from emu3_jax.storage import storage_place

_log = logging.getLogger("emu3_jax")

FORMAT = 1
_CHUNK_BYTES = 64 << 20  # a device, or an export, that reads a slice of an array reads no more than its chunks
_FOLDERS = ("checkpoints", "samples", "tensorboard", "profile")
_COMMITTED = "commit_success.txt"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
# What the parts of `run.json` are.
PARTS: Mapping[str, Any] = {
    "decoder": dict, "adapter": dict | None, "vision": dict, "image": dict, "bundle": str, "export_dtype": str,
}  # fmt: skip
_DTYPE = "dtype"  # of the products: another one is no other model


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Holds the run for this process; of several processes of one run, the first holds it for all.

    Raises:
        Emu3Error: another run holds it, or the directory cannot be made.
    """
    if jax.process_index() != 0:
        yield
        return
    if storage.is_remote(directory):
        storage.require_directory(directory)
    else:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Emu3Error(f"{directory}: cannot be used ({error.strerror}); choose another directory") from error

    def busy(holder: str) -> str:
        return f"{directory} is in use by {holder}: wait for it, stop it, or choose another directory"

    with files.locked(directory / "lock", busy):
        for folder in _FOLDERS:
            if os.path.lexists(directory / folder) and not (directory / folder).is_dir():
                raise Emu3Error(f"{directory / folder} is no directory: move it away, or choose another directory")
        for leftover in clean(directory):
            _log.warning("removed %s, which a run that was killed had left", leftover)
        yield


def clean(directory: pathlib.Path) -> list[pathlib.Path]:
    """Removes what a killed run left in its directory, and returns the paths. Only for who holds the lock.

    That is: a model or adapter that was being exported, and checkpoints that were being written.
    """
    if storage.is_remote(directory):
        return []  # models are exported elsewhere first, and Orbax removes checkpoints that were being written
    removed = [*files.sweep(directory), *files.sweep(directory / "samples")]
    # Orbax removes the second without a word when it opens the directory.
    unfinished = sorted((directory / "checkpoints").glob(f"*{_UNFINISHED}*"))
    for leftover in (directory / "model.new", directory / "adapter.new", *unfinished):
        if os.path.lexists(leftover):
            files.remove(leftover)
            removed.append(leftover)
    return removed


def clean_unused(directory: pathlib.Path) -> list[pathlib.Path]:
    """The same where no run holds the directory. Raises `Emu3Error` where one does."""
    with files.locked(directory / "lock", lambda holder: f"{directory} is in use by {holder}: wait for it or stop it"):
        return clean(directory)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What `run.json` says of a run, as parts that JSON can hold.

    Attributes:
        fixed: what all checkpoints of a directory have in common, a dict of fields each, or None.
        other: what else an export needs to know; the first run of a directory says it.
    """

    fixed: Mapping[str, Mapping[str, Any] | None]
    other: Mapping[str, Any]


def write_identity(directory: pathlib.Path, identity: Identity) -> None:
    """Says in `run.json` what is trained, or checks it where the directory has one.

    Raises:
        Emu3Error: the directory holds checkpoints of another model.
    """
    file = directory / "run.json"
    if storage.is_file(file):
        _check_same(directory, identity)
    elif jax.process_index() == 0:
        with new_file(file) as temporary:
            parts = {"format": FORMAT, **identity.fixed, **identity.other}
            temporary.write_text(json.dumps(parts, indent=2) + "\n")


def _check_same(directory: pathlib.Path, identity: Identity) -> None:
    found, wanted = read_identity(directory), json.loads(json.dumps(dict(identity.fixed)))
    for part in wanted:
        if part not in found:
            raise Emu3Error(
                f"{directory} holds checkpoints of another model: its run.json has no {part}; choose another directory"
            )
        old, new = (x[part] or {} for x in (found, wanted))  # `read_identity` lets only objects and None pass
        changed = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k != _DTYPE]
        if changed:
            name = min(changed)
            raise Emu3Error(
                f"{directory} holds checkpoints of another model: its {part} has {name} {shown(old.get(name))}, the "
                f"config {shown(new.get(name))}; correct the config or choose another directory"
            )


def read_identity(directory: pathlib.Path) -> dict[str, Any]:
    """What `write_identity` wrote. Raises `Emu3Error` if there is none, or of another format."""
    file = directory / "run.json"
    identity = storage.read_json(file, "give the directory of a training run")
    if not isinstance(identity, dict):
        raise Emu3Error(f"{file} is {shown(identity)}, no object: give the directory of a training run")
    if identity.get("format") != FORMAT:
        raise Emu3Error(f"{file}: format is {shown(identity.get('format'))}, this version reads {FORMAT}: train anew")
    for part, value in identity.items():
        if part in PARTS and not isinstance(value, PARTS[part]):
            raise Emu3Error(f"{file}: {part} is {shown(value)}: it was changed; restore it, or train anew")
    return identity


def identity_part(directory: pathlib.Path, identity: Mapping[str, Any], part: str) -> Any:
    """A part of what `read_identity` gave. Raises `Emu3Error` that names the file if it is not there."""
    if part not in identity:
        raise Emu3Error(f"{directory / 'run.json'}: has no {part}: it is of another kind of run, or was changed")
    return identity[part]


def newest_checkpoint(directory: pathlib.Path, step: int | None = None) -> tuple[int, pathlib.Path]:
    """The newest checkpoint of a run, or that of `step`: its step, and where its state lies.

    Raises:
        Emu3Error: there is no such checkpoint.
    """
    steps = sorted(number for name in _finished(directory) if (number := step_number(name)) is not None)
    if not steps or step not in (None, *steps):
        raise Emu3Error(f"{directory}: no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
    step = steps[-1] if step is None else step
    return step, storage_place(directory / "checkpoints" / str(step) / "state")


def _finished(directory: pathlib.Path) -> list[str]:
    """The names of a run's finished checkpoints."""
    places = directory / "checkpoints"
    if not storage.is_remote(directory):
        return [place.name for place in places.glob("*")]
    paths = map(pathlib.PurePosixPath, storage.listing(places))
    return [path.parts[0] for path in paths if path.parts[1:] == (_COMMITTED,)]


class Checkpoints:
    """Checkpoints of one run. They are written while training goes on; one that a kill interrupts never counts."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = storage_place(directory) / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with storage.explained(self.directory) if storage.is_remote(self.directory) else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(self.directory, item_names=("state", "data"), options=options)

    def latest(self) -> int | None:
        """The step of the newest, if there is any."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any, group: int) -> None:
        """Copies `state` off the devices and begins to write it; the one before is finished first.

        Args:
            step: its name.
            state: a `TrainState`.
            position: JSON-able, of this process' iterator over the data.
            group: which share of the data this process reads.

        Raises:
            Emu3Error: this one or the one before cannot be written, for example to a full disk.
        """
        positions = _gather(position, group)
        with self._explained(step):
            self._manager.wait_until_finished()
            self._require_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state, save_args=save_args), data=ocp.args.JsonSave(positions)
                ),
            )

    def restore(self, step: int, abstract: Any, group: int, groups: int) -> tuple[Any, Any]:
        """(state in the shardings of `abstract`, position of the data for this process).

        Raises:
            Emu3Error: the checkpoint is damaged, or was written by another number of processes.
        """
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                    ),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises anything
            storage.require_access(self.directory / str(step), error)
            reason = str(error.__cause__ or error).split("\n", 1)[0][:200]
            raise Emu3Error(
                f"{self.directory / str(step)}: cannot be restored ({reason}); delete it to go on from the one before"
            ) from error
        positions = restored["data"]
        if not isinstance(positions, list):
            raise Emu3Error(
                f"{self.directory / str(step)}: data says {shown(positions)} instead of the positions in the data; "
                "delete it to go on from the one before"
            )
        if len(positions) != groups:
            raise Emu3Error(
                f"{self.directory / str(step)} is of a run that read its data in {len(positions)} shares, this one "
                f"reads it in {groups}: resume with as many processes"
            )
        return restored["state"], positions[group]

    def finish(self, step: int) -> None:
        """Waits until all is written. Raises like `save`."""
        with self._explained(step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is to be taken away, agreed on by all processes."""
        return self._manager.reached_preemption(step)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Emu3Error:
            raise
        except Exception as error:  # `files.is_full`: of TensorStore a ValueError too
            if not isinstance(error, (OSError, ValueError)) and not storage.is_remote(self.directory):
                raise
            last = self.latest()
            full = files.is_full(error)
            reason = "the disk is full" if full else (str(error) or type(error).__name__).split("\n", 1)[0][:200]
            raise Emu3Error(
                f"{self.directory}: no checkpoint could be written at step {step} ({reason}); "
                f"{'none is there yet' if last is None else f'step {last} is kept'}; "
                f"{'free space' if full else 'mend that'}, then run again"
            ) from error

    def _require_space(self, nbytes: int) -> None:
        if storage.is_remote(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < nbytes:
            raise OSError(errno.ENOSPC, f"{nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _gather(position: Any, group: int) -> list[Any]:
    """The positions of all groups, in their order; every process gets them."""
    if jax.process_count() == 1:
        return [position]
    text = np.frombuffer(json.dumps([group, position]).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    found = dict(json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True))
    return [found[index] for index in sorted(found)]
