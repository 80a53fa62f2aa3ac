"""Steps of `check_published.py` that run transformers, the oracle. Each step runs in its own process.

Each function computes with transformers what a step of `published_model.py` has computed, and compares the results.
transformers itself loads the decoder. It cannot load the vision tokenizer of an upstream checkpoint, because it uses
other names. These weights are renamed by this package's table, and the report says so.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from published_steps import AGREES, DIFFERS, EQUAL, NOT_COMPARED, Outcome, host_memory, installed

from emu3_jax.errors import Emu3Error

# Largest allowed difference of logits, relative to the largest logit. In float32, another order of sums changes logits
# of small models by about 1e-5. bfloat16 has 8 bits; two layers with the 8 B model's widths have an error of 1%.
LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}
_KEPT = 8  # number of likeliest tokens to keep, to explain the first difference
_PREFIXES = {"model.vqmodel.": True, "vqmodel.": True, "encoder.down_block.": False}
_DECODER_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def machine(job: Mapping[str, Any]) -> Outcome:
    """Describes PyTorch's device and its memory in bytes."""
    import torch

    device = _device(job)
    data = {"platform": device, "versions": installed(("torch", "transformers", "safetensors", "tokenizers"))}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        return Outcome(data={**data, "device": found.name, "memory_bytes": found.total_memory})
    return Outcome(data={**data, "device": "cpu", "memory_bytes": host_memory()})


def _device(job: Mapping[str, Any]) -> str:
    import torch

    # By default, PyTorch's convolutions on GPUs use TF32 (10 bits of mantissa), which changes codes.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    wanted = job.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Emu3Error("--reference-device is cuda, but PyTorch finds no CUDA GPU: use cpu")
    return wanted


def _device_peak(device: str) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else None


# ------------------------------------------------------------------------------------------------ vision tokenizer


def codes(job: Mapping[str, Any]) -> Outcome:
    """Compares the codes of the same pixels with transformers' Emu3VQVAE, and the preprocessing with transformers'."""
    import torch

    outcome = Outcome()
    device = _device(job)
    model = _vision(job, outcome).to(device)
    arrays = _read(job, "codes")
    pixels = torch.from_numpy(np.moveaxis(arrays["pixels"], -1, 0)[None].copy()).to(device)
    with torch.no_grad():
        encoded = model.encode(pixels, torch.tensor([pixels.shape[-2:]]))
    expected = torch.stack(list(encoded.image_tokens))[0].cpu().numpy()
    found = arrays["codes"]
    if expected.shape != found.shape:
        raise Emu3Error(f"transformers makes codes of shape {list(expected.shape)}, this package {list(found.shape)}")
    count = int((expected != found).sum())
    outcome.compare(
        "codes of the photograph", DIFFERS if count else EQUAL, f"{found.size - count} of {found.size} codes equal"
    )
    outcome.compare("pixels of the photograph", *_compare_pixels(job, arrays["pixels"]))
    outcome.device_peak_bytes = _device_peak(device)
    return outcome


def _vision(job: Mapping[str, Any], outcome: Outcome) -> Any:
    """transformers' vision tokenizer in float32, with a checkpoint's weights."""
    import torch
    import transformers

    directory = pathlib.Path(job["directory"])
    config = json.loads((directory / "config.json").read_text())
    tensors = dict(_torch_tensors(directory))
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        state, settings = _renamed(directory, tensors)
        outcome.notes.append(
            "transformers does not know upstream's names: its vision tokenizer has the weights of --vision under the "
            "names of this package's table"
        )
    else:
        inner = _PREFIXES[prefix]
        settings = config["vq_config"] if inner else config
        state = {
            n.removeprefix(prefix) if inner else n: t for n, t in tensors.items() if n.startswith(prefix) or not inner
        }
    stored = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    )
    outcome.notes.append(f"the vision tokenizer of the reference is stored in {', '.join(stored)}, computed in float32")
    known = set(transformers.Emu3VQVAEConfig().to_dict()) - {"model_type", "dtype", "torch_dtype"}
    model = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**{k: v for k, v in settings.items() if k in known}))
    missing, unexpected = model.load_state_dict(
        {name: t.to(torch.float32) if t.is_floating_point() else t for name, t in state.items()}, strict=False
    )
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise Emu3Error(
            f"the reference's vision tokenizer does not fit transformers' class: {len(missing)} missing "
            f"{missing[:2]}, {len(unexpected)} unexpected {unexpected[:2]}"
        )
    return model.eval()


