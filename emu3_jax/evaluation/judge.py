"""The judge: a small convolutional classifier that names the concept of a picture.

It is trained on the training pictures and their reconstructions, and scores generated pictures. No score can be
trusted beyond the judge's own accuracy on real held-out pictures. The trained judge is cached in a file beside the
data, whose name contains a hash of everything that the training depends on.

Axes: N pictures, B rows of a batch, H W rows and columns of pixels, C channels, K concepts.
"""

import dataclasses
import functools
import hashlib
import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.config import JudgeConfig
from emu3_jax.evaluation.items import Data, in_batches
from emu3_jax.files import new_file
from emu3_jax.foreign import plain_file, reading
from emu3_jax.progress import Progress

try:
    import optax
except ImportError as missing:
    raise Emu3Error("the judge needs optax, which is not installed: pip install 'emu3-jax[train]'") from missing

_FORMAT = 1  # part of the cached file's name: raise it when network, augmentation or training change
_AGAIN = "delete the file; the next evaluation trains the judge again"
_STEPS_PER_REPORT = 10
_GROUPS = 8
_SHIFT = 1 / 12  # largest shift in each direction, as a share of the side
_SCALE = 0.15  # largest relative change of scale


class Block(nn.Module):
    """A convolution of stride 2, then a residual convolution. [B, H, W, C] to [B, H / 2, W / 2, `features`]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features, (3, 3), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.GroupNorm(_GROUPS)(x))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        return nn.relu(x + nn.GroupNorm(_GROUPS)(y))


class Network(nn.Module):
    """The classifier. The last feature map is averaged to 2x2 cells, which keeps some of the picture's layout."""

    width: int
    concepts: int

    @nn.compact
    def __call__(self, pixels: jax.Array, features: bool = False) -> jax.Array:
        """Logits [B, K] from float32 pixels [B, H, W, 3] in 0..1; or, with `features`, what the last layer gets."""
        x = nn.Conv(self.width, (5, 5), (2, 2), use_bias=False)(2 * pixels - 1)
        x = nn.relu(nn.GroupNorm(_GROUPS)(x))
        for factor in (1, 2, 4):
            x = Block(factor * self.width)(x)
        x = jax.image.resize(x, (len(x), 2, 2, x.shape[-1]), "linear").reshape(len(x), -1)
        return x if features else nn.Dense(self.concepts)(x)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained judge.

    Attributes:
        concepts: names of the concepts, in the order of the logits.
        width: width of the network, see `JudgeConfig`.
        params: parameters of the network.
        file: path of the cached judge, or None if it could not be written.
        pictures: number of training pictures.
    """

    concepts: tuple[str, ...]
    width: int
    params: Any
    file: Path | None
    pictures: int

    @classmethod
    def load(
        cls, file: Path, width: int, concepts: Sequence[str], shape: tuple[int, ...], pictures: int = 0
    ) -> "Judge":
        """Loads a trained judge from a file that `get_judge` wrote.

        Args:
            file: the file.
            width: width of the network.
            concepts: names of the concepts, in the order of the logits.
            shape: [H, W, 3] of the pictures that it was trained on.
            pictures: number of training pictures.

        Raises:
            Emu3Error: the file is damaged, or is a judge of another width or number of concepts.
        """
        return cls(tuple(concepts), width, _load(file, width, len(concepts), shape), file, pictures)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def logits(self, pictures: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """What the network says of each picture, float32 [N, K], for uint8 [N, H, W, 3]; K as in `concepts`."""
        forward = _make_forward(self.width, len(self.concepts))
        return in_batches(lambda rows: forward(self.params, rows), pictures, batch_size)

    def ranks(self, pictures: np.ndarray, concepts: Sequence[str], batch_size: int = 128) -> np.ndarray:
        """The rank of each picture's true concept: the number of concepts that the judge finds likelier.

        Rank 0 is a right answer (top 1). Ranks below 5 are in the top 5.

        Args:
            pictures: uint8 [N, H, W, 3], of the size that the judge was trained on.
            concepts: the true concept of each picture, from `self.concepts`.
            batch_size: number of pictures to judge at once.

        Returns:
            int64 [N].
        """
        logits = self.logits(pictures, batch_size)
        index = {concept: i for i, concept in enumerate(self.concepts)}
        truth = np.array([index[concept] for concept in concepts])
        return (logits > logits[np.arange(len(truth)), truth][:, None]).sum(axis=1)

    def probabilities(self, pictures: np.ndarray, concepts: Sequence[str], batch_size: int = 128) -> np.ndarray:
        """The probability that the judge gives to each picture's true concept, float64 [N]. Arguments: `ranks`."""
        logits = self.logits(pictures, batch_size).astype(np.float64)
        index = {concept: i for i, concept in enumerate(self.concepts)}
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        truth = np.array([index[concept] for concept in concepts])
        return chances[np.arange(len(truth)), truth] / chances.sum(axis=1)

    def verdicts(self, pictures: np.ndarray, batch_size: int = 128) -> list[str]:
        """The likeliest concept of each picture, for uint8 [N, H, W, 3]."""
        return [self.concepts[i] for i in self.logits(pictures, batch_size).argmax(axis=1)]

    def features(self, pictures: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """What the last layer gets, float64 [N, 16 * width], for uint8 [N, H, W, 3]."""
        forward = _make_forward(self.width, len(self.concepts), features=True)
        return in_batches(lambda rows: forward(self.params, rows), pictures, batch_size).astype(np.float64)


def get_judge(
    directory: Path,
    config: JudgeConfig,
    pictures: np.ndarray,
    concepts: Sequence[str],
    *,
    reconstruct: Callable[[], np.ndarray],
    tokenizer: str,
    progress: bool | None = None,
) -> Judge:
    """Loads the cached judge from `directory`, or trains it and caches it there.

    Args:
        directory: directory of the data.
        config: settings of the training.
        pictures: the training pictures, uint8 [N, H, W, 3].
        concepts: the concept of each training picture.
        reconstruct: function that returns the vision tokenizer's reconstructions of `pictures`, of the same shape. It
            is called only if the judge must be trained.
        tokenizer: hash of the vision tokenizer.
        progress: as in `progress.Progress`.

    Returns:
        The judge.

    Raises:
        Emu3Error: there are fewer than two concepts, or the cached file is damaged.
    """
    names = tuple(sorted(set(concepts)))
    if len(names) < 2:
        raise Emu3Error(
            f"{directory}: the training pictures show {len(names)} concepts, a judge needs at least two: build the "
            "data again, or correct the config's field groups"
        )
    digest = hashlib.sha256(f"{_FORMAT} {config} {tokenizer} {pictures.shape} {list(concepts)}".encode())
    digest.update(np.ascontiguousarray(pictures))
    file = Path(directory) / f"judge-{digest.hexdigest()[:16]}.npz"
    if file.exists():
        return Judge.load(file, config.width, names, pictures.shape[1:], len(pictures))
    judge = Judge(names, config.width, None, file, len(pictures))
    params = train(config, pictures, reconstruct(), np.searchsorted(names, concepts), len(names), progress=progress)
    try:
        with new_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **traverse_util.flatten_dict(params, sep="/"))
    except Emu3Error as error:  # the figures do not need the cached file
        print(f"emu3-jax: cannot save the judge, so the next run trains it again: {error}", file=sys.stderr)
        return dataclasses.replace(judge, params=params, file=None)
    return dataclasses.replace(judge, params=params)


