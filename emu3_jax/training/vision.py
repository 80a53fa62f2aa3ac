"""Training the vision tokenizer: what is special about it, as a job of `training.runner`."""

import contextlib
import functools
import pathlib
import shlex
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.compilation import enable_persistent_cache, own_settings
from emu3_jax.data.pixels import PixelData
from emu3_jax.errors import Emu3Error
from emu3_jax.models.vision import make_decoder, make_encoder
from emu3_jax.printable import printable
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.storage import place, storage_place
from emu3_jax.training import summary
from emu3_jax.training.run_directory import Identity
from emu3_jax.training.runner import Batch, Cadence, Evaluation, Outcome, run
from emu3_jax.training.summary import counted
from emu3_jax.training.vision_config import VisionTrainConfig
from emu3_jax.training.vision_export import export_vision_run, exported, vision_identity
from emu3_jax.training.vision_losses import peak_signal_to_noise, structural_similarity
from emu3_jax.training.vision_step import VisionState, VisionTrainer

_EVALUATED = 64  # pictures reconstructed at once
_SHOWN = 32  # pictures of the sheet


def train_vision(config: VisionTrainConfig, progress: bool | None = None, *, verify: bool = False) -> Outcome:
    """Trains from the last checkpoint in `config.directory`, or from the start, to the last step.

    Arguments, result and errors are those of `training.loop.train`; the model is a bundle with `vision/` alone.
    """
    enable_persistent_cache()
    storage_place(config.directory)  # refused before the work rather than at the first checkpoint
    if config.bundle and verify:
        Bundle.open(config.bundle, verify=True)
    with own_settings(), contextlib.closing(_VisionJob(config, make_mesh(config.mesh))) as job:
        return run(job, place(config.directory), progress)


