"""The command line of `check_published.py`, and the list of steps for its options."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from published_steps import digests, listing

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path

ROOT = pathlib.Path(__file__).resolve().parents[1]
PHOTO = ROOT / "scripts" / "assets" / "chelsea.jpg"
# Fixed, so that reports can be compared with each other.
PROMPT = "a shiba inu. masterpiece, film grained, best quality."
NEGATIVE = "lowres, bad anatomy, text, error, cropped, worst quality, low quality, jpeg artifacts, blurry."
QUESTION = "Please describe the image"
GUIDANCE = 3.0
GROUPS = ("download", "hash", "shapes", "convert", "codes", "picture", "answer")
SOURCE, NONE = "source", "none"  # special values of --reference
MARK = "check_published.json"  # file in OUT that marks the directory as this script's
_MOST_TOKENS = 4096
_ROOM = 1.3  # memory needed, as a multiple of the weights' bytes: room for the cache and activations


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of the check.

    Attributes:
        name: name in the report.
        group: group for --only, from `GROUPS`.
        function: "module:function", which runs in its own process.
        needs: names of steps that must run before.
        job: function from the data of these steps to the argument of `function`.
        on: device of the step: "ours" (JAX) or "reference" (PyTorch); "" if the result does not depend on it.
        checks: names of an oracle step's comparisons, for reports of runs without transformers.
    """

    name: str
    group: str
    function: str
    needs: tuple[str, ...] = ()
    job: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda found: {}
    on: str = ""
    checks: tuple[str, ...] = ()


