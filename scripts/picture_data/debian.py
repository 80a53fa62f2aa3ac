"""Packages of Debian: pinned, downloaded once into a cache, checked, and read without unpacking."""

import dataclasses
import hashlib
import io
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

from emu3_jax.errors import Emu3Error

_MAGIC = b"!<arch>\n"
_HEADER = 60  # bytes before each member of an ar archive: name, time, owner, group, mode, size and an end mark
_MOST = 1 << 28  # largest archive of files in a package; Open Clipart's has 25 MB


@dataclasses.dataclass(frozen=True)
class DebianPackage:
    """One package for every architecture. `sha256` is the checksum of the whole file, as Debian's index lists it."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """What `apt-get download` calls the file."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def fetch(package: DebianPackage, cache: pathlib.Path) -> pathlib.Path:
    """The file of `package` in `cache`, downloaded if it is not there.

    Raises:
        Emu3Error: apt-get is missing or fails, or the file is not the pinned one.
    """
    path = cache / package.filename
    if not path.exists():
        _download(package, cache)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise Emu3Error(f"{path} has the checksum {found}, not {package.sha256}: delete it and run again")
    return path


def read_members(path: pathlib.Path, ending: str, most: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's regular files whose names end in `ending`, in their order there.

    Args:
        path: of the package, an ar archive that contains a tar archive called data.tar.
        ending: of the names.
        most: largest file in bytes; larger ones are left out.

    Raises:
        Emu3Error: the file is no such package.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_data(path)), mode="r:*") as archive:
            for member in archive:
                # Links are left out: a link names a file of this machine.
                if member.isfile() and member.name.endswith(ending) and member.size <= most:
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Emu3Error(f"{path} cannot be read ({error}): delete it and run again") from error


def _data(path: pathlib.Path) -> bytes:
    """The bytes of the member data.tar of an ar archive."""
    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it is no ar archive")
        while len(header := stream.read(_HEADER)) == _HEADER:
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                if size > _MOST:
                    raise ValueError(f"its files take {size} bytes, more than {_MOST}")
                return stream.read(size)
            stream.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no member data.tar")


def _download(package: DebianPackage, cache: pathlib.Path) -> None:
    wanted = f"{package.name}={package.version}"
    remedy = f"put the file {package.filename} of Debian's archive into {cache}"
    apt = shutil.which("apt-get")
    if apt is None:
        raise Emu3Error(f"apt-get is not installed, and {cache} lacks {package.filename}: {remedy}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".apt.", dir=cache) as temporary:
        ran = subprocess.run([apt, "-q", "download", wanted], capture_output=True, text=True, cwd=temporary)
        loaded = pathlib.Path(temporary) / package.filename
        if ran.returncode or not loaded.exists():
            reason = (ran.stderr.strip() or ran.stdout.strip() or "it said nothing").splitlines()[-1]
            raise Emu3Error(f"apt-get download {wanted} failed ({reason}): run apt-get update, or {remedy}")
        loaded.replace(cache / package.filename)
