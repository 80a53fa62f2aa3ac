"""Prompt templates: combine text and the codes of pictures and clips into one sequence of token ids."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from emu3_jax.config import CLIP_LAYOUTS, SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown
from emu3_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """The prompt format that a model was trained on. Each template contains `{image}` and `{text}` once.

    Attributes:
        understanding: template of the first turn.
        next_turn: template of later turns. The reference has no such template. Ours is the first template without the
            words before USER.
        clip_layout: order of a clip's tokens, one of `config.CLIP_LAYOUTS`; see `clip_ids`.
    """

    understanding: str
    next_turn: str
    clip_layout: str = "lines"

    def __post_init__(self) -> None:
        for template in (self.understanding, self.next_turn):
            if not isinstance(template, str) or template.count("{image}") != 1 or template.count("{text}") != 1:
                raise Emu3Error(
                    f"prompt template {shown(template)} must contain {{image}} and {{text}} once each: correct it"
                )
        if self.clip_layout not in CLIP_LAYOUTS:
            raise Emu3Error(f"clip_layout is {shown(self.clip_layout)}: it must be one of {', '.join(CLIP_LAYOUTS)}")


CHAT = PromptTemplates(  # Emu3-Chat
    "You are a helpful assistant. USER: {image}{text}. ASSISTANT:", next_turn="USER: {image}{text}. ASSISTANT:"
)
STAGE1 = PromptTemplates("{image}{text}", next_turn="{image}{text}")  # Emu3-Stage1
PRESETS = {"chat": CHAT, "stage1": STAGE1}


def prompt_templates(name: str, clip_layout: str) -> PromptTemplates:
    """Looks up templates in `PRESETS`.

    Args:
        name: a key of `PRESETS`, from the bundle's config.
        clip_layout: `clip_layout` of the decoder's config.
    """
    return dataclasses.replace(PRESETS[name], clip_layout=clip_layout)


def generation_prompt(
    tokenizer: Tokenizer, special: SpecialTokens, text: str, *size: int, allow_special: bool = False
) -> list[int]:
    """Makes the prompt of a picture or clip: BOS, the text, BOI, the size as text, IMG.

    Args:
        tokenizer: the model's tokenizer.
        special: the model's control tokens.
        text: the prompt.
        *size: rows and columns in tokens; for clips, the number of latent frames comes first.
        allow_special: whether control tokens in `text` take effect.

    Returns:
        Token ids.

    Raises:
        Emu3Error: the text contains a special token and `allow_special` is false.
    """
    body = tokenizer.encode(text, allow_special=allow_special)
    return [special.bos, *body, *media_head(tokenizer, special, *size)]


def understanding_prompt(
    tokenizer: Tokenizer,
    special: SpecialTokens,
    templates: PromptTemplates,
    text: str,
    codes: np.ndarray | Sequence[np.ndarray] | None,
    *,
    allow_special: bool = False,
) -> list[int]:
    """Makes the prompt of a question: BOS and the filled-in template. Pictures and clips replace `{image}` in order.

    Args:
        tokenizer: the model's tokenizer.
        special: the model's control tokens.
        templates: the model's templates, for example `CHAT` or `STAGE1`.
        text: the question.
        codes: codes of one picture `[h, w]` or clip `[t, h, w]`, a list of such arrays, or None.
        allow_special: whether control tokens in `text` take effect.

    Returns:
        Token ids.

    Raises:
        Emu3Error: a code is outside the codebook, or the text contains a special token and `allow_special` is false.
    """
    media = _media_ids(tokenizer, special, codes, templates.clip_layout)
    return [special.bos, *_filled(templates.understanding, tokenizer, text, media, allow_special)]


def next_turn_prompt(
    tokenizer: Tokenizer,
    special: SpecialTokens,
    templates: PromptTemplates,
    text: str,
    codes: np.ndarray | Sequence[np.ndarray] | None = None,
    *,
    allow_special: bool = False,
) -> list[int]:
    """Makes the ids of a further question, which follow an answer and its EOS; see `understanding_prompt`."""
    media = _media_ids(tokenizer, special, codes, templates.clip_layout)
    return _filled(templates.next_turn, tokenizer, text, media, allow_special)


def _filled(template: str, tokenizer: Tokenizer, text: str, media: list[int], allow_special: bool) -> list[int]:
    """Fills in a template: `text` replaces `{text}`, and the ids `media` replace `{image}`."""
    # Encode the text together with the words around it. Byte pairs can merge across the boundary, as in training.
    pieces = [piece.replace("{text}", text) for piece in template.split("{image}")]
    if not media:
        return tokenizer.encode("".join(pieces), allow_special=allow_special)
    before, after = (tokenizer.encode(piece, allow_special=allow_special) for piece in pieces)
    return [*before, *media, *after]


def _media_ids(
    tokenizer: Tokenizer, special: SpecialTokens, codes: np.ndarray | Sequence[np.ndarray] | None, clip_layout: str
) -> list[int]:
    """Concatenates the ids of all pictures and clips."""
    items = [] if codes is None else codes if isinstance(codes, list | tuple) else [codes]
    ids: list[int] = []
    for item in map(np.asarray, items):
        clip = item.ndim == 3
        ids += clip_ids(tokenizer, special, item, clip_layout) if clip else image_ids(tokenizer, special, item)
    return ids


def image_ids(tokenizer: Tokenizer, special: SpecialTokens, codes: np.ndarray) -> list[int]:
    """Makes the ids of a picture: BOI, the size as text, IMG, each row of codes followed by EOL, then EOF, EOI.

    Args:
        tokenizer: the model's tokenizer.
        special: the model's control tokens.
        codes: integers `[h, w]`.

    Raises:
        Emu3Error: `codes` has another shape or dtype, or a code is outside the codebook.
    """
    codes = _checked(codes, 2, "a picture's codes must be integers [h, w]", special)
    rows = np.full((len(codes), codes.shape[1] + 1), special.eol)  # several times faster than np.pad
    rows[:, :-1] = codes
    rows[:, :-1] += special.visual_start
    return [*media_head(tokenizer, special, *codes.shape), *rows.ravel().tolist(), special.eof, special.eoi]


def clip_ids(tokenizer: Tokenizer, special: SpecialTokens, codes: np.ndarray, layout: str) -> list[int]:
    """Makes the ids of a clip: BOI, the size as text "frames*rows*columns", IMG, each frame followed by EOF, then EOI.

    The published models were not trained on clips, so both layouts are assumptions. "lines" ends every row of a frame
    with EOL, as in pictures. "flat" has no EOL; public forks train on it.

    Args:
        tokenizer: the model's tokenizer.
        special: the model's control tokens.
        codes: integers `[t, h, w]`.
        layout: one of `config.CLIP_LAYOUTS`.

    Raises:
        Emu3Error: `codes` has another shape or dtype, or a code is outside the codebook.
    """
    codes = _checked(codes, 3, "a clip's codes must be integers [t, h, w]", special)
    return [*media_head(tokenizer, special, *codes.shape), *frame_ids(special, codes, layout), special.eoi]


def _checked(codes: np.ndarray, axes: int, wanted: str, special: SpecialTokens) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != axes or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise Emu3Error(f"{wanted}, not {codes.dtype} {list(codes.shape)}")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= special.visual_count:
        raise Emu3Error(
            f"code {low if low < 0 else high} is outside the codebook: legal codes are 0 to "
            f"{special.visual_count - 1}; tokenize the picture or clip with this model's vision tokenizer"
        )
    return codes


def media_head(tokenizer: Tokenizer, special: SpecialTokens, *size: int) -> list[int]:
    """Makes the ids before the codes: BOI, the size as text, IMG. "90*90" is a picture, "2*90*90" two latent frames."""
    return [special.boi, *tokenizer.encode("*".join(map(str, size))), special.img]


def frame_ids(special: SpecialTokens, codes: np.ndarray, layout: str) -> list[int]:
    """Makes the ids of the frames in `codes`, integers [t, h, w] inside the codebook. Each frame is followed by EOF."""
    visual = codes.astype(np.int64) + special.visual_start
    if layout == "lines":
        visual = np.pad(visual, ((0, 0), (0, 0), (0, 1)), constant_values=special.eol)
    return np.pad(visual.reshape(len(codes), -1), ((0, 0), (0, 1)), constant_values=special.eof).ravel().tolist()
