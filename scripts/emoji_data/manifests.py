"""Training and evaluation manifests, as lines that `emu3-jax prepare` reads, made from the items and concepts alone.

Captions follow from names and the seed, so the same items always give the same manifests.
"""

import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator

from emoji_data.concepts import MAIN_GROUPS, Concept, fixed_number, is_held_out

Item = dict
Line = dict

# Of the procedural pictures and clips, which are many and alike; more of the clips, whose small shapes blur first.
VISION_SHARES = {"procedural_picture": 0.25, "procedural_clip": 0.5}
STILL_REPEATS = 3  # times that a procedural still stands among the captioned pictures
_CANONICAL = 3  # times that the full caption stands beside the four variants
_TAGS = (2, 4)  # tags in a caption
_DESCRIBE = "Describe the image."
_DESCRIBE_CLIP = "Describe the clip."
_CLIP_CONVERSATIONS = 2  # about each clip


def build_manifests(items: list[Item], concepts: Iterable[Concept], seed: int) -> dict[str, list[Line]]:
    """All manifests by file name, without the ending."""
    pictures = [item for item in items if item["kind"] == "picture"]
    main = [item for item in pictures if item["group"] in MAIN_GROUPS]
    clips = [item for item in items if item["kind"] == "clip"]
    stills = [item for item in items if item["kind"] == "procedural_picture"]
    drawn_clips = [item for item in items if item["kind"] == "procedural_clip"]

    def lines(make: Callable[[Item], Iterable[Line]], split: str, *sources: list[Item]) -> list[Line]:
        return [line for source in sources for item in source if item["split"] == split for line in make(item)]

    def captions(item: Item) -> Iterator[Line]:
        return _caption_lines(item, seed, _views(item))

    def upright(item: Item) -> Iterator[Line]:
        return _caption_lines(item, seed, [item["file"]])

    def questions(item: Item) -> Iterator[Line]:
        return _question_lines(item, _views(item))

    def about_clips(item: Item) -> Iterator[Line]:
        return _clip_conversations(item, seed)

    def closeups(item: Item) -> Iterator[Line]:
        return _question_lines(item, item.get("closeups", []))

    def share(source: list[Item]) -> list[Item]:
        return [item for item in source if fixed_number(seed, "vision", item["name"]) < VISION_SHARES[item["kind"]]]

    vision = lines(_canonical_line, "train", pictures, clips, share(stills), share(drawn_clips))
    return {
        "vision_train": vision,
        "vision_heldout": lines(_canonical_line, "concept", pictures),
        "t2i_train": lines(captions, "train", main, stills),
        "t2i_upright": lines(upright, "train", main, stills),
        "t2i_heldout": lines(_canonical_line, "style", main) + lines(_canonical_line, "triple", stills),
        "i2t_train": lines(questions, "train", main, stills),
        "i2t_closeups": lines(closeups, "train", main),
        "i2t_heldout_style": lines(questions, "style", main),
        "i2t_heldout_concept": lines(questions, "concept", main),
        "i2t_heldout_triple": lines(questions, "triple", stills),
        "clip_train": lines(_canonical_line, "train", clips, drawn_clips),
        "clip_heldout": lines(_canonical_line, "style", clips) + lines(_canonical_line, "triple", drawn_clips),
        "clip_questions": lines(about_clips, "train", clips, drawn_clips),
        "clip_questions_heldout": lines(about_clips, "style", clips) + lines(about_clips, "triple", drawn_clips),
        "text_train": [line for concept in concepts for line in _text_lines(concept, seed)],
    }


def write_lines(path: pathlib.Path, lines: Iterable[Line]) -> None:
    """Writes one JSON object a line, as `emu3-jax prepare` reads them."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def caption(item: Item) -> str:
    """The one full caption of an item."""
    return item["label"] if item["kind"].startswith("procedural") else f"{item['style']} emoji of {item['label']}"


def about(item: Item) -> dict[str, str]:
    """The questions about a picture or clip, with their answers."""
    moving = item["kind"].endswith("clip")
    asked = {_DESCRIBE_CLIP if moving else _DESCRIBE: caption(item)}
    if item["kind"].startswith("procedural"):
        asked |= {"What colour is the shape?": item["colour"], "What shape is this?": item["shape"]}
        asked |= {"What does the shape do?": item["motion"]} if moving else {"Where is the shape?": item["position"]}
        return asked
    asked["What category is this?"] = item["group"]
    if not moving:
        asked["What style is this?"] = item["style"]
    return asked


def turns(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """The conversation of questions and their answers."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": next(roles), "text": text} for pair in pairs for text in pair]


def _line(item: Item, ending: str, file: str, **content) -> Line:
    medium = "clip" if item["kind"].endswith("clip") else "image"
    return {medium: file, **content, "name": item["name"] + ending}


def _views(item: Item) -> list[str]:
    """The files that show the whole item."""
    return [item["file"], *item.get("views", [])]


def _canonical_line(item: Item) -> list[Line]:
    return [_line(item, "", item["file"], text=caption(item))]


def _caption_lines(item: Item, seed: int, views: list[str]) -> Iterator[Line]:
    """Every variant of the caption, in turn over `views`; the number of lines of each is its weight in training."""
    if item["kind"] == "procedural_picture":
        texts = [caption(item)] * STILL_REPEATS
    else:
        chance = random.Random(f"{seed} {item['name']}")
        tagged = (", ".join((caption(item), *_some(item["tags"], chance))) for _ in range(2))
        texts = [caption(item)] * _CANONICAL + [*tagged, f"emoji of {item['label']}", item["label"]]
    for number, text in enumerate(texts):
        yield _line(item, f"#{number}", views[number % len(views)], text=text)


def _question_lines(item: Item, views: list[str]) -> Iterator[Line]:
    """A conversation for each question that the item answers, over each of `views`."""
    asked = about(item)
    pairs = itertools.product(views, asked.items())
    for number, (file, (question, answer)) in enumerate(pairs):
        yield _line(item, f"#{number}", file, conversation=turns([(question, answer)]))


def _clip_conversations(item: Item, seed: int) -> Iterator[Line]:
    """All questions about a clip, one after the other in one conversation, each time in another order."""
    asked = about(item)
    orders = list(itertools.permutations(asked.items()))
    random.Random(f"{seed} {item['name']} questions").shuffle(orders)
    for number, pairs in enumerate(orders[:_CLIP_CONVERSATIONS]):
        yield _line(item, f"#{number}", item["file"], conversation=turns(pairs))


def _text_lines(concept: Concept, seed: int) -> Iterator[Line]:
    """What there is to say of a concept; nothing of one that is held out."""
    if is_held_out(concept, seed):
        return
    chance = random.Random(f"{seed} {concept.codepoint}")
    tags = list(concept.tags)
    texts = [f"{concept.label}. Category: {concept.group}.", f"{concept.label}: {concept.group}, {concept.subgroup}."]
    if tags:
        for _ in range(2):
            chance.shuffle(tags)
            texts.append(f"{concept.label}: {', '.join(tags)}. Category: {concept.group}.")
    for number, text in enumerate(dict.fromkeys(texts)):
        yield {"text": text, "name": f"text/{concept.codepoint}#{number}"}


def _some(tags: list[str], chance: random.Random) -> list[str]:
    """A few tags in random order."""
    return chance.sample(tags, min(len(tags), chance.randint(*_TAGS)))
