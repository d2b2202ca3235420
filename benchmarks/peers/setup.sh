#!/usr/bin/env bash
# The virtual environments of the trainers that the benchmarks run beside instructjax: .venv-trl and .venv-tunix, in
# this folder. Every package is pinned (trl.txt, tunix.txt); torch wants a CPU build where there is a choice.
#
# Usage: benchmarks/peers/setup.sh [trl|tunix]...     without names: both. PYTHON: 3.11 or newer, else python3.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
[[ $# -gt 0 ]] || set -- trl tunix

for peer in "$@"; do
  [[ -f $peer.txt ]] || { echo "error: no peer $peer; there are trl and tunix" >&2; exit 2; }
  "${PYTHON:-python3}" -m venv --clear ".venv-$peer"
  ".venv-$peer/bin/python" -m pip install --quiet --requirement "$peer.txt"
  echo "made $PWD/.venv-$peer"
done
