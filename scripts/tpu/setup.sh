#!/usr/bin/env bash
# Installs this checkout's last commit on every host of a slice, and mounts the directory that they share. Again after
# changes, and on a slice that was made anew.
#
#     TPU=emu3 ZONE=us-east5-a NFS=10.0.0.2:/vol1 bash scripts/tpu/setup.sh
#
# All hosts must see data, bundles and runs under one path, /mnt/emu3 (SHARED): checkpoints are written by all of them.
# NFS is a Filestore instance in the slice's network, and the right place for runs. BUCKET=name mounts a Cloud Storage
# bucket instead, which suits data and bundles; runs need one with hierarchical namespace, where renaming a directory
# is one step, and nothing there keeps two runs from the same directory. Without either SHARED is what you mounted.
#
# Flags as in the reference of gcloud, 2025; this script was not run against Google Cloud.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
shared=${SHARED:-/mnt/emu3}
where=(--zone="$ZONE" --worker=all)
[[ -n ${PROJECT:-} ]] && where+=(--project="$PROJECT")

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:emu3-jax.tar.gz" "${where[@]}"

# The hosts' own Python may be older than 3.11; uv brings one.
remote='set -euo pipefail
mkdir -p emu3-jax
tar -xzf emu3-jax.tar.gz -C emu3-jax
cd emu3-jax
curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || ~/.local/bin/uv venv --python 3.12 .venv
~/.local/bin/uv pip install --python .venv/bin/python ".[train,tpu]"
'
if [[ -n ${NFS:-} ]]; then
    remote+="
sudo apt-get -qq install -y nfs-common
sudo mkdir -p $shared
mountpoint -q $shared || sudo mount -t nfs -o rw,hard $NFS $shared
"
elif [[ -n ${BUCKET:-} ]]; then
    remote+="
command -v gcsfuse > /dev/null || { echo 'no gcsfuse: cloud.google.com/storage/docs/gcsfuse-install' >&2; exit 1; }
sudo mkdir -p $shared
sudo chown \$USER $shared
mountpoint -q $shared || gcsfuse --implicit-dirs $BUCKET $shared
"
fi
remote+="test -w $shared || { echo '$shared cannot be written on' \$(hostname) >&2; exit 1; }"
gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$remote"
