#!/usr/bin/env bash
# Learning rates of methods on the validation loss, grids of the same length for all.
# Usage: scripts/sweep_learning_rates.sh EXPERIMENT [method=lora,oplora,…] [HYDRA OVERRIDES]
# EXPERIMENT: commonsense, vl_bart, sdxl, llava_cars
source "$(dirname "$0")/multirun.sh"
experiment=${1:?commonsense, vl_bart, sdxl or llava_cars}
shift
train_only=score_test=false
methods=lora,oplora,dora,opdora
# OP-LoRA's steps are about 10 to 30 times larger at the same rate: its grid lies lower, so that
# every method's best rate is inside its own.
case $experiment in
  commonsense)
    methods+=,lora_matched,lora_mlp_start,lora_matched_mlp_start
    op=3e-5,1e-4,3e-4,1e-3,3e-3 plain=3e-4,1e-3,3e-3,1e-2,3e-2 full=1e-5,3e-5,1e-4,3e-4,1e-3 ;;
  vl_bart)
    methods+=,full
    op=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2 plain=3e-4,1e-3,3e-3,1e-2,3e-2,1e-1
    full=3e-5,1e-4,3e-4,1e-3,3e-3,1e-2 ;;
  sdxl)
    methods+=,pissa,full train_only=measure=false
    op=3e-6,1e-5,3e-5,1e-4,3e-4,1e-3,3e-3 plain=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1
    full=3e-6,1e-5,3e-5,1e-4,3e-4,1e-3,3e-3 ;;
  llava_cars)
    methods=lora,oplora,full
    # at width 768 OP-LoRA's steps are some hundred times larger
    op=1e-5,3e-5,1e-4,3e-4,1e-3 plain=1e-3,3e-3,1e-2,3e-2,1e-1 full=1e-3,3e-3,1e-2,3e-2,1e-1 ;;
  *) echo "error: $experiment is no experiment with a sweep of rates" >&2; exit 2 ;;
esac
sort_arguments "$@"
[ ${#rates[@]} -eq 0 ] || { echo "error: ${rates[*]}: give methods as method=lora,oplora" >&2; exit 2; }
kept=()
if [ "${overrides[0]}" = preset=paper ]; then # which trains on every image: a tenth is held out
  case $experiment in
    sdxl) kept=(hold_out=0.1 training.eval_strategy=epoch) ;;
    llava_cars) kept=(data.validation=0.1 training.eval_strategy=epoch) ;;
  esac
fi
for override in "${overrides[@]}"; do
  case $override in
    method=*) methods=${override#method=} ;;
    *) kept+=("$override") ;;
  esac
done

grid() { # LEARNING_RATES METHOD…
  local list=$1
  shift
  [ $# -eq 0 ] || multirun "$experiment" "$train_only" "method=$(IFS=,; echo "$*")" "lr=$list" \
    "${kept[@]}"
}
low=() high=() whole=()
for method in ${methods//,/ }; do
  case $method in
    full) whole+=("$method") ;;
    op* | *matched*) low+=("$method") ;;
    *) high+=("$method") ;;
  esac
done
grid "$op" ${low[@]+"${low[@]}"}
grid "$plain" ${high[@]+"${high[@]}"}
grid "$full" ${whole[@]+"${whole[@]}"}
exit $status
