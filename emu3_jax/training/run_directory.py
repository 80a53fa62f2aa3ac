"""The directory of a training run: its lock, `run.json`, and its checkpoints, which Orbax writes.

run.json          config of the trained model; resuming with another model is refused
checkpoints/N/    after step N: weights, optimiser state, step and key (`state`), positions in the data (`data`)
reference/        log-probabilities of preference pairs, see `training.references`
metrics.jsonl  tensorboard/  samples/  profile/  model/  adapter/

The directory may be in a bucket. There, Orbax marks a finished checkpoint by a file `commit_success.txt` in it.
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

from emu3_jax import files, locks, storage
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import step_number
from emu3_jax.printable import shown
from emu3_jax.storage import storage_place

_log = logging.getLogger("emu3_jax")

FORMAT = 1
_CHUNK_BYTES = 64 << 20  # arrays are stored in chunks, so that restoring or exporting a slice reads only its chunks
_FOLDERS = ("checkpoints", "samples", "tensorboard", "profile", "reference")
_COMMITTED = "commit_success.txt"
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a checkpoint that Orbax is still writing
# Legal types of the parts of `run.json`.
PARTS: Mapping[str, Any] = {
    "decoder": dict, "adapter": dict | None, "reference": dict, "vision": dict, "image": dict, "bundle": str,
    "export_dtype": str,
}  # fmt: skip
_DTYPE = "dtype"  # the compute dtype may change between runs: it does not change the model


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Makes the directory if needed and locks it. If a run has several processes, the first one locks it for all.

    It also removes what a killed run left behind, and warns about each removed path.

    Raises:
        Emu3Error: another run has the lock, or the directory cannot be made or used.
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

    with locks.locked(directory / "lock", busy):
        for folder in _FOLDERS:
            if os.path.lexists(directory / folder) and not (directory / folder).is_dir():
                raise Emu3Error(f"{directory / folder} is not a directory: move it away, or choose another directory")
        for leftover in clean(directory):
            _log.warning("removed %s, a leftover of a killed run", leftover)
        yield


def clean(directory: pathlib.Path) -> list[pathlib.Path]:
    """Removes unfinished exports and checkpoints that a killed run left. The caller must hold the directory's lock.

    Returns:
        The removed paths.
    """
    if storage.is_remote(directory):
        return []  # exports start in a local directory, and Orbax itself removes unfinished checkpoints
    removed = [*files.sweep(directory), *files.sweep(directory / "samples"), *files.sweep(directory / "reference")]
    # Orbax would remove unfinished checkpoints without telling the user.
    unfinished = sorted((directory / "checkpoints").glob(f"*{_UNFINISHED}*"))
    for leftover in (directory / "model.new", directory / "adapter.new", *unfinished):
        if os.path.lexists(leftover):
            files.remove(leftover)
            removed.append(leftover)
    return removed


def clean_unused(directory: pathlib.Path) -> list[pathlib.Path]:
    """Locks the directory and cleans it (see `clean`). Raises `Emu3Error` if a run has the lock."""
    with locks.locked(directory / "lock", lambda holder: f"{directory} is in use by {holder}: wait for it or stop it"):
        return clean(directory)


@dataclasses.dataclass(frozen=True)
class Identity:
    """The contents of `run.json`. All values must fit into JSON.

    Attributes:
        fixed: parts that must be the same in every run of the directory, such as the decoder's config. Each is a dict
            of fields, or None.
        other: further parts that an export needs. The directory's first run writes them; later runs do not compare.
    """

    fixed: Mapping[str, Mapping[str, Any] | None]
    other: Mapping[str, Any]


def write_identity(directory: pathlib.Path, identity: Identity) -> None:
    """Writes `run.json`. If the directory already has one, compares its fixed parts with `identity` instead.

    Raises:
        Emu3Error: the directory belongs to a run of another model.
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
        old, new = (x[part] or {} for x in (found, wanted))  # `read_identity` has checked the types
        changed = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k != _DTYPE]
        if changed:
            name = min(changed)
            raise Emu3Error(
                f"{directory} holds checkpoints of another model: its {part} has {name} {shown(old.get(name))}, the "
                f"config {shown(new.get(name))}; correct the config or choose another directory"
            )


def read_identity(directory: pathlib.Path) -> dict[str, Any]:
    """Reads `run.json`. Raises `Emu3Error` if the file is missing, damaged, or has another format version."""
    file = directory / "run.json"
    identity = storage.read_json(file, "give the directory of a training run")
    if not isinstance(identity, dict):
        raise Emu3Error(f"{file} holds {shown(identity)}, not an object: give the directory of a training run")
    if identity.get("format") != FORMAT:
        raise Emu3Error(
            f"{file}: format is {shown(identity.get('format'))}, this version reads only {FORMAT}: start a new run"
        )
    for part, value in identity.items():
        if part in PARTS and not isinstance(value, PARTS[part]):
            raise Emu3Error(
                f"{file}: {part} is {shown(value)}, so the file was changed; restore it, or start a new run"
            )
    return identity


