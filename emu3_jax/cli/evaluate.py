"""Measure a model on held-out data, or draw for the scorer of a benchmark.

With CONFIG.py, prints the figures as JSON. Writes them to DIR/evaluation.json, and a page of pictures to
DIR/index.html.

With --harness, draws the prompts of GenEval, DPG-Bench or T2I-CompBench, and lays the pictures out as the benchmark's
own scorer reads them. Run the same command again after an interruption: it keeps the pictures that are there. On a TPU
slice or under Slurm, start it on every host; elsewhere give each host --host and --hosts.

examples:
  emu3-jax evaluate configs/eval_two_shapes.py -o evaluation
  emu3-jax evaluate configs/eval_reconstruction.py --set data=photos
  emu3-jax evaluate --harness geneval --prompts evaluation_metadata.jsonl -o geneval
"""

import argparse
import dataclasses
import pathlib
import shlex

from emu3_jax.cli import common, outputs
from emu3_jax.cli.hosts import add_hosts, host_of, load_on_host
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults

HARNESSES = ("geneval", "dpg", "t2icompbench")
_OF_A_CONFIG = {"config", "set", "output", "no_clobber", "adapter", "verify", "quiet", "harness"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    common.add_config(command, "an EvaluateConfig", "--set cases=128", optional=True)
    command.add_argument(
        "-o",
        "--output",
        type=common.place_text,
        metavar="DIR",
        help="directory to write to (default: the config's)",
    )
    outputs.add_no_clobber(command)
    group = common.section(command, "benchmarks")
    group.add_argument("--harness", choices=HARNESSES, help="draw for this benchmark's scorer, in place of CONFIG.py")
    group.add_argument(
        "--prompts", type=common.path, metavar="FILE", help="the benchmark's published file or folder of prompts"
    )
    group.add_argument(
        "-n",
        type=common.whole(1, 1000),
        metavar="N",
        help="pictures per prompt (default: as many as the benchmark's authors draw: 4, 4 and 10)",
    )
    add_hosts(group)
    group.add_argument(
        "--area", type=int, metavar="N", help="pixels of a picture (default: what the model was trained for)"
    )
    group.add_argument(
        "--guidance", type=float, default=defaults.GUIDANCE, metavar="X", help="guidance scale (default: %(default)s)"
    )
    group.add_argument(
        "--negative", type=common.text, default="", metavar="TEXT", help="what to avoid (default: nothing)"
    )
    common.add_sampling(command, "picture", temperature=defaults.TEMPERATURE)
    common.add_model(command)
    common.add_adapter(command)


def run(options: argparse.Namespace) -> int:
    if (options.config is None) == (options.harness is None):
        raise Emu3Error("give either CONFIG.py, to measure a model, or --harness, to draw for a benchmark's scorer")
    if options.harness is None:
        plain = argparse.ArgumentParser()
        add_arguments(plain)
        for name, default in vars(plain.parse_args([])).items():
            if name not in _OF_A_CONFIG and getattr(options, name) != default:
                flag = "-n" if name == "n" else f"--{name.replace('_', '-')}"
                raise Emu3Error(f"{flag} belongs to --harness: change the config in its place, for example with --set")
        return _measure(options)
    _draw(options)
    return 0


def _draw(options: argparse.Namespace) -> None:
    """Draws for a benchmark's scorer."""
    if options.prompts is None or options.output is None:
        raise Emu3Error("--harness needs --prompts FILE, the benchmark's prompts, and -o DIR")
    if options.set or options.no_clobber:
        raise Emu3Error("--set and --no-clobber belong to CONFIG.py: leave them out beside --harness")

    from emu3_jax.evaluation import harness
    from emu3_jax.printable import counted, printable
    from emu3_jax.progress import tell

    output = pathlib.Path(common.path_text(options.output))
    items = harness.read_items(options.harness, options.prompts, options.n)
    benchmark = harness.HARNESSES[options.harness]
    if len(items) != benchmark.published:
        tell(
            f"{benchmark.title} has {benchmark.published} prompts, this file {len(items)}: scores cannot be compared "
            "with published ones",
            common.progress(options),
        )
    host, hosts = host_of(options)
    model = load_on_host(options)
    given = ("area", "guidance", "negative", "temperature", "top_k", "top_p", "seed", "greedy", "allow_special",
             "batch_size", "deterministic", "parallel")  # fmt: skip
    drawn = harness.draw(
        model, options.harness, items, output, pictures=options.n, host=host, hosts=hosts,
        progress=common.progress(options), **{name: getattr(options, name) for name in given},
    )  # fmt: skip
    where, kept = printable(str(output)), f", {drawn.kept} of them before" if drawn.kept else ""
    print(f"{where}: {counted(drawn.pictures, 'picture')} of {counted(drawn.prompts, 'prompt')}{kept}")
    side = "SIDE" if drawn.size is None else str(drawn.size[0])
    scorer = benchmark.scorer.replace("DIR", shlex.quote(str(output.absolute()))).replace("SIDE", side)
    print(f"in {benchmark.title}'s repository: {printable(scorer)}")


def _measure(options: argparse.Namespace) -> int:
    """Measures the figures of a config."""
    import json

    import emu3_jax
    from emu3_jax import storage
    from emu3_jax.evaluation import run as evaluation
    from emu3_jax.evaluation.config import EvaluateConfig
    from emu3_jax.training.config import load_config

    config = load_config(options.config, options.set)
    if not isinstance(config, EvaluateConfig):
        raise Emu3Error(
            f"{options.config}: config() returns a {type(config).__name__}, evaluation needs an EvaluateConfig"
        )
    if options.output is not None:
        config = dataclasses.replace(config, directory=options.output)
    if options.adapter is not None:
        config = dataclasses.replace(config, adapter=options.adapter)
    evaluation.check_directory(config.directory)
    directory = storage.place(config.directory)
    files = [directory / evaluation.FIGURES_FILE, directory / evaluation.PAGE_FILE]
    written = outputs.Outputs(files, no_clobber=options.no_clobber)
    data = evaluation.open_data(config)
    model = emu3_jax.load(config.model, adapter=config.adapter, quantize=config.quantize, verify=options.verify)
    figures, page = evaluation.evaluate(model, data, config, common.progress(options))
    written.look()
    evaluation.write(config.directory, figures, page, replace=not options.no_clobber)
    written.report()
    print(json.dumps(figures, indent=2))
    return 0
