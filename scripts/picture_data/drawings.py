"""The drawings beyond the emoji: sets of icons, and Open Clipart, each with a label and in small views."""

import dataclasses
import pathlib
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np
from emoji_data.concepts import Concept
from emoji_data.pictures import read_json, render_icon, resolve_icon, unless_blank, views_of
from PIL import Image

from picture_data import debian
from picture_data.rasterise import LARGEST, Rasteriser
from picture_data.sources import TABLES
from picture_data.words import Things, flag, thing

SMALLER, CLOSEUPS = 3, 3  # further views of each drawing, as in `emoji_data.pictures`
# The set of icons, its style, and how captions call a picture of the style.
STYLES = {
    "fxemoji": ("firefox", "firefox emoji"),
    "circle-flags": ("round", "round icon"),
    "flat-color-icons": ("flat icon", "flat icon"),
    "meteocons": ("weather icon", "weather icon"),
    "fluent-color": ("gradient icon", "gradient icon"),
}
_PUBLIC_DOMAIN = {
    "http://web.resource.org/cc/PublicDomain",
    "http://creativecommons.org/licenses/publicdomain/",
    "Public Domain",
}
_FOLDER = "usr/share/openclipart/svg/"
_MARGIN = 0.04  # of a clipart's longer side, around it
# Groups of things by the folder of Open Clipart, for labels that no emoji has.
_GROUPS = {
    "animals": "animals & nature",
    "plants": "animals & nature",
    "food": "food & drink",
    "transportation": "travel & places",
    "buildings": "travel & places",
    "geography": "travel & places",
    "people": "people & body",
    "recreation": "activities",
}
_REGION = 0x1F1E6 - ord("a")  # from a letter of a country's code to the letter of which flags are made


@dataclasses.dataclass
class Drawing:
    """A drawing with its label.

    Attributes:
        name: unique, for example "firefox/1f431".
        style: of the drawing, for example "firefox".
        kind: how captions call a picture of the style, for example "firefox emoji".
        label: see `words`.
        concept: codepoint of the emoji of the same thing, or the thing's name.
        group: category of the thing.
        views: uint8 [V, side, side, 3]; the first shows the whole.
    """

    name: str
    style: str
    kind: str
    label: str
    concept: str
    group: str
    views: np.ndarray


# A drawing, or the name of one and why it is not used.
Found = Drawing | tuple[str, str]


def load_icons(
    name: str, tarball: pathlib.Path, concepts: dict[str, Concept], things: Things, size: int
) -> Iterator[Found]:
    """The drawings of a set of icons that have a label.

    Args:
        name: of the set, in `STYLES`.
        tarball: of its package.
        concepts: all emoji by codepoint.
        things: see `words.Things`.
        size: side of the pictures in pixels.
    """
    icons = read_json(tarball, "package/icons.json")
    style, kind = STYLES[name]
    for icon_name, key in _labels(name, icons):
        icon = resolve_icon(icons, icon_name)
        concept = concepts.get(key) if name in ("fxemoji", "circle-flags") else things.find(key)
        if name == "circle-flags" and concept is not None:
            key = flag(concept.label.removeprefix("flag: "))
        elif name == "fxemoji" and concept is not None:
            key = concept.label
        shown = f"{style}/{icon_name}"
        if icon is None or (concept is None and name in ("fxemoji", "circle-flags")):
            yield shown, "no drawing or label of this name"
            continue
        try:
            views = unless_blank(views_of(render_icon(icon, size), size, SMALLER, CLOSEUPS, shown))
        except ValueError as error:  # the renderer's
            views = f"broken drawing: {str(error).splitlines()[0]}"
        if isinstance(views, str):
            yield shown, views
            continue
        yield _drawing(shown, style, kind, key, concept, "objects", views)


def load_clipart(package: pathlib.Path, things: Things, size: int, rasteriser: Rasteriser) -> Iterator[Found]:
    """The drawings of Open Clipart that have a label in the table, are in the public domain and can be rasterised.

    Args:
        package: the Debian package.
        things: see `words.Things`.
        size: side of the pictures in pixels.
        rasteriser: draws them.
    """
    labels = dict(_rows("openclipart"))
    for member, data in debian.read_members(package, ".svg", LARGEST):
        # Only names of the table are used, so what the package calls its files cannot matter.
        path = member.removeprefix("./").removeprefix(_FOLDER).removesuffix(".svg")
        label = labels.pop(path, None)
        if label is None:
            continue
        name = f"clipart/{path}"
        if not _is_free(data):
            yield name, "not marked as public domain"
            continue
        picture = rasteriser.draw(data)
        shown = picture if isinstance(picture, str) else _crop(picture)
        views = shown if isinstance(shown, str) else unless_blank(views_of(shown, size, SMALLER, CLOSEUPS, name))
        if isinstance(views, str):
            yield name, views
            continue
        kind = kind_of(shown)
        found = things.find(label)
        yield _drawing(name, kind, kind, label, found, _GROUPS.get(path.split("/")[0], "objects"), views)
    for path in labels:
        yield f"clipart/{path}", "not in the package, a link, or larger than the limit"


def kind_of(picture: Image.Image) -> str:
    """Whether a cropped drawing (RGBA) is a "silhouette", a "line drawing", or else "clipart"."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    pixels = np.asarray(white.convert("RGB"), np.int16)
    colourful = np.ptp(pixels, axis=-1) > 25
    light = pixels.mean(-1)
    between = (light > 70) & (light < 225)
    if colourful.mean() > 0.01 or between.mean() > 0.12:
        return "clipart"
    return "silhouette" if (light <= 70).mean() > 0.22 else "line drawing"


def _drawing(
    name: str, style: str, kind: str, label: str, concept: Concept | None, group: str, views: np.ndarray
) -> Drawing:
    if concept is not None:
        return Drawing(name, style, kind, label, concept.codepoint, concept.group, views)
    return Drawing(name, style, kind, label, thing(label), group, views)


def _labels(name: str, icons: dict) -> Iterator[tuple[str, str]]:
    """Names of icons, each with its label or, for emoji and flags, its codepoint."""
    if name == "fxemoji":
        yield from map(tuple, _rows("fxemoji"))
    elif name == "circle-flags":
        for code, icon in sorted(icons["icons"].items()):
            if len(code) == 2 and code.isalpha() and code.islower() and not icon.get("hidden"):
                yield code, "-".join(f"{_REGION + ord(letter):x}" for letter in code)
    else:
        yield from ((icon, label) for set_name, icon, label in _rows("icons") if set_name == name)


def _rows(name: str) -> Iterator[list[str]]:
    for line in (TABLES / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
        yield line.split("\t")


def _is_free(svg: bytes) -> bool:
    """Whether the drawing's metadata name a licence, and nothing but the public domain."""
    try:
        root = ElementTree.fromstring(svg)  # expat limits what entities may grow to
    except (ElementTree.ParseError, ValueError):
        return False
    found = set()
    for work in root.iter():
        if isinstance(work.tag, str) and work.tag.endswith("}Work"):
            for child in work:
                if isinstance(child.tag, str) and child.tag.endswith("}license"):
                    found |= {value for name, value in child.attrib.items() if name.endswith("resource")} or {""}
    return bool(found) and found <= _PUBLIC_DOMAIN


def _crop(picture: Image.Image) -> Image.Image | str:
    """What the picture shows, with a small margin."""
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        return "blank"
    margin = round(_MARGIN * max(box[2] - box[0], box[3] - box[1]))
    return picture.crop((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin))
