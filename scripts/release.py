"""Makes a release: sets the version, updates the changelog, makes and checks wheel and sdist, and tags the commit.

python scripts/release.py 0.2.0              # pip install ".[release]" first
python scripts/release.py 0.2.0 --dry-run    # does everything, but keeps nothing

The script works in temporary clones of the last commit. After all checks have passed, this repository gets the commit
and the tag, and `dist/` gets the wheel and the sdist. A failed release changes nothing.

1. It checks that the tree is clean, that the version is newer than the last one and has no tag yet, and that the
   changelog has unreleased entries.
2. It writes the version into emu3_jax/__init__.py and, as the heading of the unreleased entries, into CHANGELOG.md.
3. It builds the wheel and the sdist twice, each time from a fresh clone. Both builds must give the same bytes.
4. twine checks their metadata. The wheel must hold every file of the package, the sdist every file of the commit.
5. It installs the wheel into a new environment. There, outside of any checkout, `emu3-jax --version` must print the
   version, and `emu3-jax generate` must make a picture.
6. It adds the commit and the tag to this repository, and prints the commands that push and upload the release.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = "emu3_jax/__init__.py"
CHANGELOG = "CHANGELOG.md"
UNRELEASED = "## [Unreleased]\n"
TOOLS = ("build", "twine")
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


class ReleaseError(Exception):
    """The release cannot be made. The message is one line with the reason."""


def run(*command: str | os.PathLike, cwd: pathlib.Path, **variables: str) -> str:
    """Returns the output of the command. If it fails, raises ReleaseError with the last line of its errors."""
    words = [os.fspath(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)
    except FileNotFoundError:
        raise ReleaseError(f"{words[0]} is not installed: install it") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ReleaseError(f"`{' '.join([pathlib.Path(words[0]).name, *words[1:]])}` failed: {said}")
    return done.stdout


def git(*words: str | os.PathLike, cwd: pathlib.Path) -> str:
    return run("git", *words, cwd=cwd).rstrip()


# ------------------------------------------------------------------------------------------------ what is released


def check(version: str, root: pathlib.Path) -> None:
    """Raises ReleaseError unless `version` can be released from `root` as it is."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        parsed = None
    if parsed is None or str(parsed) != version or parsed.local:
        raise ReleaseError(f"{version!r} is not a version: give one such as 0.2.0 or 0.2.0rc1")
    if changed := git("status", "--porcelain", cwd=root).splitlines():
        raise ReleaseError(f"files changed or new: {len(changed)}, first {changed[0][3:]}: commit or remove them")
    if not git("branch", "--show-current", cwd=root):
        raise ReleaseError("no branch is checked out: check out the branch to release from")
    if git("tag", "--list", f"v{version}", cwd=root):
        raise ReleaseError(f"the tag v{version} exists already: choose a newer version")
    present = current_version((root / SOURCE).read_text())
    if parsed <= Version(present):
        raise ReleaseError(f"{version} is not newer than {present}, the version in {SOURCE}")
    changelog_of_release((root / CHANGELOG).read_text(), version, datetime.date.today())


def check_tools(root: pathlib.Path) -> None:
    """Raises ReleaseError unless what a release needs is installed and git knows who commits."""
    for name in TOOLS:
        if importlib.util.find_spec(name) is None:
            raise ReleaseError(f'{name} is not installed: pip install ".[release]"')
    for key in ("user.name", "user.email"):
        try:
            git("config", key, cwd=root)
        except ReleaseError:
            raise ReleaseError(f"git has no {key}, which the commit needs: git config {key} ...") from None


def current_version(source: str) -> str:
    found = _VERSION.findall(source)
    if len(found) != 1:
        raise ReleaseError(f'{SOURCE} has {len(found)} lines __version__ = "...": it needs one')
    return found[0]


def changelog_of_release(text: str, version: str, day: datetime.date) -> str:
    """The changelog with the unreleased entries under a heading of `version`, below an empty unreleased part."""
    if text.count(UNRELEASED) != 1:
        raise ReleaseError(f"{CHANGELOG} has {text.count(UNRELEASED)} headings {UNRELEASED.strip()!r}: it needs one")
    before, after = text.split(UNRELEASED)
    if not re.search("^- ", after.split("\n## ", 1)[0], re.MULTILINE):
        raise ReleaseError(f"{CHANGELOG} has no line below {UNRELEASED.strip()!r}: write what changed for users")
    return f"{before}{UNRELEASED}\n## [{version}] - {day.isoformat()}\n{after}"


def write_release(version: str, clone: pathlib.Path) -> None:
    """Commits the version and the changelog in `clone`."""
    source, changelog = clone / SOURCE, clone / CHANGELOG
    source.write_text(_VERSION.sub(f'__version__ = "{version}"', source.read_text()))
    changelog.write_text(changelog_of_release(changelog.read_text(), version, datetime.date.today()))
    git("commit", "--quiet", "--all", "--message", f"Release {version}", cwd=clone)


# ------------------------------------------------------------------------------------------------ builds


def build(commit: pathlib.Path, place: pathlib.Path, *, isolated: bool = True) -> list[pathlib.Path]:
    """The wheel and the sdist of the last commit of the repository `commit`, built in a fresh clone.

    Args:
        commit: a repository.
        place: a directory, made here, for the clone and `dist/`.
        isolated: whether to install the build backend into a new environment, as pip does. Else uses the installed one.
    """
    git("clone", "--quiet", commit, place / "source", cwd=commit)
    made = git("log", "-1", "--format=%ct", cwd=commit)
    words = [] if isolated else ["--no-isolation"]
    run(
        sys.executable, "-m", "build", *words, "--outdir", place / "dist", place / "source",
        cwd=place, SOURCE_DATE_EPOCH=made,
    )  # fmt: skip
    return sorted((place / "dist").iterdir())


