#!/usr/bin/env bash
# Learning rates of every method on the validation loss, one Hydra multirun per grid.
# Usage: scripts/sweep_commonsense.sh [HYDRA OVERRIDES]; finished runs are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
sweep() {
  "${PYTHON:-python}" experiments/commonsense.py --multirun preset=small score_test=false \
    hydra/launcher=joblib hydra.launcher.n_jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}" "$@"
}
# OP-LoRA's steps are about 10 to 30 times larger at the same rate: grids of the same length,
# shifted, so that every method's best rate lies inside its own.
sweep method=oplora,opdora,lora_matched_mlp_start,lora_matched lr=3e-5,1e-4,3e-4,1e-3,3e-3 "$@"
sweep method=lora,dora,lora_mlp_start lr=3e-4,1e-3,3e-3,1e-2,3e-2 "$@"
