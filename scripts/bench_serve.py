"""Requests of many clients at one server: how much faster one batch answers them than one request after the other.

    python scripts/bench_serve.py [--rows 8] [--jobs 24] [--json FILE]
    python scripts/bench_serve.py --preset 8b --quantize int8

The load is mixed: pictures of several ratios and guidance scales, some without guidance, answers about text, and
answers about a picture. It goes to `serving.batcher.Batcher` in this process. The same jobs are done by

- `batched`: the batcher, with all jobs in its queue at once,
- `poisson`: the batcher, with jobs that arrive at random times, at `--rate` jobs a second,
- `one row`: the batcher with one row, which is a server without batching; it gets every N-th job for N rows,
- `generate`: `Emu3.generate` and `Emu3.chat`, in batches of as many rows, without a server.

With `--load pictures` all jobs are pictures of one size with guidance, so that `generate` has the batches that suit it
best.

`batched` and `one row` are compared by tokens per second, `batched` and `generate` by jobs per second. A single request
to an idle batcher shows the time to the first row of a picture, beside the time that `Emu3.generate` needs for it.
`--preset 8b` has random weights of the published shapes, made on the device. All programs are compiled before a time is
taken.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from PIL import Image

import emu3_jax
from emu3_jax.benchmarks import decode, vision
from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import DecoderConfig, ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import Vision, decode_picture
from emu3_jax.generation.language import Batching, Grid, Language, generate_grids, grid_rows, visual_codes
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.shapes import bucket
from emu3_jax.media.sizes import generate_size
from emu3_jax.serving.batcher import Batcher
from emu3_jax.serving.jobs import AnswerJob, Busy, Failed, Finished, Job, PictureJob, PictureRows
from emu3_jax.serving.pool import Options
from emu3_jax.serving.works import make_work
from emu3_jax.text.prompts import CHAT
from emu3_jax.text.tokenizer import Tokenizer
from emu3_jax.text.vocabulary import CONTROLS

PRESETS = {
    "8b": (DecoderConfig(), VisionConfig()),
    "small": (decode.PRESETS["small"], VisionConfig(base_channels=32, num_res_blocks=1)),  # to try this script
}
AREAS = {"8b": 256 * 256, "small": 64 * 64}  # a whole picture of 720x720 takes a minute
RATIOS = ("1:1", "3:2", "2:3", "1:1")
SCALES = (3.0, 5.0, 3.0, 1.0)  # of guidance; 1 is none
LOADS = ("mixed", "pictures")
SIDES = ("batched", "poisson", "one row", "generate")
CLIENTS = 5
SHARE = 0.7  # of the saturated rate, at which jobs arrive by default


def say(words: str) -> None:
    """A line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ the model


def stand_in_tokenizer(config: DecoderConfig) -> Tokenizer:
    """A text tokenizer with the ids of `config`: the single bytes, and tokens that no text has."""
    count = config.tokens.visual_start - len(CONTROLS)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"\xff" + rank.to_bytes(3, "big"): rank for rank in range(256, count)}
    return Tokenizer(ranks, config.tokens)


def random_model(preset: str, area: int, quantize: str | None) -> Emu3:
    """A model of the preset's shapes with random weights. Its pictures have `area` pixels, also those it reads."""
    config, tokenizer = PRESETS[preset]
    config = dataclasses.replace(config, image_area=area)
    language = Language(
        config, decode.random_params(config, quantize), stand_in_tokenizer(config), CHAT, quantize=quantize
    )
    params = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, vision.random_weights(tokenizer)))
    pixels = ImageConfig(min_pixels=min(area, ImageConfig.min_pixels), max_pixels=max(area, 32 * 32))
    return Emu3(f"random-{preset}", language, Vision(tokenizer, pixels, params))


def load_model(options: argparse.Namespace) -> Emu3:
    quantize = None if options.quantize == "none" else options.quantize
    if options.model is not None or options.preset == "embedded":
        return emu3_jax.load(options.model, quantize=quantize)
    return random_model(options.preset, options.area or AREAS[options.preset], quantize)


