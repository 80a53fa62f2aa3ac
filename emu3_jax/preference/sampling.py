"""Draws samples for prompts: codes and log-probabilities, shard by shard. The work of `emu3-jax sample`."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax import files, storage
from emu3_jax.data import shard_directory
from emu3_jax.data.records import SAMPLES
from emu3_jax.data.shard_directory import Outcome, ShardDirectory
from emu3_jax.data.shards import FORMAT, Codebook, read_shard
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.codec import decode_picture
from emu3_jax.generation.language import Batching, Grid, Language, grid_rows, stream_grids
from emu3_jax.generation.log_probs import visual_log_probs
from emu3_jax.generation.pictures import metadata
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.rows import Sampling, describe, prompt_list
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.media.picture_files import save_picture
from emu3_jax.media.sizes import generate_size
from emu3_jax.models.quantizer import CODEBOOK
from emu3_jax.preference.samples import DrawnSample
from emu3_jax.printable import shown
from emu3_jax.progress import Progress
from emu3_jax.sharding.rules import use_mesh

PNG = "png"  # folder in the output directory for pictures, named by the samples' numbers
SHARD_SAMPLES = 64  # least samples of one guidance scale in a shard by default; a killed run loses one shard at most
_OTHER = "samples of other prompts, of other options or of another model"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw. Every prompt gets `n` pictures at each guidance scale.

    Picture i of prompt p has the seed `seed + p * n + i` at every scale. So the pictures of one scale are those of
    `Emu3.generate` with the same prompts, `n`, seed and scale.

    Attributes:
        prompts: the prompts.
        n: number of pictures per prompt and guidance scale.
        guidance: guidance scales, all different.
        negative: the negative prompt of all pictures.
        ratio: width:height of all pictures.
        area: area of a picture in pixels, or None for the area that the model was trained for.
        temperature: sampling temperature; 0 is greedy.
        top_k: number of likeliest tokens to sample from.
        top_p: total probability of the likeliest tokens to sample from.
        seed: seed of the first picture.
        allow_special: whether control tokens in prompts take effect.

    Raises:
        Emu3Error: a value is not legal.
    """

    prompts: Sequence[str]
    n: int
    guidance: Sequence[float] = (defaults.GUIDANCE,)
    negative: str = ""
    ratio: str = "1:1"
    area: int | None = None
    temperature: float = defaults.TEMPERATURE
    top_k: int = defaults.TOP_K
    top_p: float = defaults.TOP_P
    seed: int = defaults.SEED
    allow_special: bool = False

    def __post_init__(self) -> None:
        prompt_list(self.prompts)
        if not is_count(self.n):
            raise Emu3Error(f"n is {shown(self.n)}: it must be a whole number >= 1")
        if self.total > defaults.MAX_PICTURES:
            raise Emu3Error(
                f"{len(self.prompts):,} prompts x {self.n} pictures x {len(self.guidance)} guidance scales are "
                f"{self.total:,} pictures, but a data set has at most {defaults.MAX_PICTURES:,}: lower n, or split the "
                "prompts"
            )
        if not self.guidance or len(set(self.guidance)) < len(self.guidance):
            raise Emu3Error(f"guidance is {shown(list(self.guidance))}: give at least one scale, and none twice")
        for scale in self.guidance:
            self.settings(scale, 0, 1)
        self.settings(self.guidance[0], len(self.prompts) - 1, len(self.prompts))  # the largest seed

    @property
    def total(self) -> int:
        """The number of samples."""
        return len(self.prompts) * self.group

    @property
    def group(self) -> int:
        """The number of samples of a prompt."""
        return self.n * len(self.guidance)

    def settings(self, guidance: float, first: int, end: int) -> RowSettings:
        """The sampling settings of the prompts first .. end - 1 at one scale, grouped by prompt."""
        seeds = [self.seed + prompt * self.n for prompt in range(first, end)]
        sampling = Sampling(self.temperature, self.top_k, self.top_p, float(guidance), seeds)
        return sampling.settings(end - first, self.n)


