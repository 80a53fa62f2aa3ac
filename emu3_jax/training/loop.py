"""The loop: data, steps, metrics, evaluation, pictures and checkpoints of a run, which goes on where it was killed."""

import contextlib
import dataclasses
import math
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from emu3_jax import distributed
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import DecoderConfig
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.pipeline import Batches, evaluation_batches, training_batches
from emu3_jax.errors import Emu3Error
from emu3_jax.files import files_into, new_file
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.language import Language
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.images import save_png
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh, vision_shardings
from emu3_jax.text.prompts import prompt_templates
from emu3_jax.training import weights
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.flops import peak_flops, step_flops
from emu3_jax.training.host_rows import HostRows
from emu3_jax.training.metrics import Metrics
from emu3_jax.training.run_directory import Checkpoints, locked, write_identity
from emu3_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: the steps taken in all.
        model: the bundle with the trained weights; None where the run was asked to stop before its last step.
    """

    step: int
    model: pathlib.Path | None


def train(config: TrainConfig, progress: bool | None = None) -> Outcome:
    """Trains from the last checkpoint in `config.directory`, or from the start, to the last step.

    Asked to stop by SIGTERM, as machines are before they are taken away, it writes a checkpoint and returns.

    Args:
        config: the run.
        progress: a bar on stderr; by default if that is a terminal.

    Raises:
        Emu3Error: on bad input, on a loss that is not finite, and where files cannot be written. The checkpoints that
            were written stay.
    """
    enable_persistent_cache()
    bundle = Bundle.open(config.model.bundle)
    decoder = _decoder(config, bundle)
    mesh = make_mesh(config.mesh)
    rows = HostRows(mesh, config.batch_size)
    _check_parts(config, rows, mesh)
    directory = pathlib.Path(config.directory)
    with locked(directory), use_mesh(mesh), contextlib.ExitStack() as stack:
        identity = dataclasses.replace(decoder, dtype=config.model.dtype)
        write_identity(directory, identity, config.adapter, config.model.bundle)
        return _Run(config, bundle, decoder, mesh, rows, directory, stack).train(progress)


def _decoder(config: TrainConfig, bundle: Bundle) -> DecoderConfig:
    """The decoder's config; where weights come from the bundle it must be the bundle's, but for what is no shape."""
    wanted = config.model.decoder
    if config.model.random:
        return wanted
    bundle.require("decoder")
    found = bundle.decoder_config
    if wanted is None:
        return found
    # What is trained now may be longer, larger, or clips for the first time: no property of the weights.
    chosen = ("image_area", "max_positions", "clip_frames", "clip_layout")
    for field in dataclasses.fields(DecoderConfig):
        old, new = getattr(found, field.name), getattr(wanted, field.name)
        if old != new and field.name not in (*chosen, "dtype"):  # the products' dtype is `ModelConfig.dtype`
            raise Emu3Error(
                f"{bundle.path} is of another model: its decoder has {field.name} {old!r}, the config {new!r}; "
                "correct the config's model.decoder, or leave it out"
            )
    return dataclasses.replace(found, **{name: getattr(wanted, name) for name in chosen})


def _check_parts(config: TrainConfig, rows: HostRows, mesh) -> None:
    part = config.batch_size // config.accumulation
    HostRows(mesh, part)  # each part is spread like the whole
    length, parts = config.data.sequence_length, mesh.shape["sequence"]
    if length % parts:
        raise Emu3Error(f"sequence_length is {length}, which mesh sequence={parts} does not divide: change one of them")


class _Run:
    """A run whose directory is held and whose mesh is in use."""

    def __init__(self, config, bundle, decoder, mesh, rows, directory, stack: contextlib.ExitStack):
        self.config, self.bundle, self.mesh, self.rows, self.directory = config, bundle, mesh, rows, directory
        self.first = jax.process_index() == 0
        self.trainer = Trainer(config, decoder, mesh)
        self.tokenizer, self.templates = bundle.tokenizer(), prompt_templates(bundle.template, decoder.clip_layout)
        if self.tokenizer.special != decoder.tokens:
            found, wanted = ((t.visual_start, t.visual_count) for t in (self.tokenizer.special, decoder.tokens))
            raise Emu3Error(
                f"{bundle.path}: its vocabulary and codebook give {found[1]} visual ids from {found[0]} on, the "
                f"config's model.decoder.tokens say {wanted[1]} from {wanted[0]} on: make the two agree"
            )
        self.codebook = bundle_codebook(bundle).sha256 if bundle.has("vision") else None
        self.batches: Batches = training_batches(
            config.data,
            self.tokenizer,
            self.templates,
            rows.count,
            codebook_sha256=self.codebook,
            process_index=rows.group,
            process_count=rows.groups,
        )
        stack.callback(self.batches.close)
        self.checkpoints = Checkpoints(directory, config.keep)
        stack.callback(self.checkpoints.close)
        self.frozen: Any = {}
        if config.adapter:
            self.frozen = weights.frozen_from_bundle(bundle, decoder, config.adapter, self.trainer.frozen_shardings)
        self.state = self._start(decoder)
        self.step = int(self.state.step)
        if self.step > config.steps:
            raise Emu3Error(f"{directory} is at step {self.step}, the config ends at {config.steps}: raise steps")
        self.metrics = Metrics(directory, self.step) if self.first else None
        if self.metrics:
            stack.callback(self.metrics.close)
        self._model: Any = None
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak * mesh.size

    def _start(self, decoder: DecoderConfig) -> TrainState:
        step = self.checkpoints.latest()
        if step is not None:
            abstract = self.trainer.abstract_state()
            state, position = self.checkpoints.restore(step, abstract, self.rows.group, self.rows.groups)
            self.batches.set_state(position)
            return state
        params = None
        if not (self.config.model.random or self.config.adapter):
            places = self.trainer.state_shardings.params
            params = weights.stacked_from_bundle(self.bundle, decoder, self.mesh, places)
        return self.trainer.initial_state(params)

    # -------------------------------------------------------------------------------------------- steps

    def train(self, progress: bool | None) -> Outcome:
        config = self.config
        show = None if progress is None else not progress
        bar = tqdm(
            total=config.steps, initial=self.step, unit=" steps", disable=show if self.first else True, leave=False
        )
        began, saved = self.step, self.checkpoints.latest()
        pending: tuple[int, Any, Any] | None = None
        clock = time.perf_counter()
        with bar, stop_signal() as stop, self._profiler() as profile:
            while self.step < config.steps:
                profile(self.step - began)
                host_batch = next(self.batches)
                batch = self.rows.spread(host_batch)
                self.state, figures = self.trainer.step(self.state, self.frozen, batch)
                self.step += 1
                # The host looks at a step while the next one runs.
                if pending:
                    clock = self._report(*pending, clock, bar)
                pending = (self.step, figures, host_batch)
                last = self.step == config.steps
                stopping = self._stopping(stop)
                save = last or stopping or self.step % config.checkpoint_every == 0
                evaluate = config.evaluation and (last or self.step % config.evaluate_every == 0)
                draw = config.samples and (last or self.step % config.samples.every == 0)
                if save or evaluate or draw:
                    clock = self._report(*pending, clock, bar)  # a state that is not finite must not be kept
                    pending = None
                    if evaluate:
                        self._evaluate()
                    if draw:
                        self._draw()
                    if save and self.step != saved:
                        self.checkpoints.save(self.step, self.state, self.batches.get_state(), self.rows.group)
                        saved = self.step
                    clock = time.perf_counter()
                if stopping and not last:
                    self.checkpoints.finish(self.step)
                    return Outcome(self.step, None)
            self.checkpoints.finish(self.step)
        return Outcome(self.step, self._export())

    def _report(self, step: int, figures: dict[str, jax.Array], batch: Any, clock: float, bar: tqdm) -> float:
        """Waits for a step's figures, checks and writes them; returns the time."""
        values = {name: float(value) for name, value in figures.items()}
        now = time.perf_counter()
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self._stop_not_finite(step, values, batch)
        seconds = now - clock
        frozen = self.config.adapter is not None
        flops = step_flops(self.trainer.decoder, values["tokens"], values.pop("attended"), frozen)
        values |= {"seconds": seconds, "tokens_per_second": values["tokens"] / seconds}
        if not math.isnan(self._peak):
            values["mfu"] = flops / seconds / self._peak
        if self.metrics and (step % self.config.log_every == 0 or step == self.config.steps):
            self.metrics.write(step, values)
        bar.update(step - bar.n)
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s")
        return now

    def _stop_not_finite(self, step: int, values: dict[str, float], batch: Any) -> None:
        file = self.directory / f"batch-{step}-process-{jax.process_index()}.npz"
        with new_file(file) as temporary:
            np.savez(temporary, **batch)
        self.checkpoints.finish(step)
        last = self.checkpoints.latest()
        kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
        raise Emu3Error(
            f"the loss is {values['loss']} and the gradient's norm {values['gradient_norm']} at batch {step}, which is "
            f"in {file}; {kept}; lower optimizer.learning_rate or look at the data, then run again"
        )

    def _stopping(self, stop: list[int]) -> bool:
        if jax.process_count() > 1:
            return self.checkpoints.reached_preemption(self.step)
        return bool(stop)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        """A function of the steps taken since the start, which records those that `config.profile` names."""
        window = self.config.profile
        running = False

        def profile(taken: int) -> None:
            nonlocal running
            if window and taken == window[0]:
                jax.block_until_ready(self.state)
                jax.profiler.start_trace(str(self.directory / "profile"))
                running = True
            elif running and taken == sum(window):
                jax.block_until_ready(self.state)
                jax.profiler.stop_trace()
                running = False

        try:
            yield profile
        finally:
            if running:
                jax.profiler.stop_trace()

    # -------------------------------------------------------------------------------------------- between steps

    def _evaluate(self) -> None:
        config = self.config
        for name, source in config.evaluation:
            batches = evaluation_batches(
                source,
                self.tokenizer,
                self.templates,
                self.rows.count,
                config.data.sequence_length,
                too_long=config.data.too_long,
                codebook_sha256=self.codebook,
                process_index=self.rows.group,
                process_count=self.rows.groups,
            )
            total = np.zeros(4)
            try:
                for batch in batches:
                    sums = self.trainer.evaluate(self.state.params, self.frozen, self.rows.spread(batch))
                    total += [float(x) for x in (sums.text, sums.vision, sums.text_count, sums.vision_count)]
            finally:
                batches.close()
            text, vision, texts, visions = total
            if self.metrics:
                self.metrics.write(
                    self.step,
                    {
                        "loss": (text + vision) / max(texts + visions, 1),
                        "loss_text": text / max(texts, 1),
                        "loss_vision": vision / max(visions, 1),
                        "targets": texts + visions,
                    },
                    f"evaluation/{name}",
                )

    def _draw(self) -> None:
        samples = self.config.samples
        if self._model is None:
            places = vision_shardings(self.bundle.vision_config, self.mesh)
            vision_params = self.bundle.load_vision(places)
            vision = Vision(self.bundle.vision_config, self.bundle.image_config, vision_params)
            convert = weights.make_inference_params(self.trainer.decoder, self.config.adapter, self.mesh)
            self._model = (vision, convert)
        vision, convert = self._model
        params = convert(self.state.params, self.frozen)
        language = Language(self.trainer.decoder, params, self.tokenizer, self.templates, self.mesh)
        seed = int(np.asarray(self.state.key)[-1]) % (2**32 - len(samples.prompts))
        pictures = Emu3(f"step {self.step}", language, vision).generate(
            samples.prompts,
            ratio=samples.ratio,
            area=samples.area,
            guidance=samples.guidance,
            seed=seed,
            progress=False,
        )
        if self.first:
            with files_into(self.directory / "samples" / f"{self.step:08d}") as directory:
                for index, picture in enumerate(pictures):
                    save_png(picture, directory / f"{index:03d}.png", picture.info)

    def _export(self) -> pathlib.Path:
        """The trained model as `DIRECTORY/model`, from the checkpoint on disk."""
        target, new = self.directory / "model", self.directory / "model.new"
        if self.first:
            shutil.rmtree(new, ignore_errors=True)
            weights.export_run(self.directory, new, self.step)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
        distributed.wait("the model is written")
        return target


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that SIGTERM puts its number into; elsewhere than in the main thread it stays empty.

    Where there are several processes JAX itself waits for the signal, to tell them all (`reached_preemption`).
    """
    received: list[int] = []
    if jax.process_count() > 1:
        yield received
        return
    try:
        old = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    except ValueError:
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, old)
