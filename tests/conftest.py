"""Shared fixtures: 8 forced CPU devices, the golden case and the checkpoint that its weights were drawn for."""

import dataclasses
import functools
import gc
import importlib.util
import json
import os
import pathlib
import shutil

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # broadcasts are written out; also in processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import numpy as np
import pytest
from jax._src import compiler

# Asserts of helper modules show values, as those of test modules do.
pytest.register_assert_rewrite(*(file.stem for file in pathlib.Path(__file__).parent.glob("*.py")))

# A busy machine is no reason to fail: hypothesis' deadline of 200 ms an example would make one.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

quickly = False  # how the module that runs is compiled; see `optimisation`


@pytest.fixture(autouse=True, scope="module")
def optimisation(request):
    """Sets how a module compiles: in this process, and in those that it starts.

    Modules that compile much and compute little are marked `compiled_quickly`: there XLA leaves its optimisations out,
    which takes most of their time. Programs mean the same without them. What is compared with the reference is compiled
    as for users.

    Programs of several devices keep XLA's fusion emitters: without them, jaxlib 0.10 runs collectives of one program in
    any order, and in 4 of 8 runs two devices of a small training waited for each other for ever. Programs of one device
    leave them out, see `quick_compile_options`.
    """
    global quickly
    wanted = request.node.get_closest_marker("compiled_quickly") is not None
    if quickly != wanted:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(wanted))  # for processes that tests start
        jax.config.update("jax_disable_most_optimizations", wanted)
        # jit's own cache knows nothing of the setting: it would hand one module's programs to the next.
        jax.clear_caches()
        quickly = wanted


compile_options = compiler.get_compile_options


def quick_compile_options(num_replicas, num_partitions, *args, env_options_overrides=None, backend=None, **kwargs):
    """JAX's options; for a CPU program of one device, which has no collectives, without the fusion emitters.

    `XLA_FLAGS` could not choose by the program: XLA reads it once in each process.
    """
    if quickly and num_replicas * num_partitions == 1 and (backend is None or backend.platform == "cpu"):
        without = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
        env_options_overrides = {**without, **(env_options_overrides or {})}
    named = {"env_options_overrides": env_options_overrides, "backend": backend, **kwargs}
    return compile_options(num_replicas, num_partitions, *args, **named)


if jax.__version_info__ < (0, 11):  # JAX 0.12 refuses the option
    compiler.get_compile_options = quick_compile_options


