#!/usr/bin/env bash
# Trains with the deepspeed launcher: on this node, or on those of a host file. Arguments are those of gandist.train.
#   bash launch/deepspeed.sh [--config FILE] [key=value ...]
#
#   bash launch/deepspeed.sh engine=deepspeed run_dir=runs/a
#   HOSTFILE=hosts bash launch/deepspeed.sh run_dir=/shared/runs/a      # reaches the nodes by ssh and pdsh
#   NO_SSH=1 NODE_RANK=0 HOSTFILE=hosts MASTER_ADDR=node-a bash launch/deepspeed.sh run_dir=/shared/runs/a
#       without ssh: started once on each node, with NODE_RANK counted in the order of the host file
#
# From the environment:
#   HOSTFILE                  one line a node: NAME slots=PROCESSES
#   NPROC_PER_NODE            processes a node; default: the slots, or one a GPU, or two where there is none
#   NO_SSH, NODE_RANK         1 for a start by hand on each node, and which of them this is, from 0
#   MASTER_ADDR, MASTER_PORT  node 0 as the others reach it, and a free port there (default 29500)
#   MODULE                    what runs (default gandist.train)
#   GANDIST_JOIN_TIMEOUT      seconds until a missing rank is an error (default 120)
#   GANDIST_SECRET            with NO_SSH: the same random text on each node, so that nobody else can join (docs/security.md);
#                             ssh does not take it along
set -euo pipefail
if [[ ${1:-} == --help ]]; then
  sed -n '/^set /q; 2,$s/^# \{0,1\}//p' "$0"
  exit
fi

. "$(dirname "$0")/environment.sh"

if [[ -z ${DS_ACCELERATOR:-} ]] && (($(count_gpus) == 0)); then
  export DS_ACCELERATOR=cpu
fi
options=(--quiet --no_local_rank --module)
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -r $HOSTFILE ]] || { echo "deepspeed.sh: cannot read HOSTFILE=$HOSTFILE" >&2 && exit 1; }
  options+=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
  if [[ -n ${NO_SSH:-} ]]; then
    options+=(--no_ssh --node_rank "${NODE_RANK:?number of this node in the host file, from 0}")
    : "${MASTER_ADDR:?address of node 0}"
  fi
else
  export GANDIST_SECRET=${GANDIST_SECRET:-$(new_secret)}
  # The launcher has one port for all runs of a node, if it is not told another.
  options+=(--hostfile /dev/null/none --master_port "${MASTER_PORT:-$(free_port)}")
  # Without a number, the launcher takes the NUMA nodes of a CPU for devices.
  if [[ ${DS_ACCELERATOR:-} == cpu ]]; then NPROC_PER_NODE=${NPROC_PER_NODE:-2}; fi
fi
if [[ -n ${NPROC_PER_NODE:-} ]]; then options+=(--num_gpus "$NPROC_PER_NODE"); fi
launch=("$python" -m deepspeed.launcher.runner "${options[@]}" "${MODULE:-gandist.train}" "$@")
if [[ -n ${HOSTFILE:-} && -z ${NO_SSH:-} ]]; then exec "${launch[@]}"; fi

# Of a SIGTERM, this launcher would die and leave the process that it starts and the ranks behind. That one gets it instead,
# and saves.
"${launch[@]}" &
runner=$! early=0
first() { read -r process _ <<<"$(cat "/proc/$runner/task/$runner/children") $runner"; }
terminate() { first && kill -TERM "$process"; }
trap terminate TERM
# A Ctrl-C comes to all of them. Started in the background they ignore it, until they are ready for it.
interrupt() {
  first
  if ((0x$(sed -n 's/^SigIgn:\s*//p' "/proc/$process/status") & 2)); then
    early=130
    terminate
  fi
}
trap interrupt INT
code=0
wait "$runner" || code=$?
while kill -0 "$runner" 2>/dev/null; do # it was a signal that ended the waiting
  code=0
  wait "$runner" || code=$?
done
exit $((code ? code : early))
