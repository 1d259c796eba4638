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

export TQDM_DISABLE=1 PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning} # one line is enough

render() { run "$PYTHON" scripts/report.py "$runs" --out "$report" "$@" || status=1; }

factorize() { multirun matrix_factorization runtime.runs_dir="$runs" "$@"; }

plan=(matrix_factorization=15) small=()
add() { # EXPERIMENT RUNS [BASE_MODEL [OPTION]]: of it, if it can be run
  local base=${3:-} option=${4:-} rates
  if [ -n "$base" ] && [ ! -e "results/base_models/$base" ]; then
    echo "skipping $1: make its base model with python base_models/$base/pretrain.py"
  # shellcheck disable=SC2086 # none or one word
  elif rates=$("$PYTHON" scripts/rates.py "$1" $option lora oplora); then
    plan+=("$1=$2") small+=("$1 $rates $option")
  else
    echo "skipping $1: see above"
  fi
}

factorize method=opmf,mf optimizer=sgd # the first figure, in about a minute
render
add vl_bart 3 tiny_vl_bart # with the base model as it is
add sdxl 3 tiny_sdxl
add llava_cars 3 tiny_llava
add commonsense 3
add glue 3 "" task=sst2
"$PYTHON" scripts/progress.py "$runs" "${plan[@]}" &
progress=$!
jobs+=($progress)

factorize method=opmf,mf,mf_matched,mf_mlp_start,mf_matched_mlp_start optimizer=adam,momentum,sgd
multirun rotated_mnist runtime.runs_dir="$runs" preset=small method=oplora,lora # all rates and seeds
for experiment in ${small[@]+"${small[@]}"}; do # one run at a time on all cores
  [[ $experiment != sdxl* ]] || experiment+=" dataset=twemoji"
  # shellcheck disable=SC2086 # one word per argument
  run env SEEDS=0 JOBS=1 WITHIN=reproduce scripts/sweep_seeds.sh $experiment \
    runtime.runs_dir="$runs" runtime.threads="$JOBS" || status=1
done
kill -TERM -- "-$progress" 2> /dev/null
render --against results/published
exit $status
