"""The recipes for TPU slices, Kubernetes and Slurm: every command that is printed runs here, against stand-ins."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import cloud_flags as known
import pytest
from cloud_stand_in import install
from tiny_bundle import DECODER

pytestmark = pytest.mark.compiled_quickly

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
SHELL_SCRIPTS = sorted([*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch"), ROOT / ".ci" / "run"])
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("tpu", "cluster")}

# What the tiny model is fine-tuned by in place of the configs of the 8 B model: NAME is the config's, ADAPTED whether
# it is one of adapters, which evaluates what `prepare` held back.
CONFIG = f"""
from emu3_jax.config import DecoderConfig, SpecialTokens
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config():
    return TrainConfig(
        directory="out/NAME",
        model=ModelConfig("out/emu3-gen", {DECODER!r}, dtype="float32"),
        data=DataConfig((Source("out/data", TextToImage()),), sequence_length=64),
        batch_size=4,
        steps=16,
        optimizer=OptimizerConfig(warmup_steps=2),
        adapter=Adapter(rank=4) if ADAPTED else None,
        evaluation=(("validation", Source("out/data/validation", TextToImage())),) if ADAPTED else (),
    )
"""
# Stands in for emu3-jax where only its arguments matter: it parses them as emu3-jax does, and makes the output.
PARSE = """
import json, os, pathlib, sys
from emu3_jax.cli.main import parser
options = parser().parse_args(sys.argv[1:])
if getattr(options, "output", None) is not None:
    options.output.mkdir(parents=True, exist_ok=True)
names = ("JAX_NUM_PROCESSES", "JAX_PLATFORMS", "TPU_VISIBLE_DEVICES", "TPU_PROCESS_BOUNDS", "EMU3_START_TIMEOUT")
told = {"arguments": sys.argv[1:], "host": os.environ.get("CLOUD_HOST"), "out": os.path.realpath("out")}
told |= {name: os.environ.get(name) for name in names}
with open(pathlib.Path(os.environ["CLOUD"], "told"), "a") as file:
    file.write(json.dumps(told) + "\\n")
print("done")
"""


def linter(name: str) -> str:
    """Where the program is. Without it the test is skipped, unless continuous integration asks for it."""
    beside = pathlib.Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        reason = f"{name} is not installed: pip install -e '.[test]'"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def test_shell_scripts_are_linted():
    done = subprocess.run([linter("shellcheck"), *SHELL_SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dockerfile_is_linted():
    done = subprocess.run([linter("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dockerfile_copies_what_is_there():
    """What is copied exists, is not left out by .dockerignore, and the extras are the project's."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    copied = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and set(copied) == kept and all((ROOT / name).exists() for name in copied)
    extras = (ROOT / "pyproject.toml").read_text()
    for specification in re.findall(r'"\.\[(.*)\]"', (ROOT / "Dockerfile").read_text()):
        for extra in specification.split(","):
            for cuda in ("12", "13"):
                assert f"\n{extra.replace('${CUDA}', cuda)} = [" in extras