def digest(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def build_twice(commit: pathlib.Path, place: pathlib.Path, *, isolated: bool = True) -> list[pathlib.Path]:
    """Builds in two clones. Raises ReleaseError unless both give the same bytes."""
    first, second = (build(commit, place / name, isolated=isolated) for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        if digest(one) != digest(other):
            raise ReleaseError(f"two builds of {one.name} differ: something in it depends on time or place")
    return first


def check_contents(files: list[pathlib.Path], commit: pathlib.Path, version: str) -> None:
    """Raises ReleaseError unless the wheel holds the package, the sdist the commit, and both say `version`."""
    stem = f"emu3_jax-{version}"
    names = [f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"]
    if [file.name for file in files] != names:
        raise ReleaseError(f"the build made {', '.join(file.name for file in files)}, not {' and '.join(names)}")
    wheel, sdist = files
    tracked = set(git("ls-files", "-z", cwd=commit).strip("\0").split("\0"))
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    information = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    expected = {name for name in tracked if name.startswith("emu3_jax/")}
    _compare(wheel, held, expected | {f"{stem}.dist-info/{name}" for name in information})
    with tarfile.open(sdist) as archive:
        held = {member.name.removeprefix(f"{stem}/") for member in archive if member.isfile()}
    _compare(sdist, held, tracked | {"PKG-INFO"})


def _compare(file: pathlib.Path, held: set[str], expected: set[str]) -> None:
    for names, what in ((expected - held, "lacks"), (held - expected, "holds by mistake")):
        if names:
            raise ReleaseError(f"{file.name} {what} {len(names)} files, first {min(names)}")


def try_wheel(wheel: pathlib.Path, version: str, place: pathlib.Path) -> None:
    """Installs the wheel into a new environment in `place`, and makes a picture outside of any checkout."""
    run(sys.executable, "-m", "venv", place / "venv", cwd=place)
    run(place / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=place)
    program = place / "venv/bin/emu3-jax"
    empty = {"PYTHONPATH": "", "XDG_CACHE_HOME": os.fspath(place / "cache")}
    said = run(program, "--version", cwd=place, **empty)
    if said != f"emu3-jax {version}\n":
        raise ReleaseError(f"emu3-jax --version says {said.strip()!r}, not {version}")
    run(program, "generate", "a red apple", "-o", "out", "--quiet", cwd=place, **empty)
    if not (place / "out/000.png").read_bytes().startswith(b"\x89PNG"):
        raise ReleaseError("emu3-jax generate made no picture")


# ------------------------------------------------------------------------------------------------ the release


def release(version: str, root: pathlib.Path = ROOT, *, dry_run: bool = False, isolated: bool = True) -> None:
    """Makes the release `version` of the repository `root`; see the top of this file."""
    check(version, root)
    check_tools(root)
    before, branch = git("rev-parse", "HEAD", cwd=root), git("branch", "--show-current", cwd=root)
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        place = pathlib.Path(name)
        commit = place / "commit"
        git("clone", "--quiet", root, commit, cwd=root)
        for key in ("user.name", "user.email"):
            git("config", key, git("config", key, cwd=root), cwd=commit)
        write_release(version, commit)
        print(f"builds {version} twice", flush=True)
        files = build_twice(commit, place, isolated=isolated)
        run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=place)
        check_contents(files, commit, version)
        print("installs the wheel into a new environment and makes a picture", flush=True)
        try_wheel(files[0], version, place)
        for file in files:
            print(f"{digest(file)}  {file.name}  {file.stat().st_size / 1e6:.1f} MB")
        if dry_run:
            print(f"{version} can be released; nothing was kept (--dry-run)")
            return
        with _recorded(version, commit, root, before):
            (root / "dist").mkdir(exist_ok=True)
            for file in files:
                shutil.move(file, root / "dist" / file.name)
    print(f"released {version}. To publish it:")
    print(f"  git push origin {branch} v{version}")
    print(f"  python -m twine upload {' '.join(f'dist/{file.name}' for file in files)}")


@contextlib.contextmanager
def _recorded(version: str, commit: pathlib.Path, root: pathlib.Path, before: str) -> Iterator[None]:
    """Adds the commit to this repository and tags it. If that or the block fails, removes both again."""
    if git("rev-parse", "HEAD", cwd=root) != before or git("status", "--porcelain", cwd=root):
        raise ReleaseError("the repository changed meanwhile: run the command again")
    git("fetch", "--quiet", commit, "HEAD", cwd=root)
    made = git("rev-parse", "FETCH_HEAD", cwd=root)
    git("tag", "--annotate", "--message", f"emu3-jax {version}", f"v{version}", made, cwd=root)
    try:
        git("merge", "--quiet", "--ff-only", made, cwd=root)
        yield
    except BaseException:
        git("tag", "--delete", f"v{version}", cwd=root)
        if git("rev-parse", "HEAD", cwd=root) == made:
            git("reset", "--quiet", "--keep", before, cwd=root)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 if the release cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", metavar="VERSION", help="the new version, such as 0.2.0")
    parser.add_argument("--dry-run", action="store_true", help="do everything, but keep nothing")
    options = parser.parse_args(arguments)
    try:
        release(options.version, dry_run=options.dry_run)
    except ReleaseError as error:
        print(f"release.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