def _renamed(directory: pathlib.Path, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of upstream's vision tokenizer, renamed for transformers, and its config."""
    from emu3_jax.checkpoints import layouts
    from emu3_jax.checkpoints.published import Published
    from emu3_jax.checkpoints.published_config import vision_to_published

    config = Published.open(directory).vision_config()
    weights = [weight for param in layouts.vision_params(config) for weight in param.weights]
    state = {}
    for weight in (*weights, *layouts.vision_counters(config)):
        if weight.name in tensors:
            named = layouts.TRANSFORMERS_VISION.rename(weight, "vision")
            state[named.name] = tensors[weight.name].reshape(named.shape)
    return state, vision_to_published(config, "transformers")


def _torch_tensors(directory: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields all tensors of a checkpoint except the decoder's, read by safetensors or PyTorch."""
    import safetensors
    import torch

    def wanted(name: str) -> bool:
        return not name.startswith(("text_model.", "model.text_model.", "model.layers.", "lm_head.", "model.embed"))

    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in opened.keys() if wanted(name))  # noqa: SIM118
    for file in [] if files else sorted(directory.glob("*.bin")):
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        yield from ((name, tensor) for name, tensor in loaded.items() if wanted(name))


def _compare_pixels(job: Mapping[str, Any], ours: np.ndarray) -> tuple[str, str]:
    """Compares the pixels with transformers' own preprocessing of the photograph. Returns verdict and detail."""
    import transformers
    from PIL import Image

    directory = pathlib.Path(job["directory"])
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return NOT_COMPARED, "the reference has no preprocessor_config.json"
    try:
        processor = transformers.Emu3ImageProcessor.from_pretrained(directory)
        with Image.open(job["photo"]) as photo:
            made = processor(photo.convert("RGB"), return_tensors="np")
    except Exception as error:  # any class: the file may have another layout, or a dependency may fail
        return NOT_COMPARED, f"transformers' processor does not run ({type(error).__name__})"
    theirs = np.moveaxis(np.asarray(made["pixel_values"])[0], 0, -1)
    if theirs.shape != ours.shape:
        return DIFFERS, f"transformers has size {list(theirs.shape[:2])}, this package {list(ours.shape[:2])}"
    worst = float(np.abs(theirs - ours).max())
    # One 8-bit step is at least 2 / 255 after normalisation. float32 rounding is far smaller.
    return (EQUAL if worst < 1e-5 else DIFFERS), f"largest difference {worst:.2g} of normalised pixels"


# ------------------------------------------------------------------------------------------------ decoder


def picture(job: Mapping[str, Any]) -> Outcome:
    """Compares logits and greedy tokens of the picture with transformers, with its own guidance and constraint."""
    import torch
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        PrefixConstrainedLogitsProcessor,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )

    arrays = _read(job, "picture")
    device, model, outcome = _loaded(job)
    prompt, forced = arrays["prompt"], arrays["forced"]
    visual = list(range(*arrays["visual"].tolist()))

    def legal(_: int, ids: Any) -> list[int]:
        one = int(forced[len(ids) - len(prompt)])
        return visual if one < 0 else [one]

    negative = torch.from_numpy(arrays["negative"])[None].to(device)
    processors = [PrefixConstrainedLogitsProcessor(legal, num_beams=1)]
    if job["guidance"] != 1:
        guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(job["guidance"], model, unconditional_ids=negative)
        processors.insert(0, guide)
    _compare_generated(
        job, outcome, model, device, arrays, LogitsProcessorList(processors), "the picture's prompt", "the picture"
    )
    return outcome


def answer(job: Mapping[str, Any]) -> Outcome:
    """Compares logits and greedy tokens of the answer with transformers."""
    arrays = _read(job, "answer")
    device, model, outcome = _loaded(job)
    _compare_generated(job, outcome, model, device, arrays, None, "the question about the photograph", "the answer")
    return outcome


def _loaded(job: Mapping[str, Any]) -> tuple[str, Any, Outcome]:
    """Loads transformers' model. Returns the device, the model, and an outcome with a note on how it was loaded."""
    import torch
    import transformers

    device = _device(job)
    directory = pathlib.Path(job["directory"])
    config = json.loads((directory / "config.json").read_text())
    major = int(transformers.__version__.split(".")[0])
    options = {("dtype" if major >= 5 else "torch_dtype"): getattr(torch, job["dtype"]), "output_loading_info": True}
    if "text_config" in config:
        loader, how = transformers.Emu3ForConditionalGeneration, "the reference's own checkpoint"
    else:
        loader, how = transformers.Emu3ForCausalLM, "the files of the checkpoint under test, whose names it knows"
        options["config"] = _text_config(config, major)
    model, info = loader.from_pretrained(directory, **options)
    lost = {kind: names for kind, names in info.items() if names}
    if lost:
        kind, names = next(iter(lost.items()))
        raise Emu3Error(f"transformers cannot load all weights of the reference: {kind}: {sorted(map(str, names))[:2]}")
    outcome = Outcome(notes=[f"transformers loaded {how}; {job['dtype']} on {device}"])
    return device, model.eval().to(device), outcome


