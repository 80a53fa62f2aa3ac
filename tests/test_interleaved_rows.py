"""Sampled rows of text and pictures of a tiny model: alone, together, with parallel windows and on a mesh."""

import jax
import numpy as np
import pytest
import tiny

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import interleaving
from emu3_jax.generation.grammar import Grammar, Picture, split
from emu3_jax.generation.interleaving import InterleavedRow
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings

pytestmark = [pytest.mark.slow, pytest.mark.compiled_quickly]

TINY = Grammar(tiny.CONFIG.tokens, tuple(range(1, 11)), 11, most_digits=1)


def tiny_rows(contexts):
    """Rows of unequal prompts, sizes and lengths."""
    prompts = ([17, 1, 2], [17, 3], [17, 4, 5, 6, 7, 8], [17])
    sizes = ((2, 2), None, None, (1, 3))
    return [
        InterleavedRow(ids, [17, 9] if contexts > 1 else None, [17] if contexts > 2 else None, size, 40 + index)
        for index, (ids, size) in enumerate(zip(prompts, sizes, strict=True))
    ]


def tiny_run(rows, places, contexts, **options):
    text = tiny.settings(4, temperature=8.0, top_k=22, seed=np.arange(4) + 104)
    visual = tiny.settings(4, temperature=1.3, top_k=6, top_p=0.95, guidance=2.0)
    scales = np.linspace(1.0, 2.0, 4)[places] if contexts > 2 else None
    columns = (text.take(np.asarray(places)), visual.take(np.asarray(places)), scales)
    return interleaving.run(tiny.params(), tiny.CONFIG, TINY, [rows[place] for place in places], *columns, **options)


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_rows_are_what_they_are_alone(contexts):
    rows = tiny_rows(contexts)
    together = tiny_run(rows, [0, 1, 2, 3], contexts)
    for place, expected in enumerate(together[:2]):
        (found,) = tiny_run(rows, [place], contexts)
        np.testing.assert_array_equal(found, expected)
    pieces = [split(ids.tolist(), TINY, strict=False) for ids in together]
    assert sum(isinstance(piece, Picture) and piece.whole for row in pieces[:2] for piece in row)
    assert all(len(ids) == 40 + row or ids[-1] == tiny.CONFIG.tokens.eos for row, ids in enumerate(together))


@pytest.mark.parametrize(
    ("contexts", "window", "narrow_cache"), [(1, 5, False), (2, 2, False), (2, 16, False), (2, 5, True), (3, 5, False)]
)
def test_windows_change_nothing(contexts, window, narrow_cache):
    """Sampled rows in all modes at once, which end at different times; some at their last step within a window."""
    rows = tiny_rows(contexts)
    expected = tiny_run(rows, [0, 1, 2, 3], contexts, narrow_cache=narrow_cache)
    found = tiny_run(rows, [0, 1, 2, 3], contexts, narrow_cache=narrow_cache, parallel=window)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("place", [0, 1])
def test_windows_of_a_single_row_change_nothing(place):
    """Its passes of several tokens are all within pictures and known sizes."""
    rows = tiny_rows(2)
    expected, found = tiny_run(rows, [place], 2), tiny_run(rows, [place], 2, parallel=5)
    np.testing.assert_array_equal(found[0], expected[0])


def test_windows_save_passes():
    """Sizes, ends of lines, EOF and EOI are guesses that are always right; greedy codes that repeat are, too."""
    rows = [InterleavedRow([17, 1, 2], size=(4, 1), steps=60)]
    settings = tiny.settings(1, temperature=8.0, seed=104), tiny.settings(1, temperature=0.0)
    made = {}
    for window in ("off", 8):
        *_, made[window] = interleaving.stream(tiny.params(), tiny.CONFIG, TINY, rows, *settings, parallel=window)
    np.testing.assert_array_equal(made[8].ids[0], made["off"].ids[0])
    pieces = split(made[8].ids[0].tolist(), TINY, strict=False)
    pictures = [piece for piece in pieces if isinstance(piece, Picture) and piece.whole]
    assert pictures and made["off"].passes[0] == len(made["off"].ids[0])
    # "4*1" and IMG take one pass instead of four. Of the ten tokens after IMG, four at most need a pass of their own,
    # and one more begins.
    assert made[8].passes[0] <= made["off"].passes[0] - 8 * len(pictures)


def test_a_window_that_is_none():
    rows, settings = [InterleavedRow([17], steps=4)], tiny.settings(1)
    with pytest.raises(Emu3Error, match="parallel is 1: it must be auto, off, or a whole number from 2 to 128"):
        interleaving.run(tiny.params(), tiny.CONFIG, TINY, rows, settings, settings, parallel=1)


@pytest.mark.parametrize("options", [{"mesh": "data=2,tensor=2"}, {"mesh": "fsdp=4"}], ids=lambda o: o["mesh"])
def test_rows_on_a_mesh_are_equal(options):
    rows = tiny_rows(2)
    mesh = make_mesh(options["mesh"])
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    settings = tiny.settings(4, temperature=1.3, top_k=12, guidance=2.0)
    found = interleaving.run(params, tiny.CONFIG, TINY, rows, settings, settings, mesh=mesh)
    expected = interleaving.run(tiny.params(), tiny.CONFIG, TINY, rows, settings, settings)
    windows = interleaving.run(params, tiny.CONFIG, TINY, rows, settings, settings, mesh=mesh, parallel=4)
    for one, other, wide in zip(found, expected, windows, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(wide, other)


def test_what_cannot_share_a_batch_or_the_positions():
    settings = tiny.settings(2)
    rows = [InterleavedRow([17], steps=4), InterleavedRow([17], [17], steps=4)]
    with pytest.raises(Emu3Error, match="rows with and without guidance cannot share a batch"):
        interleaving.run(tiny.params(), tiny.CONFIG, TINY, rows, settings, settings)
    rows = [InterleavedRow([17], steps=4), InterleavedRow([17], steps=10**6)]
    with pytest.raises(Emu3Error, match="row 1: a prompt of 1 tokens and 1000000 tokens to generate exceed"):
        interleaving.run(tiny.params(), tiny.CONFIG, TINY, rows, settings, settings)
