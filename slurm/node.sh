#!/usr/bin/env bash
# For slurm/nodes.sh, once on every node of a job: the launcher of the processes on this node. Arguments are those of MODULE.
if [[ $MODULE == gandist.train ]]; then
  # Slurm's signals go to every process on the node. While ranks train they save and exit; all else, such as launchers and
  # ranks that just start, lets them.
  trap '' TERM USR2
  export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
fi
export NODE_RANK=$SLURM_NODEID
set -- bash "launch/$LAUNCHER.sh" "$@"
if [[ -n $GANDIST_ENV_SETUP ]]; then source "$GANDIST_ENV_SETUP"; fi # may put a prefix before the command: set -- PREFIX "$@"
exec "$@"
