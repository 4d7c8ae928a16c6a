#!/usr/bin/env bash
# Submits one run as N jobs in a row, for queues with short time limits: each goes on where the one before it stopped.
#   bash slurm/chain.sh N [SBATCH-OPTIONS] slurm/train.sbatch [--config FILE] [key=value ...]
#
# When the run is finished, the jobs that are left end at once; when one fails or is cancelled, they are cancelled.
set -euo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# == 1 ]]; then
  sed -n '/^set /q; 2,$s/^# \{0,1\}//p' "$0"
  [[ ${1:-} == --help ]]
  exit
fi
export GANDIST_REQUEUE=no
job=
for ((i = $1; i > 0; i--)); do
  job=$(sbatch --parsable ${job:+--dependency=afterok:$job --kill-on-invalid-dep=yes} "${@:2}")
  job=${job%%;*} # where there are several clusters, the name of one follows
  echo "$job"
done
