"""`train`: a run that trains the decoder, from its config to the exported bundle."""

import contextlib
import dataclasses
import logging

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import FREE_FIELDS, DecoderConfig, other_field
from emu3_jax.errors import Emu3Error
from emu3_jax.files import require_outside
from emu3_jax.models.capability import emulates_bfloat16
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.storage import place, storage_place
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.decoder_job import DecoderJob
from emu3_jax.training.runner import Outcome, run

_log = logging.getLogger("emu3_jax")


def train(
    config: TrainConfig,
    progress: bool | None = None,
    *,
    verify: bool = False,
    adapter_only: bool = False,
    job: type[DecoderJob] = DecoderJob,
) -> Outcome:
    """Trains the decoder and exports it as a bundle to `DIRECTORY/model`.

    If `config.directory` holds checkpoints of this run, training resumes from the newest one. On Ctrl-C or SIGTERM
    (which cloud machines get before they are taken away), the run writes a checkpoint and returns.

    Args:
        config: the config of the run.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.
        verify: whether to check the files of the config's bundle against their checksums first.
        adapter_only: whether to export only the adapter, to `DIRECTORY/adapter`, instead of the merged model.
        job: what makes the run's steps.

    Returns:
        How the run ended: the last step, and the exported model's path unless the run was stopped.

    Raises:
        Emu3Error: bad input, a loss that is not finite, or files that cannot be written. Checkpoints that were
            written before are kept.
    """
    enable_persistent_cache()
    if adapter_only and config.adapter is None:
        raise Emu3Error(
            "--adapter-only: the config trains all weights and has no adapter; set adapter=Adapter(...), or leave "
            "--adapter-only out"
        )
    storage_place(config.directory)  # a bad path must fail now, not at the first checkpoint
    require_outside(config.directory, config.model.bundle)
    bundle = Bundle.open(config.model.bundle, verify=verify)
    decoder = _decoder(config, bundle)
    if not config.model.random:
        bundle = full_bundle(bundle, "the training")
    mesh = make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(mesh))
        work = job(config, bundle, decoder, mesh, adapter_only, progress)
        stack.enter_context(contextlib.closing(work))
        if config.model.dtype == "bfloat16" and emulates_bfloat16():
            _log.warning(
                "this GPU has no bfloat16, and computes it in float32, slowly; --set model.dtype=float32 is more exact"
            )
        return run(work, place(config.directory), progress)


def _decoder(config: TrainConfig, bundle: Bundle) -> DecoderConfig:
    """The config of the decoder to train. If weights come from the bundle, all but `FREE_FIELDS` must equal its own."""
    wanted = config.model.decoder
    known = bundle.decoder_config if wanted is None and bundle.has("decoder") else wanted
    if known is not None and known.family != "emu3":
        raise Emu3Error("the decoder is of Emu3.5, whose sequences training does not make yet: train one of Emu3")
    if config.model.random and wanted is not None:
        return wanted
    bundle.require("decoder")
    found = bundle.decoder_config
    if wanted is None:
        return found
    if field := other_field(found, wanted):
        raise Emu3Error(
            f"{bundle.path}: the decoder of this bundle has {field} {getattr(found, field)!r}, the config has "
            f"{getattr(wanted, field)!r}; correct the config's model.decoder, or leave it out"
        )
    # No weight depends on these fields, so training may change picture size, sequence length and clips.
    return dataclasses.replace(found, **{name: getattr(wanted, name) for name in FREE_FIELDS})
