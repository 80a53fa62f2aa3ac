"""The static schedule against the reference's rule, offset by offset."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu3_jax.config import CLIP_LAYOUTS, SpecialTokens
from emu3_jax.data.sequences import clip_ids
from emu3_jax.generation.schedule import (
    SAMPLED_VISUAL,
    TokenClass,
    clip_schedule,
    forced_ids,
    frames_that_fit,
    grid_length,
    grid_schedule,
    image_schedule,
    sampled_steps,
    stack_schedules,
    text_schedule,
)
from emu3_jax.text.tokenizer import special_tokens


def reference_rule(offset: int, height: int, width: int, special: SpecialTokens) -> int:
    """What is legal `offset` tokens after IMG, as upstream's constraint decides it."""
    if offset % (width + 1) == 0:
        return special.eol
    tail = offset - (width + 1) * height
    return {1: special.eof, 2: special.eoi, 3: special.eos}.get(tail, special.pad if tail > 3 else SAMPLED_VISUAL)


@given(st.integers(1, 40), st.integers(3, 40))
def test_schedule_is_the_reference_rule(height, width):
    special = SpecialTokens()
    schedule = image_schedule(height, width)
    expected = [reference_rule(offset, height, width, special) for offset in range(1, len(schedule) + 1)]
    assert forced_ids(schedule, special).tolist() == expected
    assert (forced_ids(schedule, special) == SAMPLED_VISUAL).sum() == height * width


def test_narrow_pictures_close_in_order():
    """Up to two columns the reference's rule puts EOL where EOF or EOI belong; the schedule does not."""
    special = SpecialTokens()
    assert forced_ids(image_schedule(1, 1), special).tolist() == [
        SAMPLED_VISUAL, special.eol, special.eof, special.eoi, special.eos,
    ]  # fmt: skip


def test_square_720_has_8190_tokens_and_three_more():
    schedule = image_schedule(90, 90)
    assert len(schedule) == 8190 + 3
    assert sampled_steps(schedule[None]).tolist() == [8189]


def test_mixed_rows_are_padded_and_stop_at_the_last_choice():
    special = SpecialTokens()
    stacked = stack_schedules([image_schedule(2, 3), image_schedule(1, 2)], 16)
    ids = forced_ids(stacked, special)
    assert ids[1, 6:].tolist() == [special.pad] * 10
    assert sampled_steps(stacked).tolist() == [7, 2]
    assert sampled_steps(stack_schedules([text_schedule(4)], 8)).tolist() == [4]
    assert sampled_steps(np.zeros((2, 5), np.int8)).tolist() == [0, 0]


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_a_clip_s_schedule_is_what_training_shows(layout):
    special = special_tokens(300, 64)
    codes = np.arange(2 * 3 * 4).reshape(2, 3, 4)

    class Digits:
        def encode(self, text):
            return [ord(character) for character in text]

    ids = clip_ids(Digits(), special, codes, layout)
    body = [*ids[ids.index(special.img) + 1 :], special.eos]
    forced = forced_ids(clip_schedule(2, 3, 4, layout), special)
    assert len(body) == len(forced)
    expected = [SAMPLED_VISUAL if i >= special.visual_start else i for i in body]
    assert forced.tolist() == expected


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.sampled_from(CLIP_LAYOUTS))
def test_a_clip_is_its_frames_each_with_eof(frames, rows, columns, layout):
    schedule = clip_schedule(frames, rows, columns, layout)
    lines = layout == "lines"
    assert len(schedule) == frames * (rows * (columns + lines) + 1) + 2
    assert schedule[-2:].tolist() == [TokenClass.EOI, TokenClass.EOS]
    counts = {TokenClass.VISUAL: frames * rows * columns, TokenClass.EOL: frames * rows * lines}
    counts |= {TokenClass.EOF: frames, TokenClass.EOI: 1, TokenClass.EOS: 1}
    assert {kind: int((schedule == kind).sum()) for kind in TokenClass} == {
        kind: counts.get(kind, 0) for kind in TokenClass
    }
    # Every frame is the same, and ends with its EOF; every row of "lines" with its EOL.
    frame = schedule[:-2].reshape(frames, -1)
    assert (frame == frame[0]).all() and frame[0, -1] == TokenClass.EOF
    grid = frame[0, :-1].reshape(rows, columns + lines)
    assert (grid[:, :columns] == TokenClass.VISUAL).all() and (grid[:, columns:] == TokenClass.EOL).all()
    # A clip of one frame is a picture's schedule; the last choice is the last frame's last one.
    if lines and frames == 1:
        np.testing.assert_array_equal(schedule, image_schedule(rows, columns))
    assert sampled_steps(schedule[None]).tolist() == [len(schedule) - 3 - lines]
    # What is counted without a schedule is what the schedule has.
    assert grid_length((frames, rows, columns), layout) == len(schedule)
    assert grid_length((rows, columns), layout) == len(image_schedule(rows, columns))
    for room, fit in ((len(schedule), frames), (len(schedule) - 1, frames - 1)):
        assert frames_that_fit(room, rows, columns, layout) == fit
    old = frames // 2
    np.testing.assert_array_equal(
        grid_schedule((frames, rows, columns), layout, given=old), schedule[len(frame[0]) * old :]
    )