def sample(
    model: Emu3,
    request: Request,
    output: str | Path,
    *,
    png: bool = False,
    shards: int | None = None,
    batching: Batching | None = None,
    host: int = 0,
    hosts: int = 1,
    progress: bool | None = None,
) -> Outcome:
    """Draws the samples of a request into `output`. When all shards are finished, also writes the index.

    A run that starts again keeps the finished shards. The result equals that of a run without interruption. In
    bfloat16 it may depend on the batch size and on the number of shards, see `Emu3`.

    Args:
        model: the model.
        request: what to draw.
        output: a directory, local or in a bucket; made if absent.
        png: also write each picture to `output`/png, named by the sample's number.
        shards: number of shards; by default so many that each has at least 64 samples of every guidance scale.
        batching: batching of rows, or None for the default. `zipar` must be None, because it changes the distribution
            that is sampled.
        host: number of this process among those that share the work, from 0.
        hosts: number of these processes. All have the same request and `output`.
        progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

    Returns:
        The index, or the number of shards of other processes that are missing.

    Raises:
        Emu3Error: a prompt is not legal, `output` holds other samples, or the disk is full. Finished shards stay.
    """
    batching = Batching() if batching is None else batching
    if batching.zipar is not None:
        raise Emu3Error("zipar changes the distribution that tokens are sampled from: leave it out")
    if png and storage.is_remote(output):
        raise Emu3Error(f"{output}: pictures are written to local directories only; draw without --png (png=False)")
    drawing = _Drawing(model, request, dataclasses.replace(batching, progress=False))
    count = drawing.default_shards() if shards is None else shards
    if not is_count(count) or count > len(request.prompts):
        raise Emu3Error(f"shards is {shown(count)}: it must be 1 to {len(request.prompts)}, the number of prompts")
    bounds = [len(request.prompts) * number // count for number in range(count + 1)]
    output = storage.place(output)
    storage.storage_place(output)  # refuses a path that ArrayRecord cannot open, before any work
    with shard_directory.held(output, host, hosts, "sampled"):
        directory = ShardDirectory(output, drawing.job(count), count, kind=SAMPLES, other=_OTHER)
        mine = range(host, count, hosts)
        sizes = {number: (bounds[number + 1] - bounds[number]) * request.group for number in mine}
        done = {number for number in mine if directory.finished(number) is not None}
        with Progress(
            progress, sum(sizes.values()), "samples", name="sample", initial=sum(sizes[number] for number in done)
        ) as bar:
            for number in mine:
                if number not in done:
                    directory.write(number, drawing.draw(bounds[number], bounds[number + 1], bar), lambda: None)
                if png:
                    drawing.write_pictures(directory, number, output / PNG)
        return directory.merge(drawing.codebook)


class _Drawing:
    """A request with the model that draws it."""

    def __init__(self, model: Emu3, request: Request, batching: Batching):
        self._request, self._batching, self._name = request, batching, model.name
        self._language, self._vision = model.language, model.vision
        area = self._language.config.image_area if request.area is None else request.area
        self._size = generate_size(request.ratio, area, self._vision.config.spatial_factor)
        grid_rows(self._language, self._grids(0, len(request.prompts), 1), request.allow_special)  # checks all prompts
        self.codebook = Codebook.of(np.asarray(self._vision.params["quantize"][CODEBOOK[-1]]))

    def _grids(self, first: int, end: int, n: int) -> list[Grid]:
        prompts = self._request.prompts[first:end]
        return [Grid(prompt, self._request.negative, self._size) for prompt in prompts for _ in range(n)]

    def default_shards(self) -> int:
        """Shards of whole batches: as many as have `SHARD_SAMPLES` samples of each scale."""
        n, batch = self._request.n, self._batching.batch_size
        step = batch // math.gcd(batch, n)  # prompts whose samples of one scale fill batches
        prompts = step * -(-SHARD_SAMPLES // (step * n))
        return max(1, len(self._request.prompts) // prompts)

    def job(self, shards: int) -> str:
        """SHA-256 of everything that determines the samples."""
        batching = (self._batching.batch_size, self._batching.deterministic, self._batching.parallel)
        parts = {
            "format": FORMAT,
            "name": self._name,
            "request": dataclasses.asdict(self._request),
            "model": weights_digest(self._language),
            "codebook": dataclasses.asdict(self.codebook),
            "batching": batching,
            "shards": shards,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def draw(self, first: int, end: int, bar: Progress) -> Iterator[DrawnSample]:
        """Draws the samples of the prompts first .. end - 1. Yields them prompt by prompt, then scale by scale."""
        request = self._request
        scales = [self._draw_scale(scale, first, end, bar) for scale in request.guidance]
        for prompt in range(first, end):
            for place, (scale, drawn) in enumerate(zip(request.guidance, scales, strict=True)):
                for i in range(request.n):
                    number = prompt * request.group + place * request.n + i
                    arrays = drawn[(prompt - first) * request.n + i]
                    yield DrawnSample(
                        number, prompt, request.prompts[prompt], request.negative, float(scale),
                        float(request.temperature), int(request.top_k), float(request.top_p),
                        request.seed + prompt * request.n + i, self._name, *arrays,
                    )  # fmt: skip

    def _draw_scale(self, scale: float, first: int, end: int, bar: Progress) -> list[tuple[np.ndarray, ...]]:
        """Codes, log-probabilities and the model's log-probabilities of each row of a shard, [h, w] each."""
        request, language, size = self._request, self._language, self._batching.batch_size
        grids, settings = self._grids(first, end, request.n), request.settings(scale, first, end)
        rows = grid_rows(language, grids, request.allow_special)
        made: dict[int, Any] = {}
        stream = stream_grids(language, grids, settings, batching=self._batching, allow_special=request.allow_special)
        for row, grid in stream:
            made[row] = grid
            bar.update()
        found: list[tuple[np.ndarray, ...]] = []
        for begin in range(0, len(rows), size):
            batch = range(begin, min(begin + size, len(rows)))
            ids = [made[row].ids[made[row].prompt_length :] for row in batch]
            measured = visual_log_probs(
                language, [rows[row] for row in batch], ids, settings.take(np.asarray(batch)), batch_size=size
            )
            for row, one in zip(batch, measured, strict=True):
                found.append((made[row].codes, one.sampled.reshape(self._size), one.model.reshape(self._size)))
        return found

    def write_pictures(self, directory: ShardDirectory, number: int, folder: Path) -> None:
        """Writes the pictures of finished shard `number` that are missing in the local `folder`."""
        shard = directory.finished(number)
        assert shard is not None
        drawn = read_shard(directory.file(number), shard, DrawnSample.from_bytes)
        missing = [one for one in drawn if not (folder / _png(one)).exists()]
        if not missing:
            return
        with files.files_into(folder) as temporary:
            for one in missing:
                image = decode_picture(self._vision, one.codes)
                settings = RowSettings.of(1, **{name: getattr(one, name) for name in RowSettings.DTYPES})
                grid = Grid(one.prompt, one.negative, one.codes.shape)
                about = metadata(image, grid, self._request.ratio, describe(settings, 0), one.model)
                save_picture(image, temporary / _png(one), about)


def _png(one: DrawnSample) -> str:
    return f"{one.number:06d}.png"


def weights_digest(language: Language) -> str:
    """SHA-256 that identifies a decoder: its config, and the sum of each weight's bits modulo 2**32."""
    with use_mesh(language.mesh):
        sums = jax.tree.map(np.asarray, _bit_sums(language.params))
    leaves = [(jax.tree_util.keystr(path), int(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(sums)]
    return hashlib.sha256(f"{language.config} {language.quantize} {leaves}".encode()).hexdigest()


@jax.jit
def _bit_sums(params: Any) -> Any:
    def bits(leaf: jax.Array) -> jax.Array:
        kind = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, kind), dtype=jnp.uint32)

    return jax.tree.map(bits, params)
