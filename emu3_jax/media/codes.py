"""Files of codes, as `tokenize` writes them."""

import pathlib
import zipfile

import numpy as np

from emu3_jax.errors import Emu3Error


def load_codes(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads an `.npz` of integer arrays, [h, w] or [t, h, w], keyed by name.

    Raises:
        Emu3Error: if the file is not one, or an array is of another kind. Pickled objects are refused, not run.
    """
    path = pathlib.Path(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = dict(data)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError, AttributeError) as error:
        raise Emu3Error(f"{path} is not a readable .npz of codes ({error}): make one with emu3-jax tokenize") from error
    if not arrays:
        raise Emu3Error(f"{path} holds no codes: make one with emu3-jax tokenize")
    for name, array in arrays.items():
        if array.dtype.kind not in "iu" or array.ndim not in (2, 3) or array.size == 0:
            raise Emu3Error(f"{path}: {name} is {array.dtype} {array.shape}, codes are integers [h, w] or [t, h, w]")
    return arrays