def identity_part(directory: pathlib.Path, identity: Mapping[str, Any], part: str) -> Any:
    """A part of `run.json`, as `read_identity` returned it. Raises `Emu3Error` if the part is missing."""
    if part not in identity:
        raise Emu3Error(
            f"{directory / 'run.json'} has no {part}: it was changed, or belongs to another kind of run; give the "
            "directory of the right run"
        )
    return identity[part]


def newest_checkpoint(directory: pathlib.Path, step: int | None = None) -> tuple[int, pathlib.Path]:
    """Finds the newest checkpoint of a run, or the checkpoint of `step` if given.

    Returns:
        The checkpoint's step, and the path of its state.

    Raises:
        Emu3Error: there is no such checkpoint.
    """
    steps = sorted(number for name in _finished(directory) if (number := step_number(name)) is not None)
    if not steps:
        raise Emu3Error(f"{directory} has no checkpoint; train until the first one is written")
    if step not in (None, *steps):
        found = ", ".join(map(str, steps[-10:]))
        raise Emu3Error(f"{directory} has no checkpoint of step {step}; choose one of its newest: {found}")
    step = steps[-1] if step is None else step
    return step, storage_place(directory / "checkpoints" / str(step) / "state")


def _finished(directory: pathlib.Path) -> list[str]:
    """The names of a run's finished checkpoints (in a local directory, of unfinished ones too)."""
    places = directory / "checkpoints"
    if not storage.is_remote(directory):
        return [place.name for place in places.glob("*")]
    paths = map(pathlib.PurePosixPath, storage.listing(places))
    return [path.parts[0] for path in paths if path.parts[1:] == (_COMMITTED,)]


class Checkpoints:
    """The checkpoints of one run. Orbax writes them while training continues. A kill loses only unfinished ones."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = storage_place(directory) / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with storage.explained(self.directory) if storage.is_remote(self.directory) else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(self.directory, item_names=("state", "data"), options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any, group: int) -> None:
        """Starts to write a checkpoint. It first waits for the previous one, then copies `state` off the devices.

        Args:
            step: step of the checkpoint, and its directory's name.
            state: pytree of arrays, for example a `TrainState`.
            position: position of this process' data iterator, as a value that fits into JSON.
            group: index of the share of the data that this process reads.

        Raises:
            Emu3Error: this checkpoint or the previous one cannot be written, for example to a full disk.
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

    def restore(self, step: int, abstract: Any) -> tuple[Any, list[Any]]:
        """Reads a checkpoint.

        Args:
            step: step of the checkpoint.
            abstract: pytree of `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings of the state.

        Returns:
            The state in the shardings of `abstract`, and the positions of all shares that the data was read in. Their
            number is that of the run that wrote the checkpoint.

        Raises:
            Emu3Error: the checkpoint is damaged.
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
        except Exception as error:  # Orbax raises exceptions of any class
            storage.require_access(self.directory / str(step), error)
            reason = str(error.__cause__ or error).split("\n", 1)[0][:200]
            raise Emu3Error(
                f"{self.directory / str(step)} cannot be restored ({reason}); delete it to resume from the checkpoint "
                "before it"
            ) from error
        positions = restored["data"]
        if not isinstance(positions, list) or not positions:
            raise Emu3Error(
                f"{self.directory / str(step)}: its part `data` holds {shown(positions)}, not a list of positions; "
                "delete the checkpoint to resume from the one before it"
            )
        return restored["state"], positions

    def finish(self, step: int) -> None:
        """Waits until all checkpoints are written. Raises like `save`."""
        with self._explained(step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Whether a process got SIGTERM. All processes get the same answer at the same step."""
        return self._manager.reached_preemption(step)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Emu3Error:
            raise
        except Exception as error:  # TensorStore reports a full disk as a ValueError, see `files.is_full`
            if not isinstance(error, (OSError, ValueError)) and not storage.is_remote(self.directory):
                raise
            last = self.latest()
            full = files.is_full(error)
            reason = "the disk is full" if full else (str(error) or type(error).__name__).split("\n", 1)[0][:200]
            raise Emu3Error(
                f"{self.directory}: the checkpoint of step {step} cannot be written ({reason}); "
                f"{'there is no earlier one' if last is None else f'the one of step {last} is kept'}; "
                f"{'free space' if full else 'correct the cause'}, then run again"
            ) from error

    def _require_space(self, nbytes: int) -> None:
        if storage.is_remote(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < nbytes:
            raise OSError(errno.ENOSPC, f"{nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _gather(position: Any, group: int) -> list[Any]:
    """Collects the data positions of all groups on every process, in the order of the groups."""
    if jax.process_count() == 1:
        return [position]
    text = np.frombuffer(json.dumps([group, position]).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    found = dict(json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True))
    return [found[index] for index in sorted(found)]
