"""The model bundle: a directory with the parts `decoder/`, `vision/` and `tokenizer/`, or some of them.

Each part has a `config.json`. Weights are an ordinary Orbax checkpoint, `weights/`, which Orbax can read without this
package. `SHA256SUMS`, beside the parts, holds the checksums of all files.

In a quantised bundle the decoder's matrices are stored as codes and scales (see `models.quantization`), and the field
`quantize` of `decoder/config.json` names the kind. Such a bundle is there to generate. For training, merging and export
see `checkpoints.dequantized`.
"""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from emu3_jax import storage
from emu3_jax.checkpoints.checksums import verify_checksums, write_checksums
from emu3_jax.checkpoints.layouts import Param, decoder_params, vision_params
from emu3_jax.checkpoints.parts import FORMAT, LazyArray, alone_options, in_groups, read_array, size_on_disk, write_part
from emu3_jax.compilation import check_backend
from emu3_jax.config import (
    AreaConfig,
    DecoderConfig,
    IbqConfig,
    ImageConfig,
    PictureConfig,
    SpecialTokens,
    VisionTokenizerConfig,
    vision_tokenizer_from_dict,
)
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import FieldError, is_whole, read_from
from emu3_jax.files import new_directory, require_outside
from emu3_jax.foreign import plain_file, read_object, reading
from emu3_jax.models.quantization import (
    KINDS,
    codes_and_scales,
    codes_and_scales_shapes,
    codes_and_scales_shardings,
    is_codes_or_scales,
    is_quantised,
)
from emu3_jax.models.stacking import Path as TreePath
from emu3_jax.printable import shown
from emu3_jax.storage import storage_place
from emu3_jax.text.tokenizer import Tokenizer, count_ranks, special_tokens

PARTS = ("decoder", "vision", "tokenizer")
TEMPLATES = ("chat", "stage1")
VOCABULARY = "emu3.tiktoken"
ADAPTER_CONFIG = "adapter_config.json"  # file of a LoRA adapter, see `checkpoints.adapter`
QUANTIZE = "quantize"  # field of `decoder/config.json` in a quantised bundle
READ_BYTES = 256 << 20  # arrays are read in groups of this size when a part is read on the host


def _nbytes(array: Any) -> int:
    return array.size * array.dtype.itemsize


def _fits(found: jax.ShapeDtypeStruct | None, expected: jax.ShapeDtypeStruct | tuple[int, ...] | None) -> bool:
    """Whether a stored array has the expected shape, or the expected shape and dtype."""
    if found is None or expected is None:
        return False
    if isinstance(expected, tuple):
        return found.shape == expected
    return (found.shape, found.dtype) == (expected.shape, expected.dtype)


def _copy_plain(source: str, target: str) -> None:
    """Copies a file; of a device such as /dev/zero, to which a damaged bundle may link, a copy would never end."""
    with reading(source):
        plain_file(source)
        shutil.copy2(source, target)


def decoder_dict(decoder: DecoderConfig, quantize: str | None) -> dict[str, Any]:
    """The contents of `decoder/config.json`. `quantize` is the kind of a quantised decoder, or None."""
    return decoder.to_dict() if quantize is None else {QUANTIZE: quantize, **decoder.to_dict()}


