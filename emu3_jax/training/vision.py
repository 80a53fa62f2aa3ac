"""The loop that trains the vision tokenizer: data, steps, metrics, evaluation, checkpoints, and the tokenizer at the
end as a bundle. Its run directory is that of `training.loop`."""

import contextlib
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from emu3_jax import distributed
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.data.pixels import PixelData
from emu3_jax.errors import Emu3Error
from emu3_jax.files import files_into
from emu3_jax.media.images import save_png
from emu3_jax.models.vision import make_decoder, make_encoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.training.loop import Outcome, stop_signal
from emu3_jax.training.metrics import Metrics
from emu3_jax.training.run_directory import Checkpoints, locked
from emu3_jax.training.vision_config import VisionTrainConfig
from emu3_jax.training.vision_export import export_vision_run, exported, write_vision_identity
from emu3_jax.training.vision_losses import peak_signal_to_noise, structural_similarity
from emu3_jax.training.vision_step import VisionState, VisionTrainer

_EVALUATED = 64  # pictures reconstructed at once
_SHOWN = 32  # pictures of the sheet


def train_vision(config: VisionTrainConfig, progress: bool | None = None) -> Outcome:
    """Trains from the last checkpoint in `config.directory`, or from the start, to the last step.

    Arguments, result and errors are those of `training.loop.train`; the model is a bundle with `vision/` alone.
    """
    enable_persistent_cache()
    mesh = make_mesh(config.mesh)
    trainer = VisionTrainer(config, mesh)
    p = config.pixels
    data = PixelData(p.manifests, p.size, p.frames, in_memory=p.in_memory, workers=p.workers, seed=p.seed)
    data.require(p.stills, p.clips)
    directory = pathlib.Path(config.directory)
    with locked(directory), contextlib.ExitStack() as stack:
        write_vision_identity(directory, config)
        checkpoints = Checkpoints(directory, config.keep)
        stack.callback(checkpoints.close)
        position = {"pixels": data.identity, "stills": p.stills, "clips": p.clips}
        state = _start(trainer, checkpoints, config, position)
        step = int(state.step)
        first = jax.process_index() == 0
        metrics = Metrics(directory, step) if first else None
        if metrics:
            stack.callback(metrics.close)
        part = slice(jax.process_index(), None, jax.process_count())
        batches = stack.enter_context(contextlib.closing(data.batches(step, p.stills, p.clips, part)))
        show = None if progress is None else not progress
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=step, unit=" steps", disable=show if first else True, leave=False)
        )
        stop = stack.enter_context(stop_signal())
        run = _Loop(config, trainer, checkpoints, metrics, bar, directory, position)
        return run.train(state, step, batches, stop)


def _start(
    trainer: VisionTrainer, checkpoints: Checkpoints, config: VisionTrainConfig, position: dict[str, Any]
) -> VisionState:
    step = checkpoints.latest()
    if step is not None:
        if step > config.steps:
            raise Emu3Error(f"{config.directory} is at step {step}, the config ends at {config.steps}: raise steps")
        state, found = checkpoints.restore(step, trainer.abstract_state(), 0, 1)
        if found != position:
            raise Emu3Error(
                f"{config.directory} was trained on other pictures: the manifests, crops, frames, batch or seed of "
                "pixels differ; resume with the same, or start a new run"
            )
        return state
    params = None
    if config.bundle:
        bundle = Bundle.open(config.bundle)
        if bundle.vision_config != config.vision:
            raise Emu3Error(f"{config.bundle} has a vision tokenizer of other shapes than the config: correct one")
        params = bundle.load_vision()
    return trainer.initial_state(params)


