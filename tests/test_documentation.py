"""Every command on README.md, CONTRIBUTING.md and docs/*.md is run here, or says which test or machine runs it.

A block of shell or Python is one of three:

- It begins with a comment for the reader, `# needs: an NVIDIA GPU` or `# takes 10 minutes`: nobody runs it here.
- An HTML comment before it names the test that runs it: `<!-- run by tests/test_site.py::test_name -->`.
- All others are run, page by page and in order, in an empty folder. There `BAAI/...` and the embedded model are a small
  model with random weights, configs of `STAND_INS` are small ones, and `pip install` only has its extras looked up.
"""

import ast
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
from PIL import Image
from tiny_bundle import DECODER

from emu3_jax import Emu3
from emu3_jax.cli.main import COMMANDS, main, parser

pytestmark = pytest.mark.compiled_quickly

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.stem for page in PAGES]
MARK = re.compile(r"# (needs: |takes )\S")
RUN_BY = re.compile(r"<!-- run by (tests/\w+\.py)::(\w+) -->")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)

SMALL = dataclasses.replace(DECODER, max_positions=512)  # of the small model; a conversation needs some room
# Small configs in place of those whose training takes minutes. The paths are the real ones'.
STAND_INS = {
    "photos_laptop.py": f"""
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.config import DecoderConfig, SpecialTokens
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config():
    return TrainConfig(
        directory="out/photos",
        model=ModelConfig(str(embedded_bundle()), {SMALL!r}, dtype="float32"),
        data=DataConfig((Source("out/photos_data", TextToImage()),), sequence_length=128),
        batch_size=2,
        mesh="fsdp=1",
        steps=2,
        optimizer=OptimizerConfig(warmup_steps=1),
        adapter=Adapter(rank=4),
    )
"""
}


@dataclasses.dataclass(frozen=True)
class Block:
    page: pathlib.Path
    line: int
    language: str
    text: str
    before: str  # the line before the block that is not empty

    def __str__(self) -> str:
        return f"{self.page.name} line {self.line}"

    @property
    def marked(self) -> bool:
        return MARK.match(self.text) is not None

    @property
    def test(self) -> tuple[str, str] | None:
        found = RUN_BY.fullmatch(self.before)
        return (found[1], found[2]) if found else None


@functools.cache
def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        above = text[: match.start()]
        before = above.rstrip().rsplit("\n", 1)[-1]
        found.append(Block(page, above.count("\n") + 1, match["language"], match["text"], before))
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block, one a line, without comments."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


# ------------------------------------------------------------------------------------------------ what stands there


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 130


def test_the_converted_bundle_has_one_name():
    """Pages, notebooks, configs and help texts call it `out/emu3-gen`, so that their commands go together."""
    other = re.compile(r"(?<![\w/-])emu3-gen")
    globs = ("notebooks/*.ipynb", "configs/*.py", "emu3_jax/cli/*.py")
    files = [*PAGES, *(file for glob in globs for file in ROOT.glob(glob))]
    assert [file.name for file in files if other.search(file.read_text())] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_are_of_a_known_kind(page):
    """Commands are not hidden in blocks without a language; what is marked or named is so for a reason."""
    fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in ("sh", "python", "text"), f"{block}: {block.language!r} is no language that is run"
        if block.test is not None:
            file, name = block.test
            functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
            assert name in functions, f"{block}: {file} has no {name}"
        elif "<!--" in block.before:
            pytest.fail(f"{block}: {block.before} does not read <!-- run by tests/FILE.py::TEST -->")
        if block.language == "python":
            ast.parse(block.text)


@functools.cache
def options() -> dict[str, frozenset[str]]:
    """The options of each command; of `bench`, those of all its parts."""

    def of(command) -> set[str]:
        found = set(command._option_string_actions)
        for action in command._actions:
            for part in (getattr(action, "choices", None) or {}).values() if action.nargs == "A..." else ():
                found |= of(part)
        return found

    root = parser()
    (choices,) = (action.choices for action in root._actions if action.nargs == "A...")
    return {"": frozenset(root._option_string_actions)} | {name: frozenset(of(choices[name])) for name in COMMANDS}


# Options of other programs that the pages name.
FOREIGN = re.findall(
    r"\S+",
    "--build-arg --check --count --file-share --from-literal --keep-going --logdir --network --no-deps --nodes "
    "--ntasks-per-node --gpus-per-node --port --quick --recursive --requeue --signal --tag --target --tier --wait "
    "--zone --project --model_args --tasks --batch_size --output_path --gen_kwargs --data --model-args "
    "--gpu --fid --input1 --input2 "
    "--xla_gpu_enable_command_buffer --xla_gpu_enable_dynamic_slice_fusion --xla_gpu_enable_triton_gemm",
)