class Bundle:
    """An open bundle. Its configs are read and checked, its weights are still on disk. `Bundle.open` makes it."""

    def __init__(self, path: Path, files: Path, configs: Mapping[str, dict[str, Any]]):
        """`path` is the bundle's directory. `files` is a local directory with all its files except the weights."""
        self.path, self.files = path, files
        self._weights_bytes = {part: config.pop("weights_bytes", None) for part, config in configs.items()}
        self._quantize = configs.get("decoder", {}).pop(QUANTIZE, None)
        self.configs = configs

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = False) -> "Bundle":
        """Opens the bundle at `path`.

        Args:
          path: directory of the bundle, local or in a bucket. Of a bundle in a bucket, all files except the weights are
            copied to a local cache; the weights are read when they are loaded.
          verify: compare all files with their checksums. This takes as long as reading them, and is the only way to
            notice a flipped bit in the weights. A bundle in a bucket is first copied to the cache as a whole.

        Raises:
          Emu3Error: there is no bundle, its format is another version's, or a config is not valid; with `verify`, the
            checksums are missing or differ.
        """
        path = files = storage.place(path)
        if storage.is_remote(path):
            files = storage.fetched(path, lambda name: verify or "/weights/" not in name)
            for part in sorted({name.split("/")[0] for name in storage.listing(path)} & {*PARTS}):
                if not (files / part / "config.json").is_file():  # config.json is uploaded last
                    raise Emu3Error(f"{path / part} has no config.json, so its upload did not end: upload it again")
            path = files if verify else path
        elif not path.is_dir():
            raise Emu3Error(f"{path} is not a directory: give a bundle, made by `emu3-jax convert SRC -o {path}`")
        storage_place(path)
        configs = {part: read_object(files / part / "config.json") for part in PARTS if (files / part).is_dir()}
        if not configs and (files / ADAPTER_CONFIG).exists():
            raise Emu3Error(f"{path} is a LoRA adapter: give it as --adapter, and the bundle that it was trained on")
        if not any("format" in config for config in configs.values()):
            raise Emu3Error(
                f"{path} is not a bundle (no decoder/, vision/ or tokenizer/ with a bundle's config.json): "
                f"convert a checkpoint with `emu3-jax convert SRC -o BUNDLE`"
            )
        for part, config in configs.items():
            version = config.pop("format", None)
            if version != FORMAT:
                file = path / part / "config.json"
                raise Emu3Error(
                    f"{file}: format is {shown(version)}, this version reads {FORMAT}: convert the model again"
                )
        if verify:
            verify_checksums(path)
        bundle = cls(path, files, configs)
        for part, properties in {
            "decoder": ("decoder_config", "quantize"),
            "vision": ("vision_config", "image_config", "num_batches_tracked"),
            "tokenizer": ("template",),
        }.items():
            for name in properties if bundle.has(part) else ():
                getattr(bundle, name)
        return bundle

    def has(self, part: str) -> bool:
        """Whether the bundle holds `part`: "decoder", "vision" or "tokenizer"."""
        return part in self.configs

    def require(self, part: str) -> None:
        """Raises an `Emu3Error` that says how to get `part`, if the bundle does not have it."""
        if not self.has(part):
            source = {
                "decoder": "a decoder such as BAAI/Emu3-Gen or BAAI/Emu3-Chat",
                "vision": "the vision tokenizer BAAI/Emu3-VisionTokenizer",
                "tokenizer": "a decoder directory with its emu3.tiktoken or tokenizer.json",
            }[part]
            raise Emu3Error(
                f"{self.path} has no {part} part: make a bundle with it, adding {source} as another SRC of "
                "`emu3-jax convert SRC SRC -o BUNDLE`"
            )

    @functools.cached_property
    def decoder_config(self) -> DecoderConfig:
        with self._config("decoder") as config:
            return DecoderConfig.from_dict(config)

    @functools.cached_property
    def quantize(self) -> str | None:
        """The quantisation of the stored decoder, from `models.quantization.KINDS`, or None for a full bundle."""
        with self._config("decoder"):
            # A tuple, because a JSON value may be unhashable.
            if self._quantize is not None and self._quantize not in tuple(KINDS):
                legal = f"one of {', '.join(KINDS)}, or absent in a full bundle"
                raise FieldError("config", QUANTIZE, self._quantize, legal)
            return self._quantize

    def require_full(self, use: str) -> None:
        """Raises an `Emu3Error` unless the bundle has a full decoder. `use` names what needs it, for the error line."""
        self.require("decoder")
        if self.quantize is not None:
            raise Emu3Error(
                f"{self.path} is quantised ({self.quantize}), and {use} needs the full weights: "
                "give the bundle that it was made from, or convert the checkpoint without --quantize"
            )

    @functools.cached_property
    def vision_config(self) -> VisionTokenizerConfig:
        """The vision tokenizer's shapes: Emu3's, or Emu3.5's where the object `vision` has the field `kind`."""
        with self._config("vision") as config:
            return vision_tokenizer_from_dict(config["vision"])

    @functools.cached_property
    def image_config(self) -> PictureConfig:
        kind = AreaConfig if isinstance(self.vision_config, IbqConfig) else ImageConfig
        with self._config("vision") as config:
            return kind.from_dict(config["image"])

    @functools.cached_property
    def num_batches_tracked(self) -> dict[str, int]:
        """The counters of PyTorch's batch norms by upstream's names. Only `export` needs them."""
        with self._config("vision") as config:
            counters = config["num_batches_tracked"]
            if not isinstance(counters, dict) or not all(is_whole(value, 0) for value in counters.values()):
                raise FieldError("config", "num_batches_tracked", counters, "an object of whole numbers >= 0")
            return counters

    @functools.cached_property
    def template(self) -> str:
        """The prompt template's name: "chat" or "stage1"."""
        with self._config("tokenizer") as config:
            template = config["template"]
            if template not in TEMPLATES:
                raise Emu3Error(f"template is {shown(template)}; legal are {' and '.join(TEMPLATES)}; correct it")
            return template

    @contextlib.contextmanager
    def _config(self, part: str) -> Iterator[dict[str, Any]]:
        """What the part's `config.json` holds; errors within the block name the file."""
        self.require(part)
        with read_from(self.path / part / "config.json"):
            try:
                yield self.configs[part]
            except KeyError as error:
                raise Emu3Error(f"has no field {error}: convert the model again") from error

    def tokenizer(self) -> Tokenizer:
        """The text tokenizer, its ids checked against the decoder's config where the bundle holds both.

        Without a decoder, as before its pretraining, the ids follow from the vocabulary and the codebook.
        """
        self.require("tokenizer")
        file = self.files / "tokenizer" / VOCABULARY
        if self.has("decoder"):
            return Tokenizer.from_files(file, self.decoder_config.tokens)
        codes = self.vision_config.codebook_size if self.has("vision") else SpecialTokens.visual_count
        return Tokenizer.from_files(file, special_tokens(count_ranks(file), codes))

    def weights(self, part: str) -> Path:
        """The path of the Orbax checkpoint with a part's weights, local or in a bucket."""
        return storage_place(self.path / part / "weights")

    def copy_part(self, part: str, target: Path) -> None:
        """Copies a part with its weights to the local directory `target`, which must not exist."""
        source = self.path
        if storage.is_remote(source):
            source = storage.fetched(source, lambda name: name.startswith(f"{part}/"))
        shutil.copytree(source / part, target, copy_function=_copy_plain)

    def params(self, part: str) -> list[Param]:
        """The arrays that a part must have by its config. `part` is "decoder" or "vision"."""
        return decoder_params(self.decoder_config) if part == "decoder" else vision_params(self.vision_config)

    def load_decoder(self, shardings: Any = None, dtype: Any = None, quantize: str | None = None) -> dict[str, Any]:
        """Loads the decoder's parameters, each array directly into its sharding.

        Args:
          shardings: a tree of `jax.sharding.Sharding` in the structure of a full bundle's parameters, one sharding for
            all arrays, or None for the first device.
          dtype: dtype of the parameters, or None to keep the stored dtypes. Codes and scales are never cast.
          quantize: quantisation for the matrices of a full bundle, from `models.quantization.KINDS`. They are quantised
            from the stored weights while they are read, so a device never holds more than a few full matrices. A
            quantised bundle is loaded as it is stored.

        Returns:
          The parameters, as nested dicts.

        Raises:
          Emu3Error: the bundle has no decoder, `quantize` differs from a quantised bundle's, or the weights are damaged
            or do not fit the config.
        """
        if self.quantize is not None and quantize not in (None, self.quantize):
            raise Emu3Error(
                f"{self.path} is quantised as {self.quantize}, but quantize is {quantize}: leave quantize out, or "
                "give the full bundle"
            )
        if quantize is None or self.quantize is not None:
            return self.restore("decoder", shardings, dtype)
        stored = self.stored("decoder")
        params: dict[TreePath, jax.Array] = {}
        for group in in_groups(stored, lambda path: _nbytes(stored[path]), READ_BYTES):
            some = {path: stored[path] for path in group}
            wide = traverse_util.flatten_dict(self.restore("decoder", shardings, dtype, some, keep=is_quantised))
            for path in group:
                params |= codes_and_scales(path, wide.pop(path), quantize)
        return traverse_util.unflatten_dict(params)

    def load_vision(self, shardings: Any = None) -> dict[str, Any]:
        """Loads the vision tokenizer's parameters in float32, like `load_decoder`."""
        return self.restore("vision", shardings, np.float32)

    def restore(
        self,
        part: str,
        shardings: Any,
        dtype: Any,
        some: Mapping[TreePath, jax.ShapeDtypeStruct] | None = None,
        keep: Callable[[TreePath], bool] = is_codes_or_scales,
    ) -> dict[str, Any]:
        """Restores a part, or only the arrays `some`. Arrays for whose path `keep` is true are not cast to `dtype`."""
        stored = self.stored(part) if some is None else some
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(shardings, jax.sharding.Sharding):
            flat = dict.fromkeys(stored, shardings)
        else:
            flat = traverse_util.flatten_dict(shardings)
            for path in [path for path in flat if path not in stored and is_quantised(path)]:
                flat |= codes_and_scales_shardings(path, flat[path])
        dtypes = {
            path: np.dtype(array.dtype if dtype is None or keep(path) else dtype) for path, array in stored.items()
        }
        targets = {
            path: ocp.ArrayRestoreArgs(sharding=flat[path], global_shape=array.shape, dtype=dtypes[path])
            for path, array in stored.items()
        }
        # Limits the host memory between disk and device to two of the largest arrays.
        largest = max(a.size * max(a.dtype.itemsize, dtypes[path].itemsize) for path, a in stored.items())
        return self._read(part, traverse_util.unflatten_dict(targets), host_gb=math.ceil(2 * largest / 1e9) + 1)

    def arrays(self, part: str) -> Iterator[tuple[Param, np.ndarray]]:
        """Yields a part's arrays as NumPy arrays. The host holds a few hundred MB at a time.

        Raises:
          Emu3Error: the part is damaged, or it is a quantised decoder.
        """
        if part == "decoder":
            self.require_full("what reads single weights")
        params = {param.path: param for param in self.params(part)}
        for path, array in self.stored_arrays(part):
            yield params[path], array

    def stored_arrays(self, part: str) -> Iterator[tuple[TreePath, np.ndarray]]:
        """Yields a part's arrays as they are stored, including codes and scales of a quantised decoder."""
        stored = self.stored(part)
        for group in in_groups(self._expected(part), lambda path: _nbytes(stored[path]), READ_BYTES):
            targets = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in group}
            arrays = traverse_util.flatten_dict(self._read(part, traverse_util.unflatten_dict(targets)))
            for path in group:
                yield path, arrays.pop(path)

    def decoder_array(self, path: TreePath) -> np.ndarray:
        """Reads one array of the decoder, as it is stored, and nothing else. `stored` finds damage beforehand."""
        return read_array(self.weights("decoder"), path)

    def array(self, part: str, path: tuple[str, ...]) -> np.ndarray:
        """Reads one array of a part, as it is stored, and nothing else."""
        self.stored(part)
        targets = traverse_util.unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)})
        return traverse_util.flatten_dict(self._read(part, targets))[path]

    def write_with_decoder(
        self,
        target: Path,
        decoder: DecoderConfig,
        arrays: Sequence[LazyArray],
        written: Callable[[int], Any] = int,
        quantize: str | None = None,
    ) -> None:
        """Writes a new bundle with another decoder and copies of this bundle's other parts.

        Memory holds one array at a time.

        Args:
          target: path of the new bundle. It must not exist.
          decoder: config of the new decoder.
          arrays: weights of the new decoder.
          written: function that gets the number of bytes after each write.
          quantize: quantisation of the new decoder, or None for full weights.

        Raises:
          Emu3Error: `target` exists or cannot be written, or the disk is too small. No files are left behind.
        """
        require_outside(target, self.path)
        copied = [part for part in ("tokenizer", "vision") if self.has(part)]
        nbytes = sum(array.nbytes for array in arrays)
        if not storage.is_remote(self.path):
            nbytes += sum(size_on_disk(self.path / part) for part in copied)
        with new_directory(target, nbytes) as temporary:
            write_part(temporary / "decoder", decoder_dict(decoder, quantize), arrays, written)
            for part in copied:
                self.copy_part(part, temporary / part)
            write_checksums(temporary)

    def stored(self, part: str) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a part's arrays on disk. Raises `Emu3Error` if they do not fit the config."""
        self.require(part)
        self._check_complete(part)
        with self._checkpointer(part) as (checkpointer, directory):
            # Reads the database's index once, because Orbax opens all arrays at once. If that fails, Orbax leaves
            # threads that print errors.
            database = {"driver": "ocdbt", "base": storage.kvstore(directory)}
            tensorstore.KvStore.open(database).result().list().result()
            leaves = traverse_util.flatten_dict(checkpointer.metadata(directory).item_metadata.tree)
            stored = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
        expected = self._expected(part)
        wrong = sorted(
            "/".join(p) for p in expected.keys() | stored.keys() if not _fits(stored.get(p), expected.get(p))
        )
        if wrong:
            kind = self.quantize if part == "decoder" else None
            what = "shape" if kind is None else "shape or dtype"
            raise Emu3Error(
                f"{self.path / part}: {len(wrong)} arrays are missing, unknown or have another {what} than "
                f"config.json says{'' if kind is None else f' (quantize {kind})'}, first {wrong[0]}: "
                f"{'convert' if kind is None else 'quantise'} the model again"
            )
        return stored

    def _expected(self, part: str) -> dict[TreePath, jax.ShapeDtypeStruct | tuple[int, ...]]:
        """The arrays that a part must have, in the order of writing: shapes; for codes and scales also dtypes."""
        expected: dict[TreePath, jax.ShapeDtypeStruct | tuple[int, ...]] = {}
        for param in self.params(part):
            if part == "decoder" and self.quantize is not None and is_quantised(param.path):
                expected |= codes_and_scales_shapes(param.path, param.shape, self.quantize)
            else:
                expected[param.path] = param.shape
        return expected

    def _check_complete(self, part: str) -> None:
        """Raises `Emu3Error` if the weights' size is wrong, as after an interrupted copy.

        Orbax would find the damage later, inside its threads.
        """
        directory = self.path / part / "weights"
        expected, found = self._weights_bytes.get(part), size_on_disk(directory)
        if expected is not None and found != expected:
            raise Emu3Error(
                f"{directory} holds {found} bytes, but its config.json says {expected}: copy the bundle again; "
                "if you replaced the weights yourself, remove weights_bytes from config.json"
            )

    def _read(self, part: str, restore_args: Any, host_gb: int | None = None) -> Any:
        item = jax.tree.map(lambda _: 0, restore_args)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        with self._checkpointer(part, host_gb) as (checkpointer, directory):
            return checkpointer.restore(directory, args=args)

    @contextlib.contextmanager
    def _checkpointer(self, part: str, host_gb: int | None = None) -> Iterator[tuple[ocp.Checkpointer, Path]]:
        directory = self.weights(part)
        check_backend()  # first, so that a missing backend is not reported as damage
        try:
            options = alone_options()
            handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=host_gb, multiprocessing_options=options)
            with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
                yield checkpointer, directory
        except (MemoryError, jax.errors.JaxRuntimeError):  # out of memory, which has an error line of its own
            raise
        except Exception as error:  # Orbax raises exceptions of any class
            storage.require_access(directory, error)
            reason = str(error.__cause__ or error).split("\n", 1)[0][:200]
            raise Emu3Error(
                f"{directory}: cannot be restored ({reason}); if the files are damaged, convert the model again"
            ) from error
