"""Commands in odd environments: outputs that cannot be written, JAX's variables, no home, no backend, no memory."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest

from emu3_jax import compilation
from emu3_jax.cli import environment, output
from emu3_jax.cli.main import main
from emu3_jax.errors import Emu3Error

FULL = "emu3-jax: error: cannot write to standard output: No space left on device\n"
TALKING = """
import sys
from emu3_jax.cli import doctor, main
main.start_jax = lambda: None
def run(options):
    print("\\u00e9\\u6f22\\udcff " * 3)
    print("progress", file=sys.stderr)
doctor.run = run
sys.argv = ["emu3-jax", "doctor", "x"]
main.program()
"""


def shell(script, code=TALKING, **variables):
    """Runs `script`, in which $COMMAND is a command that prints to both outputs. Returns the code and what it left."""
    env = {**os.environ, "COMMAND": code, "PY": sys.executable, **variables}
    script = script.replace("COMMAND", '"$PY" -c "$COMMAND"')
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_outputs_that_cannot_be_written(unbuffered):
    def run(script):
        return shell(script, PYTHONUNBUFFERED=unbuffered)

    help_ = '"$PY" -m emu3_jax --help'
    assert run(f"{help_} >/dev/full") == (2, "", FULL)
    assert run("COMMAND >/dev/full")[0] == 2
    assert run(f"set -o pipefail; {help_} | head -c0") == (141, "", "")
    code, out, err = run("set -o pipefail; COMMAND | head -c0")
    assert (code, out) == (141, "") and err in ("", "progress\n")
    assert run("COMMAND >&-") == (0, "", "progress\n")
    assert run("COMMAND 2>/dev/full >/dev/null") == (0, "", "")
    assert run("COMMAND 2>&- >/dev/null") == (0, "", "")
    assert run('"$PY" -m emu3_jax nothing 2>/dev/full')[:2] == (2, "")
    assert run('"$PY" -m emu3_jax nothing <&- 2>&- >&-') == (2, "", "")


@pytest.mark.parametrize(
    "variables, shown",
    [
        ({"PYTHONIOENCODING": "ascii"}, "\\xe9\\u6f22\\udcff "),
        ({"PYTHONIOENCODING": "utf-8"}, "é漢\\udcff "),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "\\xe9\\u6f22\\udcff "),
    ],
)
def test_characters_that_an_output_lacks_are_escaped(variables, shown):
    assert shell("COMMAND", **{"PYTHONIOENCODING": "", **variables}) == (0, shown * 3 + "\n", "progress\n")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_line_of_json_stays_json(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding=encoding))
    for value in ("é漢", "\x1b[2J\x9b", "\udcff"):
        line = output.json_line({"answer": value})
        assert json.loads(line) == {"answer": value}
        assert line.isprintable() and line.encode(encoding)
    assert ("é" in output.json_line("é")) == (encoding == "utf-8")


# ------------------------------------------------------------------------------------------------ JAX


@pytest.mark.slow
def test_what_the_environment_says_of_jax_changes_no_picture(tmp_path, tiny_bundle):
    words = ["generate", "a dot", "--model", str(tiny_bundle), "--seed", "3", "--quiet"]
    assert main([*words, "-o", str(tmp_path / "here")]) == 0
    variables = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_DEBUG_NANS": "1",
        "XDG_CACHE_HOME": "/dev/null",
    }
    env = {k: v for k, v in os.environ.items() if k != "HOME" and not k.startswith("JAX_COMPILATION_CACHE")}
    there = [sys.executable, "-m", "emu3_jax", *words, "-o", str(tmp_path / "there")]
    done = subprocess.run(there, env={**env, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    # A cache that cannot be written is one warning, whatever the number of programs.
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("emu3-jax: warning: compiled programs are not kept, cannot write to '/dev/null/emu3_jax")
    digests = [hashlib.sha256((tmp_path / name / "000.png").read_bytes()).hexdigest() for name in ("here", "there")]
    assert digests[0] == digests[1]


def test_random_keys_and_widths_are_ours():
    def drawn():
        with compilation.own_settings():
            return jax.jit(lambda: jax.random.uniform(jax.random.key(5), (3,)))()

    expected = drawn()
    with jax.enable_x64(True), jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        found = drawn()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "error, variables, message",
    [
        (
            RuntimeError("Unable to initialize backend 'cuda': busy (set JAX_PLATFORMS='' to choose)"),
            {"JAX_PLATFORMS": "cuda"},
            r"JAX_PLATFORMS is 'cuda', which cannot be used \(Unable to initialize backend 'cuda': busy\): correct",
        ),
        (AssertionError(), {"JAX_PLATFORMS": "cuda"}, r"'cuda', which cannot be used \(there is no such device\)"),
        (
            RuntimeError("The TPU is in use by process 7"),
            {},
            r"JAX has no usable backend.*in use by process 7.*JAX_PLATFORMS=cpu",
        ),
    ],
)
def test_a_backend_that_cannot_be_used(tiny_bundle, monkeypatch, error, variables, message):
    """Reading a bundle names it, and not the weights, which were blamed as damaged."""
    from emu3_jax.checkpoints.bundle import Bundle

    def devices():
        raise error

    monkeypatch.delenv("JAX_PLATFORMS")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(Emu3Error, match=message):
        Bundle.open(tiny_bundle).load_vision()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_PLATFORMS": "nonsense"}, "emu3-jax: error: JAX_PLATFORMS is 'nonsense', which cannot be used"),
        ({"JAX_ENABLE_X64": "maybe"}, "emu3-jax: error: JAX cannot start (invalid truth value 'maybe'"),
    ],
)
def test_variables_that_jax_refuses(tmp_path, variables, message):
    words = ["generate", "a", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "emu3_jax", *words], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_memory_is_one_line(monkeypatch, capsys):
    from emu3_jax.cli import doctor

    for error in (
        MemoryError("Unable to allocate 2.7 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
        jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
    ):

        def run(options, error=error):
            raise error

        monkeypatch.setattr(doctor, "run", run)
        assert main(["doctor", "x"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"emu3-jax: error: out of memory ({str(error).splitlines()[0]}): use a smaller --batch-size"
        )


@pytest.mark.parametrize(
    "home, cache, expected",
    [("", "x", "x/emu3_jax/compiled"), ("home", "", "home/.cache/emu3_jax/compiled"), ("", "", None)],
)
@pytest.mark.parametrize("least", [None, "1"])
def test_where_compiled_programs_are_kept(tmp_path, monkeypatch, home, cache, expected, least):
    """Without a home directory, nowhere. All are kept, however quickly they compile, unless the user says otherwise."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    found = {}
    config = types.SimpleNamespace(
        jax_enable_compilation_cache=True, jax_compilation_cache_dir=None, update=lambda name, value: None
    )

    def update(name, value):
        found[name] = value
        setattr(config, name, value)

    config.update = update
    alone = types.SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr(compilation, "jax", types.SimpleNamespace(config=config, distributed=alone))
    monkeypatch.setenv("XDG_CACHE_HOME", cache and str(tmp_path / cache))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    if least is not None:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", least)
    monkeypatch.setattr(compilation.pathlib.Path, "home", (lambda: tmp_path / home) if home else no_home)
    compilation.enable_persistent_cache()
    wanted = {} if expected is None else {"jax_compilation_cache_dir": str(tmp_path / expected)}
    if wanted and least is None:
        wanted["jax_persistent_cache_min_compile_time_secs"] = 0.0
    assert found == wanted


