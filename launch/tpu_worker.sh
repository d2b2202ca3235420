#!/usr/bin/env bash
# What each worker of a TPU slice does before a run. tpu_vm.sh and skypilot.yaml call it there, in the checkout.
#
#   tpu_worker.sh install EXTRAS   the checkout with these extras, in $HOME/venv; and Cloud Storage FUSE
#   tpu_worker.sh mount BUCKET     the bucket, at /mnt/BUCKET
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The images come with Python 3.10, which is too old. uv installs a newer one on any image. The lock file keeps a run that
# was preempted from going on with other versions of its libraries.
install_package() {
  curl -LsSf https://astral.sh/uv/install.sh | sh -s -- --quiet
  local uv=$HOME/.local/bin/uv
  "$uv" venv --quiet --clear --python=3.12 "$HOME/venv"
  "$uv" pip install --quiet --python="$HOME/venv/bin/python" --constraints="$checkout/constraints/lock.txt" \
    "${checkout}[$1]"
}

add_repository() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
}

# A new machine updates itself for some minutes, during which apt is locked. Hence the timeout and the attempts.
install_gcsfuse() {
  for _ in 1 2 3 4 5 6; do
    if command -v gcsfuse >/dev/null; then return; fi
    { add_repository && sudo apt-get -qq update &&
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse; } || sleep "${PAUSE-20}"
  done
  command -v gcsfuse >/dev/null
}

# Metadata caches are off, because a worker must see at once what another worker has written. The limit on renaming is
# raised, because a checkpoint is completed by renaming its folder. The mount is a service of its own: where the run is
# one too and requires it, systemd stops it only after the run, which can still save a checkpoint. It has the bucket's
# name, so that a slice can have several; all letters of a bucket's name are allowed in a unit's.
mount_bucket() {
  local folder=/mnt/$1 unit=instructjax-bucket-$1.service user
  user=$(id -un)
  if mountpoint -q "$folder"; then return; fi
  # A gcsfuse that has died leaves a folder that can be neither made nor mounted on, until it is unmounted.
  sudo systemctl stop "$unit" 2>/dev/null || true
  sudo umount -l "$folder" 2>/dev/null || true
  sudo mkdir -p "$folder"
  sudo chown "$user" "$folder"
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
  sudo systemd-run --quiet --unit="$unit" --uid="$user" --property=Type=forking \
    --property=After=network-online.target \
    "$(command -v gcsfuse)" --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --rename-dir-limit=100000 "$1" "$folder"
}

case "$# ${1-}" in
  "2 install") install_package "$2" && install_gcsfuse ;;
  "2 mount") mount_bucket "$2" ;;
  *)
    echo "usage: tpu_worker.sh install EXTRAS | mount BUCKET" >&2
    exit 2
    ;;
esac