def parser(description: str | None) -> argparse.ArgumentParser:
    """The argument parser."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "out", metavar="OUT", help="directory of results, bundles and the report; new, or of an earlier run"
    )
    source = "directory or hub id (default: %(default)s)"
    made.add_argument("--gen", default="BAAI/Emu3-Gen", help=f"decoder that generates pictures: {source}")
    made.add_argument("--chat", default="BAAI/Emu3-Chat", help=f"decoder that answers questions: {source}")
    made.add_argument("--vision", default="BAAI/Emu3-VisionTokenizer", help=f"vision tokenizer: {source}")
    made.add_argument(
        "--reference", default="BAAI/Emu3-Chat-hf",
        help=f"checkpoint that transformers loads for --chat and --vision: {source}; `source`: the files of --chat and "
        "--vision; `none`: do not compare",
    )  # fmt: skip
    made.add_argument(
        "--gen-reference", default=SOURCE,
        help="checkpoint that transformers loads for --gen, for example BAAI/Emu3-Gen-hf; `source`: the files of "
        "--gen; `none`: do not compare (default: %(default)s)",
    )  # fmt: skip
    made.add_argument("--photo", default=str(PHOTO), help="photograph (default: the repository's picture of a cat)")
    made.add_argument(
        "--tokens", type=int, default=64, help="number of greedy tokens to compare (default: %(default)s)"
    )
    made.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="dtype of the decoder on both sides; auto: float32 if both sides have the memory, else bfloat16",
    )  # fmt: skip
    made.add_argument("--device", choices=("cpu", "cuda", "tpu"), help="JAX's device (default: JAX's choice)")
    made.add_argument(
        "--reference-device", choices=("cpu", "cuda"), help="PyTorch's device (default: cuda if there is one)"
    )
    made.add_argument(
        "--only", action="append", choices=GROUPS, metavar="STEP",
        help=f"run only this step and the steps that it needs; may be repeated; one of {', '.join(GROUPS)}",
    )  # fmt: skip
    made.add_argument("--report", help="file of the report (default: OUT/report.md)")
    return made


def check(options: argparse.Namespace) -> None:
    """Raises `Emu3Error` if an argument is not legal."""
    from emu3_jax.checkpoints.hub import local_source
    from emu3_jax.media.images import load_image

    if not 1 <= options.tokens <= _MOST_TOKENS:
        raise Emu3Error(f"--tokens is {options.tokens}: it must be a whole number from 1 to {_MOST_TOKENS}")
    for name, source in sources(options).items():
        try:
            local_source(source)
        except Emu3Error as error:
            raise Emu3Error(f"--{name}: {error}") from error
    load_image(local_path(options.photo))
    out, target = local_path(options.out), local_path(options.report or "report.md")
    if os.path.lexists(out) and not out.is_dir():
        raise Emu3Error(f"{out} is a file: choose a directory for the results")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise Emu3Error(f"{out} holds other files: choose a new directory, or the directory of an earlier check")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise Emu3Error(f"--report {target}: it must be a file in an existing directory; correct it")


def sources(options: argparse.Namespace) -> dict[str, str]:
    """The checkpoints that the options name, by option."""
    names = ("vision", "gen", "chat", "reference", "gen-reference")
    found = {name: getattr(options, name.replace("-", "_")) for name in names}
    return {
        name: source for name, source in found.items() if not (name.endswith("reference") and source in (SOURCE, NONE))
    }


def plan(options: argparse.Namespace, dtype: Callable[[int], str], oracle: bool) -> list[Step]:
    """All steps, each after the steps that it needs.

    Args:
        options: options of the command line.
        dtype: function from a decoder's number of parameters to its compute dtype.
        oracle: whether transformers is installed.
    """
    out, given = str(local_path(options.out).absolute()), sources(options)
    steps: list[Step] = []

    def directory(found: Mapping[str, Any], name: str) -> str:
        return found[f"download {name}"]["directory"]

    def common(name: str) -> list[Step]:
        return [
            Step(f"download {name}", "download", "published_steps:download", job=lambda _: {"source": given[name]}),
            Step(
                f"hash {name}", "hash", "published_steps:hash_files", (f"download {name}",),
                lambda found: {
                    **found[f"download {name}"], "title": name,
                    "listing": listing(pathlib.Path(directory(found, name))),
                },
            ),
        ]  # fmt: skip

    def shapes(name: str, others: Mapping[str, str]) -> Step:
        needs = [f"{step} {one}" for one in (name, *others) for step in ("download", "hash")]
        return Step(
            f"shapes {name}", "shapes", "published_steps:shapes", tuple(needs),
            lambda found: {
                "directory": directory(found, name), "title": name,
                "others": [
                    {"title": other, "directory": directory(found, other), "parts": [part]}
                    for other, part in others.items()
                ],
            },
        )  # fmt: skip

    def converted(name: str) -> list[Step]:
        return [
            *common(name),
            shapes(name, {}),
            Step(
                f"convert {name}", "convert", "published_steps:convert_source",
                (f"download {name}", f"hash {name}", f"shapes {name}"),
                lambda found: {
                    "directory": directory(found, name), "source": given[name], "bundle": f"{out}/bundles/{name}"
                },
            ),
            Step(
                f"export {name}", "convert", "published_steps:export_bundle",
                (f"download {name}", f"hash {name}", f"convert {name}"),
                lambda found: {
                    "directory": directory(found, name), "title": name, "bundle": found[f"convert {name}"]["bundle"],
                    "target": f"{out}/bundles/export-{name}",
                },
            ),
        ]  # fmt: skip

    def model(name: str, source: str, more: Sequence[str], **job: Any) -> Step:
        return Step(
            name, name, f"published_model:{name}", (f"convert {source}", f"shapes {source}", *more),
            lambda found: {
                "bundle": found[f"convert {source}"]["bundle"], "out": out, "tokens": options.tokens,
                "vision": f"{out}/bundles/vision", "dtype": dtype(found[f"shapes {source}"]["parameters"]), **job,
            },
            on="ours",
        )  # fmt: skip

    def reference(name: str, option: str, source: str, checks: Sequence[str], **job: Any) -> Step:
        chosen = option if option in given else source
        needs = (name, f"download {chosen}", f"hash {chosen}", f"shapes {source}")
        return Step(
            f"{name} by transformers", name, f"published_reference:{name}", needs,
            lambda found: {
                "directory": directory(found, chosen), "out": out, "device": options.reference_device,
                "dtype": dtype(found[f"shapes {source}"]["parameters"]), **job,
            },
            on="reference", checks=tuple(checks),
        )  # fmt: skip

    photo = str(local_path(options.photo).absolute())
    seen = {"photo": photo, "photo_sha256": digests(pathlib.Path(photo))[0]}
    tokens = f"first {options.tokens} greedy tokens of"
    steps += converted("vision")
    steps.append(model("codes", "vision", [], **seen))
    drawing = {"prompt": PROMPT, "negative": NEGATIVE, "guidance": GUIDANCE}
    steps += [*converted("gen"), model("picture", "gen", ["convert vision"], **drawing)]
    steps += [*converted("chat"), model("answer", "chat", ["codes"], question=QUESTION)]
    if oracle:
        if "gen-reference" in given:
            steps += [*common("gen-reference"), shapes("gen-reference", {"gen": "decoder"})]
        if "reference" in given:
            steps += [*common("reference"), shapes("reference", {"chat": "decoder", "vision": "vision"})]
    made = {
        "codes": reference("codes", "reference", "vision", ["codes of the photograph"], **seen),
        "picture": reference(
            "picture", "gen-reference", "gen", ["logits after the picture's prompt", f"{tokens} the picture"],
            text=PROMPT, guidance=GUIDANCE,
        ),
        "answer": reference(
            "answer", "reference", "chat", ["logits after the question about the photograph", f"{tokens} the answer"],
            text=QUESTION,
        ),
    }  # fmt: skip
    steps += made.values()
    return _wanted(steps, options.only)


def _wanted(steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """The steps of the groups `only` and the steps that they need; all steps if `only` is empty."""
    if not only:
        return list(steps)
    by_name = {step.name: step for step in steps}
    names: set[str] = set()
    pending = [step.name for step in steps if step.group in only]
    while pending:
        name = pending.pop()
        if name not in names and name in by_name:
            names.add(name)
            pending += by_name[name].needs
    return [step for step in steps if step.name in names]


def choose_dtype(option: str, parameters: int, memories: Sequence[int]) -> str:
    """The compute dtype of a decoder with this number of parameters, given each side's memory in bytes."""
    if option != "auto":
        return option
    return "float32" if all(parameters * 4 * _ROOM <= memory for memory in memories) else "bfloat16"
