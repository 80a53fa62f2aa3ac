"""Writes the project's address into all files that contain it: pyproject.toml, README, docs and notebooks.

python scripts/set_address.py https://github.com/NAME/emu3-jax
python scripts/set_address.py --check       # exit code 1 if a file differs from pyproject.toml

`Repository` under [project.urls] in pyproject.toml holds the current address. At first it is a placeholder with the
owner OWNER. It must be an address on GitHub, because Colab opens the notebooks from there. Run the command again after
the repository has moved.
"""

import argparse
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Tests and this script contain other addresses on purpose.
PLACES = ("pyproject.toml", "*.md", "docs/**/*", "notebooks/*", "emu3_jax/**/*.py", "scripts/**/*")
ADDRESS = re.compile(r"https://github\.com/([A-Za-z0-9][A-Za-z0-9-]{0,38})/([A-Za-z0-9._-]{1,100})")


def parse(address: str) -> tuple[str, str]:
    """Owner and name of the repository. Raises ValueError if `address` is not the address of a GitHub repository."""
    match = ADDRESS.fullmatch(address.removesuffix("/").removesuffix(".git"))
    if match is None or set(match[2]) == {"."} or match[2].endswith(".git"):
        raise ValueError(f"{address!r} is not the address of a GitHub repository: give https://github.com/OWNER/NAME")
    return match[1], match[2]


def current() -> tuple[str, str]:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return parse(urls["Repository"])


def texts() -> dict[pathlib.Path, str]:
    """The files that may contain the address, with their text."""
    found = {}
    for pattern in PLACES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.name != pathlib.Path(__file__).name and "_build" not in path.parts:
                try:
                    found[path] = path.read_bytes().decode()
                except UnicodeDecodeError:  # a picture
                    continue
    return found


def places(name: str) -> re.Pattern[str]:
    """Matches addresses of repositories called `name` on GitHub, in Colab, and on GitHub's host of plain files."""
    hosts = r"github\.com/|colab\.research\.google\.com/github/|raw\.githubusercontent\.com/"
    return re.compile(rf"(?P<host>{hosts})(?P<owner>[A-Za-z0-9-]+)/{re.escape(name)}(?![A-Za-z0-9_-])")


def others(owner: str, name: str) -> list[str]:
    """The addresses with another owner than `owner`, one line each."""
    found = []
    for path, text in texts().items():
        for number, line in enumerate(text.splitlines(), 1):
            for match in places(name).finditer(line):
                if match["owner"] != owner:
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", nargs="?", help="such as https://github.com/NAME/emu3-jax")
    parser.add_argument("--check", action="store_true", help="compare all files with pyproject.toml, change nothing")
    options = parser.parse_args()
    if options.check == (options.address is not None):
        parser.error("give either an address or --check")
    owner, name = current()
    if options.check:
        wrong = others(owner, name)
        print(*wrong, sep="\n", end="\n" if wrong else "")
        print(f"{len(wrong)} places differ from https://github.com/{owner}/{name}")
        return int(bool(wrong))
    try:
        new_owner, new_name = parse(options.address)
    except ValueError as error:
        parser.error(str(error))
    changed = 0
    for path, text in texts().items():
        replaced = places(name).sub(lambda match: f"{match['host']}{new_owner}/{new_name}", text)
        if replaced != text:
            path.write_bytes(replaced.encode())
            print(path.relative_to(ROOT))
            changed += 1
    print(f"{changed} files now have https://github.com/{new_owner}/{new_name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
