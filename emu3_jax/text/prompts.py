"""Prompt templates: text and the codes of pictures and clips to one row of token ids."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from emu3_jax.config import CLIP_LAYOUTS, SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown
from emu3_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """How a model was trained to be asked; `{image}` and `{text}` stand in each template once.

    Attributes:
        understanding: the first turn.
        next_turn: the turns after it. The reference has none; this is its first turn's without what comes before USER.
        clip_layout: how clips stand in a row of tokens, one of `config.CLIP_LAYOUTS`; see `clip_ids`.
    """

    understanding: str
    next_turn: str
    clip_layout: str = "lines"

    def __post_init__(self) -> None:
        for template in (self.understanding, self.next_turn):
            if not isinstance(template, str) or template.count("{image}") != 1 or template.count("{text}") != 1:
                raise Emu3Error(
                    f"prompt template {shown(template)} must hold {{image}} and {{text}} once each: correct it"
                )
        if self.clip_layout not in CLIP_LAYOUTS:
            raise Emu3Error(f"clip_layout is {shown(self.clip_layout)}: it must be one of {', '.join(CLIP_LAYOUTS)}")


CHAT = PromptTemplates(  # Emu3-Chat
    "You are a helpful assistant. USER: {image}{text}. ASSISTANT:", next_turn="USER: {image}{text}. ASSISTANT:"
)
STAGE1 = PromptTemplates("{image}{text}", next_turn="{image}{text}")  # Emu3-Stage1
PRESETS = {"chat": CHAT, "stage1": STAGE1}


def prompt_templates(name: str, clip_layout: str) -> PromptTemplates:
    """The templates of `PRESETS` that a bundle names, with the layout of clips that its decoder's config names."""
    return dataclasses.replace(PRESETS[name], clip_layout=clip_layout)


def generation_prompt(
    tokenizer: Tokenizer, special: SpecialTokens, text: str, *size: int, allow_special: bool = False
) -> list[int]:
    """BOS, the text, BOI, the size as text and IMG; `size` is height and width in tokens, for clips after the frames.

    Raises:
        Emu3Error: the text holds a special token and `allow_special` is false.
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
    """BOS and the filled-in template; pictures and clips stand one after the other in the place of `{image}`.

    Args:
        tokenizer: the model's.
        special: its control tokens.
        templates: the model's, for example `CHAT` or `STAGE1`.
        text: the question.
        codes: of one picture `[h, w]` or clip `[t, h, w]`, a list of such, or None.
        allow_special: lets control tokens in the text act as such.

    Raises:
        Emu3Error: codes outside the codebook, or a special token in the text and `allow_special` is false.
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
    """What follows an answer and its EOS when there is another question; see `understanding_prompt`."""
    media = _media_ids(tokenizer, special, codes, templates.clip_layout)
    return _filled(templates.next_turn, tokenizer, text, media, allow_special)


def _filled(template: str, tokenizer: Tokenizer, text: str, media: list[int], allow_special: bool) -> list[int]:
    """The ids of a template with `text` and the ids `media` in their places."""
    # The text and the words around it are encoded as one piece: byte pairs merge across the seam, as in training.
    pieces = [piece.replace("{text}", text) for piece in template.split("{image}")]
    if not media:
        return tokenizer.encode("".join(pieces), allow_special=allow_special)
    before, after = (tokenizer.encode(piece, allow_special=allow_special) for piece in pieces)
    return [*before, *media, *after]


def _media_ids(
    tokenizer: Tokenizer, special: SpecialTokens, codes: np.ndarray | Sequence[np.ndarray] | None, clip_layout: str
) -> list[int]:
    """The ids of all pictures and clips, one after the other."""
    items = [] if codes is None else codes if isinstance(codes, list | tuple) else [codes]
    ids: list[int] = []
    for item in map(np.asarray, items):
        clip = item.ndim == 3
        ids += clip_ids(tokenizer, special, item, clip_layout) if clip else image_ids(tokenizer, special, item)
    return ids


def image_ids(tokenizer: Tokenizer, special: SpecialTokens, codes: np.ndarray) -> list[int]:
    """BOI, the size as text, IMG, the rows of `codes` (int `[h, w]`) each followed by EOL, EOF, EOI.

    Raises:
        Emu3Error: the codes are not a grid of whole numbers within the codebook.
    """
    codes = _checked(codes, 2, "a picture's codes must be integers [h, w]", special)
    rows = np.full((len(codes), codes.shape[1] + 1), special.eol)  # np.pad takes several times as long
    rows[:, :-1] = codes
    rows[:, :-1] += special.visual_start
    return [*media_head(tokenizer, special, *codes.shape), *rows.ravel().tolist(), special.eof, special.eoi]


def clip_ids(tokenizer: Tokenizer, special: SpecialTokens, codes: np.ndarray, layout: str) -> list[int]:
    """BOI, the size as text "frames*rows*columns", IMG, the frames of `codes` (int `[t, h, w]`) each with EOF, EOI.

    Published weights know no clips, so that the layout is an assumption: "lines" ends every row of a frame with EOL, as
    pictures have it; "flat" has no EOL, as public forks train.

    Raises:
        Emu3Error: the codes are not frames of whole numbers within the codebook.
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
    """BOI, the size as text ("90*90"; a clip's "2*90*90" begins with its latent frames) and IMG."""
    return [special.boi, *tokenizer.encode("*".join(map(str, size))), special.img]


def frame_ids(special: SpecialTokens, codes: np.ndarray, layout: str) -> list[int]:
    """The frames of `codes` (int [t, h, w], inside the codebook), each followed by EOF; `layout`: of `CLIP_LAYOUTS`."""
    visual = codes.astype(np.int64) + special.visual_start
    if layout == "lines":
        visual = np.pad(visual, ((0, 0), (0, 0), (0, 1)), constant_values=special.eol)
    return np.pad(visual.reshape(len(codes), -1), ((0, 0), (0, 1)), constant_values=special.eof).ravel().tolist()
