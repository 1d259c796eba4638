#!/usr/bin/env bash
# Learning rates of every method on the validation loss, one Hydra multirun per grid.
# Usage: scripts/sweep_vl_bart.sh [HYDRA OVERRIDES]; finished runs are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
sweep() {
  "${PYTHON:-python}" experiments/vl_bart.py --multirun preset=small score_test=false \
    hydra/launcher=joblib hydra.launcher.n_jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}" "$@"
}
# OP-LoRA's steps are about 10 to 30 times larger at the same rate: grids of the same length,
# shifted, so that every method's best rate lies inside its own.
sweep method=oplora,opdora lr=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2 "$@"
sweep method=lora,dora lr=3e-4,1e-3,3e-3,1e-2,3e-2,1e-1 "$@"
sweep method=full lr=3e-5,1e-4,3e-4,1e-3,3e-3,1e-2 "$@"
