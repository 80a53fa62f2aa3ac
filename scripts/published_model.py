"""Steps of `check_published.py` that compute with a model: codes and pixels of a photograph, a picture, an answer.

As in `published_steps.py`, each step runs in its own process and imports what it needs inside the function.
"""

import functools
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from published_steps import Outcome, device_peak

from emu3_jax.errors import Emu3Error


def codes(job: Mapping[str, Any]) -> Outcome:
    """Encodes the photograph to codes, decodes them, and measures the difference."""
    import numpy as np
    from PIL import Image

    import emu3_jax
    from emu3_jax.generation.codec import decode_picture, encode
    from emu3_jax.media.images import load_image, postprocess, preprocess, save_png

    vision = emu3_jax.load(job["bundle"]).vision
    photo = load_image(pathlib.Path(job["photo"]))
    pixels = preprocess(photo, vision.image, vision.config.spatial_factor)
    found = encode(vision, photo)
    decoded = decode_picture(vision, found)
    true = postprocess(pixels, vision.image)
    error = float(np.mean((np.asarray(decoded, np.float64) - true) ** 2))
    side_by_side = Image.fromarray(np.concatenate([true, np.asarray(decoded)], axis=1))
    save_png(side_by_side, pathlib.Path(job["out"], "photo.png"), {})
    outcome = Outcome(files=["photo.png"], device_peak_bytes=device_peak())
    outcome.notes += [
        f"{found.shape[0]} rows of {found.shape[1]} codes, {len(np.unique(found))} of them different; "
        f"SHA-256 of the codes as int32: {hashlib.sha256(found.astype('<i4').tobytes()).hexdigest()[:16]}",
        f"decoded again: PSNR {10 * math.log10(255**2 / error):.1f} dB" if error else "decoded again: equal",
    ]
    _keep(outcome, job, "codes", codes=found, pixels=pixels)
    return outcome


def picture(job: Mapping[str, Any]) -> Outcome:
    """Computes the logits after a prompt for a picture, and the first greedy tokens of the picture with guidance."""
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.generation.schedule import forced_ids, image_schedule
    from emu3_jax.media.sizes import generate_size
    from emu3_jax.text.prompts import generation_prompt

    language = _language(job)
    special = language.config.tokens
    factor = Bundle.open(job["vision"]).vision_config.spatial_factor
    size = generate_size("1:1", language.config.image_area, factor)
    prompt, negative = (
        generation_prompt(language.tokenizer, special, job[text], *size) for text in ("prompt", "negative")
    )
    schedule = image_schedule(*size)[: job["tokens"]]
    outcome = _generate(language, prompt, schedule, negative, job["guidance"])
    outcome.notes.insert(0, f"{size[0]} rows of {size[1]} tokens, guidance {job['guidance']:g}")
    _keep(
        outcome, job, "picture", **outcome.data.pop("arrays"), prompt=prompt, negative=negative,
        forced=forced_ids(schedule, special), text=language.tokenizer.encode(job["prompt"]),
        visual=(special.visual_start, special.visual_end), ends=(special.eos, special.pad),
    )  # fmt: skip
    return outcome


def answer(job: Mapping[str, Any]) -> Outcome:
    """Computes the logits after a question about the photograph, and the first greedy tokens of the answer."""
    import numpy as np

    from emu3_jax.generation.schedule import text_schedule
    from emu3_jax.text.prompts import understanding_prompt

    language = _language(job)
    special = language.config.tokens
    with np.load(pathlib.Path(job["out"], "codes.npz")) as arrays:
        shown = arrays["codes"]
    prompt = understanding_prompt(language.tokenizer, special, language.templates, job["question"], shown)
    outcome = _generate(language, prompt, text_schedule(job["tokens"]))
    arrays = outcome.data.pop("arrays")
    text = language.tokenizer.decode(arrays["tokens"].tolist(), skip_special=True)
    outcome.notes.append(f"the answer begins: {text!r}")
    _keep(
        outcome, job, "answer", **arrays, prompt=prompt, text=language.tokenizer.encode(job["question"]),
        ends=(special.eos, special.pad),
    )  # fmt: skip
    return outcome


def _language(job: Mapping[str, Any]) -> Any:
    import emu3_jax

    return emu3_jax.load(job["bundle"], dtype=job["dtype"]).language


def _generate(
    language: Any, prompt: Sequence[int], schedule: Any, negative: Sequence[int] | None = None, guidance: float = 1.0
) -> Outcome:
    """The logits after the prompt and the greedy tokens that the schedule allows."""
    import jax.numpy as jnp
    import numpy as np

    from emu3_jax.generation import session
    from emu3_jax.generation.rows import Sampling
    from emu3_jax.generation.session_rows import Row
    from emu3_jax.models.cache import KVCache

    config = language.config
    cache = KVCache.create(config, jnp.zeros(1, jnp.int32), len(prompt))
    logits = _forward(config)(language.params, jnp.asarray([prompt], jnp.int32), cache)
    logits = np.asarray(logits, np.float32).reshape(-1)
    del cache
    ids = session.run(
        language.params, config, [Row(prompt, schedule, negative)], Sampling(0.0, guidance=guidance).settings(1)
    ).ids[0]
    if not np.isfinite(logits).all():
        raise Emu3Error("the logits contain NaN or infinity: compare the checkpoint's hashes, and report this")
    likeliest = int(np.argmax(logits))
    outcome = Outcome(data={"arrays": {"logits": logits, "tokens": ids}}, device_peak_bytes=device_peak())
    outcome.notes += [
        f"{len(prompt)} tokens in the prompt, computed in {config.dtype}",
        f"likeliest next token {likeliest} with logit {logits[likeliest]:.4f}; first tokens "
        f"{' '.join(map(str, ids[:8].tolist()))}; SHA-256 of the {len(ids)} tokens as int32: "
        f"{hashlib.sha256(ids.astype('<i4').tobytes()).hexdigest()[:16]}",
    ]
    return outcome


@functools.cache
def _forward(config: Any) -> Any:
    """The compiled function from parameters, ids [1, S] and a cache to the logits after the last id."""
    import jax

    from emu3_jax.models.decoder import Decoder

    return jax.jit(lambda params, ids, cache: Decoder(config).apply({"params": params}, ids, cache, last_only=True)[0])


def _keep(outcome: Outcome, job: Mapping[str, Any], name: str, **arrays: Any) -> None:
    """Writes arrays for later steps, and puts their hash into the outcome, so that changed arrays are noticed."""
    import numpy as np

    from emu3_jax.files import new_file

    target = pathlib.Path(job["out"], f"{name}.npz")
    with new_file(target) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **{key: np.asarray(value) for key, value in arrays.items()})
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    outcome.data["arrays"] = digest.hexdigest()
    outcome.files.append(target.name)
    outcome.new_bytes += sum(pathlib.Path(job["out"], file).stat().st_size for file in outcome.files)
