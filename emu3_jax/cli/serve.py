"""Serve a model to many clients at once: a page for browsers, and an endpoint in the shape of OpenAI's API.

Only this machine can reach the server, unless --host names another interface. Then it wants an API key. Ctrl-C and
SIGTERM end it: requests under way get --grace seconds to finish.

examples:
  emu3-jax serve
  emu3-jax serve --host 0.0.0.0 --port 8080 --rows 16
"""

import argparse
import os

from emu3_jax.cli import common
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.printable import shown
from emu3_jax.serving.limits import USUAL_RATIOS, Limits, ratio_list

KEY = "EMU3_JAX_API_KEY"


def add_arguments(command: argparse.ArgumentParser) -> None:
    common.add_model(command)
    common.add_adapter(command)
    common.add_fast_pixels(command)
    command.add_argument(
        "--rows",
        type=common.whole(1, 4096),
        default=defaults.BATCH_SIZE,
        metavar="N",
        help="pictures and answers computed at once; more take more memory (default: %(default)s)",
    )
    command.add_argument(
        "--queue",
        type=common.whole(1, 100_000),
        default=64,
        metavar="N",
        help="requests that may wait; more are told to come again later (default: %(default)s)",
    )
    command.add_argument(
        "--memory",
        type=gibibytes,
        metavar="GIB",
        help="memory for the caches of all rows; there are fewer rows if they do not fit (default: 60%% of what is "
        "free after the model is loaded, where the device tells)",
    )
    command.add_argument(
        "--ratios",
        type=ratios,
        default=USUAL_RATIOS,
        metavar="W:H,...",
        help=f"ratios of pictures to compile at the start, on CPUs all but the first one while there is nothing to do; "
        f"others are compiled when they are first asked for (default: {','.join(USUAL_RATIOS)})",
    )
    command.add_argument(
        "--documents",
        action="store_true",
        help="the model was trained on documents (docs/stories.md): serve edits, and answers with pictures",
    )
    command.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address of the interface to serve at (default: %(default)s)"
    )
    command.add_argument(
        "--port",
        type=common.whole(0, 65535),
        default=8000,
        metavar="N",
        help="port to serve at; 0 takes a free one (default: %(default)s)",
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send (default: the environment variable {KEY}, which no process list shows)",
    )
    command.add_argument(
        "--insecure", action="store_true", help="allow another interface than loopback without a key: everybody may ask"
    )
    command.add_argument(
        "--grace",
        type=common.whole(1, 86_400),
        default=60,
        metavar="SECONDS",
        help="time that requests get to finish after Ctrl-C or SIGTERM (default: %(default)s)",
    )
    command.add_argument(
        "--timeout",
        type=common.whole(1, 86_400),
        default=3600,
        metavar="SECONDS",
        help="time that an answer may take, with its time in the queue (default: %(default)s)",
    )


def gibibytes(text: str) -> int:
    """The type of `--memory`: a number of GiB, as bytes."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of GiB above 0, such as 40 or 7.5")
    return int(number * 2**30)


def ratios(text: str) -> tuple[str, ...]:
    """The type of `--ratios`."""
    try:
        return ratio_list(text)
    except Emu3Error as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(options: argparse.Namespace) -> None:
    try:
        import python_multipart  # noqa: F401  # Starlette imports it when a form comes

        from emu3_jax.models.capability import target_platform
        from emu3_jax.serving.app import make_app
        from emu3_jax.serving.batcher import Batcher
        from emu3_jax.serving.guard import LOOPBACK
        from emu3_jax.serving.memory import cache_budget
        from emu3_jax.serving.server import address, bind, check_key, make_server
    except ModuleNotFoundError as error:
        raise Emu3Error(f"serve needs {error.name}, which is not installed: pip install 'emu3-jax[serve]'") from error

    key = options.api_key or os.environ.get(KEY) or None
    loopback = check_key(key, options.host, options.insecure)
    with bind(options.host, options.port) as bound:  # before the model is loaded, which takes long
        model = common.load_model(options)
        memory = options.memory or cache_budget(model.language)
        jobs = Batcher(model, rows=options.rows, queue=options.queue, memory=memory, documents=options.documents)
        fewer = "" if jobs.rows == options.rows else f" of {options.rows}: no more fit into the memory (--memory)"
        try:
            jobs.warm_up([(ratio, None) for ratio in options.ratios], idle=target_platform() == "cpu")
            hosts = (*LOOPBACK, options.host.lower()) if loopback else None
            app = make_app(jobs, model, Limits(answer_seconds=options.timeout), key=key, hosts=hosts)

            def ready() -> None:
                print(f"{address(bound)} serves {model.name}, {jobs.rows} rows{fewer}", flush=True)

            make_server(app, jobs, grace=options.grace, ready=ready).run(sockets=[bound])
        finally:
            jobs.close(finish=False)