def _text_config(config: Mapping[str, Any], major: int) -> Any:
    """transformers' config, made from upstream's `config.json`."""
    import transformers

    fields = {name: config[name] for name in _DECODER_FIELDS if name in config}
    theta = config.get("rope_theta", 1e6)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}} if major >= 5 else {"rope_theta": theta}
    return transformers.Emu3TextConfig(**fields, **rope, tie_word_embeddings=False)


def _compare_generated(
    job: Mapping[str, Any], outcome: Outcome, model: Any, device: str, arrays: Mapping[str, np.ndarray],
    processors: Any, asked: str, made: str,
) -> None:  # fmt: skip
    """Adds comparisons of the prompt's token ids, of the logits after it, and of greedy tokens."""
    import torch
    import transformers

    prompt = torch.from_numpy(arrays["prompt"])[None].to(device)
    with torch.no_grad():
        logits = model(input_ids=prompt, use_cache=False).logits[0, -1].float().cpu().numpy()
    outcome.compare(f"ids of the text of {asked}", *_compare_text(job, arrays["text"]))
    outcome.compare(f"logits after {asked}", *compare_logits(arrays["logits"], logits, LIMITS[job["dtype"]]))
    count = len(arrays["tokens"])
    eos, pad = arrays["ends"].tolist()
    options = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=eos, pad_token_id=pad, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    generated = model.generate(
        prompt,
        options,
        attention_mask=torch.ones_like(prompt),
        **({"logits_processor": processors} if processors else {}),
    )
    tokens = generated.sequences[0, prompt.shape[1] :].cpu().numpy()
    likeliest = [score[0].float().topk(min(_KEPT, score.shape[-1])) for score in generated.scores]
    kept = [dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in likeliest]
    outcome.compare(f"first {count} greedy tokens of {made}", *compare_tokens(arrays["tokens"], tokens, kept, pad))
    outcome.device_peak_bytes = _device_peak(device)


def compare_logits(ours: np.ndarray, theirs: np.ndarray, limit: float) -> tuple[str, str]:
    """Compares two rows of logits, float32 [V]. Returns verdict and detail.

    `limit` is the largest allowed difference, relative to the largest logit.
    """
    if ours.shape != theirs.shape:
        return DIFFERS, f"this package has {len(ours)} logits, transformers {len(theirs)}"
    worst, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    relative = worst / largest if largest else worst
    first, second = int(ours.argmax()), int(theirs.argmax())
    same = "same likeliest token" if first == second else f"likeliest tokens {first} and {second}"
    ok = first == second and relative <= limit
    detail = f"largest difference {worst:.3g}, relative to the largest logit {relative:.2g} (limit {limit:g}), {same}"
    return (AGREES if ok and worst else EQUAL if ok else DIFFERS), detail


def compare_tokens(
    ours: np.ndarray, theirs: np.ndarray, likeliest: list[dict[int, float]], pad: int
) -> tuple[str, str]:
    """Compares two rows of token ids.

    Args:
        ours: int [n]; padding follows the end of an answer.
        theirs: int [up to n]; nothing follows the end.
        likeliest: for each token of `theirs`, the likeliest ids and their scores.
        pad: id of padding.

    Returns:
        Verdict and detail.
    """
    padded = np.full(len(ours), pad)
    padded[: len(theirs)] = theirs
    differing = np.flatnonzero(ours != padded)
    if not differing.size:
        ended = f"; the answer ends after {len(theirs)}" if len(theirs) < len(ours) else ""
        return EQUAL, f"{len(ours)} of {len(ours)} equal{ended}"
    first = int(differing[0])
    detail = f"first difference at token {first}: {int(ours[first])} here, {int(padded[first])} by transformers"
    scores = likeliest[first] if first < len(likeliest) else {}
    if int(ours[first]) in scores and int(padded[first]) in scores:
        gap = scores[int(padded[first])] - scores[int(ours[first])]
        return DIFFERS, f"{detail}, whose score of its own token is larger by {gap:.3g}"
    return DIFFERS, f"{detail}; our token is not among its {_KEPT} likeliest"


def _compare_text(job: Mapping[str, Any], ours: np.ndarray) -> tuple[str, str]:
    """Compares the ids of the prompt's text with transformers' tokenizer. Returns verdict and detail."""
    import transformers

    directory = pathlib.Path(job["directory"])
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return NOT_COMPARED, "the reference has no tokenizer of transformers"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        theirs = tokenizer.encode(job["text"], add_special_tokens=False)
    except Exception as error:  # any class: the files may have another layout, or a dependency may fail
        return NOT_COMPARED, f"transformers' tokenizer does not load ({type(error).__name__})"
    if theirs == ours.tolist():
        return EQUAL, f"{len(theirs)} ids"
    return DIFFERS, f"{ours.tolist()[:12]} here, {theirs[:12]} by transformers"


def _read(job: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(job["out"], f"{name}.npz")) as arrays:
        return dict(arrays)
