"""The embedded model: the bundle that ships inside the package, and the checksums that vouch for its files."""

import hashlib
from pathlib import Path

from emu3_jax.errors import Emu3Error

DIRECTORY = Path(__file__).parent.parent / "assets" / "emoji"
CHECKSUMS = "SHA256SUMS"  # lines as `sha256sum` writes and checks them
_REMEDY = "install emu3-jax again (pip install --force-reinstall), or pass --model BUNDLE"


def embedded_bundle() -> Path:
    """The embedded model's bundle, its files checked.

    Raises:
        Emu3Error: it is not in this installation, or a file of it is missing or damaged.
    """
    listing = DIRECTORY / CHECKSUMS
    if not listing.is_file():
        raise Emu3Error(
            "no model was given, and this installation has no embedded model: pass --model BUNDLE (emu3-jax convert "
            "makes one)"
        )
    for line in listing.read_text().splitlines():
        expected, _, name = line.partition("  ")
        file = DIRECTORY / name
        if not file.is_file():
            raise Emu3Error(f"a file of the embedded model is missing: {file}; {_REMEDY}")
        if _sha256(file) != expected:
            raise Emu3Error(f"a file of the embedded model is damaged, its checksum differs: {file}; {_REMEDY}")
    return DIRECTORY


def write_checksums(directory: Path) -> None:
    """Lists every file below `directory` with its SHA-256 in `directory/SHA256SUMS`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{_sha256(file)}  {file.relative_to(directory).as_posix()}\n" for file in files]
    (directory / CHECKSUMS).write_text("".join(lines))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