class Cloud:
    """A checkout, stand-ins for the vendor's commands, and a directory that the hosts share."""

    def __init__(self, root: pathlib.Path, emu3: str):
        self.root, self.shared, self.checkout = root / "cloud", root / "shared", root / "checkout"
        install(self.root)
        self.checkout.mkdir()
        for name in ("scripts", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.checkout / name)
        (self.checkout / "configs").mkdir()
        for config in (ROOT / "configs").glob("*_8b.py"):
            (self.checkout / "configs" / config.name).write_text(
                CONFIG.replace("NAME", config.stem.removesuffix("_8b")).replace("ADAPTED", str("lora" in config.stem))
            )
        self.program(self.root / "bin" / "emu3-jax", emu3)
        self.program(
            self.root / "bin" / "python",
            sys.executable,
            f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && exec cp {self.root}/bin/pip "$3/bin"; fi',
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TPU", "ZONE", "WORKER"))},
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": "",
            "CLOUD": str(self.root),
            "CLOUD_EMU3": str(self.root / "bin" / "emu3-jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "SHARED": str(self.shared),
            "POLL": "0.3",
            "USER": "somebody",
        }
        self.commit()

    @staticmethod
    def program(file: pathlib.Path, command: str, first: str = ":") -> None:
        file.write_text(f'#!/bin/sh\n{first}\nexec env PYTHONPATH={ROOT} {command} "$@"\n')
        file.chmod(0o755)

    def commit(self) -> None:
        """Makes the checkout a repository with one commit: `git archive` takes that to the hosts."""
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
        for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "the checkout"]):
            subprocess.run(["git", *words], cwd=self.checkout, check=True)

    def run(self, script: str, code: int = 0, **variables: str) -> str:
        """What a shell script prints, which must end with `code`."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.checkout,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        refused = self.root / "refused"
        assert not refused.exists(), refused.read_text()
        assert done.returncode == code, f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def error(self, script: str, **variables: str) -> str:
        """The one line of an error, after which nothing was called."""
        before = len(self.calls())
        (line,) = self.run(script, 2, **variables).splitlines()
        assert len(self.calls()) == before
        return line

    def calls(self) -> list[tuple[str, dict[str, str], list[str]]]:
        file = self.root / "calls"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    def told(self) -> list[dict]:
        file = self.root / "told"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SLICE = {"TPU": "emu3", "ZONE": "us-west4-a", "NFS": "10.0.0.2:/vol1"}


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    """Hosts whose emu3-jax only reads its arguments."""
    (tmp_path / "parse.py").write_text(PARSE)
    return Cloud(tmp_path, f"{sys.executable} {tmp_path / 'parse.py'}")


@pytest.fixture
def ready(cloud) -> Cloud:
    """With a slice that is set up."""
    cloud.run("bash scripts/tpu/slice.sh create v5e:4x4; bash scripts/tpu/setup.sh", **SLICE)
    return cloud


def blocks(page: str, heading: str = "") -> list[str]:
    """The shell commands of a page, or of one of its sections."""
    text = PAGES[page]
    if heading:
        text = text.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def substitute(text: str, cloud: Cloud) -> str:
    return (
        text.replace("/mnt/emu3", str(cloud.shared))
        .replace("/mnt/bucket", str(cloud.root / "buckets" / "my-bucket"))
        .replace("TYPE=v5e:4x4 AREA=518400", "TYPE=v5e:2x2 AREA=1024")
        .replace("tensor=4", "tensor=2")
    )


def test_links_between_pages():
    """What a page links to is there: the file, and in a page the heading."""
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{page.name}: {path}#{anchor}"


# ------------------------------------------------------------------------------------------------ the walk-through


@pytest.fixture
def real(tiny_bundle, tmp_path) -> Cloud:
    """Hosts with emu3-jax as it is. The tiny model's PyTorch checkpoints are local directories with a hub's names."""
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.checkpoints.export import export

    cloud = Cloud(tmp_path, f"{sys.executable} -m emu3_jax")
    export(Bundle.open(tiny_bundle), tmp_path / "published", "upstream", progress=False)
    shutil.copytree(tmp_path / "published" / "language_model", cloud.checkout / "BAAI" / "Emu3-Gen")
    shutil.copytree(tmp_path / "published" / "vision_tokenizer", cloud.checkout / "BAAI" / "Emu3-VisionTokenizer")
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cloud.shared.mkdir()
        (cloud.shared / ".compiled").symlink_to(compiled)  # a second run of the tests finds its programs, as of others
    cloud.commit()
    return cloud


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.libtpu
def test_walk_through(real):
    """Steps 1 to 11 of docs/tpu.md in one shell, as a reader types them; nothing is left in the end."""
    text = PAGES["tpu"]
    steps = [block for number in range(1, 12) for block in blocks("tpu", f"{number}. ")]
    assert len(re.findall(r"^## \d", text, re.MULTILINE)) == 11 and len(blocks("tpu")) == len(steps) + 5
    # Before the slice is deleted: what the hosts have.
    *steps, last = steps
    said = real.run(substitute("\n".join(steps), real))
    assert "16 steps" in said and re.search(r"the training is complete", said)
    run = json.loads((real.shared / "lora_t2i" / "run.json").read_text())
    assert run["adapter"]["rank"] == 4
    metrics = (real.shared / "lora_t2i" / "metrics.jsonl").read_text()
    assert '"evaluation/validation"' in metrics
    logs = sorted((real.shared / "logs").glob("*.log"))
    assert [log.name for log in logs] == ["emu3-w-0.log", "emu3-w-1.log"]
    headings = [re.findall(r"^[-0-9]+ [0-9:]+ emu3-jax (\w+)", log.read_text(), re.MULTILINE) for log in logs]
    assert headings == [["convert", "prepare", "train", "generate", "export"], ["train", "generate"]]
    assert (real.checkout / "pictures" / "000.png").exists() and (real.checkout / "checkpoint").is_dir()
    real.run(substitute(last, real), **SLICE, PROJECT="my-project")
    assert not (real.root / "slice").exists()
    assert real.calls()[-1][0] == "gcloud filestore instances delete"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_slurm_walk_through(real):
    """docs/cluster.md, as a reader types it, with two processes."""
    script = "\n".join(blocks("cluster"))
    script = script.replace("--area 518400", "--area 1024").replace("--nodes=8", "--nodes=1")
    script = script.replace("tensor=8", "fsdp=-1,tensor=2")
    said = real.run(script.replace("sbatch --wait", "sbatch --wait --ntasks-per-node=2"))
    assert "srun --kill-on-bad-exit=1 .venv/bin/emu3-jax train configs/sft_t2i_8b.py\n" in said
    log = (real.checkout / "emu3-77.log").read_text()
    starts = re.findall(r"job 77, start 0: emu3-jax (\w+)", log)
    assert starts == ["convert", "prepare", "train", "generate", "export"]
    assert re.search(r"^[-0-9]+ [0-9:]+ step \d+ of \d+: loss .+ tokens/s", log, re.MULTILINE)
    steps = [dict(flags) for name, flags, _ in real.calls() if name == "srun"]
    one = {"kill-on-bad-exit": "1", "nodes": "1", "ntasks": "1"}
    assert steps == [one, one, {"kill-on-bad-exit": "1"}, {"kill-on-bad-exit": "1"}, one]
    assert (real.checkout / "out" / "pictures" / "000.png").exists()


# --------------------------------------------------------------------------------------- what the other commands do


@pytest.mark.slow
def test_other_ways_to_a_slice(cloud):
    """The sections of docs/tpu.md after the walk-through: Spot, Compute Engine, xpk and the Cluster Toolkit."""
    (spot,), (compute,) = blocks("tpu", "Spot"), blocks("tpu", "TPU7x")
    (xpk,), (toolkit,) = (
        blocks("tpu", "Google Kubernetes Engine with xpk"),
        blocks("tpu", "Google Kubernetes Engine with the"),
    )
    names = f"export TPU=emu3 {blocks('tpu', '1. ')[0].splitlines()[0].removeprefix('export ')} NFS=10.0.0.2:/vol1"
    (cloud.root / "buckets" / "my-bucket").mkdir(parents=True)
    (cloud.checkout / "photos").mkdir()
    bucket = {"BUCKET_MOUNT": str(cloud.root / "buckets" / "my-bucket")}
    cloud.run(substitute(f"{names}\n{spot}bash scripts/tpu/slice.sh delete\n{compute}{xpk}{toolkit}", cloud), **bucket)
    ran = [(line["host"], line["arguments"][0]) for line in cloud.told() if line["arguments"][:1] != ["--help"]]
    hosts = [f"emu3-w-{index}" for index in (0, 1)]
    pods = ["pod-0", "pod-1"]
    wanted = [(host, "train") for host in hosts] + [(hosts[0], "prepare")]
    wanted += [("pod-0", "convert"), ("pod-0", "prepare"), *((pod, "train") for pod in pods), ("pod-0", "export")]
    wanted += [("pod-0", "prepare"), *((pod, "train") for pod in pods)]
    assert sorted(ran) == sorted(wanted)
    assert {line["out"] for line in cloud.told() if line["host"]} == {str(cloud.shared)}
    calls = {name: flags for name, flags, _ in cloud.calls()}
    assert "spot" in calls["gcloud compute tpus queued-resources create"]
    template = calls["gcloud compute instance-templates create"]
    assert (template["machine-type"], template["provisioning-model"]) == ("tpu7x-standard-4t", "SPOT")
    assert template["image-family"] == "ubuntu-accel-2404-amd64-tpu-tpu7x"
    policy = "projects/my-project/regions/us-central1/resourcePolicies/emu3"
    group = calls["gcloud compute instance-groups managed create"]
    assert (group["size"], group["workload-policy"], group["target-size-policy-mode"]) == ("2", policy, "bulk")
    assert calls["gcloud compute resource-policies create workload-policy"]["accelerator-topology"] == "2x2x2"
    workload = calls["xpk workload create"]
    assert workload["tpu-type"] == "v5litepod-64" and workload["termination-grace-period-seconds"] == "600"
    job = calls["gcluster job submit"]
    assert (job["compute-type"], job["topology"], job["grace-period"]) == ("tpu7x", "2x2x2", "600s")
    assert job["mount"].split(",")[0] == f"filestore://10.0.0.2/vol1:{cloud.shared}:rw"
    assert not (cloud.root / "slice").exists()


def test_one_worker_or_all(ready):
    """What runs where, with which variables; arguments arrive as they were typed; logs grow at their ends."""
    prompt = 'a cat\'s "hat", $HOME; `x` & *'
    ready.run(
        f"""
        bash scripts/tpu/run.sh convert a b -o out/c
        bash scripts/tpu/run.sh prepare out/m.jsonl --model out/c -o out/d
        WORKER=all bash scripts/tpu/run.sh prepare out/m.jsonl --model out/c -o out/d
        WORKER=1 bash scripts/tpu/run.sh generate {shlex.quote(prompt)} -o out/e
        """,
        **SLICE,
    )
    wanted = {
        "convert": ("1", "cpu", None, None),
        "prepare": ("1", "cpu", "0", "1,1,1"),  # the stand-in's hosts have no other platform
        "generate": ("1", "cpu", "0", "1,1,1"),
    }
    names = ("JAX_NUM_PROCESSES", "JAX_PLATFORMS", "TPU_VISIBLE_DEVICES", "TPU_PROCESS_BOUNDS")
    ran = [line for line in ready.told() if line["arguments"] != ["--help"]]
    assert [line["arguments"][0] for line in ran] == ["convert", "prepare", "prepare", "prepare", "generate"]
    for line in (ran[0], ran[1], ran[4]):
        assert tuple(line[name] for name in names) == wanted[line["arguments"][0]]
    for line in ran[2:4]:
        assert tuple(line[name] for name in names) == ("2", "cpu", None, None)
    assert ran[4]["host"] == "emu3-w-1" and ran[4]["arguments"] == ["generate", prompt, "-o", "out/e"]
    log = (ready.shared / "logs" / "emu3-w-0.log").read_text()
    assert re.findall(r"^[-0-9]+ [0-9:]+ emu3-jax (\w+)", log, re.MULTILINE) == ["convert", "prepare", "prepare"]
    assert log.count("\ndone\n") == 3
    assert "emu3-w-1.log" in ready.run("bash scripts/tpu/logs.sh 3", **SLICE)
    # `convert` leaves the chips of a real host alone by this:
    said = ready.run("bash scripts/tpu/run.sh --dry-run convert a b -o out/c", **SLICE)
    assert "JAX_PLATFORMS=cpu" in said.replace("\\", "")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("slice.sh create v5e:8x8", "set TPU to the name of the slice and ZONE to its zone"),
        ("TPU=a ZONE=b slice.sh create", "name the slice, as in: slice.sh create v5e:4x4"),
        ("TPU=a ZONE=b slice.sh create v5e:8x", "'v5e:8x' is no slice: write v5e:4x4"),
        ("TPU=a ZONE=b slice.sh create v5p-x", "'v5p-x' is no slice: write v5e:4x4"),
        ("TPU=a ZONE=b slice.sh create h100:8", "'h100:8' is no slice: write v5e:4x4"),
        ("TPU=a ZONE=b slice.sh remove", "usage: slice.sh [--dry-run] {create TYPE | wait | state | delete}"),
        ("TPU=a ZONE=b slice.sh --dry create v5e:2x2", "unknown option --dry: the options are --dry-run and --help"),
        ("TPU=a ZONE=b VIA=x slice.sh state", "VIA is 'x': it must be queued or compute"),
        ("TPU=a ZONE=b SHARED=/a/$x run.sh train", "SHARED is '/a/$x': it must be an absolute path"),
        ("TPU=a ZONE=b run.sh", "usage: run.sh"),
        (
            "TPU=a ZONE=b WORKER=all run.sh convert a -o out/b",
            "convert writes one directory, and must not run on all hosts",
        ),
        ("TPU=a ZONE=b WORKER=first run.sh train c.py", "WORKER is 'first': it must be a host's number, or all"),
        ("TPU=a ZONE=b NFS=10.0.0.2 setup.sh --dry-run", "NFS is '10.0.0.2': it must be ADDRESS:/SHARE"),
        (
            "TPU=a ZONE=b BUCKET=gs://x setup.sh --dry-run",
            "BUCKET is 'gs://x': it must be a bucket's name, without gs://",
        ),
        ("TPU=a ZONE=b copy.sh up absent out/a", "absent does not exist"),
        ("TPU=a ZONE=b copy.sh up scripts /mnt/a", "'/mnt/a' on the slice must be out/NAME"),
        ("TPU=a ZONE=b copy.sh up scripts out/../a", "'out/../a' on the slice must be out/NAME"),
        ("TPU=a ZONE=b copy.sh down out/a scripts", "scripts exists: choose another name"),
        ("TPU=a ZONE=b copy.sh sideways a b", "usage: copy.sh"),
        ("TPU=a ZONE=b logs.sh many", "LINES is 'many': it must be a whole number"),
        ("TPU=a ZONE=b keep_training.sh v5e:2x2", "usage: keep_training.sh"),
        ("TPU=a ZONE=b VIA=compute slice.sh --dry-run create v5litepod-16", "write the topology of v5litepod-16"),
        ("CLUSTER=a PROJECT=b ZONE=c xpk.sh list", "TYPE is not set"),
        ("CLUSTER=a PROJECT=b ZONE=c TYPE=v5e:4x4 xpk.sh run Train train c.py", "'Train' must be a name of letters"),
        ("CLUSTER=a PROJECT=b ZONE=c TYPE=v5e:4x4 xpk.sh storage big", "usage: xpk.sh [--dry-run] storage GB"),
        ("CLUSTER=a PROJECT=b gcluster.sh list", "LOCATION is not set"),
        (
            "CLUSTER=a PROJECT=b LOCATION=c gcluster.sh run a train c.py",
            "set TYPE to the slice, like v5e:4x4, and FILES",
        ),
    ],
)
def test_bad_input_of_scripts(cloud, script, says):
    """One line that names culprit and remedy; nothing is called."""
    *variables, name, arguments = re.match(r"((?:\w+=\S+ )*)(\w+\.sh)(.*)", script).groups()
    quoted = " ".join(shlex.quote(word) for word in variables[0].split())
    line = cloud.error(f"env {quoted} bash scripts/tpu/{name}{arguments}")
    # The first lines of --dry-run may come before.
    assert line.startswith(f"{name}: error: ") and says in line


def test_slurm_script(cloud, monkeypatch):
    """Bad input is refused; a job that was stopped with a checkpoint starts again, and its log goes on."""
    said = cloud.run("bash scripts/slurm/emu3.sbatch", 2)
    assert said.startswith("usage: sbatch emu3.sbatch")
    said = cloud.run("WORKER=all bash scripts/slurm/emu3.sbatch convert a -o b", 2)
    assert "convert writes one directory, and must not run as several processes" in said
    assert "WORKER is '3': it must be 0 or all" in cloud.run("WORKER=3 bash scripts/slurm/emu3.sbatch train c.py", 2)
    said = cloud.run("WORKER=all bash scripts/slurm/emu3.sbatch --dry-run prepare m.jsonl --model b -o c")
    assert said == "srun --kill-on-bad-exit=1 .venv/bin/emu3-jax prepare m.jsonl --model b -o c\n"
    (cloud.checkout / ".venv" / "bin").mkdir(parents=True)
    stopped = cloud.checkout / ".venv" / "bin" / "emu3-jax"
    stopped.write_text("#!/bin/sh\necho here; [ $SLURM_RESTART_COUNT = 1 ] || exit 143\n")
    stopped.chmod(0o755)
    cloud.run("sbatch --ntasks-per-node=1 scripts/slurm/emu3.sbatch train c.py")
    log = (cloud.checkout / "emu3-77.log").read_text()
    assert re.findall(r"start (\d)", log) == ["0", "1"] and log.count("here") == 2
    assert [name for name, *_ in cloud.calls()] == ["sbatch", "srun", "scontrol requeue", "srun"]


def as_bash_reads(line: str) -> list[str]:
    return subprocess.check_output(["bash", "-c", f"printf '%s\\0' {line}"], text=True).split("\0")[:-1]


def test_dry_run_calls_nothing(cloud):
    """With --dry-run every script prints whole commands with flags that exist, and runs none."""
    (cloud.checkout / "photos").mkdir()
    everything = {
        **SLICE,
        "CLUSTER": "emu3",
        "PROJECT": "my-project",
        "LOCATION": "us-central1",
        "TYPE": "tpu7x:2x2x2",
        "FILES": "volume",
        "GCLUSTER_IMAGE_REPO": "emu3",
    }
    names = set()
    for via, kind in (("queued", "v5p:2x2x2"), ("compute", "tpu7x:2x2x2")):
        for line in (
            f"slice.sh --dry-run create {kind}",
            "slice.sh --dry-run delete",
            "slice.sh --dry-run wait",
            "slice.sh --dry-run state",
            "setup.sh --dry-run",
            "run.sh --dry-run train configs/sft_t2i_8b.py",
            "copy.sh --dry-run up photos out/photos",
            "copy.sh --dry-run down out/a a",
            "logs.sh --dry-run",
            f"keep_training.sh --dry-run {kind} configs/sft_t2i_8b.py",
            "xpk.sh --dry-run cluster --spot",
            "xpk.sh --dry-run storage 2560",
            "xpk.sh --dry-run run train-1 train c.py",
            "gcluster.sh --dry-run run train-1 train c.py",
            "gcluster.sh --dry-run stop train-1",
        ):
            said = cloud.run(f"bash scripts/tpu/{line}", VIA=via, **everything)
            for words in map(as_bash_reads, said.splitlines()):
                if words[0] in ("gcloud", "xpk", "gcluster"):
                    names.add(known.split(words[0], words[1:])[0])
                else:
                    assert words[0] in ("git", "mkdir", "rm", "mv", "emu3:")
    assert not cloud.calls() and not cloud.told() and not (cloud.checkout / "a").exists()
    assert {"gcloud compute ssh", "gcloud compute tpus tpu-vm ssh", "xpk workload create"} < names


@pytest.mark.parametrize(
    ("kind", "machine", "size"),
    [("v6e:1x1", "ct6e-standard-1t", 1), ("v6e:4x4", "ct6e-standard-4t", 4), ("v5p:2x2x1", "ct5p-hightpu-4t", 1)],
)
def test_machines_of_compute_engine(cloud, kind, machine, size):
    said = cloud.run(f"bash scripts/tpu/slice.sh --dry-run create {kind}", VIA="compute", **SLICE)
    assert f"--machine-type={machine} " in said and f" --size={size}" in said
    assert ("--workload-policy=" in said) == (size > 1)


def test_help_is_the_head_of_the_script(cloud):
    sourced = ("common.sh", "pods.sh")
    for name in (path.name for path in (SCRIPTS / "tpu").iterdir() if path.name not in sourced):
        said = cloud.run(f"bash scripts/tpu/{name} --help")
        assert len(said.splitlines()) > 4 and f"scripts/tpu/{name}" in said and "set -euo" not in said
    said = cloud.run("bash scripts/slurm/emu3.sbatch --help")
    assert said.startswith("Runs an emu3-jax command on GPU nodes under Slurm") and "#SBATCH" not in said
    assert not cloud.calls()


def test_copies_are_whole_or_absent(ready):
    (ready.checkout / "photos").mkdir()
    (ready.checkout / "photos" / "a.txt").write_text("a")
    ready.run("bash scripts/tpu/copy.sh up photos out/deep/photos", **SLICE)
    assert (ready.shared / "deep" / "photos" / "a.txt").read_text() == "a"
    said = ready.run("bash scripts/tpu/copy.sh up photos out/deep/photos", 2, **SLICE)
    assert "out/deep/photos exists on the slice: choose another name" in said
    ready.run("bash scripts/tpu/copy.sh down out/deep/photos back/photos", **SLICE)
    assert [path.name for path in (ready.checkout / "back").rglob("*")] == ["photos", "a.txt"]
    assert ready.run("bash scripts/tpu/copy.sh down out/absent x", 1, **SLICE)
    assert not (ready.checkout / "x").exists()


# What hosts run as emu3-jax in the tests of keep_training.sh: `codes` has a line for each start, with an exit code and
# what becomes of the slice.
PLAY = """
[ "$1" != --help ] || exit 0
echo "started $*"
[ "$CLOUD_HOST" = emu3-w-0 ] || exit 0
while [ -e "$CLOUD/wait" ]; do sleep 0.1; done
read -r code state < "$CLOUD/codes"
sed -i 1d "$CLOUD/codes"
[ -z "$state" ] || echo "$state" > "$CLOUD/states"
exit "$code"
"""


@pytest.fixture
def played(cloud) -> Cloud:
    play = cloud.root / "play.sh"
    play.write_text(PLAY)
    cloud.environment |= {"CLOUD_EMU3": f"bash {play}", "CLOUD_HOSTS": "1"}
    return cloud


KEEP = "bash scripts/tpu/keep_training.sh v5e:4x4 configs/sft_t2i_8b.py --set steps=3"


@pytest.mark.slow
def test_training_goes_on_when_the_slice_is_taken_away(played):
    """A Spot slice that ends is made again; a failure is tried again on the same slice; the logs of all tries stay."""
    (played.root / "codes").write_text("134 SUSPENDED\n1\n0\n")
    said = played.run(KEEP, SPOT="1", **SLICE)
    assert "the slice is SUSPENDED, and the training continues on a new one" in said and "training is complete" in said
    names = [name.split()[-1] for name, *_ in played.calls() if "queued-resources" in name]
    assert [name for name in names if name != "describe"] == ["create", "delete", "create"]
    log = (played.shared / "logs" / "emu3-w-0.log").read_text()
    assert log.count("started train configs/sft_t2i_8b.py --set steps=3\n") == 3


@pytest.mark.slow
def test_training_that_cannot_go_on_ends(played):
    (played.root / "codes").write_text("2\n1\n1\n")
    # What is not granted is asked for again.
    (played.root / "states").write_text("FAILED\n")
    said = played.run(KEEP, 2, **SLICE)
    assert "the slice is FAILED: deleting it" in said
    assert said.endswith("error: the training found bad input: 'bash scripts/tpu/logs.sh' shows it\n")
    said = played.run(KEEP, 2, RETRIES="2", **SLICE)
    assert "error: 2 failures in a row, the last one: the training ended with 1, the slice is there" in said


@pytest.mark.slow
def test_training_that_runs_is_watched_not_started_again(played):
    (played.root / "wait").touch()
    (played.root / "codes").write_text("0\n")
    start = "bash scripts/tpu/slice.sh create v5e:4x4; bash scripts/tpu/setup.sh; "
    start += "DETACH=1 bash scripts/tpu/run.sh train c.py"
    played.run(f"{start}; (sleep 2; rm {played.root / 'wait'}) & {KEEP}", **SLICE)
    assert (played.shared / "logs" / "emu3-w-0.log").read_text().count("started") == 1


@pytest.mark.slow
@pytest.mark.parametrize("via", ["queued", "compute"])
def test_training_waits_for_a_slice_that_was_asked_for(played, via):
    """It is not deleted because it is not there yet."""
    (played.root / "codes").write_text("0\n")
    ask = "gcloud compute tpus queued-resources create emu3 --node-id=emu3 --zone=z --accelerator-type=a "
    ask += "--runtime-version=r"
    if via == "compute":
        ask = "gcloud compute instance-groups managed create emu3 --zone=z --template=t --size=1"
    assert "the training is complete" in played.run(f"{ask}; {KEEP}", VIA=via, **SLICE)
    assert sum(name.endswith(("s create", "managed create")) for name, *_ in played.calls()) == 1
    assert not any("delete" in name for name, *_ in played.calls())
