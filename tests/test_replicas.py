"""Replicas with Ray Serve: options, and two replicas of a small model on CPUs that OpenAI's client asks."""

import base64
import concurrent.futures
import importlib.util
import io
import re
import socket
import sys
import urllib.request

import numpy as np
import openai
import pytest
from PIL import Image

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.serving.replicas import Replica, ReplicaOptions, application

KEY = "key-of-replicas"


def test_options_are_read_from_texts():
    found = ReplicaOptions.read({"model": "/b", "rows": "4", "replicas": "2", "gpus": "0.5"})
    assert found == ReplicaOptions(model="/b", rows=4, replicas=2, gpus=0.5)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"row": "4"}, "'row' is no option of replicas: give model, quantize"),
        ({"rows": "x"}, "rows is 'x': it must be a number"),
        ({"rows": "0"}, "rows is '0': it must be a number from 1 to 100000"),
        ({"gpus": "nan"}, "gpus is 'nan': it must be a number from 0"),
    ],
)
def test_wrong_options_are_refused(given, line):
    with pytest.raises(Emu3Error, match=line):
        application(given)


def test_without_ray_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Emu3Error, match=r"replicas need ray.*, which is not installed: pip install 'emu3-jax\[ray\]'"):
        application({})


def test_a_replica_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("EMU3_JAX_API_KEY", raising=False)
    with pytest.raises(Emu3Error, match="replicas need an API key: set EMU3_JAX_API_KEY where Ray starts"):
        Replica(ReplicaOptions())
    monkeypatch.setenv("EMU3_JAX_API_KEY", "short")
    with pytest.raises(Emu3Error, match="at least 8 printable"):
        Replica(ReplicaOptions())


@pytest.mark.multiprocess
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray takes 470 MB and is not in the extra `test`: pip install 'emu3-jax[ray]'",
)
@pytest.mark.filterwarnings("default")  # those of Ray and its dependencies
def test_two_replicas_draw(tiny_bundle, monkeypatch):
    """Pictures are those of `Emu3.generate`, whichever replica draws them. A client without the key is refused."""
    import ray
    from ray import serve

    monkeypatch.setenv("EMU3_JAX_API_KEY", KEY)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        given = {"model": str(tiny_bundle), "dtype": "float32", "rows": "2", "replicas": "2"}
        serve.run(application(given), name="emu3", route_prefix="/")
        states = serve.status().applications["emu3"].deployments["emu3-jax"].replica_states
        assert {str(getattr(name, "value", name)): count for name, count in states.items()} == {"RUNNING": 2}
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:

            def draw(seed):
                return client.images.generate(prompt="a", extra_body={"seed": seed}).data[0]

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                found = list(pool.map(draw, range(12)))
            alone = emu3_jax.load(tiny_bundle, dtype="float32").generate("a", n=12, seed=0, progress=False)
            for one, picture in zip(found, alone, strict=True):
                drawn = Image.open(io.BytesIO(base64.b64decode(one.b64_json)))
                np.testing.assert_array_equal(np.asarray(drawn), np.asarray(picture))
                assert one.metadata["seed"] == picture.info["seed"]
            taken = set()
            for _ in range(20):  # each answer is one replica's
                request = urllib.request.Request(
                    f"{url[:-3]}/metrics", headers={"Authorization": f"Bearer {KEY}", "Connection": "close"}
                )
                with urllib.request.urlopen(request, timeout=30) as answer:
                    taken |= set(re.findall(r"(?m)^emu3_jax_jobs_finished_total (\d+)$", answer.read().decode()))
            assert taken and "0" not in taken  # both drew
            events = list(client.images.generate(prompt="a", stream=True, partial_images=3))
            assert events[-1].type == "image_generation.completed"
            with client.with_options(api_key="wrong") as other, pytest.raises(openai.AuthenticationError):
                other.models.list()
    finally:
        serve.shutdown()
        ray.shutdown()
