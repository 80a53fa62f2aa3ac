"""How far pictures are from each other, and how evenly a codebook is used."""

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.errors import Emu3Error

EQUAL_PSNR = 100.0  # dB: what equal pictures count as, so that means stay finite
_WINDOW, _SIGMA, _K1, _K2, _RANGE = 11, 1.5, 0.01, 0.03, 255.0
_BLOCK = 1024  # pictures that are compared at once


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair, in dB for the 8-bit range; `EQUAL_PSNR` at most.

    Args:
        a: uint8 [N, H, W, 3].
        b: the same.

    Returns:
        float64 [N].
    """
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(_RANGE**2 / error), EQUAL_PSNR)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair (Wang et al. 2004): 11x11 Gaussian window of deviation 1.5, 8-bit range.

    Only windows that lie wholly in the picture count, as in the authors' program. Of a picture's channels the mean.

    Args:
        a: uint8 [N, H, W, 3].
        b: the same.

    Returns:
        float64 [N].

    Raises:
        Emu3Error: the pictures are smaller than the window.
    """
    if min(a.shape[1:3]) < _WINDOW:
        raise Emu3Error(f"pictures of {a.shape[2]}x{a.shape[1]} pixels have no SSIM: its window has {_WINDOW} rows")
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    values = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        mean_x, mean_y, xx, yy, xy = map(_blurred, (x, y, x * x, y * y, x * y))
        variances = xx - mean_x**2 + yy - mean_y**2
        covariance = xy - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        values.append((luminance * (2 * covariance + c2) / (variances + c2)).mean())
    return np.array(values)


def code_counts(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """How often each code occurs, int64 [codebook_size]; `codes` are whole numbers of any shape."""
    return np.bincount(codes.reshape(-1), minlength=codebook_size)


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the codes: how many codes would be used if all of them were used equally."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each pair of uint8 [N, H, W, 3], in steps of 8-bit pixels: float64 [N]."""
    return np.abs(a.astype(np.int16) - b.astype(np.int16)).mean(axis=(1, 2, 3), dtype=np.float64)


def motion_energy(clips: np.ndarray, power: int = 2) -> np.ndarray:
    """Mean squared difference of each clip's consecutive frames, in squared steps of 8-bit pixels.

    `power` 1 is the mean absolute difference instead.

    Args:
        clips: uint8 [N, T, H, W, 3]; T >= 2.

    Returns:
        float64 [N].
    """
    return np.array([(np.abs(np.diff(clip.astype(np.float64), axis=0)) ** power).mean() for clip in clips])


def nearest(pictures: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of other pictures to each picture, by `distance`.

    Args:
        pictures: uint8 [N, H, W, 3].
        among: uint8 [M, H, W, 3].

    Returns:
        indices into `among`, int [N], of equally near ones the first; and the distances, float64 [N].
    """
    sums = []
    for start in range(0, len(among), _BLOCK):
        part = among[start : start + _BLOCK]
        padded = np.pad(part, [(0, _BLOCK - len(part)), (0, 0), (0, 0), (0, 0)])  # one compiled shape for all
        sums.append(np.asarray(_absolute_sums(pictures, padded))[:, : len(part)])
    sums = np.concatenate(sums, axis=1)
    indices = sums.argmin(axis=1)
    return indices, sums[np.arange(len(sums)), indices] / pictures[0].size


@jax.jit
def _absolute_sums(pictures: jax.Array, others: jax.Array) -> jax.Array:
    """Sums of absolute differences, int32 [N, M]. Sums of whole numbers are exact on every device."""

    def of_one(picture):
        # Larger minus smaller stays within uint8.
        difference = jnp.maximum(picture[None], others) - jnp.minimum(picture[None], others)
        return difference.astype(jnp.int32).sum(axis=(1, 2, 3))

    return jax.lax.map(of_one, pictures)


def _blurred(values: np.ndarray) -> np.ndarray:
    """[H, W, C] under the window, [H - 10, W - 10, C]. The Gaussian is one over rows times one over columns."""
    steps = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(steps**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    rows, columns = values.shape[0] - _WINDOW + 1, values.shape[1] - _WINDOW + 1
    down = sum(weight * values[i : i + rows] for i, weight in enumerate(weights))
    return sum(weight * down[:, i : i + columns] for i, weight in enumerate(weights))
