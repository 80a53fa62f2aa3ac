"""Rows of decode sessions of the decoder of `tiny.py`: with guidance, clips, texts, and of several kinds."""

import numpy as np
import tiny

from emu3_jax.generation import session
from emu3_jax.generation.schedule import clip_schedule, image_schedule, text_schedule


def mixed_rows():
    """Rows that differ in everything: prompt, negative prompt, grid, guidance, temperature, filters, seed."""
    prompts = [[17, 1, 2, 20, 19], [17, 20, 19], [17, *range(12), 20, 19], [17, 3, 20, 19]]
    negatives = [[17, 20, 19], [17, 5, 6, 7, 20, 19], [17, 1, 20, 19], [17, 9, 20, 19]]
    schedules = [image_schedule(3, 4), image_schedule(2, 2), image_schedule(4, 3), image_schedule(1, 5)]
    settings = tiny.settings(
        4, guidance=[3.0, 1.0, 2.0, 0.5], temperature=[1.0, 0.7, 0.0, 1.3], top_k=[8, 3, 5, 2], top_p=[1, 0.9, 1, 0.8],
        seed=[7, 7, 8, 9],
    )  # fmt: skip
    return prompts, negatives, schedules, settings


GUIDED = dict(zip(("prompts", "negatives", "schedules", "settings"), mixed_rows(), strict=True))
CLIPS = {
    "prompts": [[17, 1, 2, 20, 19], [17, 20, 19], [17, 4, 20, 19]],
    "negatives": None,
    "schedules": [clip_schedule(3, 2, 3), clip_schedule(2, 3, 3), image_schedule(4, 4)],
    "settings": tiny.settings(3, seed=[1, 2, 3], temperature=[1.0, 0.8, 1.5], top_k=[8, 4, 8]),
}
TEXTS = {
    "prompts": [[17, 1, 2], [17, 3], [17, 4, 5, 6]],
    "negatives": None,
    "schedules": [text_schedule(20), text_schedule(33), text_schedule(1)],
    "settings": tiny.settings(3, seed=[1, 2, 3], temperature=[1.0, 0.0, 1.5], top_p=[1.0, 1.0, 0.8]),
}
# A picture with guidance, a clip, and two answers: of different kinds, lengths and settings.
MIXED = {
    "prompts": [[17, 1, 2, 20, 19], [17, 20, 19], [17, 1, 2], [17, 3]],
    "negatives": [[17, 20, 19], None, None, None],
    "schedules": [image_schedule(3, 4), clip_schedule(2, 2, 3), text_schedule(25), text_schedule(9)],
    "settings": tiny.settings(
        4, seed=[1, 2, 3, 4], guidance=[3, 1, 1, 1], top_k=[6, 8, 20, 32], top_p=[1, 0.9, 1, 0.9]
    ),
}
CASES = {"guided": GUIDED, "clips": CLIPS, "texts": TEXTS, "mixed": MIXED}


def run(case, only=None, params=None, **options):
    """The rows of a case, or those whose numbers are in `only`, generated; see `session.run`."""
    rows = tiny.rows(case["prompts"], case["schedules"], case["negatives"])
    only = range(len(rows)) if only is None else only
    settings = case["settings"].take(np.asarray(only))
    return session.run(params or tiny.params(), tiny.CONFIG, [rows[i] for i in only], settings, **options)


def run_rows(order, **changes):
    """The ids of some of `mixed_rows`."""
    return run(GUIDED, order, **changes).ids


def started(window, schedule, **options):
    """A session of two guided rows, after its prompts; see `session.DecodeSession`."""
    rows = [session.Row([17, 1, 2, 20, 19], schedule, [17, 20, 19])] * 2
    decoding = session.DecodeSession(
        tiny.params(), tiny.CONFIG, rows, tiny.settings(2, seed=[5, 6]), parallel=window, **options
    )
    decoding.start()
    return decoding


def finish(decoding):
    """The last reading of a session that has started, and the ids."""
    while (snapshot := decoding.advance()) is not None:
        reading = decoding.read(snapshot)
    return reading, decoding.results(reading)
