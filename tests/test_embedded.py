"""The embedded model's checksums: what is missing or damaged is named."""

import pytest

from emu3_jax.checkpoints import embedded
from emu3_jax.checkpoints.checksums import CHECKSUMS, write_checksums
from emu3_jax.errors import Emu3Error


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A directory in place of the package's assets, with two files and their checksums."""
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "weights").write_bytes(b"weights")
    (tmp_path / "CARD.md").write_text("card")
    write_checksums(tmp_path)
    monkeypatch.setattr(embedded, "DIRECTORY", tmp_path)
    return tmp_path


def test_whole_files_pass(assets):
    assert embedded.embedded_bundle() == assets
    assert len((assets / CHECKSUMS).read_text().splitlines()) == 2


def test_a_damaged_file_is_named(assets):
    (assets / "decoder" / "weights").write_bytes(b"weighty")
    with pytest.raises(Emu3Error, match=r"damaged, its checksum differs: .*decoder/weights; install"):
        embedded.embedded_bundle()


def test_a_missing_file_is_named(assets):
    (assets / "CARD.md").unlink()
    with pytest.raises(Emu3Error, match=r"missing: .*CARD\.md; install"):
        embedded.embedded_bundle()


def test_an_installation_without_it_says_so(assets):
    (assets / CHECKSUMS).unlink()
    with pytest.raises(Emu3Error, match="no model was given"):
        embedded.embedded_bundle()