def judge_of(
    data: Data,
    config: JudgeConfig,
    groups: Sequence[str] | None,
    reconstruct: Callable[[np.ndarray], np.ndarray],
    tokenizer: str,
    progress: bool | None = None,
) -> tuple[Judge, np.ndarray]:
    """The judge of evaluation data: the one that is cached beside them, or a new one. And its training pictures.

    Args:
        data: evaluation data.
        config: settings of the training.
        groups: groups of the training pictures, or None for all.
        reconstruct: the vision tokenizer: its reconstructions of pictures, see `get_judge`.
        tokenizer: hash of the vision tokenizer.
        progress: as in `progress.Progress`.

    Returns:
        The judge, and the training pictures, uint8 [N, H, W, 3].

    Raises:
        Emu3Error: as `get_judge`.
    """
    training = data.where("picture", "train", groups)
    pixels = data.pixels(training, progress) if training else np.zeros((0, 1, 1, 3), np.uint8)
    judge = get_judge(
        data.directory, config, pixels, [item.concept for item in training], reconstruct=lambda: reconstruct(pixels),
        tokenizer=tokenizer, progress=progress,
    )  # fmt: skip
    return judge, pixels


def train(
    config: JudgeConfig,
    pictures: np.ndarray,
    reconstructions: np.ndarray,
    labels: np.ndarray,
    concepts: int,
    *,
    progress: bool | None = None,
) -> Any:
    """Trains the judge's network from random weights.

    The result depends only on the arguments. On some GPUs, convolutions sum in varying order, so the last digits vary.

    Args:
        config: settings of the training.
        pictures: uint8 [N, H, W, 3].
        reconstructions: the vision tokenizer's reconstructions of `pictures`, uint8 [N, H, W, 3].
        labels: int [N], from 0 to `concepts` - 1.
        concepts: number of concepts.
        progress: as in `progress.Progress`.

    Returns:
        The parameters, nested dicts of NumPy arrays.
    """
    network, rng = Network(config.width, concepts), np.random.default_rng(config.seed)
    params = _random_params(network, pictures.shape[1:], rng)
    optimizer, step = _make_step(config, concepts)
    both = jnp.asarray(np.stack([pictures, reconstructions]))
    labels = np.asarray(labels, np.int32)

    state = optimizer.init(params)
    with Progress(progress, config.steps, "steps", name="training the judge") as bar:
        for number in range(1, config.steps + 1):  # inside `lax.scan`, XLA runs CPU convolutions on one core only
            rows = rng.integers(0, len(labels), config.batch_size)
            second = (rng.random(config.batch_size) < config.reconstructions).astype(np.int32)
            change = Change.random(rng, config.batch_size)
            params, state, loss = step(params, state, both, second=second, rows=rows, label=labels[rows], change=change)
            if number % _STEPS_PER_REPORT == 0 or number == config.steps:
                bar.update(number - bar.done, f"loss {float(loss):.2f}")
    return jax.tree.map(np.asarray, params)


