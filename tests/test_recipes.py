"""The recipes for TPU slices, Kubernetes and Slurm: every command of the pages runs here, against stand-ins."""

import json
import os
import re
import shutil
import sys

import pytest
from cloud_checkout import ROOT, SLICE, Cloud, parsing_cloud

pytestmark = pytest.mark.compiled_quickly

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("tpu", "cluster")}


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


# --------------------------------------------------------------------------------------- the other ways


@pytest.mark.slow
def test_other_ways_to_a_slice(tmp_path):
    """The sections of docs/tpu.md after the walk-through: Spot, Compute Engine, xpk and the Cluster Toolkit."""
    cloud = parsing_cloud(tmp_path)
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
