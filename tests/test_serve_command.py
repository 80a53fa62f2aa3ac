"""`emu3-jax serve`, the command: who may be let in, and a server with a small model from its start to SIGTERM."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import jax
import openai
import pytest

from emu3_jax.cli.main import main
from emu3_jax.serving.memory import cache_budget

pytestmark = pytest.mark.compiled_quickly

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def line(capsys, monkeypatch):
    """Runs the command, which is refused; returns the one line."""
    monkeypatch.delenv("EMU3_JAX_API_KEY", raising=False)

    def fail(*words: str) -> str:
        assert main(["serve", "--port", "0", *words]) == 2
        out, said = capsys.readouterr()
        assert out == "" and said.count("\n") == 1
        return said

    return fail


def test_refusals(line, monkeypatch):
    assert "--host 0.0.0.0 is open to other machines: set EMU3_JAX_API_KEY" in line("--host", "0.0.0.0")
    assert "at least 8 printable ASCII" in line("--api-key", "short")
    assert "at least 8 printable ASCII" in line("--api-key", "with a space")
    assert "has no address" in line("--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot serve at 127.0.0.1 port {port}: Address already in use" in line("--port", port)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "emu3_jax.serving.server", raising=False)
    assert "serve needs uvicorn, which is not installed: pip install 'emu3-jax[serve]'" in line()


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_the_budget_of_caches_is_a_share_of_what_is_free(monkeypatch):
    plain = types.SimpleNamespace(mesh=None)
    assert cache_budget(plain) is None  # CPUs do not tell
    devices = [Device({"bytes_limit": 1000, "bytes_in_use": used}) for used in (100, 300)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert cache_budget(plain) == 540
    assert cache_budget(types.SimpleNamespace(mesh=types.SimpleNamespace(local_devices=devices))) == 840
    devices[1] = Device({"bytes_limit": 1000})
    assert cache_budget(types.SimpleNamespace(mesh=types.SimpleNamespace(local_devices=devices))) is None


@pytest.mark.parametrize(
    "words", [("--memory", "0"), ("--memory", "x"), ("--memory", "inf"), ("--ratios", "1:1,9:1"), ("--ratios", "")]
)
def test_wrong_numbers_are_refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and f"argument {words[0]}: " in said


def test_no_row_fits_into_the_memory(line, tiny_bundle):
    said = line("--model", str(tiny_bundle), "--memory", "0.000001")
    assert "one row takes" in said and "give it more memory" in said


@pytest.mark.multiprocess
def test_a_server_from_start_to_end(tiny_bundle):
    """OpenAI's client draws, streams and asks. SIGTERM ends the server, with the code that all commands have."""
    words = ["serve", "--model", str(tiny_bundle), "--dtype", "float32", "--rows", "2", "--port", "0"]
    words += ["--ratios", "1:1,3:2", "--memory", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMU3_JAX_API_KEY": "key-of-a-test"}
    with subprocess.Popen(
        [sys.executable, "-m", "emu3_jax", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    ) as started:  # fmt: skip
        try:
            told = re.fullmatch(r"(http://127\.0\.0\.1:\d+) serves tiny, 2 rows\n", started.stdout.readline())
            assert told, started.stderr.read()
            with openai.OpenAI(base_url=f"{told[1]}/v1", api_key="key-of-a-test", max_retries=0) as client:
                found = client.images.generate(prompt="a", n=3, extra_body={"seed": 1})
                assert len(found.data) == 3 and found.size == "24x24"
                again = client.images.generate(prompt="a", extra_body={"seed": 2})
                assert again.data[0].b64_json and again.data[0].metadata["seed"] == "2"
                events = list(client.images.generate(prompt="a", stream=True, partial_images=3))
                assert events[-1].type == "image_generation.completed"
                url = f"data:image/png;base64,{found.data[0].b64_json}"
                content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
                answer = client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4
                )
                assert answer.usage.completion_tokens <= 4
                with pytest.raises(openai.BadRequestError):
                    client.images.generate(prompt="<|image start|>")
            started.send_signal(signal.SIGTERM)
            out, said = started.communicate(timeout=60)
        finally:
            started.kill()
    assert (started.returncode, out, said) == (143, "", "emu3-jax: terminated\n")
