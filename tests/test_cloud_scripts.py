"""The scripts for TPU slices and Slurm: what they run where, what they refuse, and how a training goes on."""

import re
import shlex
import subprocess

import cloud_flags as known
import pytest
from cloud_checkout import ROOT, SLICE, Cloud, parsing_cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return parsing_cloud(tmp_path)


@pytest.fixture
def ready(cloud) -> Cloud:
    """With a slice that is set up."""
    cloud.run("bash scripts/tpu/slice.sh create v5e:4x4; bash scripts/tpu/setup.sh", **SLICE)
    return cloud


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
    for name in (path.name for path in (ROOT / "scripts" / "tpu").iterdir() if path.name not in sourced):
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
