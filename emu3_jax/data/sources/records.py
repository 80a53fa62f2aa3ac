"""Makes records from the examples of any source. Each picture is read, resized and encoded on demand."""

import hashlib
import threading
from typing import Any

import numpy as np

from emu3_jax.config import AreaConfig
from emu3_jax.data.manifest import check_area, resize_to_area
from emu3_jax.data.records import Part, Record
from emu3_jax.data.sources.examples import Example, Medium, Source, where_once
from emu3_jax.data.sources.recent import Recent
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.text.tokenizer import SpecialTokenError, Tokenizer

_RECENT = 64  # pictures whose codes stay in memory in any case; more than the usual number of threads
_ROOM = 64 << 20  # bytes of codes that stay in memory: many documents may share a few thousand small pictures
_ENCODING = 2  # one picture on the device and one in transfer; more would need memory without being faster


class SourceRecords:
    """Entries for `prepare`, made from a source and a vision tokenizer."""

    def __init__(self, source: Source, model: Emu3, area: int | None, tokenizer: Tokenizer | None = None):
        """Stores how examples become records.

        Args:
            source: the examples.
            model: the model whose vision tokenizer encodes pictures.
            area: area in pixels to which pictures and frames are resized first, as in the reference's data preparation.
                The image processor of Emu3 may resize them again; that of Emu3.5 takes this area for its own. With
                None, only the image processor resizes them.
            tokenizer: if given, texts with control tokens are refused here. Otherwise training would refuse them.
        """
        check_area(area, model.vision.config.spatial_factor)
        self._source, self._model, self._area, self._tokenizer = source, model, area, tokenizer
        self._device = threading.Semaphore(_ENCODING)
        # Examples near each other often share a picture.
        self._codes = Recent(self._encode, _RECENT, _ROOM, lambda codes: codes.nbytes)
        settings = f"{source.digest} {area} {model.vision.config} {model.vision.image}"
        self.digest = hashlib.sha256(settings.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def check(self, index: int) -> None:
        """Raises an `Emu3Error` if entry `index` has an error that can be found without reading its picture."""
        self._example(index)

    def identity(self, index: int) -> bytes:
        """A hash of the contents of entry `index`; see `Example.identity`."""
        return self._source[index].identity()

    def __getitem__(self, index: int) -> Record:
        """Makes record `index`. Raises an `Emu3Error` that names the example if that fails."""
        example = self._example(index)
        try:
            codes = self._codes_of(example.medium)
            document = tuple(Part(part.role, part.text, self._codes_of(part.medium)) for part in example.document)
        except Emu3Error as error:
            raise Emu3Error(where_once(example.where, error)) from error
        return Record(example.name, example.text, codes, example.conversation, document)

    def _example(self, index: int) -> Example:
        example = self._source[index]
        try:
            for medium in example.media:
                medium.check()
            if self._tokenizer is not None:
                for text in example.texts:
                    self._tokenizer.encode(text)
        except SpecialTokenError as error:
            raise Emu3Error(f"{example.where}: the text contains the special token {error.token}: remove it") from error
        except Emu3Error as error:
            raise Emu3Error(where_once(example.where, error)) from error
        return example

    def _codes_of(self, medium: Medium | None) -> np.ndarray | None:
        return None if medium is None else self._codes[medium]

    def _encode(self, medium: Medium) -> np.ndarray:
        """Encodes a picture or clip to codes."""
        media = medium.load()
        settings: dict[str, Any] = {}
        if self._area is not None and isinstance(self._model.vision.image, AreaConfig):
            settings = {"area": self._area}  # resized once, as Emu3.5 does
        elif self._area is not None:
            media = resize_to_area(media, self._area)
        with self._device:
            return self._model.tokenize([media], **settings)[0]
