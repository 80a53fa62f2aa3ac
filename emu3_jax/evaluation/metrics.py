"""Metrics: distances between pictures and between sets of features, motion of clips, and use of the codebook."""

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.errors import Emu3Error

EQUAL_PSNR = 100.0  # PSNR of equal pictures in dB, instead of infinity, so that means are finite
_WINDOW, _SIGMA, _K1, _K2, _RANGE = 11, 1.5, 0.01, 0.03, 255.0
_BLOCK = 1024  # number of pictures compared at once


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of pictures, in dB for the 8-bit range, at most `EQUAL_PSNR`.

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
    """Structural similarity (SSIM, Wang et al. 2004) of each pair of pictures.

    The window is an 11x11 Gaussian with standard deviation 1.5, the range 8 bits. As in the authors' program, only
    windows wholly inside the picture count. The result is the mean over windows and channels.

    Args:
        a: uint8 [N, H, W, 3].
        b: the same.

    Returns:
        float64 [N].

    Raises:
        Emu3Error: the pictures are smaller than the window.
    """
    if min(a.shape[1:3]) < _WINDOW:
        raise Emu3Error(
            f"SSIM needs pictures of at least {_WINDOW}x{_WINDOW} pixels, these have {a.shape[2]}x{a.shape[1]}: "
            "evaluate larger pictures"
        )
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
    """The number of occurrences of each code, int64 [codebook_size]. `codes` is an int array of any shape."""
    return np.bincount(codes.reshape(-1), minlength=codebook_size)


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the code distribution: the number of equally frequent codes with the same entropy."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each pair of uint8 [N, H, W, 3], in 8-bit pixel values: float64 [N]."""
    return np.abs(a.astype(np.int16) - b.astype(np.int16)).mean(axis=(1, 2, 3), dtype=np.float64)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features, each taken as a normal distribution (FID, Heusel et al. 2017).

    It is |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) with the unbiased covariances A and B. With factors
    A = F'F and B = G'G, the last trace is the sum of the singular values of F G'. So no root of a matrix is taken, and
    covariances that are not of full rank need no correction, unlike with `scipy.linalg.sqrtm`.

    Args:
        a: float [N, D].
        b: float [M, D].

    Returns:
        The distance, at least 0.

    Raises:
        Emu3Error: a set has fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise Emu3Error(f"a Fréchet distance needs at least 2 pictures, there are {min(len(a), len(b))}: evaluate more")
    means, factors = [], []
    for features in (a, b):
        means.append(features.mean(axis=0, dtype=np.float64))
        factor, block = np.zeros((0, features.shape[1])), max(1024, features.shape[1])
        for start in range(0, len(features), block):  # in blocks, because LAPACK copies its argument
            factor = np.linalg.qr(np.concatenate([factor, features[start : start + block] - means[-1]]), mode="r")
        factors.append(factor / np.sqrt(len(features) - 1))
    traces = sum((factor**2).sum() for factor in factors)
    root = np.linalg.norm(factors[0] @ factors[1].T, ord="nuc")
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + traces - 2 * root))


def motion_energy(clips: np.ndarray, power: int = 2) -> np.ndarray:
    """Mean squared difference of consecutive frames of each clip, in squared 8-bit pixel values.

    Args:
        clips: uint8 [N, T, H, W, 3]; T >= 2.
        power: 2 for squared differences, 1 for absolute differences.

    Returns:
        float64 [N].
    """
    return np.array([(np.abs(np.diff(clip.astype(np.float64), axis=0)) ** power).mean() for clip in clips])


def nearest(pictures: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest picture of `among` to each picture, by `distance`.

    Args:
        pictures: uint8 [N, H, W, 3].
        among: uint8 [M, H, W, 3].

    Returns:
        Indices into `among`, int [N] (the first of equally near pictures); and the distances, float64 [N].
    """
    sums = []
    for start in range(0, len(among), _BLOCK):
        part = among[start : start + _BLOCK]
        padded = np.pad(part, [(0, _BLOCK - len(part)), (0, 0), (0, 0), (0, 0)])  # one compiled shape for all parts
        sums.append(np.asarray(_absolute_sums(pictures, padded))[:, : len(part)])
    sums = np.concatenate(sums, axis=1)
    indices = sums.argmin(axis=1)
    return indices, sums[np.arange(len(sums)), indices] / pictures[0].size


@jax.jit
def _absolute_sums(pictures: jax.Array, others: jax.Array) -> jax.Array:
    """Sums of absolute differences, int32 [N, M]. Integer sums are exact on every device."""

    def of_one(picture):
        # Larger minus smaller value: a plain difference would overflow uint8.
        difference = jnp.maximum(picture[None], others) - jnp.minimum(picture[None], others)
        return difference.astype(jnp.int32).sum(axis=(1, 2, 3))

    return jax.lax.map(of_one, pictures)


def _blurred(values: np.ndarray) -> np.ndarray:
    """Filters [H, W, C] with the Gaussian window to [H - 10, W - 10, C], first along rows, then along columns."""
    steps = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(steps**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    rows, columns = values.shape[0] - _WINDOW + 1, values.shape[1] - _WINDOW + 1
    down = sum(weight * values[i : i + rows] for i, weight in enumerate(weights))
    return sum(weight * down[:, i : i + columns] for i, weight in enumerate(weights))
