"""Times a step of GRPO at the published shapes, and the engine alone beside it, with random weights.

python scripts/bench_grpo.py --preset 8b --prompts 2 -n 8

Prints JSON lines. `engine` draws as many pictures as a step, with weights that stay as they are: this is what
`emu3-jax bench decode` times. `step` is a whole step: the adapters are merged on the device, the pictures are drawn and
decoded, a reward judges them in a worker process, the reference's log-probabilities are computed, and the adapters are
updated. All programs are compiled before a time is taken. The sampled tokens are those of random weights, so rewards
mean nothing.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_serve import stand_in_tokenizer
from flax import traverse_util

from emu3_jax.benchmarks import decode, train, vision
from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.data.config import DataConfig
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.language import Language
from emu3_jax.models.adapters import Adapter
from emu3_jax.preference.grpo import trainer_arrays
from emu3_jax.preference.rewards import Reward, RewardPool
from emu3_jax.preference.rollouts import Artist, rewards_of
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.text.prompts import CHAT
from emu3_jax.training import grpo
from emu3_jax.training.config import ModelConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig
from emu3_jax.training.host_rows import HostRows
from emu3_jax.training.step import Trainer
from emu3_jax.training.weights import make_inference_params

VISIONS = {"8b": VisionConfig(), "small": VisionConfig(base_channels=32, num_res_blocks=1)}
REWARD = "def brightness(prompts, pictures):\n    return [float(picture.mean()) for picture in pictures]\n"


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the machine, then the figures of the engine, then those of a step."""
    enable_persistent_cache()
    decoder, tokens = decode.PRESETS[options.preset], VISIONS[options.preset]
    side = round((options.area or decoder.image_area) ** 0.5)
    decoder = dataclasses.replace(decoder, image_area=side * side)
    pictures = options.prompts * options.n
    settings = GrpoConfig(
        "prompts.txt", "brightness", n=options.n, guidance=options.guidance, draw_at_once=options.at_once,
        parallel="off", kl_weight=0.01,
    )  # fmt: skip
    length = -(-((side // tokens.spatial_factor) * (side // tokens.spatial_factor + 1) + 256) // 128) * 128
    config = TrainConfig(
        directory="", model=ModelConfig("", decoder, remat=options.remat), data=DataConfig((), length, packing=0),
        batch_size=pictures * settings.rows, steps=1000, adapter=Adapter(rank=16), grpo=settings,
        accumulation=options.accumulation,
    )  # fmt: skip
    mesh = make_mesh(config.mesh)
    about = {
        "bench": "grpo", "preset": options.preset, "picture": f"{side}x{side}", "pictures": pictures,
        "guidance": options.guidance, "row_tokens": length, "accumulation": options.accumulation,
    }  # fmt: skip
    yield about | describe_machine()
    with use_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "reward.py"
        file.write_text(REWARD)
        trainer = Trainer(config, decoder, mesh)
        state, frozen = trainer.initial_state(), train.random_frozen(trainer)
        convert = make_inference_params(trainer.decoder, config.adapter, mesh)
        params = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, vision.random_weights(tokens)))
        artist = Artist(settings, Vision(tokens, ImageConfig(), params), mesh)
        tokenizer, rows = stand_in_tokenizer(decoder), HostRows(mesh, config.batch_size, config.together)
        prompts = [f"a red apple, number {number}" for number in range(options.prompts)]
        each = [prompt for prompt in prompts for _ in range(options.n)]

        def language(params: Any) -> Language:
            return Language(trainer.decoder, params, tokenizer, CHAT, mesh)

        def seeds(first: int) -> np.ndarray:
            return np.arange(first, first + pictures, dtype=np.uint32)

        fixed = jax.block_until_ready(convert(state.params, frozen))
        times = []
        for first in (0, 1000):
            began = time.perf_counter()
            artist.draw(language(fixed), each, seeds(first))
            times.append(time.perf_counter() - began)
        engine = times[-1]
        yield {"engine_s": round(engine, 2), "pictures_per_minute": round(60 * pictures / engine, 2)}
        del fixed
        with RewardPool(Reward.parse(f"{file}:brightness")) as pool:
            pool.start()
            for first in (2000, 3000):
                clock = [time.perf_counter()]

                def mark(clock: list[float] = clock) -> None:
                    clock.append(time.perf_counter())

                inference = jax.block_until_ready(convert(state.params, frozen))
                mark()
                drawn = artist.draw(language(inference), each, seeds(first))
                mark()
                pixels = artist.samples(drawn)
                mark()
                del inference
                rewards, _ = rewards_of(pool, prompts, pixels, options.n)
                mark()
                made = artist.batch_rows(drawn, np.ones(pictures, bool), rows.mine, length)
                advantages = np.asarray(grpo.advantages(jnp.asarray(rewards))).reshape(-1)
                made["advantage"] = np.repeat(advantages, settings.rows)
                arrays = rows.spread(made)
                arrays["reference"] = trainer.policy(state.params, frozen, trainer_arrays(arrays), False)
                jax.block_until_ready(arrays)
                mark()
                state, figures = trainer.step(state, frozen, arrays)
                jax.block_until_ready(state)
                mark()
                loss = float(figures["loss"])
        if not np.isfinite(loss):
            raise AssertionError(f"the loss is {loss}")
        names = ("merging_s", "drawing_s", "pixels_s", "rewards_s", "reference_s", "update_s")
        parts = dict(zip(names, np.diff(clock).tolist(), strict=True))
        whole = sum(parts.values())
        drawing = sum(parts[name] for name in names[:3])
        yield {
            "step_s": round(whole, 2),
            **{name: round(seconds, 2) for name, seconds in parts.items()},
            "share_of_drawing": round(drawing / whole, 3),
            "rollout_pictures_per_minute": round(60 * pictures / drawing, 2),
            "rollouts_by_engine": round(engine / drawing, 3),
            **train.device_memory(),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(VISIONS), default="8b", help="shapes (default: %(default)s)")
    parser.add_argument("--area", type=int, metavar="N", help="pixels of a picture (default: the model's)")
    parser.add_argument("--prompts", type=int, default=2, metavar="N", help="prompts of a step (default: %(default)s)")
    parser.add_argument("-n", type=int, default=8, help="pictures per prompt (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--at-once", type=int, metavar="N", help="pictures drawn at once (default: all)")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="parts of a batch (default: 1)")
    parser.add_argument("--remat", choices=("full", "dots", "none"), default="full", help="(default: %(default)s)")
    for figures in run(parser.parse_args(arguments)):
        print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
