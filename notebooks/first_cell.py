# @title Install emu3-jax
# Where the package comes from: an address for git, a wheel (path or address), or the folder of a checkout.
PACKAGE = "git+https://github.com/OWNER/emu3-jax"  # @param {type:"string"}
EXTRAS = ""  # what this notebook uses beside the package itself
MEMORY = 2  # GiB of free main memory that this notebook takes

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import warnings

import psutil
from IPython import get_ipython
from packaging.requirements import Requirement
from packaging.version import Version

GB = 1e9
# JAX takes three quarters of a GPU's memory unless told otherwise. Large models need the rest too.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
# `!emu3-jax` finds the command that belongs to this kernel. JAX warns of its fork, which is replaced at once.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")


class Stop(Exception):
    """Ends a cell, and "Run all", with one line in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stopped: {self}"]


def version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def accelerators() -> list[str]:
    """The extras for this machine's accelerators. They bring JAX's plugins in the version that JAX needs.

    Colab has an older JAX with its plugin. A newer JAX refuses the old plugin and computes on the CPU instead, so a
    plugin that is already here is always updated together with JAX.
    """
    tpu = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    found = ["tpu"] if tpu or version("libtpu") else []
    if version("jax-cuda12-plugin"):
        return [*found, "cuda12"]
    if version("jax-cuda13-plugin"):
        return [*found, "cuda13"]
    if shutil.which("nvidia-smi"):
        driver = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        if driver.returncode == 0:
            return [*found, "cuda13" if "CUDA Version: 13" in driver.stdout else "cuda12"]
    return found


def missing(requirement: Requirement, seen: set) -> list[str]:
    """What of a requirement, and of all that it requires in turn, is not installed in a fitting version."""
    key = (requirement.name, *sorted(requirement.extras))
    if key in seen:
        return []
    seen.add(key)
    held = version(requirement.name)
    if held is None:
        return [requirement.name]
    if not requirement.specifier.contains(held, prereleases=True):
        return [f"{requirement.name} (here: {held})"]
    lacking = []
    for inner in map(Requirement, importlib.metadata.requires(requirement.name) or ()):
        if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            lacking += missing(inner, seen)
    return lacking


def source(package: str, extras: str) -> tuple[str, str]:
    """`PACKAGE` as a requirement for pip, and its address as pip writes it down, "" for a name in the index."""
    if package.startswith("emu3-jax"):
        return f"emu3-jax[{extras}]{package.removeprefix('emu3-jax')}", ""
    if package.startswith(("http://", "https://")) and not package.endswith((".whl", ".gz", ".zip")):
        package = f"git+{package}"
    if "://" not in package:
        path = pathlib.Path(package).expanduser().resolve()
        if not path.exists():
            raise Stop(f"PACKAGE names {path}, which does not exist: give a git address, a wheel or a checkout")
        package = path.as_uri()
    return f"emu3-jax[{extras}] @ {package}", package.removeprefix("git+")


def installed_from(address: str) -> bool:
    """Whether the package that is here is the one at `address`. A checkout that is edited in place always is."""
    try:
        written = importlib.metadata.distribution("emu3-jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    if written is None or "/OWNER/" in address:
        return True
    origin = json.loads(written)
    host, _, path = address.partition("://")[2].partition("/")
    path, _, revision = path.partition("@")
    wanted = (f"{address.partition('://')[0]}://{host}/{path}", revision)
    held = (origin["url"], origin.get("vcs_info", {}).get("requested_revision", ""))
    return origin.get("dir_info", {}).get("editable", False) or wanted == held


def stale() -> list[str]:
    """Modules that this kernel imported in another version than the one that is now installed."""
    names = {"PIL": "pillow", "ml_dtypes": "ml-dtypes", **{n: n for n in ("flax", "jax", "jaxlib", "numpy", "optax")}}
    found = []
    for module, name in names.items():
        loaded, held = getattr(sys.modules.get(module), "__version__", None), version(name)
        if loaded and held and Version(loaded) != Version(held):
            found.append(f"{module} {loaded} (now {held})")
    return found


def check_room(what: str, *, memory: float = 0, disk: float = 0, device: float = 0, folder: str = ".") -> None:
    """Ends the cell in one line unless this runtime has so many GB of free main memory, disk and device memory."""
    has = {"main memory": psutil.virtual_memory().available, "disk": shutil.disk_usage(folder).free}
    if device:
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        has["device memory"] = stats.get("bytes_limit", has["main memory"])  # a CPU has no memory of its own
    for place, needed in (("main memory", memory), ("disk", disk), ("device memory", device)):
        if needed and has[place] < needed * GB:
            raise Stop(
                f"{what} needs {needed:.3g} GB of {place}, and this runtime has {has[place] / GB:.3g} GB free: choose "
                "a larger one (in Colab: Runtime, Change runtime type)"
            )


def install() -> None:
    check_room("this notebook", memory=MEMORY * 2**30 / GB)
    extras = ",".join(dict.fromkeys([*filter(None, EXTRAS.split(",")), *accelerators()]))
    requirement, address = source(PACKAGE, extras)
    wanted = Requirement(f"emu3-jax[{extras}]")
    lacking = missing(wanted, set())
    here = installed_from(address)
    if lacking or not here:
        if "/OWNER/" in PACKAGE:
            raise Stop(
                "PACKAGE is a placeholder: put the address of the repository there, like git+https://github.com/NAME/"
                "emu3-jax, or the path of a wheel or a checkout"
            )
        print(f"installing {requirement}; this takes a few minutes", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # pip does not replace a package by one of another place with the same version, unless it is told to.
        replace = [[*pip, "--force-reinstall", "--no-deps", requirement]] if version("emu3-jax") and not here else []
        for command in [[*pip, requirement], *replace]:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                break
        importlib.invalidate_caches()
        lacking = missing(wanted, set())
        if done.returncode or lacking:
            print(done.stdout, done.stderr, sep="\n")
            raise Stop(f"pip could not install {requirement}: its message is above. Lacking: {lacking[:5]}")
        if "dependency resolver" in done.stderr:
            print("Other packages of this runtime ask for older versions. This notebook does not use them.")
    old = stale() + (["emu3_jax"] if not here and "emu3_jax" in sys.modules else [])
    if old:
        print(f"The kernel must restart: it imported {', '.join(old)} before pip replaced the files.")
        print("It restarts now. Then run this cell again: it will find everything in place.", flush=True)
        get_ipython().kernel.do_shutdown(True)
        raise Stop("the kernel restarts. If it does not, choose Restart in the menu. Then run this cell again.")
    print(f"emu3-jax {version('emu3-jax')} with JAX {version('jax')}, extras: {extras or 'none'}")


install()
