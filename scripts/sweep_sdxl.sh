#!/usr/bin/env bash
# Table 1 at laptop scale: learning rates on one dataset's held-out loss, then seeds at the chosen
# rates on both, the base model, the control on the base's own style, and half the rank.
# Usage: scripts/sweep_sdxl.sh rates|base|seeds [HYDRA OVERRIDES]; finished runs are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?rates, base or seeds}
shift
sweep() {
  "${PYTHON:-python}" experiments/sdxl.py --multirun preset=small hydra/launcher=joblib \
    hydra.launcher.n_jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}" "$@"
}
case $what in
  rates) # grids of the same length; OP's steps are larger at the same rate
    sweep measure=false method=oplora,opdora lr=1e-4,3e-4,1e-3,3e-3,1e-2 "$@"
    sweep measure=false method=lora,dora,pissa lr=1e-3,3e-3,1e-2,3e-2,1e-1 "$@"
    sweep measure=false method=full lr=3e-5,1e-4,3e-4,1e-3,3e-3 "$@" ;;
  base) # what the figures are read against; nothing is trained
    sweep fine_tune=false run_name=base dataset=fluent,twemoji "$@" ;;
  seeds) # give method=… lr=… at the chosen rate, and rank=… for the comparison of ranks
    sweep dataset=fluent,twemoji seed=0,1,2 "$@" ;;
  *) echo "error: rates, base or seeds, not '$what'" >&2; exit 2 ;;
esac