class _VisionJob:
    """The vision tokenizer on crops of pictures and clips."""

    def __init__(self, config: VisionTrainConfig, mesh: Mesh):
        self._config = config
        self._trainer = VisionTrainer(config, mesh)
        p = config.pixels
        self._data = PixelData(p.manifests, p.size, p.frames, in_memory=p.in_memory, workers=p.workers, seed=p.seed)
        self._data.require(p.stills, p.clips)
        self._batches: Generator[Batch, None, None] | None = None
        self._compiled: jax.stages.Compiled | None = None
        self.identity: Identity = vision_identity(config)
        self.product = "model"
        self.share = (0, 1)  # the position is that of all processes
        self.cadence = Cadence(
            steps=config.steps,
            watch_every=config.log_every,
            look_behind=2,
            log_every=1,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep,
            evaluate_every=config.evaluate_every if config.evaluation else None,
        )

    def close(self) -> None:
        """Ends the threads that make batches."""
        if self._batches:
            self._batches.close()

    # -------------------------------------------------------------------------------------------- for people

    def describe(self) -> list[str]:
        config, p, state = self._config, self._config.pixels, self._trainer.abstract_state()
        kinds = [counted(p.stills, "picture")] if p.stills else []
        kinds += [f"{counted(p.clips, 'clip')} of {p.frames} frames"] if p.clips else []
        found = f"{counted(len(self._data.stills), 'picture')}, {counted(len(self._data.clips), 'clip')}"
        lines = [
            f"trained: all {summary.parameters(state.params):,} parameters of a vision tokenizer",
            f"a step: {' and '.join(kinds)}, each of {p.size}x{p.size} pixels",
            f"data: {found}, of {', '.join(printable(name) for name in p.manifests)}",
        ]
        if config.evaluation:
            sets = ", ".join(printable(name) for name in config.evaluation)
            lines.append(f"evaluated every {config.evaluate_every:,} steps: {sets}")
        parts = {
            "parameters and their average": (state.params, state.average),
            "optimizer": state.opt_state,
            "discriminator": state.discriminator,
            "gradients": state.params,
        }
        mesh = self._trainer.mesh
        return [*lines, summary.devices(mesh), *summary.memory(parts, mesh)]

    def step_memory(self) -> str:
        return "" if self._compiled is None else summary.step_memory(self._compiled, self._trainer.mesh)

    def usage(self, model: pathlib.Path) -> str:
        return f"emu3-jax tokenize PICTURE --model {shlex.quote(printable(str(model)))} -o out/codes.npz"

    # -------------------------------------------------------------------------------------------- the state

    def abstract_state(self) -> VisionState:
        return self._trainer.abstract_state()

    def initial_state(self) -> VisionState:
        config, params = self._config, None
        if config.bundle:
            bundle = Bundle.open(config.bundle)
            if bundle.vision_config != config.vision:
                raise Emu3Error(f"{config.bundle} has a vision tokenizer of other shapes than the config: correct one")
            params = bundle.load_vision()
        return self._trainer.initial_state(params)

    # -------------------------------------------------------------------------------------------- steps

    def start(self, step: int, position: Any | None) -> None:
        if position is not None and position != self.position():
            raise Emu3Error(
                f"{self._config.directory} was trained on other pictures: the manifests, crops, frames, batch or seed "
                "of pixels differ; resume with the same, or start a new run"
            )
        p = self._config.pixels
        part = slice(jax.process_index(), None, jax.process_count())
        self._batches = self._data.batches(step, p.stills, p.clips, part)

    def position(self) -> dict[str, Any]:
        """What decides the batches: which of them come next follows from the step."""
        p = self._config.pixels
        return {"pixels": self._data.identity, "stills": p.stills, "clips": p.clips}

    def next_batch(self) -> Batch:
        assert self._batches is not None  # `start` opens them
        return next(self._batches)

    def step(self, state: VisionState, batch: Batch) -> tuple[VisionState, dict[str, jax.Array]]:
        place = self._trainer.batch_sharding
        spread = {kind: jax.make_array_from_process_local_data(place, values) for kind, values in batch.items()}
        if self._compiled is None:  # ahead of its call, to know what memory it takes
            self._compiled = self._trainer.step.lower(state, spread).compile()
        return self._compiled(state, spread)

    def skipped(self) -> int:
        return 0

    def report(self, figures: dict[str, float], seconds: float) -> tuple[dict[str, float], str]:
        note = f"loss {figures['loss']:.4f}, psnr {figures['psnr']:.2f} dB, {figures['codes_used']:.0%} of the codes"
        return figures | {"seconds": seconds}, note

    def not_finite(self, step: int, batch: Batch, directory: pathlib.Path) -> tuple[str, str]:
        return f"step {step}", "lower optimizer.learning_rate, or choose dtype float32"

    # -------------------------------------------------------------------------------------------- between steps

    def evaluate(self, state: VisionState) -> Iterator[Evaluation]:
        """Reconstructs the evaluation's pictures and clips as the exported tokenizer will, and shows some pictures."""
        params = exported(state.average, self._config.export_dtype)
        for kind, true in self._evaluated.items():
            figures, shown = self._reconstruct(params, true)
            note = f"{figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}, {figures['codes_used']:.0%} of the codes"
            sheet = None
            if kind == "stills":
                sheet = _sheet(*shown)
                sheet.info |= {"software": "emu3-jax", "step": str(int(state.step))}
            yield Evaluation(kind, figures, note, sheet)

    @functools.cached_property
    def _evaluated(self) -> dict[str, np.ndarray]:
        """All pictures and clips of the evaluation."""
        p = self._config.pixels
        data = PixelData(self._config.evaluation, p.size, p.frames, in_memory=True, workers=p.workers)
        return data.batch(0, len(data.stills), len(data.clips))

    def _reconstruct(self, params: Any, true: np.ndarray) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
        """Figures of pictures [N, H, W, 3] or clips [N, T, H, W, 3], and the first of both sides."""
        vision = self._config.vision
        encode, decode = make_encoder(vision), make_decoder(vision)
        psnr, ssim, codes = [], [], []
        shown: tuple[np.ndarray, np.ndarray] | None = None
        group = max(1, _EVALUATED // (1 if true.ndim == 4 else true.shape[1]))
        for first in range(0, len(true), group):
            some = true[first : first + group]
            count = len(some)
            some = np.concatenate([some, np.repeat(some[-1:], group - count, axis=0)])  # one shape, compiled once
            pixels = jnp.asarray(some, jnp.float32) / 127.5 - 1
            found = encode(params, pixels)
            decoded = jnp.clip(decode(params, found), -1, 1)
            values = _similarity(*(x[:count].reshape(-1, *x.shape[-3:]) for x in (decoded, pixels)))
            psnr.append(np.asarray(values[0]))
            ssim.append(np.asarray(values[1]))
            codes.append(np.asarray(found)[:count].ravel())
            shown = shown or (some[:count], np.asarray(decoded)[:count])
        assert shown is not None  # there is at least one picture
        counts = np.bincount(np.concatenate(codes), minlength=vision.codebook_size)
        share = counts / counts.sum()
        return {
            "psnr": float(np.concatenate(psnr).mean()),
            "ssim": float(np.concatenate(ssim).mean()),
            "codes_used": float((counts > 0).mean()),
            "perplexity": float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum())),
            "cases": len(true),
        }, shown

    def sample(self, state: VisionState) -> list[Image.Image]:
        return []  # its cadence asks for none: the evaluation shows pictures

    def export(self, directory: pathlib.Path, target: pathlib.Path, step: int) -> int:
        return export_vision_run(directory, target, step)


@jax.jit
def _similarity(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """PSNR and SSIM of each picture, [N] both."""
    return peak_signal_to_noise(a, b), jax.vmap(lambda x, y: structural_similarity(x[None], y[None]))(a, b)


def _sheet(true: np.ndarray, decoded: np.ndarray) -> Image.Image:
    """True pictures and their reconstructions in turn, eight pairs a row."""
    true, decoded = true[:_SHOWN], np.round((decoded[:_SHOWN] + 1) * 127.5).astype(np.uint8)
    count, height, width, _ = true.shape
    columns = min(8, count)
    sheet = Image.new("RGB", (columns * 2 * width, -(-count // columns) * height), "white")
    for index in range(count):
        row, column = divmod(index, columns)
        for offset, pixels in enumerate((true[index], decoded[index])):
            sheet.paste(Image.fromarray(pixels), ((2 * column + offset) * width, row * height))
    return sheet
