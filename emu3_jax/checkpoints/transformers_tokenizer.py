"""Writes the tokenizer files of a transformers checkpoint from a bundle's vocabulary.

They split text like upstream, and give the same ids. The published transformers checkpoints split text like GPT-2.
"""

import itertools
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from emu3_jax.text.tokenizer import PATTERN, Tokenizer
from emu3_jax.text.vocabulary import read_ranks

IMAGE_PLACEHOLDER = "<image>"  # transformers' processor replaces it by the tokens of a picture
_UNUSED = "<|extra_0|>"  # the placeholder takes its id, so that the vocabulary keeps its size
_CHAT_TEMPLATES = {
    "chat": (
        "You are a helpful assistant.{% for message in messages %}"
        "{{ ' USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}CONTENT"
        "{{ '.' if message['role'] == 'user' else '' }}{% endfor %}"
        "{{ ' ASSISTANT:' if add_generation_prompt else '' }}"
    ),
    "stage1": "{% for message in messages %}CONTENT{% endfor %}",
}
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}" + IMAGE_PLACEHOLDER + "{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of all control tokens, visual tokens and added words, by their surface forms in transformers."""
    ids = {IMAGE_PLACEHOLDER if surface == _UNUSED else surface: i for surface, i in tokenizer.special_ids.items()}
    return ids | tokenizer.added


def write_tokenizer(directory: Path, vocabulary: Path, tokenizer: Tokenizer, template: str) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    words = {word for word in tokenizer.added if not (word.startswith("<|") and word.endswith("|>"))}
    files: dict[str, Any] = {
        "tokenizer.json": _tokenizer_json(read_ranks(vocabulary), special_ids(tokenizer), words),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Emu3Processor",
            "bos_token": "<|extra_203|>",
            "eos_token": "<|extra_204|>",
            "pad_token": tokenizer.decode([tokenizer.special.pad]),
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {
                "image_token": IMAGE_PLACEHOLDER,
                "boi_token": "<|image start|>",
                "eoi_token": "<|image end|>",
                "image_wrapper_token": "<|image token|>",
                "eof_token": "<|extra_201|>",
            },
        },
    }
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATES[template].replace("CONTENT", _CONTENT))


def _tokenizer_json(ranks: Mapping[bytes, int], ids: Mapping[str, int], words: Set[str]) -> dict[str, Any]:
    """`ids` are the ids of control tokens, visual tokens and added words. `words` are no control tokens."""
    spell = _character_of_byte()
    spelled = {"".join(spell[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        ["".join(spell[byte] for byte in part) for part in _merged_from(token, ranks)]
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": surface, **flags, "special": surface not in words} for surface, i in ids.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": spelled, "merges": merges, "ignore_merges": False},
    }


def _merged_from(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two parts that byte-pair encoding merges last to make `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _character_of_byte() -> list[str]:
    """GPT-2's alphabet: printable bytes keep their character, the other bytes get characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
