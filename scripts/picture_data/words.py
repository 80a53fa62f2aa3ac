"""Labels as people would say them, and what thing a label names.

A label is a noun phrase without its article: "red car". Labels that take none ("french fries") begin with "~" in the
tables of this folder.
"""

import functools
import pathlib
import re
from collections.abc import Iterable

from emoji_data.concepts import Concept

# Words before a noun that do not change what the thing is.
_COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "golden",
)  # fmt: skip
_PLAIN = {
    *_COLOURS, "big", "small", "old", "tall", "wooden", "open", "full", "colorful", "striped", "sleeping", "two",
    "three", "four", "many", "half", "a", "an", "the", "bitten", "broken", "sad", "running", "crying", "angry",
}  # fmt: skip
_PART = re.compile(r"^(?:slice|half|piece|bowl|cup|glass|mug|stack|ear|loaf|flock|ball) (?:of |an? )")
_REST = re.compile(r" (?:with|in|on|at|behind|from|doing|and|under|over|showing|holding) .*")
_SAME = {
    "ladybug": "lady beetle",
    "bee": "honeybee",
    "car": "automobile",
    "gift": "wrapped gift",
    "dinosaur": "sauropod",
    "seagull": "bird",
    "sheep": "ewe",
    "folder": "file folder",
    "magnifying glass": "magnifying glass tilted left",
    "flower": "blossom",
    "globe": "globe showing Americas",
    "speech bubble": "speech balloon",
    "saw": "carpentry saw",
    "sword": "dagger",
    "knife": "kitchen knife",
    "mitten": "gloves",
    "pumpkin": "jack-o-lantern",
    "jack-o'-lantern": "jack-o-lantern",
    "die": "game die",
    "hourglass": "hourglass done",
    "pistol": "water pistol",
    "pigeon": "bird",
    "hen": "chicken",
    "ice cream cone": "soft ice cream",
    "coffee": "hot beverage",
    "beer": "beer mug",
    "soup": "pot of food",
    "tea": "teacup without handle",
    "wine": "wine glass",
    "apple": "red apple",
    "corn on the cob": "ear of corn",
    "lemonade": "cup with straw",
    "heart": "red heart",
    "diamond": "gem stone",
    "gemstone": "gem stone",
    "trash can": "wastebasket",
    "padlock": "locked",
    "computer monitor": "desktop computer",
    "computer": "desktop computer",
    "cell phone": "mobile phone",
    "smartphone": "mobile phone",
    "boat": "sailboat",
    "truck": "delivery truck",
    "fir tree": "evergreen tree",
    "tree": "deciduous tree",
    "smiley": "slightly smiling face",
    "campfire": "fire",
    "roast turkey": "poultry leg",
}
_MASS = {
    "bacon", "baggage", "bamboo", "bowling", "bread", "broccoli", "bubble tea", "butter", "camping", "cheese",
    "cooked rice", "curry", "dna", "fencing", "fire", "fog", "fried rice", "fried shrimp", "garlic", "ginger",
    "grass", "honey", "honeycomb", "ice", "knitting", "lasagna", "lightning", "luggage", "mate", "money",
    "parchment", "popcorn", "rice", "sake", "salt", "seaweed", "skiing", "soap", "spaghetti", "sushi", "toast",
    "tofu", "water", "wind", "wood", "yarn",
}  # fmt: skip
_SINGULAR = re.compile(
    r"(?:ss|us|is|lens|rhinoceros|cyclops|compass|oasis|atlas|canvas|tennis|chess|dress|glass|swiss)$"
)
_NAMES = re.compile(
    r"^(?:flag of|Santa|Mrs|Mx|Mount|Mars|Venus|Saturn|Jupiter|Japan\b|Halley|Kaaba|Christmas lights)|^[A-Z]+$"
)
_PERSON = re.compile(r"(?:person|man|woman)\b")
_PEOPLE = re.compile(r"(?:people|men|women)\b")
_THE = re.compile(
    r"^(?:sun$|Eiffel|Statue of|Tokyo Tower|United|Netherlands|Philippines|Bahamas|Gambia|Maldives|Dominican Rep|"
    r"Central African|Comoros|Isle|.* Islands$|.* Territor)"
)


