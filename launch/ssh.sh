#!/usr/bin/env bash
# A run over plain ssh until it is finished, on whichever of the nodes are there:
#
#   launch/ssh.sh HOSTFILE RUN_FOLDER [COMMAND] --config h14.json [key.path=value …]
#
# from the repository's root, on a machine that reaches every node without a password; the nodes and this machine share
# the file system. COMMAND is that of launch/COMMAND.py: pretrain (the default), finetune (also with --sweep), fewshot,
# evaluate or another that runs on many ranks. HOSTFILE has a line `host slots=GPUS` for each node. A node that does not
# answer is left out, and taken in again at the next start once it does. Ctrl-C or SIGTERM here: the ranks that train
# save, those of other commands are ended, and this ends with status 75.

set -u
hostfile=${1:?the hostfile}
run=${2:?the run folder}
shift 2
entry=pretrain
if [ -f "launch/${1:-}.py" ]; then entry=$1; shift; fi
case $entry in pretrain | finetune) trains=1 ;; *) trains= ;; esac
mkdir -p -- "$run" || exit 2
run=$(cd -- "$run" && pwd) || exit 2 # by its whole path a process on a node is this run's, no other checkout's
case $PWD in *[[:space:]]*) echo "$PWD: DeepSpeed cannot start in a folder with a space in its path" >&2; exit 2 ;; esac
alive=$run/hostfile
PATH=$PWD/.venv/bin:$PATH

nodes=() number=0
while IFS= read -r line || [ -n "$line" ]; do # the last line may lack its end
  number=$((number + 1)) line=${line#$'\xef\xbb\xbf'} # a byte-order mark
  read -r host slots rest <<<"${line%%[#$'\r']*}"
  [ -n "$host" ] || continue
  if [[ ! $slots =~ ^slots=[1-9][0-9]*$ || -n $rest ]]; then
    echo "$hostfile: line $number is '${line%$'\r'}'; 'host slots=GPUS' would be right" >&2
    exit 2
  fi
  case " ${nodes[*]-}" in *" $host slots="*) echo "$hostfile: line $number names $host again" >&2; exit 2 ;; esac
  nodes+=("$host $slots")
done <"$hostfile" || exit 2 # bash has said why
if [ ${#nodes[@]} = 0 ]; then echo "$hostfile: no line 'host slots=GPUS'" >&2; exit 2; fi

# One script a run folder: two would end each other's ranks for left-overs. The lock goes with this process: whatever
# it starts may outlive it, and does not inherit it (9>&-).
exec 9>>"$run/.launch" || exit 2
flock -n 9
case $? in
  0) echo "process $$ on $HOSTNAME" >&9 ;;
  1)
    echo "$run: launch/ssh.sh is at work in it ($(tail -n 1 "$run/.launch")); stop that one, or give another folder" >&2
    exit 2
    ;;
  *) echo "$run: nothing keeps a second launch/ssh.sh out of this folder" >&2 ;; # flock has said why
esac

# ssh alone would never notice that a node is gone; so it takes a minute.
ssh=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
export PDSH_SSH_ARGS_APPEND="${ssh[*]}"

# What the next start need not do again: training has checkpoints, a sweep those of its runs, few-shot files of features.
progress() { grep -hs . "$run"/{,sweep/*/,full/*/}checkpoints/latest; ls "$run/features"; } 2>/dev/null

# What a process of this run has in its command line. [l]: not the shell that carries the pattern itself.
# shellcheck disable=SC2001
ours="[l]aunch/$entry\.py .*--out $(sed 's/[][\.*^$+?(){}|]/\\&/g' <<<"$run")( |\$)"

