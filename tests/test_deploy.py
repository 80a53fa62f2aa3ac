"""`deploy/kubernetes.yaml`: its options are those of `emu3-jax serve`, its paths are answered, and its times fit."""

import argparse
import asyncio
import pathlib

import pytest
import yaml
from serving_stand_ins import FakeJobs, FakeModel, ask

from emu3_jax.cli import serve
from emu3_jax.serving.app import make_app

FILE = pathlib.Path(__file__).parents[1] / "deploy" / "kubernetes.yaml"


@pytest.fixture
def objects():
    return {found["kind"]: found for found in yaml.safe_load_all(FILE.read_text())}


@pytest.fixture
def pod(objects):
    return objects["Deployment"]["spec"]["template"]


@pytest.fixture
def options(pod):
    (container,) = pod["spec"]["containers"]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    command, *words = container["args"]
    assert command == "serve"
    return parser.parse_args(words)


def test_the_options_are_legal_and_the_times_fit(pod, options):
    (container,) = pod["spec"]["containers"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > options.grace + sleep
    assert options.host == "0.0.0.0" and not options.insecure and options.api_key is None
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    assert options.model in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_key_comes_from_a_secret(pod):
    (container,) = pod["spec"]["containers"]
    values = {one["name"]: one for one in container["env"]}
    secret = values[serve.KEY]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": "emu3-jax", "key": "api-key"} and "value" not in values[serve.KEY]
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in FILE.read_text()


def test_the_paths_are_answered_at_the_port(pod, options):
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    notes = pod["metadata"]["annotations"]
    assert port["containerPort"] == options.port == int(notes["prometheus.io/port"])
    app, key = make_app(FakeJobs(), FakeModel(), key="key-of-a-test"), {"authorization": "Bearer key-of-a-test"}
    for probe in ("startupProbe", "readinessProbe"):
        place = container[probe]["httpGet"]
        assert place["port"] == port["name"]
        assert asyncio.run(ask(app, "GET", place["path"])).status == 200  # the kubelet has no key
    assert asyncio.run(ask(app, "GET", notes["prometheus.io/path"])).status == 401
    assert asyncio.run(ask(app, "GET", notes["prometheus.io/path"], headers=key)).status == 200


def test_the_service_finds_the_pods(objects, pod):
    labels = pod["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (port,) = objects["Service"]["spec"]["ports"]
    assert port["targetPort"] == pod["spec"]["containers"][0]["ports"][0]["name"]
