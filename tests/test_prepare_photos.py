"""`emu3-jax prepare` on photographs: from a folder to data, bad input, pictures of phones, the 24 photographs."""

import ast
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from captioned import ANY, picture, split, write
from conftest import GOLDEN
from PIL import Image

from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.data.shards import PreparedData
from emu3_jax.data.sources import folder as folders
from emu3_jax.data.sources.folder import Folder
from emu3_jax.data.sources.opening import open_source
from emu3_jax.media import images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight photographs with captions, and what a folder of a person's has beside."""
    root = tmp_path_factory.mktemp("photos")
    with Image.open(GOLDEN / "photo.png") as photo:
        photo = photo.convert("RGB")
        for number in range(8):
            photo.crop((4 * number, 0, 4 * number + 40, 40)).save(root / f"{number}.jpg")
            (root / f"{number}.txt").write_text(f"part {number}")
    return root


def test_from_photos_to_data(photos, tmp_path, capsys):
    write(photos, {"broken.jpg": b"\xff\xd8\xff", "broken.txt": "broken", "alone.png": picture()})
    command = ["prepare", str(photos), "-o", str(tmp_path / "data"), "--validation", "0.3", "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr().out
    train, validation = PreparedData(tmp_path / "data"), PreparedData(tmp_path / "data/validation")
    assert len(train) + len(validation) == 8
    texts = [data[index].text for data in (train, validation) for index in range(len(data))]
    assert sorted(texts) == [f"part {number}" for number in range(8)]
    listed = (tmp_path / "data/skipped.txt").read_text().splitlines()
    assert len(listed) == 2 and not (tmp_path / "data/validation/skipped.txt").exists()
    assert "alone.png has no caption" in listed[0] and "broken.jpg" in listed[1]
    assert f"2 skipped, listed in {tmp_path / 'data/skipped.txt'}" in said and f"skipped: {listed[0]}" in said
    before = (tmp_path / "data/index.json").read_bytes()
    assert main(command) == 0  # it is all there
    assert (tmp_path / "data/index.json").read_bytes() == before
    (photos / "0.txt").write_text("other")
    assert main(command) == 2
    assert "holds data prepared from another source" in capsys.readouterr().err
    (photos / "0.txt").write_text("part 0")
    assert main([*command[:-3], "--quiet", "--on-error", "stop", "-o", str(tmp_path / "other")]) == 2
    assert "alone.png has no caption" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required|one of the arguments"),
        (["{empty}"], "holds no pictures"),
        (["{empty}/gone"], "there is no such file"),
        (["gs://bucket/photos"], "gs:// addresses are not supported"),
        (["{photos}", "{empty}"], "2 sources were given"),
        (["{photos}", "--validation", "2"], "must be a share between 0 and 1"),
        (["{photos}", "--validation", "x"], "'x' is not a number"),
    ],
)
def test_bad_input_is_one_line(arguments, reason, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = [text.format(empty=tmp_path / "empty", photos=photos) for text in arguments]
    try:
        code = main(["prepare", *arguments, "-o", str(tmp_path / "out")])
    except SystemExit as ended:  # where the arguments themselves are wrong
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert any(word in said for word in reason.split("|")), said
    assert said.strip().splitlines()[-1].startswith("emu3-jax") and not (tmp_path / "out").exists()


def test_heic_without_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_heic_is_read", lambda: False)
    write(tmp_path, {"a.heic": b"\0\0\0\x18ftypheic", "a.txt": "a", "b.png": picture(), "b.txt": "b"})
    with pytest.raises(Emu3Error, match=r"has 1 HEIC pictures. HEIC pictures need pillow-heif.*emu3-jax\[heic\]"):
        Folder(tmp_path, ANY)
    with pytest.raises(Emu3Error, match="HEIC pictures need pillow-heif"):
        images.load_image(tmp_path / "a.heic")
    assert folders.NAMES[0] == "metadata.jsonl"


def test_without_pyarrow(tmp_path, monkeypatch):
    write_files = write(tmp_path, {"a.parquet": b"PAR1"})
    for name in ("arrow", "hub"):
        monkeypatch.delitem(sys.modules, f"emu3_jax.data.sources.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for place in (str(write_files / "a.parquet"), "hf:org/name"):
        with pytest.raises(Emu3Error, match=r"pyarrow, which is not installed: pip install 'emu3-jax\[data\]'"):
            open_source([place], ANY)


def test_the_photographs(tmp_path):
    """`scripts/photos.py`: 24 photographs, all captioned, that `prepare` takes, of pictures that are free."""
    skimage = pytest.importorskip("skimage", reason="the extra `photos` installs scikit-image")
    script = pathlib.Path(__file__).parent.parent / "scripts" / "photos.py"
    pieces = runpy.run_path(str(script))["PHOTOS"]
    fetchers = ast.parse((pathlib.Path(skimage.__file__).parent / "data" / "_fetchers.py").read_text())
    said = {  # what the function that loads a picture says of it
        name: ast.get_docstring(function)
        for function in fetchers.body
        if isinstance(function, ast.FunctionDef)
        for name in re.findall(r"data/([\w.]+)", ast.unparse(function.body[-1]))
    }
    for _, file, *_ in pieces:
        assert re.search(r"CC0|public\s+domain|[Nn]o known copyright", said[file]), file
    subprocess.run([sys.executable, str(script), str(tmp_path / "photos")], check=True)
    good, bad = split(Folder(tmp_path / "photos", ANY))
    assert len(good) == len(set(good.values())) == 24 and not bad
    for name in good:
        with Image.open(tmp_path / "photos" / name) as photo:
            assert photo.size == (256, 256)


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heic` installs pillow-heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6  # of phones that are held upright
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    picture.save(tmp_path / "IMG_1.HEIC", exif=exif.tobytes())
    (tmp_path / "IMG_1.txt").write_text("half of it is blue")
    (tmp_path / "broken.heic").write_bytes((tmp_path / "IMG_1.HEIC").read_bytes()[:-100])
    (tmp_path / "broken.txt").write_text("cut off")
    source = Folder(tmp_path, ANY)
    image = source[0].medium.load()
    assert image.size == (32, 64)
    assert image.getpixel((16, 8))[2] > 200 and image.getpixel((16, 56))[0] > 200
    with pytest.raises(Emu3Error, match=r"broken\.heic"):
        source[1].medium.load()
