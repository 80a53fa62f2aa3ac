"""Pictures that the model drew for prompts, with their log-probabilities, as a directory of shards.

`sampling.sample` writes such directories, which is the work of `emu3-jax sample`. The samples of a prompt form a group;
they all lie in one shard. Codes are stored as they were drawn and never encoded again.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from emu3_jax.data.records import SAMPLES, check_text, read_header, stored_codes
from emu3_jax.data.shards import PreparedShards, Shard
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_number, is_whole
from emu3_jax.foreign import reading
from emu3_jax.printable import shown

_AGAIN = "draw the samples again"
_TEXTS, _COUNTS = ("prompt", "negative", "model"), ("number", "group", "top_k", "seed")
_NUMBERS = ("guidance", "temperature", "top_p")


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnSample:
    """A picture that the model drew.

    Attributes:
        number: number of the sample in its directory, from 0.
        group: number of its prompt, from 0. All samples of a prompt have the same.
        prompt: the prompt.
        negative: the negative prompt.
        guidance: guidance scale.
        temperature: sampling temperature; 0 is greedy.
        top_k: number of likeliest tokens that were sampled from.
        top_p: total probability of the likeliest tokens that were sampled from.
        seed: seed of the random numbers.
        model: name of the model.
        codes: int32 [h, w], as they were drawn.
        log_probs: float32 [h, w], the log-probability of each code under the distribution that it was drawn from, in
            nats: see `generation.log_probs.LogProbs.sampled`.
        model_log_probs: float32 [h, w], the log-probability of each code under the model without guidance, at
            temperature 1, of all visual tokens: see `generation.log_probs.LogProbs.model`.
    """

    number: int
    group: int
    prompt: str
    negative: str
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    model: str
    codes: np.ndarray
    log_probs: np.ndarray
    model_log_probs: np.ndarray

    @property
    def log_prob(self) -> float:
        """The sum of `log_probs`, in nats: log-probability of the whole picture."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def model_log_prob(self) -> float:
        """The sum of `model_log_probs`, in nats."""
        return float(self.model_log_probs.sum(dtype=np.float64))

    def to_bytes(self) -> bytes:
        """Serialises the sample: a line of JSON, then the codes, then both log-probabilities as float32."""
        described, words = stored_codes(self.codes)
        header = {name: getattr(self, name) for name in (*_COUNTS, *_TEXTS, *_NUMBERS)} | {"codes": described}
        floats = (array.astype("<f4").tobytes() for array in (self.log_probs, self.model_log_probs))
        return json.dumps(header, ensure_ascii=False, allow_nan=False).encode() + b"\n" + words + b"".join(floats)

    @classmethod
    def from_bytes(cls, data: bytes) -> "DrawnSample":
        """Reads bytes that `to_bytes` wrote. Raises an `Emu3Error` if they are damaged."""
        with reading("the sample", _AGAIN):
            header, stored = read_header("the sample", data)
            fields: dict[str, Any] = {name: check_text(name, header[name]) for name in _TEXTS}
            for names, ok in ((_COUNTS, lambda value: is_whole(value, 0)), (_NUMBERS, is_number)):
                for name in names:
                    if not ok(header[name]):
                        raise Emu3Error(f"the sample is damaged ({name} is {shown(header[name])}); {_AGAIN}")
                    fields[name] = header[name]
            codes = stored.read(header["codes"], (2,))
            arrays = [stored.read_floats(codes.shape) for _ in range(2)]
            stored.end()
            return cls(codes=codes, log_probs=arrays[0], model_log_probs=arrays[1], **fields)


class Samples(PreparedShards):
    """Random access to the samples of a directory that `emu3-jax sample` wrote.

    `samples[i]` reads sample i, `len(samples)` counts them, and `groups` reads them prompt by prompt.
    """

    kind: ClassVar[str] = SAMPLES

    def __getitem__(self, index: int) -> DrawnSample:
        """Reads sample `index`. Raises an `Emu3Error` that names the shard if it is damaged."""
        return self._read(index, DrawnSample.from_bytes)

    def groups(self, shard: int | None = None) -> Iterator[list[DrawnSample]]:
        """Yields the samples of each prompt, in the order of the prompts; of one shard, or of all."""
        ends = np.cumsum([0, *(one.records for one in self.index.shards)])
        first, end = (0, len(self)) if shard is None else (ends[shard], ends[shard + 1])
        drawn = (self[index] for index in range(int(first), int(end)))
        for _, group in itertools.groupby(drawn, key=lambda sample: sample.group):
            yield list(group)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in order."""
        return self.index.shards