# ------------------------------------------------------------------------------------------------ the load


def make_jobs(load: str, count: int, area: int | None, tokens: int, seed: int) -> list[Job]:
    """The load. If it is mixed, three of five jobs are pictures, one an answer about text, one about a picture.

    Args:
        load: from `LOADS`; "pictures" has pictures of the ratio 1:1 with guidance alone.
        count: number of jobs.
        area: area of the pictures in pixels, or None for the model's own.
        tokens: most tokens of an answer.
        seed: of the order.
    """
    side = round(math.sqrt(area or 64 * 64))
    photo = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))
    jobs: list[Job] = []
    if load == "pictures":
        return [
            PictureJob(prompt=f"a red apple, number {number}", area=area, seed=seed + number,
                       client=f"client {number % CLIENTS}")
            for number in range(count)
        ]  # fmt: skip
    for number in range(count):
        client, drawn = f"client {number % CLIENTS}", number // 5 * 3 + number % 5
        if number % 5 < 3:
            which = drawn % len(RATIOS)
            jobs.append(
                PictureJob(
                    prompt=f"a red apple, number {number}", ratio=RATIOS[which], guidance=SCALES[drawn // 2 % 4],
                    area=area, seed=seed + number, client=client,
                )
            )  # fmt: skip
        else:
            pictures = (photo,) if number % 5 == 4 else ()
            jobs.append(
                AnswerJob(prompt=f"What is number {number}?", pictures=pictures, max_new_tokens=tokens, client=client,
                          temperature=1.0, seed=seed + number)
            )  # fmt: skip
    random.Random(seed).shuffle(jobs)
    return jobs


@dataclasses.dataclass
class Seen:
    """What a client saw of a job, in seconds after it asked."""

    job: Job
    first: float | None = None  # the first row of the picture, or the first text
    last: float = 0.0
    tokens: int = 0


def follow(batcher: Batcher, job: Job) -> Seen | None:
    """Submits a job and waits for its end. Returns None if it was refused."""
    asked, seen = time.perf_counter(), Seen(job)
    try:
        ticket = batcher.submit(job)
    except Busy:
        return None
    for event in ticket.events():
        now = time.perf_counter() - asked
        if isinstance(event, Failed):
            raise Emu3Error(f"a job failed: {event.message}; see the log above")
        if seen.first is None and (isinstance(event, Finished) or hasattr(event, "pixels") or hasattr(event, "text")):
            seen.first = now
        if isinstance(event, Finished):
            seen.last, seen.tokens = now, event.tokens
    return seen


def offer(batcher: Batcher, jobs: Sequence[Job], rate: float | None, seed: int) -> tuple[list[Seen | None], float]:
    """Submits jobs at random times, `rate` a second on average, or all at once. A thread follows each.

    Returns:
        What the clients saw, and the seconds from the first request to the last answer.
    """
    found: list[Seen | None] = [None] * len(jobs)
    failed: list[BaseException] = []

    def one(index: int) -> None:
        try:
            found[index] = follow(batcher, jobs[index])
        except BaseException as error:  # told by the main thread
            failed.append(error)

    draw, began, due = random.Random(seed), time.perf_counter(), 0.0
    threads = []
    for index in range(len(jobs)):
        if rate is not None:
            due += draw.expovariate(rate)
            time.sleep(max(0.0, began + due - time.perf_counter()))
        threads.append(threading.Thread(target=one, args=(index,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found, time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ figures


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of the values do not exceed; None without values."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3) if ordered else None


def figures(
    side: str, found: Sequence[Seen | None], seconds: float, grown: dict[str, int], rows: int
) -> dict[str, Any]:
    """A side's figures. `grown` is what the batcher counted meanwhile."""
    done = [seen for seen in found if seen is not None]
    pictures = [seen for seen in done if isinstance(seen.job, PictureJob)]
    answers = [seen for seen in done if isinstance(seen.job, AnswerJob)]
    figures: dict[str, Any] = {
        "side": side,
        "rows": rows,
        "jobs": len(found),
        "refused": len(found) - len(done),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(seen.tokens for seen in done) / seconds, 2),
        "jobs_per_s": round(len(done) / seconds, 4),
        "pictures_per_minute": round(60 * len(pictures) / seconds, 2),
        "rows_used_share": round(grown["row_passes_used_total"] / max(grown["row_passes_total"], 1), 3),
    }
    for name, group in (("picture", pictures), ("answer", answers)):
        for share, label in ((0.5, "p50"), (0.99, "p99")):
            first = [seen.first for seen in group if seen.first is not None]
            figures[f"{name}_first_{label}_s"] = percentile(first, share)
            figures[f"{name}_{label}_s"] = percentile([seen.last for seen in group], share)
    return figures


COLUMNS = {
    "side": "side", "rows": "rows", "jobs": "jobs", "refused": "refused", "seconds": "s", "tokens_per_s": "tokens/s",
    "pictures_per_minute": "pictures/min", "rows_used_share": "rows in use", "picture_first_p50_s": "first row, p50 s",
    "picture_first_p99_s": "p99 s", "picture_p50_s": "picture, p50 s", "picture_p99_s": "p99 s",
    "answer_p50_s": "answer, p50 s", "answer_p99_s": "p99 s",
}  # fmt: skip


def table(sides: Sequence[dict[str, Any]], ratios: dict[str, float]) -> str:
    """Markdown: one line per side, then the ratios."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for side in sides:
        cells = [side.get(name) for name in COLUMNS]
        lines.append("| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"{name}: {value:.3g}" for name, value in ratios.items())])


# ------------------------------------------------------------------------------------------------ the sides


class Bench:
    """The sides of the comparison, over one model and one load."""

    def __init__(
        self,
        model: Emu3,
        jobs: Sequence[Job],
        *,
        rows: int,
        passes: int | None,
        parallel: str,
        rows_every: float | None,
    ):
        self._model, self._jobs, self._rows, self._parallel = model, jobs, rows, parallel
        self._options: dict[str, Any] = {
            "passes": passes,
            "options": Options(parallel=parallel),
            "rows_every": rows_every,
        }
        works = [make_work(model, job) for job in jobs]
        prompt = max(work.prompt for work in works)
        width = 64  # the smallest cache that all of these jobs fit into
        while width < prompt:
            width += min(width, 1024)
        self._slots = bucket(width + max(work.steps for work in works))
        pictures = [job for job in jobs if isinstance(job, PictureJob)]
        self._sizes = sorted({(job.ratio, job.area) for job in pictures}, key=str)
        self._picture = dataclasses.replace(next(job for job in pictures if job.guidance != 1), partial=True)

    @contextlib.contextmanager
    def batcher(self, rows: int) -> Iterator[Batcher]:
        """A batcher that has compiled all that the load needs."""
        batcher = Batcher(self._model, rows=rows, queue=6 * len(self._jobs), slots=[self._slots], **self._options)
        try:
            began = time.perf_counter()
            batcher.warm_up(self._sizes)
            once = [job for job in self._jobs if isinstance(job, AnswerJob) and job.pictures][:1]
            offer(batcher, [dataclasses.replace(job, max_new_tokens=2) for job in once], None, 0)
            say(f"rows {rows}: compiled in {time.perf_counter() - began:.1f} s, {self._slots} slots a row")
            yield batcher
        finally:
            batcher.close(finish=False)

    def measure(
        self, side: str, batcher: Batcher, jobs: Sequence[Job], rate: float | None, seed: int
    ) -> dict[str, Any]:
        """Figures of one load."""
        before = batcher.figures()
        found, seconds = offer(batcher, jobs, rate, seed)
        after = batcher.figures()
        grown = {name: after[name] - before[name] for name in ("row_passes_used_total", "row_passes_total")}
        result = figures(side, found, seconds, grown, after["rows"])
        say(f"{side}: {len(jobs)} jobs in {seconds:.1f} s, {result['tokens_per_s']} tokens/s")
        return result

    def first_row(self, batcher: Batcher, repeat: int = 3) -> float:
        """Seconds to the first row of a picture that nobody else disturbs; the median of some requests."""
        times = []
        for _ in range(repeat):
            began = time.perf_counter()
            ticket = batcher.submit(self._picture)
            for event in ticket.events():
                if isinstance(event, PictureRows | Finished):
                    times.append(time.perf_counter() - began)
                    break
            ticket.cancel()
        return sorted(times)[repeat // 2]

    def first_row_of_generate(self, repeat: int = 3) -> float:
        """Seconds to the first row of the same picture in `generate_grids`, on which `Emu3.generate` runs."""
        model, job = self._model, self._picture
        area = job.area or model.language.config.image_area
        grid = Grid(job.prompt, job.negative, generate_size(job.ratio, area, model.vision.config.spatial_factor))
        (row,) = grid_rows(model.language, [grid])
        settings = Sampling(job.temperature, job.top_k, job.top_p, job.guidance, job.seed).settings(1)
        times = []

        def on_tokens(rows: Sequence[int], tokens: list[np.ndarray]) -> None:
            codes, (_, columns) = visual_codes(model.language, row, tokens[0]), grid.size
            if len(codes) >= columns:
                shown = np.resize(codes[:columns], grid.size)
                decode_picture(model.vision, shown.astype(np.int32))
                raise _Shown

        for _ in range(repeat + 1):  # the first compiles
            began = time.perf_counter()
            with contextlib.suppress(_Shown):
                batching = Batching(1, False, parallel=self._parallel)
                generate_grids(model.language, [grid], settings, batching=batching, on_tokens=on_tokens)
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[repeat // 2]

    def generate(self) -> dict[str, Any]:
        """Figures of `Emu3.generate` and `Emu3.chat` for the whole load, after one run that compiles."""
        pictures = [job for job in self._jobs if isinstance(job, PictureJob)]
        answers = [job for job in self._jobs if isinstance(job, AnswerJob)]
        common: dict[str, Any] = {"batch_size": self._rows, "parallel": self._parallel, "progress": False}

        def names(jobs: Sequence[Any], *fields: str) -> dict[str, Any]:
            return {field: [getattr(job, field) for job in jobs] for field in fields}

        def once() -> float:
            began = time.perf_counter()
            self._model.generate(
                [job.prompt for job in pictures], area=pictures[0].area, **common,
                **names(pictures, "ratio", "guidance", "temperature", "seed"),
            )  # fmt: skip
            if answers:
                self._model.chat(
                    [list(job.pictures) for job in answers], [job.prompt for job in answers],
                    max_new_tokens=answers[0].max_new_tokens, **common, **names(answers, "temperature", "seed"),
                )  # fmt: skip
            return time.perf_counter() - began

        say(f"generate: the run that compiles took {once():.1f} s")
        seconds = once()
        say(f"generate: {len(self._jobs)} jobs in {seconds:.1f} s")
        return {
            "side": "generate", "rows": self._rows, "jobs": len(self._jobs), "refused": 0,
            "seconds": round(seconds, 2), "jobs_per_s": round(len(self._jobs) / seconds, 4),
            "pictures_per_minute": round(60 * len(pictures) / seconds, 2),
        }  # fmt: skip


class _Shown(Exception):
    """The first row was seen: the rest of the picture need not be computed."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All sides that were asked for: `machine`, `sides` and `ratios`."""
    enable_persistent_cache()
    say(f"loading {options.model or options.preset}")
    model = load_model(options)
    area = options.area or (None if options.model or options.preset == "embedded" else AREAS[options.preset])
    jobs = make_jobs(options.load, options.jobs or 3 * options.rows, area, options.tokens, options.seed)
    if options.whole:
        jobs = [dataclasses.replace(job, partial=False) if isinstance(job, PictureJob) else job for job in jobs]
    bench = Bench(model, jobs, rows=options.rows, passes=options.passes, parallel=options.parallel,
                  rows_every=options.rows_every)  # fmt: skip
    sides: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with bench.batcher(options.rows) as batcher:
        first = bench.first_row(batcher)
        batched = bench.measure("batched", batcher, jobs, None, options.seed)
        sides.append(batched)
        if "poisson" in options.sides:
            rate = options.rate or SHARE * batched["jobs_per_s"]
            say(f"poisson: {rate:.3g} jobs a second")
            sides.append({**bench.measure("poisson", batcher, jobs, rate, options.seed), "rate": rate})
    del batcher  # its caches need memory
    if "one row" in options.sides:
        with bench.batcher(1) as alone:
            sides.append(bench.measure("one row", alone, jobs[:: options.rows], None, options.seed))
        ratios["tokens per second, batched / one row"] = batched["tokens_per_s"] / sides[-1]["tokens_per_s"]
        del alone
    if "generate" in options.sides:
        plain = bench.first_row_of_generate()
        say(f"first row of a single request: {first:.3f} s, of generate {plain:.3f} s")
        ratios["seconds to the first row, one request / generate"] = first / plain
        sides.append({**bench.generate(), "picture_first_p50_s": round(plain, 3)})
        ratios["jobs per second, batched / generate"] = batched["jobs_per_s"] / sides[-1]["jobs_per_s"]
    about = {"model": model.name, "quantize": options.quantize, "area": area, "parallel": options.parallel}
    about |= {"load": options.load, "whole": options.whole}
    return {"machine": describe_machine(), **about, "sides": sides, "ratios": ratios, "first_row_s": first}


def whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number >= 1")
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number > 0")
    return number


def side_list(text: str) -> tuple[str, ...]:
    sides = tuple(text.split(","))
    if not set(sides) <= set(SIDES):
        raise argparse.ArgumentTypeError(f"{text} must be names of {', '.join(SIDES)}, with commas between them")
    return sides


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=("embedded", *PRESETS), default="embedded", help="the model (default: %(default)s)")
    add("--model", metavar="BUNDLE", help="a bundle instead of the preset")
    add("--quantize", choices=("none", "int8"), default="none", help="weights and caches (default: %(default)s)")
    add("--rows", type=whole, default=8, metavar="N", help="rows of the batch (default: %(default)s)")
    add("--jobs", type=whole, metavar="N", help="jobs of the load (default: three for each row)")
    add("--load", choices=LOADS, default=LOADS[0], help="the jobs (default: %(default)s)")
    add("--area", type=whole, metavar="PIXELS", help="area of a picture (default: the model's; 256x256 for 8b)")
    add("--tokens", type=whole, default=64, metavar="N", help="most tokens of an answer (default: %(default)s)")
    add(
        "--rate",
        type=positive,
        metavar="R",
        help=f"jobs a second of `poisson` (default: {SHARE} of `batched`)",
    )
    add("--sides", type=side_list, default=SIDES, metavar="A,B", help="sides beside `batched` (default: all)")
    add("--passes", type=whole, metavar="N", help="passes of a call (default: as the server)")
    add("--parallel", default="off", metavar="W", help="tokens of a pass of a row, on all sides (default: %(default)s)")
    add(
        "--rows-every",
        type=positive,
        metavar="S",
        help="seconds between two looks at a picture (default: as the server)",
    )
    add("--whole", action="store_true", help="the clients of the load do not look at pictures that are not whole")
    add("--seed", type=int, default=0, metavar="N", help="of the load (default: %(default)s)")
    add("--json", metavar="FILE", help="also write all figures to this file")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    try:
        found = run(options)
    except Emu3Error as error:
        sys.exit(f"bench_serve.py: {error}")
    print(table(found["sides"], found["ratios"]))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
