"""The flags that the commands of the recipes know, so that a stand-in can refuse others.

Sources, read in November 2026: the reference of the Google Cloud CLI, the parser of xpk 1.16.0, `cmd/job/*.go` of the
Cluster Toolkit of June 2026, and the manual pages of Slurm 22.05. The lists hold what the recipes may need, not all
that the commands know.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """What a command takes.

    Attributes:
        operands: how many arguments that are no flags; the least and the most.
        valued: flags with a value.
        switches: flags without one.
        required: flags that must be there.
    """

    operands: tuple[int, int]
    valued: str = ""
    switches: str = ""
    required: str = ""


_PLACE = "zone project format"
_GROUP = f"{_PLACE} region"
_XPK = "cluster project zone"
_JOB = "cluster location project"

COMMANDS = {
    "gcloud services enable": Command((1, 99), "project"),
    "gcloud config get-value": Command((1, 1)),
    "gcloud storage cp": Command((2, 99), "project", "recursive"),
    "gcloud filestore instances create": Command(
        (1, 1), f"{_PLACE} tier file-share network", "async", "tier file-share network"
    ),
    "gcloud filestore instances describe": Command((1, 1), _PLACE),
    "gcloud filestore instances delete": Command((1, 1), _PLACE, "quiet force"),
    "gcloud compute tpus queued-resources create": Command(
        (1, 1),
        f"{_PLACE} node-id accelerator-type runtime-version valid-until-duration valid-after-duration service-account "
        "network subnetwork labels metadata data-disk scopes tags",
        "spot reserved guaranteed async internal-ips",
        "zone node-id accelerator-type runtime-version",
    ),
    "gcloud compute tpus queued-resources describe": Command((1, 1), _PLACE, required="zone"),
    "gcloud compute tpus queued-resources delete": Command((1, 1), _PLACE, "force quiet async", "zone"),
    "gcloud compute tpus tpu-vm ssh": Command(
        (1, 1), f"{_PLACE} worker command output-directory ssh-flag ssh-key-file", "internal-ip plain dry-run", "zone"
    ),
    "gcloud compute tpus tpu-vm scp": Command(
        (2, 99), f"{_PLACE} worker scp-flag ssh-key-file", "recurse compress internal-ip plain dry-run", "zone"
    ),
    "gcloud compute ssh": Command((1, 1), f"{_PLACE} command ssh-flag ssh-key-file", "internal-ip dry-run", "zone"),
    "gcloud compute scp": Command((2, 99), f"{_PLACE} scp-flag ssh-key-file", "recurse compress internal-ip", "zone"),
    "gcloud compute resource-policies create workload-policy": Command(
        (1, 1),
        "region project type accelerator-topology accelerator-topology-mode max-topology-distance description",
        required="type",
    ),
    "gcloud compute resource-policies describe": Command((1, 1), "region project format"),
    "gcloud compute resource-policies delete": Command((1, 99), "region project", "quiet"),
    "gcloud compute instance-templates create": Command(
        (1, 1),
        "project machine-type image-project image-family boot-disk-size boot-disk-type maintenance-policy scopes "
        "provisioning-model instance-termination-action max-run-duration reservation reservation-affinity network "
        "subnet instance-template-region",
    ),
    "gcloud compute instance-templates delete": Command((1, 99), "project", "quiet"),
    "gcloud compute instance-groups managed create": Command(
        (1, 1),
        f"{_GROUP} template size zones workload-policy target-size-policy-mode default-action-on-vm-failure "
        "target-distribution-shape instance-redistribution-type base-instance-name description",
        required="template size",
    ),
    "gcloud compute instance-groups managed list-instances": Command((1, 1), _GROUP),
    "gcloud compute instance-groups managed delete": Command((1, 99), _GROUP, "quiet"),
    "xpk cluster create": Command(
        (0, 0),
        f"{_XPK} tpu-type device-type num-slices num-nodes gke-version reservation default-pool-cpu-machine-type",
        "spot on-demand flex enable-gcpfilestore-csi-driver enable-gcsfuse-csi-driver enable-workload-identity dry-run",
        "cluster tpu-type",
    ),
    "xpk cluster delete": Command((0, 0), _XPK, "force dry-run", "cluster"),
    "xpk storage create": Command(
        (1, 1),
        f"{_XPK} type size tier access-mode vol mount-point readonly auto-mount instance manifest mount-options",
        "dry-run",
        "cluster type size vol mount-point readonly",
    ),
    "xpk storage attach": Command(
        (1, 1),
        f"{_XPK} type size bucket vol access-mode mount-point readonly auto-mount instance manifest mount-options",
        "dry-run prefetch-metadata",
        "cluster type auto-mount mount-point readonly",
    ),
    "xpk workload create": Command(
        (0, 0),
        f"{_XPK} workload tpu-type device-type num-slices num-nodes command docker-image base-docker-image script-dir "
        "max-restarts termination-grace-period-seconds restart-on-exit-codes storage priority env env-file "
        "ttl-seconds-after-finished",
        "spot on-demand flex dry-run skip-validation",
        "cluster workload tpu-type command",
    ),
    "xpk workload list": Command((0, 0), f"{_XPK} filter-by-status filter-by-job timeout", "dry-run", "cluster"),
    "xpk workload delete": Command(
        (0, 0), f"{_XPK} workload filter-by-status filter-by-job", "force dry-run", "cluster"
    ),
    "gcluster job submit": Command(
        (0, 0),
        f"{_JOB} image base-image build-context command compute-type dry-run-out platform mount name queue num-nodes "
        "num-slices restarts gke-ttl-after-finished grace-period placement-policy node-constraint "
        "restart-on-exit-codes topology timeout priority service-account gke-nap-provisioning gke-nap-reservation",
        "await-job-completion verbose",
        "command name compute-type",
    ),
    "gcluster job list": Command((0, 0), f"{_JOB} status name-contains"),
    "gcluster job logs": Command((1, 1), _JOB, "follow"),
    "gcluster job cancel": Command((1, 1), _JOB),
    "xprof server": Command((0, 0), "logdir port grpc_port", "", "logdir"),
    "scontrol requeue": Command((1, 1)),
}
# Of `sbatch` and `srun`, where the flags end at the first argument that is none.
LAUNCHERS = {
    "sbatch": Command(
        (1, 999),
        "nodes ntasks ntasks-per-node gpus-per-node cpus-per-task mem time partition account job-name output open-mode "
        "signal chdir export constraint dependency",
        "requeue no-requeue exclusive test-only parsable wait",
    ),
    "srun": Command(
        (1, 999), "nodes ntasks ntasks-per-node kill-on-bad-exit cpus-per-task chdir export time", "label exclusive"
    ),
}


def split(program: str, words: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """The name of the command, its flags and its operands.

    Raises:
        ValueError: the program has no such command, or the command does not take these arguments.
    """
    if program in LAUNCHERS:
        name, command = program, LAUNCHERS[program]
        words = words[:]
    else:
        count = next((n for n in range(5, 0, -1) if " ".join([program, *words[:n]]) in COMMANDS), None)
        if count is None:
            raise ValueError(f"unknown command: {' '.join([program, *words[:3]])}")
        name = " ".join([program, *words[:count]])
        command, words = COMMANDS[name], words[count:]
    valued, switches = command.valued.split(), command.switches.split()
    flags: dict[str, str] = {}
    operands: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or (program in LAUNCHERS and operands):
            operands.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        if flag in valued:
            if not equals:
                if not words:
                    raise ValueError(f"{name}: --{flag} needs a value")
                value = words.pop(0)
            if not value:
                raise ValueError(f"{name}: --{flag} is empty")
        elif flag not in switches or equals:
            raise ValueError(f"{name}: unknown flag {word}")
        # Some flags may be repeated.
        flags[flag] = f"{flags[flag]},{value}" if flag in flags else value
    missing = [flag for flag in command.required.split() if flag not in flags]
    if missing:
        raise ValueError(f"{name}: --{' --'.join(missing)} is missing")
    if not command.operands[0] <= len(operands) <= command.operands[1]:
        raise ValueError(f"{name}: {len(operands)} arguments ({operands}), it takes {command.operands}")
    return name, flags, operands
