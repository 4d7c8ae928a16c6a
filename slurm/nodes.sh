#!/usr/bin/env bash
# For the batch scripts: starts slurm/node.sh once on every node of the job. Arguments are those of MODULE.
set -euo pipefail
fail() { echo "nodes.sh: $1" >&2 && exit 1; }

export LAUNCHER=${LAUNCHER:-torchrun}
[[ $LAUNCHER == torchrun || $LAUNCHER == deepspeed ]] || fail "LAUNCHER=$LAUNCHER is neither torchrun nor deepspeed"
[[ -z ${GANDIST_ENV_SETUP:-} || -r $GANDIST_ENV_SETUP ]] || fail "cannot read GANDIST_ENV_SETUP=$GANDIST_ENV_SETUP"
if [[ -z ${NPROC_PER_NODE:-} && -n ${SLURM_GPUS_ON_NODE:-} ]]; then export NPROC_PER_NODE=$SLURM_GPUS_ON_NODE; fi

mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#names[@]}
# Slurm's own address of the node: its name need not be known to the other nodes.
MASTER_ADDR=$(scontrol --oneliner show node "${names[0]}" | grep -oP ' NodeAddr=\K\S+')
# Another port for each job and attempt, below those that systems hand out by themselves (32768 and up).
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
export MASTER_ADDR MASTER_PORT
export GANDIST_SECRET=${GANDIST_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')} # which nobody outside of the job knows

if [[ $LAUNCHER == deepspeed ]] && ((NNODES > 1)); then
  export NO_SSH=1 HOSTFILE=$PWD/slurm-$SLURM_JOB_ID.hosts
  printf "%s slots=${NPROC_PER_NODE:-2}\n" "${names[@]}" >"$HOSTFILE"
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-} # which srun no longer takes over from sbatch, since Slurm 22.05
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
# When the processes of one node have ended, the others have a minute to end too: they may be saving, or hang.
export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=${SLURM_WAIT:-60}
exec srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 bash slurm/node.sh "$@"