class Change(NamedTuple):
    """Random augmentation of B pictures, float32. NumPy's random numbers are the same on every device.

    Attributes:
        scale: magnification, [B, 1].
        shift: shift down and right, as shares of the side, [B, 2].
        blur: share of a blurred copy that is mixed in, mostly small, [B, 1, 1, 1].
        mix: matrix that mixes the colour channels, near the identity, [B, 3, 3].
        gain: factor on the contrast, [B, 1, 1, 1].
        offset: number added to each colour channel, [B, 1, 1, 3].
    """

    scale: np.ndarray
    shift: np.ndarray
    blur: np.ndarray
    mix: np.ndarray
    gain: np.ndarray
    offset: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, count: int) -> "Change":
        change = cls(
            scale=(1 + _SCALE) ** rng.uniform(-1, 1, (count, 1)),
            shift=rng.uniform(-_SHIFT, _SHIFT, (count, 2)),
            blur=rng.random((count, 1, 1, 1)) ** 2,
            mix=np.eye(3) + 0.1 * rng.standard_normal((count, 3, 3)),
            gain=rng.uniform(0.75, 1.25, (count, 1, 1, 1)),
            offset=0.1 * rng.standard_normal((count, 1, 1, 3)),
        )
        return cls(*(field.astype(np.float32) for field in change))


def augment(pixels: jax.Array, change: Change) -> jax.Array:
    """Shifts, scales, blurs and recolours each picture by its own random numbers.

    It never mirrors a picture: the direction of an arrow is part of its concept.

    Args:
        pixels: float32 [B, H, W, 3] in 0..1.
        change: the random numbers.

    Returns:
        float32 [B, H, W, 3] in 0..1.
    """
    _, height, width, _ = pixels.shape
    x = jnp.einsum("byh,bhwc->bywc", _resampling(height, change.scale, change.shift[:, :1]), pixels)
    x = jnp.einsum("bxw,bywc->byxc", _resampling(width, change.scale, change.shift[:, 1:]), x)
    blurred = x
    for _ in range(2):  # repeated [1 2 1] / 4 filters approximate a Gaussian
        blurred = _smoothed(_smoothed(blurred, 1), 2)
    x = x + change.blur * (blurred - x)
    x = jnp.einsum("bhwc,bcd->bhwd", x - 0.5, change.mix)
    return jnp.clip(x * change.gain + 0.5 + change.offset, 0, 1)


