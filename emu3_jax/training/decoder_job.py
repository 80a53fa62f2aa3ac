"""Training of the decoder on token sequences: the `Job` that `training.loop.train` gives to `training.runner`."""

import contextlib
import dataclasses
import functools
import math
import operator
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.checksums import part_digest
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import Source
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.pipeline import (
    ORDERS,
    Batches,
    began_in_order,
    evaluation_batches,
    open_prepared,
    training_batches,
)
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.language import Language
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.sizes import generate_size
from emu3_jax.printable import printable
from emu3_jax.sharding.rules import vision_shardings
from emu3_jax.storage import is_remote, place
from emu3_jax.text.prompts import prompt_templates
from emu3_jax.training import summary, weights
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.examples import example_command
from emu3_jax.training.flops import peak_flops, step_flops
from emu3_jax.training.host_rows import HostRows
from emu3_jax.training.references import References, attached
from emu3_jax.training.run_directory import Identity
from emu3_jax.training.runner import Batch, Cadence, Evaluation
from emu3_jax.training.step import Trainer, TrainState
from emu3_jax.training.summary import counted


def _check_parts(config: TrainConfig, mesh: Mesh) -> None:
    part = config.batch_size // config.accumulation
    HostRows(mesh, part, config.together)  # raises if the mesh does not divide a part's rows
    length, parts = config.data.sequence_length, mesh.shape["sequence"]
    if length % parts:
        raise Emu3Error(f"sequence_length is {length}, which mesh sequence={parts} does not divide: change one of them")


