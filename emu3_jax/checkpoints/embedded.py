"""The embedded model: the bundle inside the package. Its files are checked against their checksums."""

from pathlib import Path

from emu3_jax.checkpoints.checksums import compare_checksums, has_checksums
from emu3_jax.errors import Emu3Error

DIRECTORY = Path(__file__).parent.parent / "assets" / "emoji"
_REMEDY = "install emu3-jax again (pip install --force-reinstall), or pass --model BUNDLE"


def embedded_bundle() -> Path:
    """Checks the files of the embedded model and returns the directory of its bundle.

    Raises:
        Emu3Error: this installation has no embedded model, or one of its files is missing or damaged.
    """
    if not has_checksums(DIRECTORY):
        raise Emu3Error(
            "no model was given, and this installation has no embedded model: pass --model BUNDLE (emu3-jax convert "
            "makes one)"
        )
    _, different = compare_checksums(DIRECTORY, whole=True, progress=False)
    for difference in different[:1]:
        raise Emu3Error(f"a file of the embedded model {difference.what}: {DIRECTORY / difference.name}; {_REMEDY}")
    return DIRECTORY