# ------------------------------------------------------------------------------------------------ libtpu


@pytest.mark.parametrize(
    "devices, variables, told",
    [
        ({}, {}, True),
        ({"0": ("0x1ae0", "0x0042")}, {}, True),  # the network card of Google's virtual machines
        ({"0": ("0x8086", "0x1234"), "1": ("0x1ae0", "0x0063")}, {}, False),  # a TPU v5e
        ({"0": ("0x1ae0", "0xffff")}, {}, False),  # what may be one
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({}, {"JAX_FORCE_TPU_INIT": "1"}, False),
    ],
)
def test_libtpu_is_told_of_no_tpu_where_there_is_none(tmp_path, monkeypatch, devices, variables, told):
    for name, (vendor, device) in devices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device").write_text(device + "\n")
    files = [str(path) for path in tmp_path.glob("*/vendor")]
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: files if pattern.endswith("vendor") else [])
    monkeypatch.setattr(os, "environ", dict(variables))
    environment.quiet_libtpu()
    assert ("TPU_ACCELERATOR_TYPE" in os.environ) == told
    assert {name: os.environ[name] for name in variables} == variables


@pytest.mark.libtpu
def test_libtpu_without_a_tpu_says_nothing():
    pytest.importorskip("libtpu")
    code = textwrap.dedent("""
        import sys
        from emu3_jax.cli import doctor, main
        def run(options):
            import jax
            print(jax.default_backend())
        doctor.run = run
        sys.argv = ["emu3-jax", "doctor", "x"]
        main.program()
    """)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------ odd arguments


@pytest.mark.parametrize(
    "words",
    [
        "decode --rows 1000000000", "decode --rows 0", "decode --steps 1000000000", "decode --area 2000000000",
        "vision --size 1000000000", "vision --repeat 1000000000", "train --layers 1000000000",
        "train --tokens 1000000000", "train --adapter -1", "train --steps " + "9" * 5000,
    ],
)  # fmt: skip
def test_numbers_of_bench_are_bounded(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *words.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not a whole number from" in line and len(line) <= 300