def spans(page: pathlib.Path) -> list[str]:
    """What stands in code: each command of a block, and each span in backquotes."""
    found = [command for block in blocks(page) for command in commands(block.text)]
    return found + re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()).replace("\n", " "))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_exist(page):
    scripts = {option for file in (ROOT / "scripts").rglob("*.*") if file.suffix in (".py", ".sh", ".sbatch")
               for option in re.findall(r"--[a-z][a-z-]+", file.read_text())}  # fmt: skip
    known = frozenset().union(*options().values()) | scripts | {*FOREIGN}
    for span in spans(page):
        span = span.split(" # ")[0]
        named = re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
        command = re.search(r"emu3-jax (\w+)(?!.*emu3-jax)", span)
        legal = known
        if command and span.startswith("emu3-jax") and command[1] in COMMANDS:
            legal = options()[command[1]]
        elif command and span.startswith("emu3-jax") and command[1] != "COMMAND":
            pytest.fail(f"{page.name}: {span}: there is no command {command[1]}")
        assert [option for option in named if option not in legal] == [], f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_exist(page):
    """What is named as a file of the repository is one."""
    named = re.findall(
        r"(?<![\w/.-])(?:scripts|configs|tests|docs|notebooks|emu3_jax)/[\w./*-]*\w", " ".join(spans(page))
    )
    assert [name for name in named if "NAME" not in name and not [*ROOT.glob(name)]] == []


# ------------------------------------------------------------------------------------------------ what is run


def is_run(block: Block) -> bool:
    return block.language in ("sh", "python") and not block.marked and block.test is None


RUN = [page for page in PAGES if any(is_run(block) for block in blocks(page))]


@pytest.fixture(scope="session")
def stand_in(tiny_bundle, tmp_path_factory) -> pathlib.Path:
    """A folder with `hub`, a cache of the hub that has the small model under BAAI's names, and `embedded`, a bundle."""
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.checkpoints.checksums import write_checksums
    from emu3_jax.checkpoints.export import export

    root = tmp_path_factory.mktemp("stand_in")
    shutil.copytree(tiny_bundle, root / "embedded")
    config = root / "embedded" / "decoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_positions": SMALL.max_positions}))
    write_checksums(root / "embedded")
    export(Bundle.open(root / "embedded"), root / "published", "upstream", progress=False)
    for name in ("Emu3-Gen", "Emu3-Chat", "Emu3-VisionTokenizer"):
        part = "vision_tokenizer" if name == "Emu3-VisionTokenizer" else "language_model"
        repository = root / "hub" / f"models--BAAI--{name}"
        shutil.copytree(root / "published" / part, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    return root


@pytest.fixture
def scratch(stand_in, tmp_path, monkeypatch) -> pathlib.Path:
    """An empty checkout, in which the small model takes the place of all others."""
    import huggingface_hub.constants

    from emu3_jax.checkpoints import embedded
    from emu3_jax.generation import defaults

    # With random weights no answer ends by itself.
    monkeypatch.setattr(defaults, "MAX_NEW_TOKENS", 8)
    for method in (Emu3.chat, Emu3.converse):
        monkeypatch.setitem(method.__kwdefaults__, "max_new_tokens", 8)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(stand_in / "hub"))
    monkeypatch.setattr(embedded, "DIRECTORY", stand_in / "embedded")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    for folder in ("scripts", "tests", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.py"):
        if config.name in STAND_INS:
            (tmp_path / "configs" / config.name).write_text(STAND_INS[config.name])
        else:
            (tmp_path / "configs" / config.name).symlink_to(config)
    return tmp_path


def give(page: pathlib.Path, scratch: pathlib.Path, bundle: pathlib.Path) -> None:
    """Makes what a page that does not make it itself takes as given: bundles, and photos with captions."""
    text = "\n".join(block.text for block in blocks(page) if is_run(block))
    for name in ("out/emu3-gen", "out/emu3-chat"):
        if name in text and f"-o {name}" not in text:
            shutil.copytree(bundle, scratch / name)
    if re.search(r"prepare photos\b", text) and "scripts/photos.py" not in text:
        (scratch / "photos").mkdir()
        for number, colour in enumerate(("red", "green", "blue", "white")):
            Image.new("RGB", (24, 24), colour).save(scratch / "photos" / f"{number}.png")
            (scratch / "photos" / f"{number}.txt").write_text(f"a {colour} wall")


def look_up_extras(arguments: list[str]) -> None:
    """`pip install` of this package asks for extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[:2] == ["pip", "install"]
    for argument in arguments[2:]:
        found = re.fullmatch(r"\.(?:\[(.*)\])?", argument)
        assert found is not None, f"pip install {argument}: only this package is installed without a mark"
        assert {*(found[1] or "").split(",")} - {""} <= extras.keys()


def run_command(command: str, capsys) -> None:
    arguments = words(command)
    if arguments[0] == "pip":
        look_up_extras(arguments)
    elif arguments[0] == "emu3-jax" and not {"|", "&&", ">", ">>", ";", "<"} & {*arguments}:
        code = main(arguments[1:])
        said = capsys.readouterr()
        assert code == 0, f"{command}\n{said.out}{said.err}"
    else:
        environment = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f'emu3-jax() {{ python -m emu3_jax "$@"; }}\n{command}'],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=[page.stem for page in RUN])
def test_page_is_run(page, stand_in, scratch, capsys):
    give(page, scratch, stand_in / "embedded")
    for block in filter(is_run, blocks(page)):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        else:
            for command in commands(block.text):
                run_command(command, capsys)


def test_links_between_pages():
    """What a page links to is there: the file, and in a page the heading."""
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{page.name}: {path}#{anchor}"
