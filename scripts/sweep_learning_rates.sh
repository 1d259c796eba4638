#!/usr/bin/env bash
# Learning rates of methods on the validation loss, over the grids of configs/grids.yaml.
# Usage: scripts/sweep_learning_rates.sh EXPERIMENT [method=lora,oplora,…] [HYDRA OVERRIDES]
# EXPERIMENT: commonsense, vl_bart, sdxl, llava_cars, subjects, glue (all tasks, or task=…)
source "$(dirname "$0")/multirun.sh"
experiment=${1:?$known}
shift
train_only=score_test=false
[[ $experiment != sdxl && $experiment != subjects ]] || train_only=measure=false
sort_arguments "$@"
[ ${#rates[@]} -eq 0 ] || { echo "error: ${rates[*]}: give methods as method=lora,oplora" >&2; exit 2; }
kept=()
if [ "${overrides[0]}" = preset=paper ]; then # which trains on every image: a tenth is held out
  case $experiment in
    sdxl) kept=(hold_out=0.1 training.eval_strategy=epoch) ;;
    llava_cars | glue) kept=(data.validation=0.1 training.eval_strategy=epoch) ;;
  esac
fi
if [[ $experiment == glue && " ${overrides[*]}" != *" task="* ]]; then
  case ${overrides[0]} in
    preset=small) kept+=(task=sst2,mrpc,rte) ;; # those that ship in a package
    *) kept+=(task=sst2,cola,qnli,mrpc,rte,stsb) ;;
  esac
fi
methods=
for override in "${overrides[@]}"; do
  case $override in
    method=*) methods=${override#method=} ;;
    *) kept+=("$override") ;;
  esac
done
# shellcheck disable=SC2086 # one word per method
grids=$("${PYTHON:-python}" scripts/rates.py "$experiment" --preset "${overrides[0]#preset=}" --grids \
  ${methods//,/ }) || exit 2
while read -r names learning_rates; do
  multirun "$experiment" "$train_only" "method=$names" "lr=$learning_rates" "${kept[@]}" < /dev/null
done <<< "$grids"
exit $status
