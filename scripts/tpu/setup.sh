#!/usr/bin/env bash
# Installs this checkout's last commit on every host of a slice, and mounts the directory that the hosts share.
#
#     export TPU=emu3 ZONE=us-west4-a
#     NFS=10.0.0.2:/vol1 bash scripts/tpu/setup.sh [--dry-run]
#
# Run it again after each commit, and on each new slice. NFS is a Filestore instance in the slice's network.
# All hosts must see photos, bundles and runs under one path, because all of them write checkpoints: the share is
# mounted at /mnt/emu3 (SHARED), and `out` in the checkout becomes a link to it. So `out/data` in a config or on a
# command line is /mnt/emu3/data on every host. BUCKET=NAME mounts a Cloud Storage bucket instead. That suits photos and
# bundles. Runs need a bucket with hierarchical namespace, where renaming a directory is one step, and nothing there
# keeps two runs from the same directory. Without NFS and BUCKET the script takes SHARED as you mounted it.
#
# The flags follow gcloud's reference of 2026. This script was not run against Google Cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need_slice
((${#rest[@]} == 0)) || die "unknown argument ${rest[0]}"
if [[ -n ${NFS:-} ]]; then
    [[ $NFS =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ ]] || die "NFS is '$NFS': it must be ADDRESS:/SHARE"
elif [[ -n ${BUCKET:-} ]]; then
    [[ $BUCKET =~ ^[a-z0-9._-]+$ ]] || die "BUCKET is '$BUCKET': it must be a bucket's name, without gs://"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

archive=$(mktemp -d)/emu3-jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
copy all "$archive" :emu3-jax.tar.gz

# The hosts' own Python may be older than 3.11; uv brings one.
remote="set -euo pipefail
mkdir -p ~/emu3-jax
tar -xzf ~/emu3-jax.tar.gz -C ~/emu3-jax
cd ~/emu3-jax
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || ~/.local/bin/uv venv --python 3.12 .venv
~/.local/bin/uv pip install --python .venv/bin/python '.[train,convert,data,heic,gcs,tpu]'
"
if [[ -n ${NFS:-} ]]; then
    remote+="if ! mountpoint -q $shared; then
    if ! command -v mount.nfs > /dev/null; then
        # A new host updates itself, and holds the lock of apt meanwhile.
        sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
        sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y nfs-common
    fi
    sudo mkdir -p $shared
    sudo mount -t nfs -o rw,hard $NFS $shared
    # A new share belongs to root.
    [ -w $shared ] || sudo chmod 1777 $shared
fi
"
elif [[ -n ${BUCKET:-} ]]; then
    remote+="if ! mountpoint -q $shared; then
    command -v gcsfuse > /dev/null || { echo 'no gcsfuse: cloud.google.com/storage/docs/gcsfuse-install' >&2; exit 2; }
    sudo mkdir -p $shared
    sudo chown \$(id -u) $shared
    gcsfuse --implicit-dirs $BUCKET $shared
fi
"
fi
remote+="[ -w $shared ] || { echo \"\$(hostname) cannot write to $shared: set NFS or BUCKET\" >&2; exit 2; }
[ -L out ] || [ ! -e out ] || { echo \"\$(hostname): ~/emu3-jax/out is a directory: move it to $shared\" >&2; exit 2; }
ln -sfn $shared out
.venv/bin/emu3-jax --help > /dev/null
echo \"\$(hostname): emu3-jax is installed, out is $shared\""
on all "$remote"
