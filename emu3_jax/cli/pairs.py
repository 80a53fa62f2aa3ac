"""Make preference pairs of the pictures of `emu3-jax sample`: data to train on.

Of each prompt, the picture with the highest reward is paired with the one with the lowest. Prompts whose rewards are
equal, or differ by less than the margin, are skipped and counted. --per-prompt 2 also pairs the second best picture
with the second worst, and so on.

With --votes, people's votes take the place of rewards. VOTES.csv has a row for each vote. Its columns `chosen` and
`rejected` name two pictures of one prompt, by their numbers or file names (12 or 000012.png). Pictures that were
compared make a pair: the one with more votes is better.

examples:
  emu3-jax pairs samples --margin 0.2 -o pairs
  emu3-jax pairs samples --per-prompt 4 -o pairs
  emu3-jax pairs samples --votes votes.csv -o pairs
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("samples", type=common.place, metavar="DIR", help="directory that emu3-jax sample wrote")
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DATA", help="new directory to write the pairs to"
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument("--reward", metavar="NAME", help="name of the rewards to use (default: the only ones)")
    source.add_argument("--votes", type=common.path, metavar="VOTES.csv", help="people's votes, in place of rewards")
    command.add_argument(
        "--margin",
        type=float,
        metavar="M",
        help="least difference of the rewards, or of the votes, of a pair (default: any difference)",
    )
    command.add_argument(
        "--guidance", type=float, metavar="G", help="use only pictures of this guidance scale (default: all)"
    )
    command.add_argument(
        "--per-prompt", type=int, metavar="N", help="most pairs of a prompt that rewards make (default: 1)"
    )


def run(options: argparse.Namespace) -> None:
    from emu3_jax.errors import Emu3Error
    from emu3_jax.preference import pairing
    from emu3_jax.preference.samples import Samples
    from emu3_jax.preference.scoring import read_rewards, reward_names
    from emu3_jax.printable import counted, printable

    samples = Samples(options.samples)
    margin = 0.0 if options.margin is None else options.margin
    if options.votes is not None:
        for name in ("guidance", "per_prompt"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise Emu3Error(f"--{flag} does not go with --votes: the votes say which pictures count")
        choices, skipped = pairing.by_votes(samples, options.votes, margin=margin), "pair"
    else:
        names = reward_names(options.samples)
        if options.reward is None and len(names) != 1:
            found = f"it has {', '.join(names)}; choose one by --reward" if names else "run emu3-jax score first"
            raise Emu3Error(f"{options.samples} has {counted(len(names), 'reward')}: {found}")
        rewards = read_rewards(samples, options.reward or names[0], options.samples)
        per_prompt = 1 if options.per_prompt is None else options.per_prompt
        choices = pairing.by_reward(samples, rewards, margin=margin, guidance=options.guidance, per_prompt=per_prompt)
        skipped = "prompt"
    index = pairing.write(samples, choices, options.output)
    reasons = "".join(f", {counted(count, skipped)} {reason}" for reason, count in choices.skipped.items())
    print(f"{printable(str(options.output))}: {counted(index.records, 'pair')}{reasons or ', none skipped'}")
