"""Several servers of one model behind one address, with Ray Serve (extra `ray`).

    serve run emu3_jax.serving.replicas:application model=/bundle replicas=2 gpus=1

Each replica loads the model, and has rows and a queue of its own. Ray sends a request to the replica that has fewer.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.printable import shown
from emu3_jax.serving.limits import USUAL_RATIOS, ratio_list

KEY = "EMU3_JAX_API_KEY"
_MOST_ONGOING = 512  # requests of a replica; it has a queue of its own, which refuses earlier
_GRACE = 60.0  # seconds in which a replica finishes its requests


@dataclasses.dataclass(frozen=True)
class ReplicaOptions:
    """Options of `application`. Values may be texts, as on Ray's command line.

    Attributes:
        model: path of the bundle, which all machines must see; empty for the embedded model.
        quantize: quantisation, see `load`; empty for none.
        dtype: dtype of the decoder, see `load`; empty for the bundle's.
        rows: rows of each replica.
        queue: jobs that may wait in each replica.
        replicas: number of replicas.
        gpus: GPUs of each replica; the model must fit into one, so 1 or a part of 1. 0 runs on CPUs.
        cpus: CPU cores that Ray counts for each replica.
        ratios: ratios of pictures to compile at the start, with commas between them.
        documents: 1 for a model that was trained on documents, to serve edits and answers with pictures.
        insecure: 1 to serve without an API key.

    Raises:
        Emu3Error: a number or a ratio is not legal.
    """

    model: str = ""
    quantize: str = ""
    dtype: str = ""
    rows: int = defaults.BATCH_SIZE
    queue: int = 64
    replicas: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    ratios: str = ",".join(USUAL_RATIOS)
    documents: int = 0
    insecure: int = 0

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "ReplicaOptions":
        """Reads options by name. Raises `Emu3Error` for unknown names and for values that are not legal."""
        kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        least: dict[str, int] = {"rows": 1, "queue": 1, "replicas": 1}
        values = {}
        for name, value in given.items():
            if name not in kinds:
                raise Emu3Error(f"{shown(name)} is no option of replicas: give {', '.join(kinds)}")
            try:
                values[name] = kinds[name](value)
            except (TypeError, ValueError) as error:
                raise Emu3Error(f"{name} is {shown(value)}: it must be a number") from error
            if kinds[name] is not str and not least.get(name, 0) <= values[name] <= 100_000:
                raise Emu3Error(f"{name} is {shown(value)}: it must be a number from {least.get(name, 0)} to 100000")
        options = cls(**values)
        ratio_list(options.ratios)
        return options


class Replica:
    """One server. Ray makes it in a process of its own, and asks it for its ASGI application."""

    def __init__(self, options: ReplicaOptions):
        """Loads the model and compiles its programs.

        Raises:
            Emu3Error: the bundle is not there or damaged, or there is no API key.
        """
        from emu3_jax.loading import load
        from emu3_jax.models.capability import target_platform
        from emu3_jax.serving.app import make_app
        from emu3_jax.serving.batcher import Batcher
        from emu3_jax.serving.memory import cache_budget
        from emu3_jax.serving.server import check_key

        key = os.environ.get(KEY) or None
        if key is None and not options.insecure:  # Ray's proxy may listen anywhere
            raise Emu3Error(f"replicas need an API key: set {KEY} where Ray starts, or give insecure=1")
        check_key(key, "127.0.0.1", True)
        model = load(options.model or None, quantize=options.quantize or None, dtype=options.dtype or None)
        self._jobs = Batcher(
            model, rows=options.rows, queue=options.queue, memory=cache_budget(model.language),
            documents=bool(options.documents),
        )  # fmt: skip
        ratios = [(ratio, None) for ratio in ratio_list(options.ratios)]
        self._jobs.warm_up(ratios, idle=target_platform() == "cpu")
        self._app = make_app(self._jobs, model, key=key, clips=options.replicas == 1)

    def __serve_build_asgi_app__(self) -> Any:  # Ray's name
        return self._app

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._jobs.figures()["closing"]:
            raise RuntimeError("the batcher is closed")

    def __del__(self) -> None:
        if hasattr(self, "_jobs"):  # else the model was not loaded
            self._jobs.close(finish=False)


def application(args: Mapping[str, Any]) -> Any:
    """The application for Ray Serve's `serve run` and `serve.run`.

    Args:
        args: the fields of `ReplicaOptions`.

    Raises:
        Emu3Error: an option is not legal, or Ray is not installed.
    """
    options = ReplicaOptions.read(args)
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise Emu3Error(f"replicas need {error.name}, which is not installed: pip install 'emu3-jax[ray]'") from error
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="emu3-jax",
        num_replicas=options.replicas,
        max_ongoing_requests=_MOST_ONGOING,
        graceful_shutdown_timeout_s=_GRACE,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    return deployment.bind(options)
