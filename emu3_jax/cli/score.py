"""Score the pictures of `emu3-jax sample` by a reward, and keep the rewards beside them.

A reward is a Python function that you name, FILE.py:NAME, or a shipped one. `procedural` is the share of attributes of
a scene of shapes that a picture shows. `judge` is the probability that a trained classifier of emoji gives to the
prompt's emoji; it needs the evaluation data (--data).

The function gets a list of prompts and a list of as many pictures (NumPy arrays, uint8 [H, W, 3]) and returns one
number for each; larger is better. It runs in worker processes, with your rights. If it raises an error, returns NaN or
the wrong count, or takes longer than --timeout, the prompt is skipped and named. The same command tries it again.

examples:
  emu3-jax score samples --reward procedural
  emu3-jax score samples --reward rewards.py:brightness --workers 4 --timeout 30
"""

import argparse

from emu3_jax.cli import common
from emu3_jax.cli.hosts import add_hosts, host_of

_SHOWN = 10  # most skipped prompts that are printed; the files of the rewards have all


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("samples", type=common.place, metavar="DIR", help="directory that emu3-jax sample wrote")
    command.add_argument(
        "--reward", required=True, metavar="REWARD", help="FILE.py:NAME, which runs this file; or procedural; or judge"
    )
    command.add_argument("--name", metavar="NAME", help="name to keep the rewards under (default: the function's)")
    command.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes (default: %(default)s)")
    command.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="longest time of one call of the function (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="pictures per call; all pictures of a prompt are in one call (default: %(default)s)",
    )
    command.add_argument(
        "--data",
        type=common.path,
        metavar="DIR",
        help="evaluation data of the reward judge, from scripts/build_pictures.py or scripts/build_emoji.py; its "
        "pictures need the size of the model's (default: out/pictures64/emoji)",
    )
    add_hosts(command)
    group = common.section(command, "model")
    group.add_argument(
        "--model",
        type=common.place_text,
        metavar="BUNDLE",
        help="bundle whose vision tokenizer decodes the pictures (default: the small embedded model)",
    )
    common.add_verify(group)
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    import pathlib

    from emu3_jax.data.encoder import load_encoder, open_bundle
    from emu3_jax.errors import Emu3Error
    from emu3_jax.preference.rewards import Reward, RewardPool
    from emu3_jax.preference.samples import Samples
    from emu3_jax.preference.scoring import judge_settings, score
    from emu3_jax.printable import counted, printable

    reward = Reward.parse(options.reward, options.name)
    if options.data is not None and options.reward != "judge":
        raise Emu3Error("--data is for the reward judge: leave it out, or choose --reward judge")
    host, hosts = host_of(options)
    progress = common.progress(options)
    samples = Samples(options.samples)
    vision = load_encoder(open_bundle(options.model, verify=options.verify)).vision
    if options.reward == "judge":
        settings = judge_settings(options.data or pathlib.Path("out/pictures64/emoji"), vision, progress=progress)
        reward = Reward.parse(options.reward, options.name, settings)
    with RewardPool(reward, workers=options.workers, timeout=options.timeout, batch_size=options.batch_size) as pool:
        outcome = score(
            samples,
            reward,
            pool,
            vision,
            output=options.samples,
            host=host,
            hosts=hosts,
            progress=progress,
        )
    for line in outcome.skipped[:_SHOWN]:
        print(printable(f"skipped: {line}"))
    if len(outcome.skipped) > _SHOWN:
        print(f"... and {len(outcome.skipped) - _SHOWN} more")
    print(
        f"{printable(str(options.samples))}: reward {reward.name} of {counted(outcome.samples, 'sample')} of "
        f"{counted(outcome.prompts, 'prompt')}, mean {outcome.mean:.4g}, {counted(len(outcome.skipped), 'prompt')} "
        "skipped"
    )