def flag(place: str) -> str:
    """A label for the flag of a place: "flag of the Netherlands"."""
    return f"flag of {'the ' if _THE.match(place) else ''}{place.replace(' & ', ' and ')}"


@functools.cache
def other_names() -> dict[str, list[str]]:
    """What people call an emoji, by its label: "car" for "automobile"."""
    found: dict[str, list[str]] = {}
    for row in (pathlib.Path(__file__).parent / "names.tsv").read_text(encoding="utf-8").splitlines():
        label, name = row.split("\t")
        found.setdefault(label, []).append(name)
    return found


def phrase(label: str) -> str:
    """What one says when the thing is to be drawn: "a red car", "french fries", "flag of Japan".

    Args:
        label: of a table, or of an emoji ("flag: Japan", "man: red hair").
    """
    if label.startswith("~"):
        return label[1:]
    if label.startswith("flag: "):
        return flag(label.removeprefix("flag: "))
    if label.endswith(("o'clock", "-thirty")):
        return f"a clock showing {label}"
    person = re.fullmatch(r"(\w+): (.+)", label)
    if person:
        label = f"{person[1]} with a {person[2]}" if person[2] == "beard" else f"{person[1]} with {person[2]}"
    if _NAMES.match(label) or _PEOPLE.match(label):
        return label
    if _THE.match(label):
        return f"the {label}"
    head = _REST.sub("", label).split(" of ")[0]
    last = head.split()[-1].lower()
    plural = last.endswith("s") and not _SINGULAR.search(last) and not _PERSON.match(label)
    if head.lower() in _MASS or last in _MASS or plural:
        return label
    return f"{'an' if _sounds_open(label) else 'a'} {label}"


def coloured(label: str, colour: str) -> str:
    """The phrase of a label with a colour: "a red car" of "car"."""
    said = phrase(label)
    without = re.sub(r"^(?:an?|the) ", "", said)
    return f"{colour} {said}" if without == said else f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {without}"


def named_colour(label: str) -> str | None:
    """The first colour that a label names, or None."""
    return next((word for word in label.split() if word in _COLOURS), None)


def thing(label: str) -> str:
    """What a label names, without colours, numbers and surroundings: "cat" of "two gray cats", "pizza" of "slice of
    pizza", "cat face" of "cat's head"."""
    name = label.removeprefix("~")
    if name.startswith("flag of "):
        return name
    name = re.sub(r"'s (?:face|head)$", " face", name)
    words = _PART.sub("", _plain(_REST.sub("", name))).split()
    words = _plain(" ".join(words)).split()
    if label.startswith("~") and words[-1].endswith("s") and not _SINGULAR.search(words[-1]):
        words[-1] = _one(words[-1])
    return " ".join(words)


class Things:
    """Which emoji shows what a label names."""

    def __init__(self, concepts: Iterable[Concept]):
        self._concepts = {}
        for concept in concepts:
            name = phrase(concept.label) if concept.label.startswith("flag: ") else concept.label
            self._concepts.setdefault(name.lower(), concept)

    def find(self, label: str) -> Concept | None:
        """The emoji of the whole label ("red apple"), else of the thing that it names ("apple"); None if none is."""
        name = thing(label)
        words = label.removeprefix("~")
        for known in (words, name, _SAME.get(words, ""), _SAME.get(name, ""), f"{name}s", name.removesuffix(" face")):
            if known.lower() in self._concepts:
                return self._concepts[known.lower()]
        return None


def _plain(name: str) -> str:
    """The name without the words before its noun that do not change what the thing is."""
    words = name.split()
    while len(words) > 1 and words[0] in _PLAIN:
        words = words[1:]
    return " ".join(words)


def _one(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "oes", "xes", "sses")):
        return word[:-2]
    return "leaf" if word == "leaves" else word[:-1]


def _sounds_open(label: str) -> bool:
    """Whether "an" stands before the label."""
    first = label.split()[0].lower()
    if first.startswith(("uni", "use", "ewe", "euro", "one", "ufo", "u-", "ut")):
        return False
    return first[0] in "aeiou" or first in {"hour", "hourglass", "sos", "mp3", "x-ray"} or label.startswith("8 ")
