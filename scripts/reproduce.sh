#!/usr/bin/env bash
# What a laptop can reproduce: matrix factorization whole; of rotated MNIST LoRA and OP-LoRA with all
# rates and seeds; of every other experiment's small preset LoRA and OP-LoRA, one seed each, at the
# learning rates that the published sweeps chose.
# Usage: scripts/reproduce.sh [RUNS_DIR [REPORT_DIR]]; finished runs are skipped, cut ones go on.
source "$(dirname "$0")/multirun.sh"
runs=${1:-results/runs}
report=${2:-results/report}
export PYTHON=${PYTHON:-python}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
export JOBS

render() { "$PYTHON" scripts/report.py "$runs" --out "$report" || status=1; }

factorize() { multirun matrix_factorization runtime.runs_dir="$runs" "$@"; }

small() { # EXPERIMENT [BASE_MODEL OVERRIDES…]
  local experiment=$1 base=${2:-} rates
  shift $(($# > 1 ? 2 : 1))
  if [ -n "$base" ] && [ ! -e "results/base_models/$base" ]; then
    echo "skipping $experiment: make its base model with python base_models/$base/pretrain.py"
    return
  fi
  if ! rates=$("$PYTHON" scripts/rates.py "$experiment" lora oplora); then
    echo "skipping $experiment: see above"
    return
  fi
  # one run at a time on all cores
  SEEDS=0 JOBS=1 scripts/sweep_seeds.sh "$experiment" $rates runtime.runs_dir="$runs" \
    runtime.threads="$JOBS" "$@" || status=1
}

factorize method=opmf,mf optimizer=sgd # the first figure, in about a minute
render
factorize method=opmf,mf,mf_matched,mf_mlp_start,mf_matched_mlp_start optimizer=adam,momentum,sgd
multirun rotated_mnist runtime.runs_dir="$runs" preset=small method=oplora,lora # all rates and seeds
small vl_bart tiny_vl_bart
small sdxl tiny_sdxl dataset=twemoji
small llava_cars tiny_llava
small commonsense
render
exit $status
