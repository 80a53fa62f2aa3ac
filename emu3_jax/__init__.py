"""Emu3 in JAX: one decoder over discrete tokens writes and reads pictures, clips and text."""

import importlib
import typing

if typing.TYPE_CHECKING:  # what `_PUBLIC` loads, for editors and type checkers
    from emu3_jax.checkpoints.convert import convert as convert
    from emu3_jax.checkpoints.export import export as export
    from emu3_jax.config import AreaConfig as AreaConfig
    from emu3_jax.config import DecoderConfig as DecoderConfig
    from emu3_jax.config import IbqConfig as IbqConfig
    from emu3_jax.config import ImageConfig as ImageConfig
    from emu3_jax.config import SpecialTokens as SpecialTokens
    from emu3_jax.config import VisionConfig as VisionConfig
    from emu3_jax.errors import Emu3Error as Emu3Error
    from emu3_jax.generation.pictures import Generation as Generation
    from emu3_jax.generation.pieces import Document as Document
    from emu3_jax.generation.pieces import Growing as Growing
    from emu3_jax.generation.pieces import Piece as Piece
    from emu3_jax.generation.pipeline import Emu3 as Emu3
    from emu3_jax.generation.turns import Turns as Turns
    from emu3_jax.loading import load as load
    from emu3_jax.media.clips import Clip as Clip
    from emu3_jax.models.adapters import Adapter as Adapter
    from emu3_jax.trainers import train as train
    from emu3_jax.training.config import TrainConfig as TrainConfig

# The only place of the version: pyproject.toml reads it here, without running this file.
__version__ = "0.1.0"

# Loaded on first use, so that `emu3-jax --help` need not wait for JAX.
_PUBLIC = {
    "Adapter": "emu3_jax.models.adapters",
    "AreaConfig": "emu3_jax.config",
    "Clip": "emu3_jax.media.clips",
    "DecoderConfig": "emu3_jax.config",
    "Document": "emu3_jax.generation.pieces",
    "Emu3": "emu3_jax.generation.pipeline",
    "Emu3Error": "emu3_jax.errors",
    "Generation": "emu3_jax.generation.pictures",
    "IbqConfig": "emu3_jax.config",
    "Growing": "emu3_jax.generation.pieces",
    "ImageConfig": "emu3_jax.config",
    "Piece": "emu3_jax.generation.pieces",
    "SpecialTokens": "emu3_jax.config",
    "TrainConfig": "emu3_jax.training.config",
    "Turns": "emu3_jax.generation.turns",
    "VisionConfig": "emu3_jax.config",
    "convert": "emu3_jax.checkpoints.convert",
    "export": "emu3_jax.checkpoints.export",
    "load": "emu3_jax.loading",
    "train": "emu3_jax.trainers",
}

__all__ = sorted([*_PUBLIC, "__version__"])


if not typing.TYPE_CHECKING:  # type checkers would believe that it knows every name

    def __getattr__(name: str) -> typing.Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
