"""Draw pictures for many prompts, and keep their tokens, log-probabilities and seeds as a data set.

Every prompt gets N pictures at each guidance scale. DIR holds shards and an index, which `emu3-jax score` and `emu3-jax
pairs` read. Run the same command again after an interruption: it keeps the shards that are complete.

On a TPU slice or under Slurm, start the command on every host with the same arguments: the processes share the prompts,
and each draws its share on its own devices. Elsewhere give each host --host and --hosts.

examples:
  emu3-jax sample prompts.txt -n 4 -o samples
  emu3-jax sample prompts.txt -n 4 --guidance 1 3 --png -o samples
"""

import argparse

from emu3_jax.cli import common
from emu3_jax.cli.hosts import add_hosts, host_of, load_on_host
from emu3_jax.generation import defaults


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompts",
        type=common.path,
        metavar="PROMPTS.txt",
        help="file of prompts, one a line (UTF-8, blank lines are skipped); - reads standard input",
    )
    command.add_argument(
        "-n",
        type=common.whole(1, 100_000),
        required=True,
        metavar="N",
        help="pictures per prompt and guidance scale, with different seeds",
    )
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write to"
    )
    command.add_argument("--png", action="store_true", help="also write the pictures, to DIR/png/000000.png and so on")
    command.add_argument("--ratio", default="1:1", metavar="W:H", help="width:height (default: %(default)s)")
    command.add_argument(
        "--area", type=int, metavar="N", help="pixels of a picture (default: what the model was trained for)"
    )
    command.add_argument(
        "--shards", type=int, metavar="N", help="number of files to write (default: one per 64 pictures of a scale)"
    )
    add_hosts(command)
    group = common.section(command, "sampling")
    group.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[defaults.GUIDANCE],
        metavar="G",
        help="guidance scales; every prompt gets N pictures at each, with the same seeds; 1 is no guidance "
        f"(default: {defaults.GUIDANCE})",
    )
    group.add_argument(
        "--negative", type=common.text, default="", metavar="TEXT", help="what to avoid (default: nothing)"
    )
    common.add_sampling(command, "picture", temperature=defaults.TEMPERATURE)
    common.add_model(command)
    common.add_adapter(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.generation.language import Batching
    from emu3_jax.preference.sampling import Request, sample
    from emu3_jax.printable import counted, printable
    from emu3_jax.text.prompt_files import read_prompts

    source = read_prompts(options.prompts)
    request = Request(
        source.prompts,
        options.n,
        guidance=options.guidance,
        negative=options.negative,
        ratio=options.ratio,
        area=options.area,
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        allow_special=options.allow_special,
    )
    batching = Batching(options.batch_size, None, options.deterministic, options.parallel)
    host, hosts = host_of(options)
    model = load_on_host(options)
    with source.naming_lines():
        outcome = sample(
            model,
            request,
            options.output,
            png=options.png,
            shards=options.shards,
            batching=batching,
            host=host,
            hosts=hosts,
            progress=common.progress(options),
        )
    where = printable(str(options.output))
    if outcome.index is None:
        missing = counted(outcome.missing, "shard")
        print(f"{where}: {missing} of other hosts {'is' if outcome.missing == 1 else 'are'} not written yet")
    else:
        prompts = counted(len(source.prompts), "prompt")
        print(f"{where}: {counted(outcome.index.records, 'sample')} of {prompts}")