class DecoderJob:
    """The `Job` that trains the decoder on token sequences. Make and use it within `use_mesh(mesh)`."""

    def __init__(
        self,
        config: TrainConfig,
        bundle: Bundle,
        decoder: DecoderConfig,
        mesh: Mesh,
        adapter_only: bool = False,
        progress: bool | None = None,
    ):
        self._config, self._bundle, self._decoder, self._mesh = config, bundle, decoder, mesh
        self._progress = progress
        self._rows = HostRows(mesh, config.batch_size, config.together)
        _check_parts(config, mesh)
        self._tokenizer = bundle.tokenizer()
        self._templates = prompt_templates(bundle.template, decoder.clip_layout)
        self._check_vision()
        self._codebook = bundle_codebook(bundle).sha256 if bundle.has("vision") else None
        self._evaluated = [
            (name, len(open_prepared(source, self._tokenizer, self._codebook))) for name, source in config.evaluation
        ]
        self._trainer = Trainer(config, decoder, mesh)
        self._batches = self._open_batches()
        # The reference's log-probabilities of the training pairs, and of each evaluation's.
        self._stored: list[np.ndarray | None] = [None] * (1 + len(config.evaluation))
        self._compiled: jax.stages.Compiled | None = None
        self._peak = peak_flops(mesh.devices.flat[0].device_kind) * mesh.size
        self.share = (self._rows.group, self._rows.groups)
        self.product = "adapter" if adapter_only else "model"
        self.cadence = Cadence(
            steps=config.steps,
            watch_every=1,
            look_behind=1,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep,
            evaluate_every=config.evaluate_every if config.evaluation else None,
            sample_every=config.samples.every if config.samples else None,
            profile=config.profile,
        )

    def _open_batches(self) -> Any:
        """The iterator over this process' batches."""
        return self._batches_in_order(ORDERS[-1])

    def _batches_in_order(self, order: int) -> Batches:
        return training_batches(
            self._config.data,
            self._tokenizer,
            self._templates,
            self._rows.count,
            codebook_sha256=self._codebook,
            process_index=self._rows.group,
            process_count=self._rows.groups,
            rows=self._rows.mine,
            order=order,
        )

    def close(self) -> None:
        """Ends the threads that read the data."""
        self._batches.close()

    def _check_vision(self) -> None:
        path, special = self._bundle.path, self._decoder.tokens
        if self._tokenizer.special != special:
            found, wanted = ((t.visual_start, t.visual_count) for t in (self._tokenizer.special, special))
            raise Emu3Error(
                f"{path}: this bundle has {found[1]} visual ids from {found[0]} on, the config's "
                f"model.decoder.tokens has {wanted[1]} from {wanted[0]} on: make the two agree"
            )
        grpo = self._config.grpo
        if self._config.samples or (grpo is not None and grpo.max_new_tokens is None):
            codes = self._bundle.vision_config.codebook_size
            if codes != special.visual_count:
                raise Emu3Error(
                    f"{path}: the vision tokenizer has {codes} codes, the decoder {special.visual_count}, so samples "
                    "cannot be decoded: put the decoder's own vision tokenizer into the bundle, or leave samples out"
                )
        if samples := self._config.samples:  # a wrong area must fail now, not at the first samples
            area = self._decoder.image_area if samples.area is None else samples.area
            generate_size(samples.ratio, area, self._bundle.vision_config.spatial_factor, name="samples.area")

    # -------------------------------------------------------------------------------------------- for people

    def describe(self) -> list[str]:
        config, decoder, trainer = self._config, self._decoder, self._trainer
        state, frozen = trainer.abstract_state(), trainer.abstract_frozen()
        count = sum(math.prod(param.shape) for param in decoder_params(decoder))
        lines = [f"trained: all {count:,} parameters"]
        if config.adapter:
            rank, trained = config.adapter.rank, summary.parameters(state.params)
            lines = [f"trained: adapters of rank {rank} ({trained:,} parameters); {count:,} parameters are frozen"]
        rows, length = config.batch_size, config.data.sequence_length
        parts = f", in {config.accumulation} parts" if config.accumulation > 1 else ""
        lines.append(
            f"a step: {counted(rows, 'row')}{self._row_groups()} of {length:,} tokens, up to {rows * length:,} "
            f"tokens{parts}"
        )
        lines += self._describe_data()
        lines.append(summary.devices(self._mesh))
        parts_of_memory = {
            "frozen weights": frozen,
            "parameters": state.params,
            "optimizer": state.opt_state,
            "gradients": state.params,
        }
        return [*lines, *summary.memory(parts_of_memory | self._further_memory(), self._mesh)]

    def _further_memory(self) -> dict[str, Any]:
        """Further trees of arrays that lie in memory beside the state, by name."""
        return {}

    def _row_groups(self) -> str:
        """What the rows of a step are, in brackets, or nothing."""
        return f" ({counted(self._config.batch_size // 2, 'pair')})" if self._config.data.pairs else ""

    def _describe_data(self) -> list[str]:
        noun = "pair" if self._config.data.pairs else "record"
        lines = [f"data: {summary.sources(self._batches.sources, noun)}"]
        if self._evaluated:
            sets = ", ".join(f"{printable(name)} ({counted(count, noun)})" for name, count in self._evaluated)
            lines.append(f"evaluation every {self._config.evaluate_every:,} steps: {sets}")
        return lines

    def step_memory(self) -> str:
        return "" if self._compiled is None else summary.step_memory(self._compiled, self._mesh)

    def usage(self, model: pathlib.Path) -> str:
        written, bundle = (shlex.quote(printable(str(path))) for path in (model, self._config.model.bundle))
        options = f"--model {written}"
        if self.product == "adapter":
            options = f"--model {bundle} --adapter {written}"
        if not self._bundle.has("vision"):
            options += " --vision BUNDLE"
        if command := self._example(options):
            return command
        if self.product == "adapter":
            return f"emu3-jax merge {bundle} --adapter {written} -o out/merged"
        return f"emu3-jax doctor {written}"

    def _example(self, options: str) -> str | None:
        """A command that uses the model, or None if no command suits."""

        def first(source: Source) -> Any:
            return open_prepared(source, self._tokenizer, self._codebook)[0]

        return example_command(self._config.data.sources, self._config.samples, first, options)

    # -------------------------------------------------------------------------------------------- the state

    @property
    def identity(self) -> Identity:
        config = self._config
        decoder = dataclasses.replace(self._decoder, dtype=config.model.dtype).to_dict()
        adapter = None if config.adapter is None else dataclasses.asdict(config.adapter)
        bundle = config.model.bundle
        bundle = bundle if is_remote(bundle) else str(pathlib.Path(bundle).absolute())
        fixed = {"decoder": decoder, "adapter": adapter}
        if self._compares:  # another bundle would be another reference
            fixed["reference"] = {"decoder": self._decoder_digest}
        return Identity(fixed=fixed, other={"bundle": bundle})

    def abstract_state(self) -> TrainState:
        return self._trainer.abstract_state()

    def initial_state(self) -> TrainState:
        params = None if self._config.model.random or self._config.adapter else self._load_params()
        return self._trainer.initial_state(params)

    def _load_params(self) -> Any:
        """The bundle's weights in float32, of which all are trained."""
        places = self._trainer.state_shardings.params
        return weights.stacked_from_bundle(self._bundle, self._decoder, self._mesh, places)

    def _load_frozen(self) -> Any:
        """The frozen weights beside adapters, or an empty dict if all weights are trained."""
        adapter = self._config.adapter
        if adapter is None:
            return {}
        return weights.frozen_from_bundle(self._bundle, self._decoder, adapter, self._trainer.frozen_shardings)

    # -------------------------------------------------------------------------------------------- steps

    def start(self, step: int, positions: Sequence[Any] | None) -> None:
        self._frozen = self._load_frozen()  # here, so that loading does not count as time of the first step
        if self._compares:
            self._stored = self._references()
        if positions is not None:
            self._set_positions(positions)

    def _set_positions(self, positions: Sequence[Any]) -> None:
        """Moves the batches to the positions that all shares saved."""
        order = began_in_order(positions)
        if order == ORDERS[-1]:
            self._batches.set_state(*positions)
            return
        group, groups = self._rows.group, self._rows.groups
        if len(positions) != groups:
            raise Emu3Error(
                f"{self._config.directory}: this run began with version 0.1.0, whose order of records depends on the "
                f"number of processes; it read its data in {len(positions)} shares, now there are {groups}: resume "
                "with as many processes as before, or start a new run in another directory"
            )
        self._batches.close()
        self._batches = self._batches_in_order(order)
        self._batches.set_state(positions[group])

    # -------------------------------------------------------------------------------------------- references

    @property
    def _compares(self) -> bool:
        """Whether the objective reads log-probabilities of a reference."""
        return "reference" in self._trainer.objective.arrays

    @functools.cached_property
    def _decoder_digest(self) -> str:
        return part_digest(self._bundle.files, "decoder")

    def _references(self) -> list[np.ndarray | None]:
        """The reference's log-probabilities of the training pairs, and of each evaluation's pairs."""
        config, trainer = self._config, self._trainer
        kept = References(place(config.directory), self._progress)
        model = {
            "decoder": self._decoder_digest,
            "adapter base": config.adapter and config.adapter.base,
            "dtype": config.model.dtype,
            "templates": dataclasses.asdict(self._templates),
        }

        @functools.cache
        def compute() -> Callable[[Batch], tuple[np.ndarray, np.ndarray]]:
            params = trainer.initial_state().params if config.adapter else self._load_params()

            def run_batch(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
                log_probs, pairs = trainer.reference(params, self._frozen, self._rows.spread(batch))
                return np.asarray(log_probs), np.asarray(pairs)

            return run_batch

        def of(source: Source) -> np.ndarray:
            data = open_prepared(source, self._tokenizer, self._codebook)
            row = {"length": config.data.sequence_length, "too long": config.data.too_long}
            identity = {**model, **row, "data": data.index.job, "task": repr(source.task)}
            per_batch = self._rows.count * self._rows.groups // 2
            return kept.get(identity, len(data), per_batch, lambda: self._one_pass(source), compute)

        training = np.concatenate([of(source) for source in config.data.sources])
        return [training, *(of(source) for _, source in config.evaluation)]

    # -------------------------------------------------------------------------------------------- batches

    def position(self) -> Any:
        return self._batches.get_state()

    def next_batch(self) -> Batch:
        return attached(next(self._batches), self._stored[0])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, figures = self._update(state, self._rows.spread(batch))
        if self._skips:
            figures["skipped"] = self._rows.total(self._batches.skipped)
        return state, figures

    def _update(self, state: TrainState, rows: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        """Runs the compiled step on the arrays of a batch."""
        arguments = (state, self._frozen, rows)
        if self._compiled is None:  # compiled ahead of time, because only that tells its memory
            self._compiled = self._trainer.step.lower(*arguments).compile()
        return self._compiled(*arguments)

    @property
    def _skips(self) -> bool:
        """Whether records longer than a row are skipped."""
        return self._config.data.too_long == "skip"

    def skipped(self) -> int:
        return int(self._rows.total(self._batches.skipped)) if self._skips else 0

    def report(self, figures: dict[str, float], seconds: float) -> tuple[dict[str, float], str]:
        line = dict(figures)
        frozen = self._config.adapter is not None
        flops = step_flops(self._trainer.decoder, line["tokens"], line.pop("attended"), frozen)
        line |= {"seconds": seconds, "tokens_per_second": line["tokens"] / seconds}
        if not math.isnan(self._peak):
            line["mfu"] = flops / seconds / self._peak
        notes = [self._trainer.objective.note(line), f"{line['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in line:
            notes.append(f"MFU {line['mfu']:.1%}")
        if skipped := line.get("skipped", 0):
            notes.append(f"{skipped:,.0f} skipped")
        return line, ", ".join(notes)

    def not_finite(self, step: int, batch: Batch, directory: pathlib.Path) -> tuple[str, str]:
        file = directory / f"batch-{step}-process-{jax.process_index()}.npz"
        arrays: dict[str, Any] = dict(batch)
        with new_file(file) as temporary:
            np.savez(temporary, **arrays)
        return f"step {step}, whose batch is in {file}", "lower optimizer.learning_rate or check the data"

    # -------------------------------------------------------------------------------------------- between steps

    def evaluate(self, state: TrainState) -> Iterator[Evaluation]:
        for number, (name, source) in enumerate(self._config.evaluation):
            yield self._evaluate(name, source, state, self._stored[1 + number])

    def _one_pass(self, source: Source) -> Batches:
        """One pass over a source in order."""
        data = self._config.data
        return evaluation_batches(
            source,
            self._tokenizer,
            self._templates,
            self._rows.count,
            data.sequence_length,
            too_long=data.too_long,
            codebook_sha256=self._codebook,
            process_index=self._rows.group,
            process_count=self._rows.groups,
        )

    def _evaluate(self, name: str, source: Source, state: TrainState, stored: np.ndarray | None) -> Evaluation:
        data, objective = self._config.data, self._trainer.objective
        batches = self._one_pass(source)
        total, skipped = None, 0
        with contextlib.closing(batches):
            for batch in batches:
                rows = self._rows.spread(attached(batch, stored))
                sums = jax.tree.map(float, self._trainer.evaluate(state.params, self._frozen, rows))
                total = sums if total is None else jax.tree.map(operator.add, total, sums)
            if self._skips:
                skipped = int(self._rows.total(batches.skipped))
        figures: dict[str, float] = {"loss": objective.loss(total), **objective.figures(total)}
        note = objective.note(figures)
        if not self._skips:
            return Evaluation(name, figures, note)
        if skipped:
            note += f", {skipped} records longer than {data.sequence_length} tokens skipped"
        return Evaluation(name, figures | {"skipped": skipped}, note)

    def sample(self, state: TrainState) -> list[Image.Image]:
        samples = self._config.samples
        assert samples is not None  # without samples the cadence never calls this
        return Emu3(f"step {int(state.step)}", self._language(state), self._vision).generate(
            samples.prompts,
            ratio=samples.ratio,
            area=samples.area,
            guidance=samples.guidance,
            seed=int(np.asarray(state.key)[-1]) % (2**32 - len(samples.prompts)),
            progress=False,
        )

    @functools.cached_property
    def _vision(self) -> Vision:
        bundle = self._bundle
        params = bundle.load_vision(vision_shardings(bundle.vision_config, self._mesh))
        return Vision(bundle.vision_config, bundle.image_config, params)

    def _language(self, state: TrainState) -> Language:
        """The model with its present weights, for generation. The weights move on the devices, without files."""
        params = self._inference_params(state.params, self._frozen)
        return Language(self._trainer.decoder, params, self._tokenizer, self._templates, self._mesh)

    @functools.cached_property
    def _inference_params(self) -> Callable[[Any, Any], Any]:
        """Turns (trained, frozen) parameters into those for generation."""
        return weights.make_inference_params(
            self._trainer.decoder, self._config.adapter, self._mesh, gathered=self._config.gather_weights
        )

    def export(self, directory: pathlib.Path, target: pathlib.Path, step: int) -> int:
        write = weights.export_adapter if self.product == "adapter" else weights.export_run
        return write(directory, target, step)
