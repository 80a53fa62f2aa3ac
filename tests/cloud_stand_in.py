"""Stands in for gcloud, xpk, gcluster, xprof, sbatch, srun and scontrol, and for what the recipes use on a host.

    python cloud_stand_in.py PROGRAM ARGUMENTS

It refuses flags that the real command does not know (`cloud_flags.py`). Hosts are directories of this machine: `ssh`
runs the command there as the processes of a slice would run, with devices of the CPU. The environment variable CLOUD
names the directory that holds everything:

    calls       a line of JSON for each call: the name of the command, its flags, its operands
    refused     what was refused; tests assert that there is nothing
    states      a state per line that `describe` reports, one after the other; the last one stays
    slice       the slice: its type
    hosts/NAME  the home directory of each host
    bin, host   programs of the user's machine and of the hosts (see `install`)
    buckets     a directory for each bucket

Variables: CLOUD_HOSTS, the number of hosts (2); CLOUD_EMU3, the command that hosts run as emu3-jax.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import cloud_flags as known

CLOUD = pathlib.Path(os.environ.get("CLOUD", "."))
HOSTS = int(os.environ.get("CLOUD_HOSTS", "2"))
USERS = ("gcloud", "xpk", "gcluster", "xprof", "sbatch", "pip")
# Variables of the tests that hosts have too.
KEPT = ("CLOUD", "JAX_DISABLE", "JAX_PERSISTENT", "JAX_COMPILATION_CACHE_MAX")
STATES = "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n"
OF_INSTANCES = {"WAITING_FOR_RESOURCES": "", "PROVISIONING": "STAGING", "ACTIVE": "RUNNING"}
ON_HOSTS = ("hostname", "sudo", "mount", "mount.nfs", "mountpoint", "curl", "uv", "apt-get", "pip", "srun", "scontrol")


def install(cloud: pathlib.Path) -> None:
    """Makes the programs, as scripts that call this file."""
    for folder, names in (("bin", USERS), ("host", ON_HOSTS)):
        (cloud / folder).mkdir(parents=True)
        for name in names:
            file = cloud / folder / name
            file.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {name} "$@"\n')
            file.chmod(0o755)
    (cloud / "states").write_text(STATES)


# ---------------------------------------------------------------------------------------------------------- hosts


def names() -> list[str]:
    return sorted(path.name for path in (CLOUD / "hosts").glob("*"))


def make_hosts(prefix: str) -> None:
    for index in range(HOSTS):
        (CLOUD / "hosts" / f"{prefix}-w-{index}").mkdir(parents=True)


def processes(count: int) -> list[dict[str, str]]:
    """What JAX reads in place of a slice's metadata: the variables of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        for index in range(count)
    ]


def environment(home: pathlib.Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    flags = " ".join(x for x in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in x)
    return {
        **kept,
        "PATH": f"{CLOUD / 'host'}:/usr/bin:/bin",
        "HOME": str(home),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2",
        **more,
    }


def everywhere(hosts: list[str], command: str) -> int:
    """Runs a shell command on hosts at once, as processes of one slice if these are all of its hosts."""
    started = []
    variables = dict(zip(names(), processes(len(names())), strict=True))
    for host in hosts:
        home = CLOUD / "hosts" / host
        more = environment(home, CLOUD_HOST=host, **variables[host])
        started.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=more, stdin=subprocess.DEVNULL))
    return max(process.wait() for process in started)


def chosen(worker: str) -> list[str]:
    return names() if worker == "all" else [names()[int(worker)]]


def copy(words: list[str], hosts: list[str]) -> int:
    """scp -r. `machine:path` is relative to the home of each of `hosts`."""
    *sources, target = words
    for host in hosts:
        home = CLOUD / "hosts" / host

        def place(word: str, home: pathlib.Path = home) -> pathlib.Path:
            machine, colon, path = word.partition(":")
            return home / path if colon else pathlib.Path(machine)

        for source in map(place, sources):
            end = place(target)
            end = end / source.name if end.is_dir() else end
            if source.is_dir():
                shutil.copytree(source, end)
            else:
                shutil.copy(source, end)
    return 0


