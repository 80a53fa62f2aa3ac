"""Training of the vision tokenizer: `train_vision`, and its `Job` for `training.runner`."""

import contextlib
import functools
import pathlib
import shlex
from collections.abc import Generator, Iterator, Sequence
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
from emu3_jax.files import require_outside
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

_EVALUATED = 64  # pictures (or frames) that an evaluation reconstructs at once
_SHOWN = 32  # pictures in the saved sheet


def train_vision(config: VisionTrainConfig, progress: bool | None = None, *, verify: bool = False) -> Outcome:
    """Trains the vision tokenizer and exports it to `DIRECTORY/model`, a bundle with only a `vision/` part.

    If `config.directory` holds checkpoints of this run, training resumes from the newest one. On Ctrl-C or SIGTERM,
    the run writes a checkpoint and returns.

    Args:
        config: the config of the run.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.
        verify: whether to check the files of the config's bundle against their checksums first.

    Returns:
        How the run ended.

    Raises:
        Emu3Error: bad input, a loss that is not finite, or files that cannot be written. Checkpoints that were
            written before are kept.
    """
    enable_persistent_cache()
    storage_place(config.directory)  # a bad path must fail now, not at the first checkpoint
    if config.bundle:
        require_outside(config.directory, config.bundle)
    if config.bundle and verify:
        Bundle.open(config.bundle, verify=True)
    with own_settings(), contextlib.closing(_VisionJob(config, make_mesh(config.mesh))) as job:
        return run(job, place(config.directory), progress)


class _VisionJob:
    """The `Job` that trains the vision tokenizer on crops of pictures and clips."""

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
        self.share = (0, 1)  # all processes store the same data position
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
        """Ends the threads that read the data."""
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
            f"data: {found} in {', '.join(printable(name) for name in p.manifests)}",
        ]
        if config.evaluation:
            sets = ", ".join(printable(name) for name in config.evaluation)
            lines.append(f"evaluation every {config.evaluate_every:,} steps: {sets}")
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
                raise Emu3Error(
                    f"{config.bundle}: its vision tokenizer has other shapes than the config's field vision; correct "
                    "vision, or choose another bundle"
                )
            params = bundle.load_vision()
        return self._trainer.initial_state(params)

    # -------------------------------------------------------------------------------------------- steps

    def start(self, step: int, positions: Sequence[Any] | None) -> None:
        if positions is not None and positions[0] != self.position():
            raise Emu3Error(
                f"{self._config.directory} was trained on other data: manifests, size, frames, stills, clips or seed "
                "in the config's pixels have changed; restore them, or choose another directory"
            )
        p = self._config.pixels
        part = slice(jax.process_index(), None, jax.process_count())
        self._batches = self._data.batches(step, p.stills, p.clips, part)

    def position(self) -> dict[str, Any]:
        """Everything that determines the batches, except the step."""
        p = self._config.pixels
        return {"pixels": self._data.identity, "stills": p.stills, "clips": p.clips}

    def next_batch(self) -> Batch:
        assert self._batches is not None  # `start` opens them
        return next(self._batches)

    def step(self, state: VisionState, batch: Batch) -> tuple[VisionState, dict[str, jax.Array]]:
        place = self._trainer.batch_sharding
        spread = {kind: jax.make_array_from_process_local_data(place, values) for kind, values in batch.items()}
        if self._compiled is None:  # compiled ahead of time, because only that tells its memory
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
        """Reconstructs the evaluation's pictures and clips with the weights as exported, and makes a sheet of some."""
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
        """All pictures and clips of the evaluation, uint8, by kind."""
        p = self._config.pixels
        data = PixelData(self._config.evaluation, p.size, p.frames, in_memory=True, workers=p.workers)
        return data.batch(0, len(data.stills), len(data.clips))

    def _reconstruct(self, params: Any, true: np.ndarray) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
        """Reconstructs uint8 pictures [N, H, W, 3] or clips [N, T, H, W, 3].

        Returns:
            The figures, and the first group as (original uint8, reconstruction in -1..1).
        """
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
        return []  # never called, because the cadence has no `sample_every`; evaluations show pictures

    def export(self, directory: pathlib.Path, target: pathlib.Path, step: int) -> int:
        return export_vision_run(directory, target, step)


@jax.jit
def _similarity(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """PSNR in dB and SSIM of each picture: two arrays [N] from pictures [N, H, W, 3] in -1..1."""
    return peak_signal_to_noise(a, b), jax.vmap(lambda x, y: structural_similarity(x[None], y[None]))(a, b)


def _sheet(true: np.ndarray, decoded: np.ndarray) -> Image.Image:
    """A sheet of originals and reconstructions side by side, eight pairs per row."""
    true, decoded = true[:_SHOWN], np.round((decoded[:_SHOWN] + 1) * 127.5).astype(np.uint8)
    count, height, width, _ = true.shape
    columns = min(8, count)
    sheet = Image.new("RGB", (columns * 2 * width, -(-count // columns) * height), "white")
    for index in range(count):
        row, column = divmod(index, columns)
        for offset, pixels in enumerate((true[index], decoded[index])):
            sheet.paste(Image.fromarray(pixels), ((2 * column + offset) * width, row * height))
    return sheet
