#!/usr/bin/env bash
# Pre-train over plain ssh until the run is finished, on whichever of the nodes are there:
#
#   launch/ssh.sh HOSTFILE RUN_FOLDER --config h14.json [key.path=value …]
#
# from the repository's root, on a machine that reaches every node without a password; the nodes and this machine share
# the file system. HOSTFILE has a line `host slots=GPUS` for each node. A node that does not answer is left out, and
# taken in again at the next start once it does. Ctrl-C or SIGTERM here: the ranks save, and this ends with status 75.

set -u
hostfile=${1:?the hostfile}
run=${2:?the run folder}
shift 2
mkdir -p "$run" || exit 2
alive=$run/hostfile
nodes=$(grep -cE '^[^#[:space:]]' "$hostfile") || { echo "$hostfile: no line 'host slots=GPUS'" >&2; exit 2; }
PATH=$PWD/.venv/bin:$PATH

# ssh alone would never notice that a node is gone; so it takes a minute.
ssh=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
export PDSH_SSH_ARGS_APPEND="${ssh[*]}"

stopping=
trap 'stopping=1; touch "$run/STOP"' INT TERM

latest() { cat "$run/checkpoints/latest" 2>/dev/null; }

# Writes the nodes that answer to $alive, at most $1 of them, and ends what a broken start may have left on them.
gather() {
  : >"$alive"
  while read -r host slots <&3; do
    case $host in '' | '#'*) continue ;; esac
    # [l]: not the shell that carries the pattern itself. 1: there was nothing to end.
    # shellcheck disable=SC2029
    ssh "${ssh[@]}" "$host" "pkill -KILL -f '[l]aunch/pretrain.py .*--out $run( |\$)'; test \$? -le 1" </dev/null ||
      { echo "$host does not answer: left out" >&2; continue; }
    if [ "$(wc -l <"$alive")" -lt "$1" ]; then echo "$host $slots" >>"$alive"; fi
  done 3<"$hostfile"
}

tries=0 most=$nodes
while :; do
  gather "$most"
  now=$(wc -l <"$alive")
  if [ "$now" = 0 ]; then echo "no node answers" >&2; exit 1; fi
  echo "starting on $now of $nodes nodes" >&2
  before=$(latest)

  # In a session of its own, so that Ctrl-C reaches it as STOP only: the launcher would kill where the ranks should save.
  # --force_multi: a single node that is left is not this machine.
  setsid deepspeed --hostfile "$alive" --launcher pdsh --force_multi launch/pretrain.py --out "$run" "$@" &
  while kill -0 $! 2>/dev/null; do wait $!; done # a trapped signal ends `wait`, not the run
  wait $!
  status=$?
  if [ -n "$stopping" ]; then exit "$status"; fi

  case $status in
    0) exit 0 ;; # finished
    2)           # at fault is the input, or the batch does not divide among the nodes that are left: then take fewer
      most=$((now - 1))
      if [ "$now" = "$nodes" ] || [ "$most" = 0 ]; then exit 2; fi
      continue
      ;;
  esac
  most=$nodes
  if [ "$status" = 75 ] || [ "$(latest)" != "$before" ]; then tries=0; else tries=$((tries + 1)); fi
  if [ "$tries" = 3 ]; then
    echo "status $status, and no new checkpoint in three starts: given up" >&2
    exit "$status"
  fi
  echo "status $status, checkpoint $(latest): starting again" >&2
  sleep 10
done
