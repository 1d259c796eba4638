#!/usr/bin/env bash
# Everything that this machine can reproduce: finished runs are skipped, cut ones are resumed.
# Usage: scripts/reproduce.sh [RUNS_DIR [REPORT_DIR]]
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-results/runs}
report=${2:-results/report}
python=${PYTHON:-python}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}

"$python" experiments/matrix_factorization.py --multirun \
  hydra/launcher=joblib hydra.launcher.n_jobs="$jobs" runtime.runs_dir="$runs" \
  method=opmf,mf,mf_matched,mf_mlp_start,mf_matched_mlp_start optimizer=adam,momentum,sgd

"$python" scripts/report.py "$runs" --out "$report"
