"""The records of any source: pictures are read, resized and encoded one by one, when asked for."""

import hashlib
import threading

import numpy as np

from emu3_jax.data.manifest import check_area, resize_to_area
from emu3_jax.data.records import Record
from emu3_jax.data.sources.examples import Example, Medium, Source, where_once
from emu3_jax.data.sources.recent import Recent
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.text.tokenizer import SpecialTokenError, Tokenizer

_RECENT = 64  # pictures whose codes are kept: more than the threads that read
_ENCODING = 2  # one picture on the device, and one on its way there: more would only take memory


class SourceRecords:
    """Entries for `prepare`, of a source and a vision tokenizer."""

    def __init__(self, source: Source, model: Emu3, area: int | None, tokenizer: Tokenizer | None = None):
        """Sets out how examples become records.

        Args:
            source: the examples.
            model: its vision tokenizer encodes.
            area: pixels that pictures and frames are resized to before the image processor has its say, keeping their
                shape, as the reference's data preparation does; None leaves their size to the image processor alone.
            tokenizer: where given, texts with control tokens in them are refused now rather than in training.
        """
        check_area(area)
        self._source, self._model, self._area, self._tokenizer = source, model, area, tokenizer
        self._device = threading.Semaphore(_ENCODING)
        self._codes = Recent(self._encode, _RECENT)  # examples near each other often share a picture
        settings = f"{source.digest} {area} {model.vision.config} {model.vision.image}"
        self.digest = hashlib.sha256(settings.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def check(self, index: int) -> None:
        """Raises the `Emu3Error` that is known of entry `index` before its picture is read."""
        self._example(index)

    def identity(self, index: int) -> bytes:
        """What entry `index` shows, as a hash; see `Example.identity`."""
        return self._source[index].identity()

    def __getitem__(self, index: int) -> Record:
        """Record `index`. Raises `Emu3Error` that names the example if it cannot be made."""
        example = self._example(index)
        try:
            codes = None if example.medium is None else self._codes[example.medium]
        except Emu3Error as error:
            raise Emu3Error(where_once(example.where, error)) from error
        return Record(example.name, example.text, codes, example.conversation)

    def _example(self, index: int) -> Example:
        example = self._source[index]
        try:
            if example.medium is not None:
                example.medium.check()
            if self._tokenizer is not None:
                for text in (example.text, *(turn.text for turn in example.conversation)):
                    self._tokenizer.encode(text)
        except SpecialTokenError as error:
            raise Emu3Error(
                f"{example.where}: the text contains the special token {error.token}: take it out"
            ) from error
        except Emu3Error as error:
            raise Emu3Error(where_once(example.where, error)) from error
        return example

    def _encode(self, medium: Medium) -> np.ndarray:
        """The codes of a picture or clip."""
        media = medium.load()
        if self._area is not None:
            media = resize_to_area(media, self._area)
        with self._device:
            return self._model.tokenize([media])[0]
