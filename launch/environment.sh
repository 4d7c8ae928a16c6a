# What the launchers have in common; they source it.

python=python own=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $own ]]; then python=$own; fi

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
# By which the ranks of a job know each other: all of them need the same one, and nobody else.
new_secret() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
count_gpus() { # ends quietly at a Ctrl-C
  "$python" -c 'import signal; signal.signal(2, signal.SIG_DFL); import torch; print(torch.cuda.device_count())'
}

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# When a collective hangs: end the process at once, not by way of NCCL, which may hang as well, and leave a record of the
# last collectives, for `torchfrtrace`.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