class _Loop:
    """A run whose directory is held."""

    def __init__(self, config, trainer, checkpoints, metrics: Metrics | None, bar: tqdm, directory, position):
        self.config, self.trainer, self.checkpoints = config, trainer, checkpoints
        self.metrics, self.bar, self.directory, self.position = metrics, bar, directory, position
        self._true: dict[str, np.ndarray] = {}

    def train(self, state: VisionState, step: int, batches: Iterator[dict[str, np.ndarray]], stop: list[int]):
        config, saved = self.config, self.checkpoints.latest()
        clock, reported = time.perf_counter(), step
        pending: tuple[int, dict[str, jax.Array]] | None = None
        while step < config.steps:
            batch = self._spread(next(batches))
            state, figures = self.trainer.step(state, batch)
            step += 1
            # The host looks at a step while the next ones run.
            if pending and step - pending[0] >= 2:
                clock, reported = self._report(*pending, clock, reported)
                pending = None
            last, stopping = step == config.steps, self._stopping(step, stop)
            save = last or stopping or step % config.checkpoint_every == 0
            evaluate = config.evaluation and (last or step % config.evaluate_every == 0)
            if pending is None and (last or save or evaluate or step % config.log_every == 0):
                pending = (step, figures)
            if save or evaluate:
                clock, reported = self._report(step, figures, clock, reported)
                pending = None
                if evaluate:
                    self._evaluate(step, state)
                if save and step != saved:
                    self.checkpoints.save(step, state, self.position, 0)
                    saved = step
                clock = time.perf_counter()
            if stopping and not last:
                self.checkpoints.finish(step)
                return Outcome(step, None)
        self.checkpoints.finish(step)
        return Outcome(step, self._export())

    def _stopping(self, step: int, stop: list[int]) -> bool:
        return self.checkpoints.reached_preemption(step) if jax.process_count() > 1 else bool(stop)

    def _spread(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        place = self.trainer.batch_sharding
        return {kind: jax.make_array_from_process_local_data(place, values) for kind, values in batch.items()}

    def _report(self, step: int, figures: dict[str, jax.Array], clock: float, reported: int) -> tuple[float, int]:
        """Waits for a step's figures, checks and writes them; returns the time, and the step."""
        if step <= reported:
            return clock, reported
        values = {name: float(value) for name, value in figures.items()}
        now = time.perf_counter()
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self.checkpoints.finish(step)
            last = self.checkpoints.latest()
            kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
            raise Emu3Error(
                f"the loss is {values['loss']} and the gradient's norm {values['gradient_norm']} at step {step}; "
                f"{kept}; lower optimizer.learning_rate, or choose dtype float32, then run again"
            )
        values["seconds"] = (now - clock) / (step - reported)
        if self.metrics:
            self.metrics.write(step, values)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"psnr {values['psnr']:.2f} dB, {values['codes_used']:.0%} of the codes")
        return now, step

    def _evaluate(self, step: int, state: VisionState) -> None:
        """Reconstructs the evaluation's pictures and clips as the exported tokenizer will, and shows some pictures."""
        config = self.config
        if not self._true:
            p = config.pixels
            data = PixelData(config.evaluation, p.size, p.frames, in_memory=True, workers=p.workers)
            self._true = data.batch(0, len(data.stills), len(data.clips))
        params = exported(state.average, config.export_dtype)
        for kind, true in self._true.items():
            figures, shown = self._reconstruct(params, true)
            if self.metrics:
                self.metrics.write(step, figures, f"evaluation/{kind}")
                if kind == "stills":
                    about = {"software": "emu3-jax", "step": str(step)}
                    with files_into(self.directory / "samples") as target:
                        save_png(_sheet(*shown), target / f"{step:08d}.png", about)
            if not self.bar.disable:
                told = f"{figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}, {figures['codes_used']:.0%} of the codes"
                self.bar.write(f"step {step}, {kind}: {told}", file=sys.stderr)

    def _reconstruct(self, params: Any, true: np.ndarray) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
        """Figures of pictures [N, H, W, 3] or clips [N, T, H, W, 3], and the first of both sides."""
        vision = self.config.vision
        encode, decode = make_encoder(vision), make_decoder(vision)
        psnr, ssim, codes, shown = [], [], [], None
        group = max(1, _EVALUATED // (1 if true.ndim == 4 else true.shape[1]))
        for first in range(0, len(true), group):
            some = true[first : first + group]
            count = len(some)
            some = np.concatenate([some, np.repeat(some[-1:], group - count, axis=0)])  # one shape, compiled once
            pixels = jnp.asarray(some, jnp.float32) / 127.5 - 1
            found = encode(params, pixels)
            drawn = jnp.clip(decode(params, found), -1, 1)
            values = _similarity(*(x[:count].reshape(-1, *x.shape[-3:]) for x in (drawn, pixels)))
            psnr.append(np.asarray(values[0]))
            ssim.append(np.asarray(values[1]))
            codes.append(np.asarray(found)[:count].ravel())
            shown = shown or (some[:count], np.asarray(drawn)[:count])
        counts = np.bincount(np.concatenate(codes), minlength=vision.codebook_size)
        share = counts / counts.sum()
        return {
            "psnr": float(np.concatenate(psnr).mean()),
            "ssim": float(np.concatenate(ssim).mean()),
            "codes_used": float((counts > 0).mean()),
            "perplexity": float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum())),
            "cases": len(true),
        }, shown

    def _export(self) -> pathlib.Path:
        """The trained tokenizer as `DIRECTORY/model`, from the checkpoint on disk."""
        target, new = self.directory / "model", self.directory / "model.new"
        if jax.process_index() == 0:
            shutil.rmtree(new, ignore_errors=True)
            export_vision_run(self.directory, new)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
        distributed.wait("the model is written")
        return target


@jax.jit
def _similarity(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """PSNR and SSIM of each picture, [N] both."""
    return peak_signal_to_noise(a, b), jax.vmap(lambda x, y: structural_similarity(x[None], y[None]))(a, b)


def _sheet(true: np.ndarray, drawn: np.ndarray) -> Image.Image:
    """True pictures and their reconstructions in turn, eight pairs a row."""
    true, drawn = true[:_SHOWN], np.round((drawn[:_SHOWN] + 1) * 127.5).astype(np.uint8)
    count, height, width, _ = true.shape
    columns = min(8, count)
    sheet = Image.new("RGB", (columns * 2 * width, -(-count // columns) * height), "white")
    for index in range(count):
        row, column = divmod(index, columns)
        for offset, pixels in enumerate((true[index], drawn[index])):
            sheet.paste(Image.fromarray(pixels), ((2 * column + offset) * width, row * height))
    return sheet
