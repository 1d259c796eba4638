#!/usr/bin/env bash
# Make the virtual environment $1 with everything that the experiments and tests need.
# uv where it is installed, else venv and pip; a CPU build of torch where there is no CUDA.
set -euo pipefail
venv=${1:-.venv}
stamp=$venv/.ready
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $($python --version) is too old: set PYTHON to a Python ≥ 3.10" >&2
  exit 2
}
has_cuda() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

with_uv() {
  local backend=cpu
  if has_cuda; then backend=auto; fi
  uv venv --quiet --allow-existing --python "$python" "$venv" &&
    uv pip install --quiet --python "$venv/bin/python" --torch-backend "$backend" -e '.[dev,small]'
}

with_pip() {
  "$python" -m venv "$venv"
  if ! has_cuda; then
    # this release comes without the CUDA libraries where an index offers such a build
    "$venv/bin/python" -m pip install --quiet 'torch==2.13.0'
  fi
  "$venv/bin/python" -m pip install --quiet -e '.[dev,small]'
}

echo "setting up $venv (a few minutes the first time)"
if ! { command -v uv >/dev/null && with_uv; }; then
  rm -rf "$venv"
  with_pip
fi
touch "$stamp"
echo "$venv is ready: $(du -sh "$venv" | cut -f1)"