# -------------------------------------------------------------------------------------------------- the user's programs


def state() -> str:
    lines = (CLOUD / "states").read_text().split()
    if len(lines) > 1:
        (CLOUD / "states").write_text("\n".join(lines[1:]))
    return lines[0]


def gcloud(name: str, flags: dict[str, str], operands: list[str]) -> int:
    match name.split()[-2:]:
        case ["queued-resources" | "managed", "create"]:
            assert not (CLOUD / "slice").exists(), "the slice exists"
            (CLOUD / "slice").write_text(flags.get("accelerator-type", flags.get("size", "")))
            make_hosts(operands[0])
        case ["queued-resources", "describe"] | ["managed", "list-instances"]:
            if not (CLOUD / "slice").exists():
                print(f"ERROR: (gcloud) NOT_FOUND: {operands[0]} was not found", file=sys.stderr)
                return 1
            if "basename" in flags["format"]:
                print("\n".join(names()))
            else:
                now = state()
                print(now if "describe" in name else "\n".join([OF_INSTANCES.get(now, now)] * HOSTS))
        case ["queued-resources" | "managed", "delete"]:
            (CLOUD / "slice").unlink()
            shutil.rmtree(CLOUD / "hosts")  # the disks of the hosts go with them
            (CLOUD / "states").write_text(STATES)
        case ["tpu-vm", "ssh"]:
            return everywhere(chosen(flags.get("worker", "0")), flags["command"])
        case ["tpu-vm", "scp"]:
            return copy(operands, chosen(flags.get("worker", "0")))
        case ["compute", "ssh"]:
            return everywhere(operands, flags["command"])
        case ["compute", "scp"]:
            return copy(operands, [next(x for x in names() if any(word.startswith(f"{x}:") for word in operands))])
        case ["storage", "cp"]:
            places = [word.replace("gs://", f"{CLOUD}/buckets/") for word in operands]
            for place in places[:-1]:
                shutil.copytree(place, pathlib.Path(places[-1], pathlib.Path(place).name))
        case ["instances", "describe"]:  # of Filestore
            print("10.0.0.2")
        case ["resource-policies", "describe"]:
            return 0 if any("workload-policy" in line for line in (CLOUD / "calls").read_text().splitlines()) else 1
    return 0


def pods(command: str, sources: str | None) -> int:
    """Runs a command as the pods of a slice would, one after the other, and stops at the first that fails."""
    for index in range(HOSTS):
        home = CLOUD / "pods" / str(index)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(sources, home) if sources else home.mkdir(parents=True)
        more = environment(home, TPU_WORKER_ID=str(index), CLOUD_HOST=f"pod-{index}")
        code = subprocess.run(["bash", "-c", f"({command})"], cwd=home, env=more, check=False).returncode
        if code:
            return code
    return 0


def xprof(name: str, flags: dict[str, str], operands: list[str]) -> int:
    assert list(pathlib.Path(flags["logdir"]).glob("plugins/profile/*/*.xplane.pb")), "no profile"
    return 0


def launch(words: list[str], flags: dict[str, str]) -> int:
    """srun: as many processes as the step has tasks, with Slurm's variables."""
    tasks = int(flags.get("ntasks", os.environ["SLURM_NTASKS"]))
    started = []
    for index in range(tasks):
        more = {
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(tasks),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
        }
        started.append(subprocess.Popen(words, env={**os.environ, **more}))
    return max(process.wait() for process in started)