@functools.cache
def _make_step(config: JudgeConfig, concepts: int) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser and the jitted step of `train`."""
    network = Network(config.width, concepts)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 20), max(2, config.steps)
    )
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    # The pictures are an argument, because XLA would fold a constant of their size at compile time.
    def step(params, state, both, *, second, rows, label, change):
        pixels = augment(both[second, rows].astype(jnp.float32) / 255, change)
        target = optax.smooth_labels(jax.nn.one_hot(label, concepts), config.label_smoothing)

        def loss_of(params):
            return optax.softmax_cross_entropy(network.apply({"params": params}, pixels), target).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return optimizer, step


def _random_params(network: Network, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Random parameters: kernels of variance 2 / fan-in (He initialisation), norm scales 1, biases 0."""
    zeros = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = traverse_util.flatten_dict(jax.eval_shape(network.init, jax.random.key(0), zeros)["params"])
    params = {}
    for path, leaf in shapes.items():
        if path[-1] == "kernel":
            scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            params[path] = jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))
        else:
            params[path] = jnp.full(leaf.shape, 1.0 if path[-1] == "scale" else 0.0, jnp.float32)
    return traverse_util.unflatten_dict(params)


def _resampling(side: int, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Linear interpolation along one axis, as matrices [B, new pixel, old pixel]. Border pixels are repeated outside.

    Args:
        side: number of pixels of the axis.
        scale: magnification, [B, 1].
        shift: shift of the picture, as shares of the side, [B, 1].
    """
    middle = (side - 1) / 2
    pixel = jnp.arange(side)
    seen = jnp.clip((pixel[None] - middle - shift * side) / scale + middle, 0, side - 1)
    return jnp.maximum(0, 1 - jnp.abs(seen[..., None] - pixel[None, None]))


def _smoothed(x: jax.Array, axis: int) -> jax.Array:
    """Filters with [1 2 1] / 4 along `axis`. Border pixels are repeated outside."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (1, 1)
    padded = jnp.pad(x, pads, mode="edge")
    before, after = (jax.lax.slice_in_dim(padded, s, s + x.shape[axis], axis=axis) for s in (0, 2))
    return (before + 2 * x + after) / 4


@functools.cache
def _make_forward(width: int, concepts: int, features: bool = False) -> Callable[[Any, np.ndarray], jax.Array]:
    network = Network(width, concepts)
    return jax.jit(lambda params, pixels: network.apply({"params": params}, pixels.astype(jnp.float32) / 255, features))


@functools.cache
def _shapes(width: int, concepts: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the network's parameters, by path."""
    zeros = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    expected = jax.eval_shape(Network(width, concepts).init, jax.random.key(0), zeros)["params"]
    return traverse_util.flatten_dict(expected, sep="/")


def _load(file: Path, width: int, concepts: int, shape: tuple[int, ...]) -> Any:
    expected = _shapes(width, concepts, shape)
    arrays = {}
    other = Emu3Error(f"{file}: this judge has other weights than its config says; {_AGAIN}")
    with reading(file, _AGAIN):
        plain_file(file)
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if members.keys() != expected.keys() or len(members) != len(archive.infolist()):
                raise other
            for name, leaf in expected.items():
                with archive.open(members[name]) as stream:
                    # Check the header's shape and dtype before allocating memory for the array.
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0
                    if version != (1, 0) or read(stream) != (leaf.shape, False, leaf.dtype):
                        raise other
                    values = stream.read(leaf.size * leaf.dtype.itemsize + 1)
                    arrays[name] = np.frombuffer(values, leaf.dtype).reshape(leaf.shape)
    return traverse_util.unflatten_dict(arrays, sep="/")
