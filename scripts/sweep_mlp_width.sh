#!/usr/bin/env bash
# Figure 6: the MLP's width, three seeds each, at the learning rates that the sweep chose.
# Usage: OPLORA_LR=1e-3 OPDORA_LR=1e-3 scripts/sweep_mlp_width.sh [HYDRA OVERRIDES]
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OPLORA_LR:?set it to the rate that scripts/sweep_vl_bart.sh found best}" "${OPDORA_LR:?same}"
sweep() {
  "${PYTHON:-python}" experiments/vl_bart.py --multirun preset=small seed=0,1,2 \
    mlp_width=1,2,4,8,16,32,64,128 hydra/launcher=joblib \
    hydra.launcher.n_jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}" "$@"
}
sweep method=oplora lr="$OPLORA_LR" "$@"
sweep method=opdora lr="$OPDORA_LR" "$@"
