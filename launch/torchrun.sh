#!/usr/bin/env bash
# Trains with torchrun: on this node, or on several, started once on each. Arguments are those of gandist.train.
#   bash launch/torchrun.sh [--config FILE] [key=value ...]
#
#   bash launch/torchrun.sh run_dir=runs/a
#   MODULE=gandist.evaluate NPROC_PER_NODE=4 bash launch/torchrun.sh runs/a
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash launch/torchrun.sh run_dir=/shared/runs/a    # on node-a
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a bash launch/torchrun.sh run_dir=/shared/runs/a    # on the other node
#
# From the environment:
#   NPROC_PER_NODE            processes on this node; default: one a GPU, or two where there is none
#   NNODES, NODE_RANK         how many nodes, and which of them this is, from 0
#   MASTER_ADDR, MASTER_PORT  node 0 as the others reach it, and a free port there (default 29500); on one node any free one
#   MODULE                    what runs (default gandist.train)
#   GANDIST_JOIN_TIMEOUT      seconds until a missing node or rank is an error (default 120)
#   GANDIST_SECRET            on several nodes: the same random text on each, so that nobody else can join (docs/security.md)
#   PET_...                   torchrun's other options, such as PET_MAX_RESTARTS=3 for --max-restarts=3
set -euo pipefail
if [[ ${1:-} == --help ]]; then
  sed -n '/^set /q; 2,$s/^# \{0,1\}//p' "$0"
  exit
fi

. "$(dirname "$0")/environment.sh"

if [[ -z ${NPROC_PER_NODE:-} ]]; then
  gpus=$(count_gpus)
  NPROC_PER_NODE=$((gpus > 0 ? gpus : 2))
fi
if ((${NNODES:-1} == 1)); then
  # Not --standalone: torchrun would unpickle what any program may write into its store.
  nodes=(--master-addr=localhost --master-port="${MASTER_PORT:-$(free_port)}")
  export GANDIST_SECRET=${GANDIST_SECRET:-$(new_secret)}
else
  : "${NODE_RANK:?number of this node, from 0}" "${MASTER_ADDR:?address of node 0}"
  # Not --rdzv-backend=c10d: there, any node may become the one with rank 0.
  nodes=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}"
    --rdzv-conf=timeout="${GANDIST_JOIN_TIMEOUT:-120}")
fi

threads=$(($(nproc) / NPROC_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# A signal to torchrun reaches the ranks, which save and end; they have two minutes for it instead of half a one.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
exec "$python" "$(dirname "$0")/torchrun.py" "${nodes[@]}" --nproc-per-node="$NPROC_PER_NODE" -m "${MODULE:-gandist.train}" "$@"
