"""Lines of the manifests: short prompts as people write them, and questions with answers."""

import itertools
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from emoji_data.concepts import MAIN_GROUPS
from emoji_data.manifests import turns

from picture_data.words import coloured, named_colour, other_names, phrase, thing

PEOPLE, FLAGS = "people & body", "flags"
GROUPS = (*MAIN_GROUPS, PEOPLE, FLAGS)
_UNCOLOURED = ("smileys & emotion", PEOPLE, FLAGS)  # whose colour says nothing
_STYLED, _PLAIN = 2, 3  # lines with and without the style, in which the prompt is all there is to go by
_OTHER = 2  # lines with another name of the thing
_LIST = pathlib.Path(__file__).with_name("people_prompts.txt")


def caption(item: dict) -> str:
    """The one full caption: "clipart of a red car", "3d emoji of cat", "round icon of the flag of Japan"."""
    if item["group"] == FLAGS and item["phrase"].startswith("flag of "):
        return f"{item['look']} of the {item['phrase']}"
    if item["source"] in ("emoji", "firefox"):
        return f"{item['style']} emoji of {item['label']}"
    return f"{item['look']} of {item['phrase']}"


def manifests(items: Iterable[dict]) -> dict[str, list[dict]]:
    """All manifests by file name, without the ending."""
    items = [item for item in items if item["group"] in GROUPS]

    def lines(make, split: str) -> list[dict]:
        return [line for item in items if item["split"] == split for line in make(item)]

    return {
        "pictures_train": lines(_canonical, "train"),
        "pictures_heldout_style": lines(_canonical, "style"),
        "pictures_heldout_concept": lines(_canonical, "concept"),
        "prompts_train": lines(_prompts, "train"),
        "prompts_heldout": lines(_plain, "style"),
        "questions_train": lines(_questions, "train"),
        "questions_heldout_style": lines(_questions, "style"),
        "questions_heldout_concept": lines(_questions, "concept"),
    }


def people(prompts: Iterable[dict], items: Iterable[dict]) -> list[dict]:
    """The prompts of people_prompts.txt, each with the concepts of the pictures that training shows with it."""
    concepts, shown = {item["name"]: item["concept"] for item in items}, defaultdict(set)
    for line in prompts:
        shown[line["text"]].add(concepts[line["name"].partition("#")[0]])
    return [{"text": text, "concepts": sorted(shown[text])} for text in _LIST.read_text().splitlines()]


def _files(item: dict) -> list[str]:
    return [item["file"], *item.get("views", [])]


def _canonical(item: dict) -> Iterator[dict]:
    yield {"image": item["file"], "text": caption(item), "name": item["name"]}


def _plain(item: dict) -> Iterator[dict]:
    yield {"image": item["file"], "text": item["phrase"], "name": item["name"]}


def _prompts(item: dict) -> Iterator[dict]:
    """Every prompt, in turn over the views; the number of lines of each is its weight in training."""
    texts = [item["phrase"]] * _PLAIN
    if item["source"] != "emoji" or item["group"] in (PEOPLE, FLAGS):  # others have such lines in the emoji's manifests
        texts += [caption(item)] * _STYLED
    if item["source"] == "clipart" and item["phrase"] != item["label"]:
        texts.append(phrase(thing(item["label"])))
    colour = _colour(item)
    for label in (item["label"], *other_names().get(item["label"], ())):
        if label != item["label"]:
            texts += [phrase(label)] * _OTHER
        if colour and not named_colour(label):
            texts.append(coloured(label, colour))
    files = _files(item)
    for number, text in enumerate(texts):
        yield {"image": files[number % len(files)], "text": text, "name": f"{item['name']}#{number}"}


def asked(item: dict) -> dict[str, str]:
    """The questions about a picture, with their answers."""
    questions = {
        "Describe the image.": caption(item),
        "What is this?": item["phrase"],
        "What category is this?": item["group"],
        "What style is this?": item["look"],
    }
    colour = _colour(item)
    if colour:
        questions["What colour is it?"] = colour
    return questions


def _questions(item: dict) -> Iterator[dict]:
    for number, (file, pair) in enumerate(itertools.product(_files(item), asked(item).items())):
        yield {"image": file, "conversation": turns([pair]), "name": f"{item['name']}#{number}"}


def _colour(item: dict) -> str | None:
    """The colour that the label names, else the one that is measured."""
    if item["group"] in _UNCOLOURED or item["look"] == "line drawing":
        return None
    return named_colour(item["label"]) or item["colour"]