# Files that take longest, the longest first. Two workers share the files: one that begins late ends alone.
LONG = (
    "notebooks", "scripts", "two_processes", "vision_training", "interleaved_rows", "vision", "grpo_training",
    "interleaving", "training_step", "train", "recipes", "sharding", "turns", "bucket_runs", "documentation",
    "golden_sessions", "parallel", "window_kernels_tpu", "live", "plan", "grpo_answers", "cli",
    "training_decoder", "stories", "buckets", "interleave_command", "deterministic", "window_kernels_hopper",
    "serve_command",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files compiled as for users come before those compiled quickly, and in both groups the long ones begin.

    Each change between the two ways drops all compiled programs, see `optimisation`. With one change in a worker,
    programs of the models that modules share are kept from module to module.
    """
    places = {f"test_{name}": place for place, name in enumerate(LONG)}

    def place(item: pytest.Item) -> tuple[bool, int]:
        quick = item.get_closest_marker("compiled_quickly") is not None
        return quick, places.get(item.path.stem, len(places))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """The garbage collector leaves out what imports made, and runs less often: it took a seventh of JAX's tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Where no oracle is asked for, modules of nothing else are not even imported: PyTorch may be absent."""
    if "not oracle" in config.getoption("markexpr") and collection_path.match("test_*.py"):
        text = collection_path.read_text()
        forms = ("\npytestmark = pytest.mark.oracle\n", "\npytestmark = [pytest.mark.oracle, ")
        return any(form in text for form in forms) or None
    return None


GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden_json(name: str):
    return json.loads((GOLDEN / name).read_text())


def golden_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as data:
        return dict(data)


def drawing():
    """The function that draws the weights of golden cases."""
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference_weight


def reference_weights(part: str) -> dict[str, np.ndarray]:
    """The golden case's state dict of `part` ("vq" or "lm"), under upstream's PyTorch names."""
    draw = drawing()
    shapes = golden_json("state_dict_shapes.json")[part]
    seed = golden_json("prompts.json")["seed"]
    return {name: draw(name, tuple(shape), seed) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def vocabulary() -> pathlib.Path:
    """The public 151,643-rank vocabulary file; the `dashscope` wheel carries it."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the test extra installs dashscope"
    return pathlib.Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory, vocabulary) -> pathlib.Path:
    """Directories `lm` and `vq` in upstream's layout with the golden case's weights, configs and vocabulary."""
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("golden")
    configs = golden_json("hf_configs.json")
    for part in ("lm", "vq"):
        (root / part).mkdir()
        (root / part / "config.json").write_text(json.dumps(configs[part]))
        save_file(reference_weights(part), root / part / "model.safetensors", metadata={"format": "pt"})
    (root / "vq" / "preprocessor_config.json").write_text(json.dumps(configs["image_processor"]))
    (root / "lm" / "emu3.tiktoken").write_bytes(vocabulary.read_bytes())
    return root


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory, golden_checkpoint) -> pathlib.Path:
    """The golden checkpoint, converted."""
    from emu3_jax.checkpoints.convert import convert

    bundle = tmp_path_factory.mktemp("bundles") / "golden"
    convert([golden_checkpoint / "lm", golden_checkpoint / "vq"], bundle, progress=False)
    return bundle


@pytest.fixture(scope="session")
def golden_model(golden_bundle):
    """The golden model in memory, in float32 as the reference ran it."""
    import emu3_jax

    return emu3_jax.load(golden_bundle, dtype="float32")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, vocabulary) -> pathlib.Path:
    """A bundle for what needs all parts of a model and no reference."""
    from tiny_bundle import write_bundle

    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", vocabulary)


@pytest.fixture(scope="session")
def vouched(tiny_bundle, tmp_path_factory) -> pathlib.Path:
    """The tiny bundle with its checksums."""
    from emu3_jax.checkpoints.checksums import write_checksums

    copy = tmp_path_factory.mktemp("vouched") / "tiny"
    shutil.copytree(tiny_bundle, copy)
    write_checksums(copy)
    return copy


@pytest.fixture(scope="module")
def shared_trainers():
    """Runs of this process take their `Trainer` from here: configs with the same programs compile them once."""
    from emu3_jax.training import decoder_job

    # What a run reads, writes and rewards is in none of its programs.
    elsewhere = {"directory": "", "evaluation": (), "samples": None, "profile": None}
    elsewhere |= {"checkpoint_every": 1, "evaluate_every": 1, "log_every": 1, "keep": 1}
    rewarded = {"prompts": "-", "reward": "rewards.py:reward", "held_out": "", "judge_data": "", "timeout": 1.0}
    made = functools.cache(decoder_job.Trainer)

    def trainer(config, decoder, mesh):
        grpo = config.grpo and dataclasses.replace(config.grpo, **rewarded)
        return made(dataclasses.replace(config, grpo=grpo, **elsewhere), decoder, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_job, "Trainer", trainer)
        yield


@pytest.fixture(scope="module")
def shared_models():
    """A model is loaded once for each set of arguments: reading the public vocabulary takes most of a refused command.

    For modules that leave the files of their bundles as they are.
    """
    import emu3_jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emu3_jax, "load", functools.cache(emu3_jax.load))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch, golden_model):
    """An empty folder. Commands get the golden model without loading it anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emu3_jax.load", lambda *_, **__: golden_model)
    return tmp_path


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The line of a command that must fail before a model is loaded, and must write nothing."""
    from commands import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emu3_jax.load", lambda *_, **__: pytest.fail("a model was loaded"))

    def state() -> list[tuple[str, bytes]]:
        return sorted((str(file), file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file())

    def fail(*words: object) -> str:
        before = state(), sorted(os.listdir(tmp_path))
        assert run(*words) == 2
        out, line = capsys.readouterr()
        assert out == "" and line.startswith("emu3-jax: error: ") and line.count("\n") == 1 and len(line) <= 320
        assert (state(), sorted(os.listdir(tmp_path))) == before
        return line

    return fail


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A stand-in for Cloud Storage; clients in this process and in those that it starts find it."""
    from gcs_stand_in import serving

    with pytest.MonkeyPatch.context() as patch, serving() as served:
        patch.setenv("STORAGE_EMULATOR_HOST", served.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", served.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("EMU3_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield served


@pytest.fixture
def bucket(store, tmp_path, monkeypatch):
    """An empty bucket, `gs://bucket`. At the end no lock is left, and nothing local named after an address."""
    monkeypatch.chdir(tmp_path)
    store.bucket("bucket")
    yield store
    store.refuse = lambda *_: None
    assert [name for name in store.names("bucket") if "lock" in name] == []
    assert [name for name in os.listdir(tmp_path) if ":" in name or name == "gs"] == []
