"""Small made-up packages of emoji for the recipes of data: pictures, drawings, clips and labels."""

import io
import json
import pathlib
import tarfile

from PIL import Image, ImageDraw

GROUPS = ["smileys & emotion", "people & body", "components", "animals & nature", "objects"]
ANIMALS = [f"1f4{number:02x}" for number in range(40)]  # codepoints of the concepts; nothing checks what they mean


def picture(number: int, tone: int = 0) -> Image.Image:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 40 + number % 20, 56), fill=(number * 6 % 256, tone, 200, 255))
    return image


def webp(*frames: Image.Image) -> bytes:
    stream = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "duration": 40} if len(frames) > 1 else {}
    frames[0].save(stream, "WEBP", lossless=True, **options)
    return stream.getvalue()


def clip(moves: bool) -> bytes:
    frames = []
    for number in range(16):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        left = number * 2 if moves else 0
        ImageDraw.Draw(image).rectangle((left, 8, left + 30, 50 + number % 2), fill=(10, 90, 200, 255))
        frames.append(image)
    return webp(*frames)


def icons(colour: str, extra: dict | None = None) -> dict:
    """An Iconify collection with a drawing for each animal."""
    drawings = {}
    for number, codepoint in enumerate(ANIMALS):
        body = f'<path fill="{colour}" d="M2 2h{4 + number % 20}v{6 + number // 2}H2z"/>'
        drawings[f"animal-{codepoint}"] = {"body": body}
    return {"width": 32, "height": 32, "icons": drawings | (extra or {}), "aliases": {"other": {"parent": "broken"}}}


def write_package(builder, cache: pathlib.Path, name: str, files: dict[str, bytes]):
    """Writes a tarball as npm would, and returns its package."""
    made = builder.Package(name, "1.0.0", "")
    with tarfile.open(cache / made.filename, "w:gz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return builder.Package(name, "1.0.0", builder.packages.integrity(cache / made.filename))


def write_sources(builder, cache: pathlib.Path):
    """Writes a cache of small packages, and returns what the builder is to take from it."""

    def package(name: str, files: dict[str, bytes]):
        return write_package(builder, cache, name, files)

    entries = [
        {"label": f"beast’s {c}", "hexcode": c.upper(), "tags": ["pet", "fur", "tail", f"beast’s {c}"], "group": 3}
        for c in ANIMALS
    ]
    entries.append({"label": "man running", "hexcode": "1F3C3-200D-2642-FE0F", "group": 1})
    entries.append({"label": "light skin tone", "hexcode": "1F3FB", "group": 2})
    entries.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    messages = {
        "groups": [{"key": m.split()[0].rstrip("s"), "message": m, "order": i} for i, m in enumerate(GROUPS)],
        "subgroups": [{"key": "mammal", "message": "mammals", "order": 0}],
    }
    messages["groups"][2]["key"] = "component"
    labels = package(
        "labels",
        {
            "en/data.json": json.dumps([entry | {"subgroup": 0} for entry in entries]).encode(),
            "en/messages.json": json.dumps(messages).encode(),
        },
    )
    files = {f"assets/{codepoint}.webp": webp(picture(i)) for i, codepoint in enumerate(ANIMALS)}
    files["assets/1f3c3-200d-2642-fe0f.webp"] = webp(picture(50))
    files["assets/1f3c3-1f3fb-200d-2642-fe0f.webp"] = webp(picture(51))
    files["assets/1f999.webp"] = webp(picture(52))
    characters = json.dumps({c: f"animal-{c}" for c in ANIMALS} | {"1f3c3-200d-2642": "other"}).encode()

    def drawings(name: str, colour: str, listed: bytes = characters, body: str = "<g><path</g>"):
        collection = icons(colour, {"broken": {"body": body}})
        return package(name, {"icons.json": json.dumps(collection).encode(), "chars.json": listed})

    moving = '<circle cx="16" cy="16" r="12"/>'
    return builder.Sources(
        labels=labels,
        pictures_3d=package("@pictures/3d", files),
        drawings={
            "flat": drawings("flat", "#a00"),
            "noto": drawings("noto", "#0a0", body=moving),
            "vintage": drawings("vintage", "#00a", listed=b"{}", body=moving),
            "twemoji": drawings("twemoji", "#a0a", body=moving),
        },
        clips=(
            package("clips-1", {f"assets/{c}.webp": clip(True) for c in ANIMALS[:12]}),
            package("clips-2", {f"assets/{ANIMALS[0]}.webp": clip(True), f"assets/{ANIMALS[20]}.webp": clip(False)}),
        ),
    )
