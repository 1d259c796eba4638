#!/usr/bin/env bash
# The adapter's rank, at the learning rates chosen for the usual one; alpha keeps its proportion.
# Usage: RANKS="2 4" scripts/sweep_rank.sh EXPERIMENT METHOD=RATE… [HYDRA OVERRIDES]
source "$(dirname "$0")/multirun.sh"
experiment=${1:?$known}
shift
alpha_per_rank=
case $experiment in
  sdxl | subjects) ranks="1 2 4 8" alpha_per_rank=1 ;;
  vl_bart) ranks="2 4 8 16" alpha_per_rank=1 ;;
  commonsense) ranks="2 4 8 16" alpha_per_rank=2 ;;
  glue) ranks="2 4 8 16" alpha_per_rank=1 ;;
  llava_cars) ranks="4 8 16 64" ;; # its configuration sets alpha to twice the rank
  *) echo "error: $experiment has no rank to sweep" >&2; exit 2 ;;
esac
sort_arguments "$@"
if [ "${overrides[0]}" = preset=paper ]; then # the paper's own, and half of it
  case $experiment in
    sdxl | subjects) ranks="2 4" ;;
    vl_bart) ranks="64 128" ;;
    commonsense) ranks="16 32" ;;
    llava_cars) ranks="16 64" ;;
    glue) ranks="4 8" ;;
  esac
fi
[ ${#rates[@]} -gt 0 ] || { echo "error: give methods with rates, as oplora=1e-3" >&2; exit 2; }
for pair in "${rates[@]}"; do
  for rank in ${RANKS:-$ranks}; do
    multirun "$experiment" method="${pair%%=*}" lr="${pair#*=}" seed="${SEEDS:-0,1,2}" \
      rank="$rank" ${alpha_per_rank:+alpha=$((rank * alpha_per_rank))} "${overrides[@]}"
  done
done
exit $status
