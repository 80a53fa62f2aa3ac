"""Releases: the wheel and the sdist are the same bytes wherever they are built, and a release is made whole or not."""

import datetime
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- More.\n\n## [0.1.0] - 2026-11-27\n\n- First.\n"


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import release

    return release


def git(repository, *words):
    done = subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A small repository with a version and a changelog."""
    root = tmp_path / "repository"
    (root / "emu3_jax").mkdir(parents=True)
    (root / "emu3_jax" / "__init__.py").write_text('"""A package."""\n\n__version__ = "0.1.0"\n')
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    (root / ".gitignore").write_text("dist/\n")
    git(root, "init", "--quiet", "--initial-branch", "main")
    for key, value in (("user.name", "tester"), ("user.email", "tester@example.com")):
        git(root, "config", key, value)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def state(root):
    """All that a release may change, but for what git ignores."""
    return git(root, "log", "--all", "--format=%H %s"), git(root, "tag"), git(root, "status", "--porcelain")


def quick_steps(release, monkeypatch, *, failing=None):
    """Builds two small files, and leaves the environment out. The step called `failing` fails."""

    def build(commit, place, **_):
        (place / "dist").mkdir(parents=True)
        version = release.current_version((commit / release.SOURCE).read_text())
        files = [place / "dist" / f"emu3_jax-{version}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
        for file in files:
            file.write_bytes(b"different" if failing == "build" and place.name == "second" else b"same")
        return files

    def run(*words, **options):
        return "" if "twine" in words else run_command(*words, **options)

    def try_wheel(*_):
        if failing == "try_wheel":
            raise release.ReleaseError("emu3-jax generate made no picture")

    def move(*_):
        if failing == "move":
            raise OSError("disk full")
        return move_file(*_)

    run_command, move_file = release.run, shutil.move
    monkeypatch.setattr(release, "TOOLS", ())
    monkeypatch.setattr(release, "build", build)
    monkeypatch.setattr(release, "run", run)
    monkeypatch.setattr(release, "check_contents", lambda *_: None)
    monkeypatch.setattr(release, "try_wheel", try_wheel)
    monkeypatch.setattr(release.shutil, "move", move)


def test_a_release_is_a_commit_a_tag_and_two_files(release, repository, monkeypatch, capsys):
    quick_steps(release, monkeypatch)
    release.release("0.2.0", repository)
    assert git(repository, "log", "--format=%s") == "Release 0.2.0\nfirst"
    assert git(repository, "rev-parse", "v0.2.0^{commit}") == git(repository, "rev-parse", "main")
    assert git(repository, "status", "--porcelain") == ""
    assert (repository / "emu3_jax" / "__init__.py").read_text().endswith('__version__ = "0.2.0"\n')
    today = datetime.date.today().isoformat()
    headings = [line for line in (repository / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## [Unreleased]", f"## [0.2.0] - {today}", "## [0.1.0] - 2026-11-27"]
    assert sorted(file.name for file in (repository / "dist").iterdir()) == [
        "emu3_jax-0.2.0-py3-none-any.whl",
        "emu3_jax-0.2.0.tar.gz",
    ]
    told = capsys.readouterr().out
    assert "  git push origin main v0.2.0\n  python -m twine upload dist/emu3_jax-0.2.0-py3-none-any.whl" in told


def test_a_dry_run_keeps_nothing(release, repository, monkeypatch, capsys):
    quick_steps(release, monkeypatch)
    before = state(repository)
    release.release("0.2.0", repository, dry_run=True)
    assert state(repository) == before and not (repository / "dist").exists()
    assert capsys.readouterr().out.endswith("0.2.0 can be released; nothing was kept (--dry-run)\n")


@pytest.mark.parametrize(
    "failing, error, message",
    [("build", None, "two builds of"), ("try_wheel", None, "made no picture"), ("move", OSError, "disk full")],
)
def test_a_release_that_fails_leaves_nothing(release, repository, monkeypatch, failing, error, message):
    quick_steps(release, monkeypatch, failing=failing)
    before = state(repository)
    with pytest.raises(error or release.ReleaseError, match=message):
        release.release("0.2.0", repository)
    assert state(repository) == before
    assert '"0.1.0"' in (repository / "emu3_jax" / "__init__.py").read_text()


@pytest.mark.parametrize(
    "version, spoil, message",
    [
        ("1.0.x", None, "'1.0.x' is not a version"),
        ("v0.2.0", None, "'v0.2.0' is not a version"),
        ("0.2.0+mine", None, "is not a version"),
        ("0.1.0", None, "0.1.0 is not newer than 0.1.0"),
        ("0.1.0rc1", None, "0.1.0rc1 is not newer"),
        ("0.2.0", "tag", "the tag v0.2.0 exists already"),
        ("0.2.0", "new file", "files changed or new: 1, first notes.txt"),
        ("0.2.0", "changed file", "files changed or new: 1, first CHANGELOG.md"),
        ("0.2.0", "tools", 'no_such_tool is not installed: pip install ".[release]"'),
        ("0.2.0", "name", "git has no user.name"),
        ("0.2.0", "detached", "no branch is checked out"),
        ("0.2.0", "changelog", "has no line below"),
        ("0.2.0", "headings", "has 0 headings"),
        ("0.2.0", "source", "has 0 lines __version__"),
    ],
)
def test_what_cannot_be_released_is_refused_in_one_line(
    release, repository, monkeypatch, capsys, version, spoil, message
):
    match spoil:
        case "tag":
            git(repository, "tag", "v0.2.0")
        case "new file":
            (repository / "notes.txt").write_text("x")
        case "changed file":
            (repository / "CHANGELOG.md").write_text(f"{CHANGELOG}\n")
        case "tools":
            monkeypatch.setattr(release, "TOOLS", ("no_such_tool",))
        case "name":
            monkeypatch.setattr(release, "TOOLS", ())
            git(repository, "config", "--unset", "user.name")
            for scope in ("GLOBAL", "SYSTEM"):
                monkeypatch.setenv(f"GIT_CONFIG_{scope}", os.devnull)
        case "detached":
            git(repository, "checkout", "--quiet", "--detach")
        case "changelog":
            (repository / "CHANGELOG.md").write_text(CHANGELOG.replace("- More.\n", ""))
        case "headings":
            (repository / "CHANGELOG.md").write_text(CHANGELOG.replace("[Unreleased]", "Unreleased"))
        case "source":
            (repository / "emu3_jax" / "__init__.py").write_text("VERSION = 1\n")
    if spoil in ("changelog", "headings", "source"):
        git(repository, "commit", "--quiet", "--all", "--message", "spoilt")
    before = state(repository)
    monkeypatch.setattr(release.release, "__defaults__", (repository,))
    assert release.main([version]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("release.py: error: ") and message in told.err
    assert told.err.count("\n") == 1 and len(told.err) <= 300
    assert state(repository) == before


def test_the_changelog_has_something_to_release(release):
    text = (ROOT / "CHANGELOG.md").read_text()
    made = release.changelog_of_release(text, "9.9.9", datetime.date(2030, 1, 2))
    assert (
        "## [Unreleased]\n\n## [9.9.9] - 2030-01-02\n" in made and len(made.splitlines()) == len(text.splitlines()) + 2
    )


@pytest.mark.slow
def test_wheel_and_sdist_are_the_same_bytes_twice_and_whole(release, tmp_path):
    """Built in two clones at different times, of which one may be read by its owner alone."""
    if not (ROOT / ".git").exists():
        pytest.skip("builds the last commit, and this is no repository")
    commit = tmp_path / "commit"
    git(ROOT, "clone", "--quiet", "--no-hardlinks", ROOT, commit)
    files = release.build(commit, tmp_path / "first", isolated=False)
    umask = release.os.umask(0o077)
    try:
        private = release.build(commit, tmp_path / "second", isolated=False)
    finally:
        release.os.umask(umask)
    assert [release.digest(file) for file in files] == [release.digest(file) for file in private]
    release.check_contents(files, commit, release.current_version((commit / release.SOURCE).read_text()))
    wheel, sdist = files
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().split("\n\n")[0].splitlines()
        assert {"License-Expression: Apache-2.0", "License-File: LICENSE", "License-File: NOTICE"} <= {*lines}
        assert {"Classifier: Typing :: Typed", "Requires-Python: >=3.11"} <= {*lines}
        # PyPI shows the README without the files beside it: its links lead to the project's address.
        address = tomllib.loads((commit / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
        readme, page = archive.read(metadata).decode().split("\n\n", 1)[1], (commit / "README.md").read_text()
        links, there = (re.findall(r"\]\(([^)]+)\)", text) for text in (page, readme))
        assert [re.sub(f"^{re.escape(address)}/(blob|raw)/HEAD/", "", link) for link in there] == links
        assert all(link.startswith("https://") for link in there)
        assert f"{address}/raw/HEAD/docs/demo.png" in there and f"{address}/blob/HEAD/docs/index.md" in there
        # As pip installs it: the package works without a checkout.
        archive.extractall(tmp_path / "site")
    place = {"cwd": tmp_path, "env": {**release.os.environ, "PYTHONPATH": str(tmp_path / "site")}}
    script = "import emu3_jax; from emu3_jax.checkpoints import embedded; print(emu3_jax.__file__)"
    script += "; print(embedded.embedded_bundle())"  # its checksums hold
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, **place)
    package = tmp_path / "site" / "emu3_jax"
    assert done.stdout == f"{package / '__init__.py'}\n{package / 'assets' / 'emoji'}\n"
    with tarfile.open(sdist) as archive:
        assert {member.uid for member in archive} == {member.gid for member in archive} == {0}


@pytest.mark.parametrize("change", ["lacks", "holds by mistake"])
def test_a_wheel_of_other_files_than_the_package_is_named(release, repository, tmp_path, change):
    wheel, sdist = tmp_path / "emu3_jax-0.1.0-py3-none-any.whl", tmp_path / "emu3_jax-0.1.0.tar.gz"
    information = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    names = ["emu3_jax/__init__.py", *(f"emu3_jax-0.1.0.dist-info/{name}" for name in information)]
    names = names[1:] if change == "lacks" else [*names, "emu3_jax/notes.txt"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    sdist.write_bytes(b"")
    with pytest.raises(release.ReleaseError, match=rf"whl {change} 1 files, first emu3_jax/"):
        release.check_contents([wheel, sdist], repository, "0.1.0")