def submit(flags: dict[str, str], operands: list[str]) -> int:
    """sbatch: runs the script at once, and again when it asked for that."""
    script = pathlib.Path(operands[0])
    lines = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    _, own, _ = known.split("sbatch", [*lines, "script"])
    assert own["signal"] and own["open-mode"] == "append"
    log = own["output"].replace("%x", own["job-name"]).replace("%j", "77")
    tasks = int({**own, **flags}["ntasks-per-node"]) * int({**own, **flags}.get("nodes", "1"))
    code = 0
    for restart in range(3):
        (CLOUD / "requeue").unlink(missing_ok=True)
        more = environment(
            pathlib.Path.home(), SLURM_JOB_ID="77", SLURM_NTASKS=str(tasks), SLURM_RESTART_COUNT=str(restart)
        )
        with open(log, "a") as out:
            # WORKER and other variables of the user go with the job.
            command = ["bash", str(script), *operands[1:]]
            code = subprocess.run(command, env={**os.environ, **more}, stdout=out, stderr=out, check=False).returncode
        if not (CLOUD / "requeue").exists():
            break
    print("Submitted batch job 77")
    return code


# ---------------------------------------------------------------------------------------------- programs of the hosts


def uv(words: list[str]) -> int:
    if words[0] == "venv":
        pathlib.Path(words[-1], "bin").mkdir(parents=True)
        return 0
    assert words[:3] == ["pip", "install", "--python"], words
    return check_extras(words[-1]) or put_emu3(pathlib.Path(words[3]).parent)


def check_extras(specification: str) -> int:
    """`.[a,b]` must name extras of the project in this directory."""
    if specification in ("xprof", "xpk"):
        return 0
    text = pathlib.Path("pyproject.toml").read_text()
    assert specification.startswith(".["), specification
    for extra in specification[2:-1].split(","):
        assert f"\n{extra} = [" in text, f"no extra {extra}"
    return 0


def put_emu3(folder: pathlib.Path) -> int:
    program = folder / "emu3-jax"
    program.write_text(f'#!/bin/sh\nexec {os.environ["CLOUD_EMU3"]} "$@"\n')
    program.chmod(0o755)
    return 0


def on_host(program: str, words: list[str]) -> int | None:
    host = os.environ.get("CLOUD_HOST", "")
    mounted = CLOUD / "hosts" / host / ".mounted"
    match program:
        case "hostname":
            print(host)
        case "sudo":
            os.execvp(words[0], words)
        case "mountpoint":
            return 0 if mounted.exists() else 1
        case "mount":
            assert words[:4] == ["-t", "nfs", "-o", "rw,hard"] and words[4] == "10.0.0.2:/vol1", words
            assert pathlib.Path(words[5]).is_dir()
            mounted.touch()
        case "curl":  # the installer of uv, which goes to a shell
            print(f"mkdir -p ~/.local/bin && cp {CLOUD / 'host' / 'uv'} ~/.local/bin/uv")
        case "uv":
            return uv(words)
        case "pip":
            if "CLOUD_HOST" in os.environ:
                put_emu3(CLOUD / "host")
            elif pathlib.Path(".venv").exists():
                put_emu3(pathlib.Path(".venv/bin"))
            return check_extras(words[-1])
        case "mount.nfs" | "apt-get":
            return 0
        case _:
            return None
    return 0


def main(program: str, words: list[str]) -> int:
    code = on_host(program, words)
    if code is not None:
        return code
    try:
        name, flags, operands = known.split(program, words)
    except ValueError as error:
        with open(CLOUD / "refused", "a") as refused:
            refused.write(f"{error}\n")
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    with open(CLOUD / "calls", "a") as calls:
        calls.write(json.dumps([name, flags, operands]) + "\n")
    match program:
        case "gcloud":
            return gcloud(name, flags, operands)
        case "xprof":
            return xprof(name, flags, operands)
        case "sbatch":
            return submit(flags, operands)
        case "srun":
            return launch(operands, flags)
        case "scontrol":
            (CLOUD / "requeue").touch()
        case "xpk" | "gcluster" if "command" in flags:
            return pods(flags["command"], flags.get("script-dir", flags.get("build-context")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