# Writes the nodes that answer to $alive, at most $1 of them. What $2 does there with this run's processes:
#   pgrep        before the first start, they are another's: it may be healthy, so this ends
#   pkill -KILL  after a start that broke, they are what it left on the nodes
#   true         nothing: the ranks of the last start have ended by themselves
gather() {
  : >"$alive"
  local node host
  for node in "${nodes[@]}"; do
    host=${node% *}
    # shellcheck disable=SC2029
    ssh "${ssh[@]}" "$host" "$2 -f $(printf %q "$ours")" </dev/null >/dev/null 9>&-
    case $? in
      0)
        if [ "$2" = pgrep ]; then
          echo "$run: a run is under way in it on $host; wait for it, stop it (touch $run/STOP), or, if it is what a" \
            "broken start has left there, end it: ssh $host \"pkill -KILL -f '$ours'\"" >&2
          exit 2
        fi
        ;;
      1) ;; # there was nothing to find
      *) echo "$host does not answer: left out" >&2; continue ;;
    esac
    if [ "$(wc -l <"$alive")" -lt "$1" ]; then echo "$node" >>"$alive"; fi
  done
}

stopping=
halt() {
  stopping=1
  if [ -n "$trains" ]; then touch "$run/STOP"; else gather 0 'pkill -KILL'; fi
}
trap halt INT TERM

# `deepspeed` also ends with 0 where what it has started is killed by a signal. So only the command's own word counts:
# of training, which it gives where there is nothing left to do; of the others, its last line, which names the result.
# 0 without it becomes 100.
# shellcheck disable=SC2016
watched='
  deepspeed "$@" | {
    trap "" PIPE # Ctrl-C may have ended whoever reads this, and the ranks are still saving
    said=100
    while IFS= read -r line; do
      printf "%s\n" "$line" 2>/dev/null
      case $line in
        *"$run: finished at step "*"; nothing to do"* | *"report: $run/"* | *"sweep: $run/sweep.json") said=0 ;;
      esac
    done
    exit "$said"
  }
  ends=("${PIPESTATUS[@]}")
  exit "$((ends[0] ? ends[0] : ends[1]))"'

tries=0 most=${#nodes[@]} search=pgrep
while :; do
  gather "$most" "$search"
  now=$(wc -l <"$alive")
  if [ -n "$stopping" ] && [ -z "$trains" ]; then exit 75; fi
  if [ "$now" = 0 ]; then echo "no node answers" >&2; exit 1; fi
  echo "starting on $now of ${#nodes[@]} nodes" >&2
  before=$(progress)

  # In a session of its own, so that Ctrl-C reaches it as STOP only: the launcher would kill where ranks should save.
  # --force_multi: a single node that is left is not this machine.
  run=$run setsid bash -c "$watched" deepspeed --hostfile "$alive" --launcher pdsh --force_multi \
    "launch/$entry.py" --out "$run" "$@" 9>&- &
  while kill -0 $! 2>/dev/null; do wait $!; done # a trapped signal ends `wait`, not the run
  wait $!
  status=$?
  what="status $status" search='pkill -KILL'

  case $status in
    0) # finished, and a stop that came meanwhile is not for the next run
      rm -f "$run/STOP"
      exit 0
      ;;
    2) # at fault is the input, or the batch does not divide among the nodes that are left: then take fewer
      most=$((now - 1)) search=true
      if [ -n "$stopping" ] || [ "$now" = "${#nodes[@]}" ] || [ "$most" = 0 ]; then exit 2; fi
      continue
      ;;
    75) search=true ;;
    100)
      what="status 0, not yet confirmed by the run"
      if [ -n "$stopping" ]; then status=75; else status=1; fi # STOP is there; the same command tells what became of it
      ;;
  esac
  if [ -n "$stopping" ]; then
    if [ -n "$trains" ]; then exit "$status"; else exit 75; fi
  fi
  most=${#nodes[@]}
  if [ "$status" = 75 ] || [ "$(progress)" != "$before" ]; then tries=0; else tries=$((tries + 1)); fi
  if [ "$tries" = 3 ]; then
    echo "$what, and nothing new in $run in three starts: given up" >&2
    exit "$status"
  fi
  found=$(progress | tail -n 1)
  echo "$what, last written: ${found:-nothing}; starting again" >&2
  sleep 10 9>&-
done
