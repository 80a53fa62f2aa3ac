"""What the pictures show: codepoints with labels, tags and groups, and which of them are held out of training."""

import dataclasses
import hashlib
import json
import pathlib
import re

from emoji_data.packages import read_members
from emu3_jax.errors import Emu3Error

STYLES = ("3d", "flat", "noto", "vintage", "twemoji")
CLIP_STYLE = "animated"
# The groups whose labels tell what is seen; people, symbols and flags ask for more detail than small pictures hold.
MAIN_GROUPS = (
    "smileys & emotion",
    "animals & nature",
    "food & drink",
    "travel & places",
    "activities",
    "objects",
)

HELD_CONCEPTS = 0.05
HELD_TRIPLES = 0.15
# Of the concepts, one style is drawn for each; since Fluent's 3d and flat go together this holds out about 8% of pairs.
HELD_STYLES = 0.33

_SKIN = re.compile("1f3f[b-f]")
_VARIANT = re.compile("-200d-(264[02]|27a1)")  # gender signs, and the arrow of those who face right
_PERSON = re.compile(r"\b1f46[6-9]\b|\b1f9d[12]\b")
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji without skin tone. `codepoint` is in lower case and without variation selectors."""

    codepoint: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str

    @property
    def family(self) -> str:
        """What siblings share that differ in gender, direction or the hour that a clock shows: they look alike."""
        if re.fullmatch("1f5[56][0-9a-f]", self.codepoint) and "1f550" <= self.codepoint <= "1f567":
            return "clock"
        return _PERSON.sub("person", _VARIANT.sub("", self.codepoint))


def normalise(hexcode: str) -> str:
    """The codepoint under which all packages agree."""
    return hexcode.lower().replace("-fe0f", "")


def is_skin_variant(codepoint: str) -> bool:
    """Whether a skin tone is part of the codepoint."""
    return bool(_SKIN.search(codepoint)) and codepoint not in {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def load_concepts(tarball: pathlib.Path) -> dict[str, Concept]:
    """All labelled concepts by codepoint, without components such as skin tones and single letters of flags."""
    files = {name: json.loads(data) for name, data in read_members(tarball, ("/en/data.json", "/en/messages.json"))}
    try:
        messages, emoji = files["package/en/messages.json"], files["package/en/data.json"]
    except KeyError as error:
        raise Emu3Error(f"{tarball} has no {error.args[0]}: delete it and run again") from error
    groups = {group["order"]: group["message"] for group in messages["groups"] if group["key"] != "component"}
    subgroups = {subgroup["order"]: subgroup["message"] for subgroup in messages["subgroups"]}
    concepts = {}
    for entry in emoji:
        if entry.get("group") not in groups:
            continue
        codepoint = normalise(entry["hexcode"])
        label = entry["label"].translate(_PLAIN)
        tags = tuple(tag for t in entry.get("tags", ()) if (tag := t.translate(_PLAIN)) != label)
        concepts[codepoint] = Concept(codepoint, label, tags, groups[entry["group"]], subgroups[entry["subgroup"]])
    return dict(sorted(concepts.items()))


def fixed_number(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the names, so new data change no old decision."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def is_held_out(concept: Concept, seed: int) -> bool:
    """Whether the concept, and all its siblings, are kept out of training altogether."""
    return fixed_number(seed, "concept", concept.family) < HELD_CONCEPTS


def held_out_styles(concept: Concept, alike: dict[str, set[str]], seed: int) -> set[str]:
    """The styles of a concept that are kept out of training although others stay in.

    Args:
        concept: one that is not held out altogether.
        alike: for each style that there is, the styles (itself among them) that draw the concept almost the same way.
            They are held out together, or training would show what is held out.
        seed: of the splits.

    Returns:
        None or one of the sets in `alike`; at least two pictures of other kinds remain.
    """
    if fixed_number(seed, "style", concept.codepoint) >= HELD_STYLES:
        return set()
    style = min(STYLES, key=lambda style: fixed_number(seed, "style", concept.codepoint, style))
    held = alike.get(style, set())
    return held if len(alike) - len(held) >= 2 else set()


def is_held_out_triple(kind: str, colour: str, shape: str, last: str, seed: int) -> bool:
    """Whether a combination of colour, shape and motion or position is kept out of training."""
    return fixed_number(seed, f"triple of {kind}", colour, shape, last) < HELD_TRIPLES
