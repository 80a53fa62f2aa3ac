"""The limits of requests: bytes, seconds, characters, pictures and pixels."""

import dataclasses

from emu3_jax.media.sizes import check_ratio


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may send. The defaults suit a lab that shares one machine.

    Attributes:
        body_bytes: bytes of a body.
        held_bytes: bytes of all bodies that are in memory at the same time. A body counts until the end of the answer,
            unless it is small.
        body_seconds: time in which a whole body must arrive.
        send_seconds: time in which a client must take each part of an answer.
        answer_seconds: time in which a whole answer must be there.
        json_values: values in a body. A value of two bytes can take 100 bytes in memory.
        text: characters of all prompts of a request together.
        messages: messages of a chat.
        pictures: pictures of a chat.
        picture_pixels: pixels of all uploaded pictures of a request, checked before they are decoded.
        n: pictures or answers per request.
        partial_images: partial pictures per picture.
        max_new_tokens: tokens of an answer.
        decoders: pictures that are decoded at the same time.
    """

    body_bytes: int = 32 << 20
    held_bytes: int = 512 << 20
    body_seconds: float = 60.0
    send_seconds: float = 60.0
    answer_seconds: float = 3600.0
    json_values: int = 200_000
    text: int = 32_000
    messages: int = 64
    pictures: int = 8
    picture_pixels: int = 50_000_000
    n: int = 10
    partial_images: int = 100
    max_new_tokens: int = 16_384
    decoders: int = 2


USUAL_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")  # of the page, and of OpenAI's sizes


def ratio_list(text: str) -> tuple[str, ...]:
    """Ratios in a text, with commas between them. Raises an `Emu3Error` that names one that is not legal."""
    ratios = tuple(text.split(","))
    for ratio in ratios:
        check_ratio(ratio)
    return ratios
