#!/usr/bin/env bash
# Figure 6: the MLP's width, at the learning rates chosen for the usual one.
# Usage: WIDTHS=1,8,64 scripts/sweep_mlp_width.sh EXPERIMENT METHOD=RATE… [HYDRA OVERRIDES]
source "$(dirname "$0")/multirun.sh"
experiment=${1:?$known}
shift
sort_arguments "$@"
[ ${#rates[@]} -gt 0 ] || { echo "error: give methods with rates, as oplora=1e-3" >&2; exit 2; }
for pair in "${rates[@]}"; do
  multirun "$experiment" method="${pair%%=*}" lr="${pair#*=}" seed="${SEEDS:-0,1,2}" \
    mlp_width="${WIDTHS:-1,2,4,8,16,32,64,128}" "${overrides[@]}"
done
exit $status
