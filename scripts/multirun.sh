# Sourced by scripts/sweep_*.sh. `multirun EXPERIMENT OVERRIDES…` is one Hydra multirun: finished
# runs are skipped, cut ones go on, failed ones are listed at its end and do not end the rest.
# LAUNCHER=joblib (JOBS runs at once), basic (one after another: the default of preset=paper, where
# a run fills a GPU), or submitit_slurm on a cluster.
set -uom pipefail # m: every job is a process group of its own, which can be ended whole
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit ;; esac # its first comment
cd "$(dirname "${BASH_SOURCE[0]}")/.."
status=0 jobs=()
known="commonsense, vl_bart, sdxl, llava_cars, glue or subjects"

# Run a command so that TERM and Ctrl-C end it at once, with all that it started.
run() {
  "$@" < /dev/null &
  jobs+=($!)
  wait $!
}
stop() {
  trap '' INT TERM
  kill -TERM ${jobs[@]/#/-} 2> /dev/null
  [ -n "${WITHIN:-}" ] || echo "stopped: the same command goes on from here" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

multirun() {
  local experiment=$1 usual=joblib
  shift
  [[ " $* " != *" preset=paper "* ]] || usual=basic
  echo "== $experiment $*"
  run "${PYTHON:-python}" "experiments/$experiment.py" --multirun \
    launcher="${LAUNCHER:-$usual}" "$@" || status=1
}

# Sort "METHOD=RATE … OVERRIDES…" into the arrays `rates` and `overrides`; the preset's default is
# small. A METHOD is one of configs/method/.
sort_arguments() {
  rates=() overrides=(preset=small)
  for argument in "$@"; do
    case $argument in
      preset=*) overrides[0]=$argument ;;
      *) if [ -f "configs/method/${argument%%=*}.yaml" ]; then
           [[ $argument == *=* ]] ||
             { echo "error: $argument has no rate: give methods as lora=3e-3" >&2; exit 2; }
           rates+=("$argument")
         else overrides+=("$argument"); fi ;;
    esac
  done
}
