#!/usr/bin/env bash
# Seeds of methods at their chosen rates and the base model, scored on the test set; the report
# names the rates.
# Usage: SEEDS=0,1,2 scripts/sweep_seeds.sh EXPERIMENT METHOD=RATE… [HYDRA OVERRIDES]
# sdxl trains on two styles, or on dataset=…; twemoji_control and blobs_control are their controls.
# glue's tasks have rates of their own: give one, as task=sst2.
source "$(dirname "$0")/multirun.sh"
experiment=${1:?$known}
shift
sort_arguments "$@"
[ ${#rates[@]} -gt 0 ] || { echo "error: give methods with their rates, as lora=3e-3" >&2; exit 2; }
data=()
if [[ $experiment == glue && " ${overrides[*]}" != *" task="* ]]; then
  echo "error: glue's tasks have rates of their own: add one, as task=sst2" >&2
  exit 2
fi
if [[ $experiment == sdxl && " ${overrides[*]}" != *" dataset="* ]]; then # two styles
  data=(dataset=twemoji,blobs)
  [ "${overrides[0]}" = preset=small ] || data=(dataset=naruto,wikiart)
fi
[[ " ${overrides[*]}" == *_control* ]] || # the model as it is, which is what is compared with
  multirun "$experiment" fine_tune=false run_name=base ${data[@]+"${data[@]}"} "${overrides[@]}"
for pair in "${rates[@]}"; do
  multirun "$experiment" method="${pair%%=*}" lr="${pair#*=}" seed="${SEEDS:-0,1,2}" \
    ${data[@]+"${data[@]}"} "${overrides[@]}"
done
exit $status
