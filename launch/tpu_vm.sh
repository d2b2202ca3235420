#!/usr/bin/env bash
# Runs instructjax.main on Cloud TPU VMs and keeps it running through preemptions. See --help, docs/launching.md (which
# also says what else there is) and docs/pods.md.
#
# On this machine it needs bash, gcloud and a Python with instructjax, which checks the run before anything is requested.
# On the workers the run is a systemd service, for three reasons: it outlives the ssh connection, systemd keeps its exit
# code, and it gets SIGTERM when the machine is taken away, while the bucket is still mounted.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh COMMAND [FLAGS] [-- FLAGS OF instructjax.main]

commands
  check    say whether the run would start on such slices; asks nobody but Python on this machine
  create   ask for the slices and wait until they are READY
  install  copy the source to all workers, install it in a venv, mount the bucket
  run      start the run on all workers and return; it goes on by itself
  status   state of the slices and of the run, with its exit code once it has ended
  logs     copy every worker's log here, those of slices that were preempted too
  delete   give the slices back (the workdir stays in its bucket)
  up       check, create, install, run and watch; when a slice is preempted or a worker dies, delete, create,
           install and run again: the run goes on from its workdir. Ends with logs and delete. If the slices are
           there and run already, up only watches.

flags
  --name=NAME               of the slice or slices                                              (all commands)
  --zone=ZONE               such as us-west4-a                                                  (all commands)
  --project=PROJECT         default: gcloud's own                                               (all commands)
  --slices=N                slices of one run, as config.mesh.slice=N; default: 1               (all commands)
  --accelerator-type=TYPE   of a slice, such as v5litepod-256, v5p-512, v6e-64             (check, create, up)
  --version=RUNTIME         default: the one for the accelerator type                             (create, up)
  --spot                    cheaper; may be preempted at any time                                 (create, up)
  --reserved                from your project's reservation                                       (create, up)
  --flex-start=DURATION     such as 24h: waits for room, and is taken back after this time        (create, up)
  --network=NAME            of the workers; default: default                                      (create, up)
  --subnetwork=NAME         default: that of the network in the zone's region                     (create, up)
  --service-account=EMAIL   of the workers; default: Compute Engine's                             (create, up)
  --source=DIR_OR_GIT_URL   default: this checkout; URL#TAG for a tag or branch                  (install, up)
  --extras=NAMES            to install beside tpu, such as hub,wandb                             (install, up)
  --workdir=gs://BUCKET/DIR where the run lives, checkpoints and all; mounted at /mnt/BUCKET/DIR
                                                                             (check, install, run, logs, up)
  --config=FILE.py:PRESET   such as configs/ppo_ptx.py:gpt3_1p3b                              (check, run, up)
  --env-file=FILE           variables of the run, such as a password, as lines NAME=VALUE; never printed    (run, up)
  --no-check                do not check: for a config that reads weights from the bucket                 (up)
  --logs=DIR                where logs go on this machine; default: runs/NAME-logs                  (logs, up)
  --retries=N               how often to start again; default: 10                                         (up)
  --keep                    leave the slices when the run has ended                                       (up)
  --poll=SECONDS            between two looks at the slices; default: 30                          (create, up)
  --dry-run                 print every command, one a line, and run none
  --help                    this text

environment
  PYTHON                    the Python that checks; default: python3

example
  launch/tpu_vm.sh up --name=gpt3 --zone=us-west4-a --project=my-project --accelerator-type=v5litepod-256 --spot \
    --workdir=gs://my-bucket/gpt3 --config=configs/ppo_ptx.py:gpt3_1p3b -- --config.mesh.tensor=8 \
    --config.data.documents=jsonl:/mnt/my-bucket/data/documents.jsonl \
    --config.data.demonstrations=jsonl:/mnt/my-bucket/data/demonstrations.jsonl \
    --config.data.comparisons=jsonl:/mnt/my-bucket/data/comparisons.jsonl \
    --config.data.prompts=jsonl:/mnt/my-bucket/data/prompts.jsonl
EOF
}

fail() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

say() { echo "tpu_vm.sh: $*" >&2; }

# Joins words to one command line that bash splits into the same words again.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}

# Runs a command, or only prints it.
perform() {
  if $dry_run; then quoted "$@"; else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# Prints a comment in a dry run.
note() { if $dry_run; then echo "# $*"; fi; }

# --- gcloud -----------------------------------------------------------------------------------------------------------

# Slices are requested as queued resources, not with `tpu-vm create`. v5e, v5p and v6e slices of more than a few hosts
# are hardly ever free at once: `tpu-vm create` then fails, while a queued resource waits. A preempted resource remains
# in the state SUSPENDED, and must be deleted before its name can be used again.
queue() { perform gcloud compute tpus queued-resources "$@" "${place[@]}"; }

# Calls a function with the name of each slice, at once for all, and fails if one call does.
on_each_slice() {
  local node pid pids=() failed=0
  if $dry_run || ((slices == 1)); then
    for node in "${nodes[@]}"; do "$1" "$node" "${@:2}" || return; done
    return
  fi
  for node in "${nodes[@]}"; do "$1" "$node" "${@:2}" & pids+=("$!"); done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

ssh_all() { perform gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" --worker=all "--command=$2"; }

copy_all() { perform gcloud compute tpus tpu-vm scp "$2" "$1:$3" "${place[@]}" --worker=all; }

on_all_workers() { on_each_slice ssh_all "$1"; }

# Only the alpha track knows flex-start.
request_slice() {
  local track=() flags=("--accelerator-type=$accelerator_type" "--runtime-version=$version")
  if ((slices == 1)); then flags=("--node-id=$name" "${flags[@]}"); else
    flags=("--node-count=$slices" "--node-prefix=$name" "${flags[@]}")
  fi
  if $spot; then flags+=(--spot); fi
  if $reserved; then flags+=(--reserved); fi
  if [[ -n $flex_start ]]; then
    track=(alpha) flags+=(--provisioning-model=flex-start "--max-run-duration=$flex_start")
  fi
  if [[ -n $network ]]; then flags+=("--network=$network"); fi
  if [[ -n $subnetwork ]]; then flags+=("--subnetwork=$subnetwork"); fi
  if [[ -n $service_account ]]; then flags+=("--service-account=$service_account"); fi
  perform gcloud ${track[@]+"${track[@]}"} compute tpus queued-resources create "$name" "${flags[@]}" "${place[@]}"
}

delete_slice() { queue delete "$name" --force --quiet; }

slice_query=(gcloud compute tpus queued-resources describe '--format=value(state.state)')
node_query=(gcloud compute tpus tpu-vm describe '--format=value(state)')

# Runs a gcloud query and prints its answer. Prints ABSENT if the resource does not exist, and UNKNOWN if gcloud fails
# for another reason, such as a lost connection.
ask() {
  local answer complaint
  complaint=$(mktemp)
  if answer=$("$@" 2>"$complaint"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi 'not_found\|not found' "$complaint"; then
    echo ABSENT
  else
    cat "$complaint" >&2
    echo UNKNOWN
  fi
  rm -f "$complaint"
}

# Prints the state of the slices: READY if all can be used, else that of the first that cannot. Before they exist, this
# is the state of the request. GONE is a slice without which the request remains: its name can be used again only after
# the request is deleted.
slice_state() {
  local state node
  state=$(ask "${slice_query[@]}" "$name" "${place[@]}")
  if [[ $state == ACTIVE ]]; then
    for node in "${nodes[@]}"; do
      state=$(ask "${node_query[@]}" "$node" "${place[@]}")
      if [[ $state == ABSENT ]]; then state=GONE; fi
      if [[ $state != READY ]]; then break; fi
    done
  fi
  echo "$state"
}

show_queries() {
  local node
  perform "${slice_query[@]}" "$name" "${place[@]}"
  for node in "${nodes[@]}"; do perform "${node_query[@]}" "$node" "${place[@]}"; done
}

# Waits until the slice is READY. Fails if it can no longer become READY, and sets the reason.
wait_until_ready() {
  if $dry_run; then
    note "every $poll s until ACTIVE and READY:"
    show_queries
    return
  fi
  local state before=
  while true; do
    state=$(slice_state)
    if [[ $state != "$before" ]]; then say "slice $name: $state"; fi
    before=$state
    case $state in
      READY) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | PREEMPTED | STOPPING | STOPPED | TERMINATED | ABSENT | GONE)
        reason="the slice is $state"
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

# --- on the workers ---------------------------------------------------------------------------------------------------
# Single quotes on purpose: $HOME and other variables must be expanded on the worker. What a worker installs and mounts is
# in tpu_worker.sh.
# shellcheck disable=SC2016
readonly WORKER='bash "$HOME/instructjax/launch/tpu_worker.sh"'
# shellcheck disable=SC2016
readonly UNLESS_IT_RUNS='if [ "$(systemctl show instructjax --property=SubState --value)" = running ]; then echo "$(hostname): it runs already" >&2; exit 1; fi;'
# shellcheck disable=SC2016
readonly RUN_STATE='echo "worker=$(hostname)" $(systemctl show instructjax --property=SubState,ExecMainCode,ExecMainStatus)'

# The run's command is written to a file, because systemd would expand % and $ in a command line. chmod is for an scp that
# gives the file of variables the mode that it has here.
start_command() {
  local program log unit=instructjax-bucket-$bucket.service # as tpu_worker.sh names it
  program="exec \"\$HOME/venv/bin/python\" -u -m instructjax.main $(quoted "${main_flags[@]}")"
  log="\$HOME/instructjax-\$(hostname).log"
  echo "$UNLESS_IT_RUNS" \
    "{ sudo systemctl stop instructjax; sudo systemctl reset-failed instructjax; } 2>/dev/null;${env_file:+ chmod 600 \"\$HOME/instructjax.env\" &&}" \
    "echo ${program@Q} > \"\$HOME/run.sh\" && sudo systemd-run --quiet --unit=instructjax --uid=\"\$(id -un)\"" \
    "--working-directory=\"\$HOME/instructjax\" --remain-after-exit --setenv=JAX_PLATFORMS=tpu,cpu" \
    "--property=Requires=$unit --property=After=$unit${env_file:+ --property=EnvironmentFile=\"\$HOME/instructjax.env\"}" \
    "--property=KillMode=mixed --property=TimeoutStopSec=300 --property=LimitNOFILE=1048576" \
    "--property=StandardOutput=append:\"$log\" --property=StandardError=append:\"$log\"" \
    "--property=ExecStopPost=\"/bin/cp $log $mounted/logs/\" /bin/bash \"\$HOME/run.sh\""
}

# Makes the archive that install copies. This happens once for all attempts, so that a run continues with the code that
# it started with, even if the checkout has changed since. Secrets stay out of it: anybody may read what it holds.
pack() {
  if [[ $source == *://* || $source == git@* ]]; then return; fi
  perform tar -czf "$archive" '--exclude=./.[!.]*' --exclude=./runs --exclude=./build '--exclude=*.egg-info' \
    --exclude=__pycache__ --exclude=site-packages '--exclude=.venv-*' '--exclude=*.gguf' '--exclude=*.safetensors' \
    ${env_file:+"--exclude=${env_file##*/}"} -C "$source" .
}

# The files of a run that is under way stay, also where `up` could not see that it is.
install_everything() {
  # The && are needed because bash ignores `set -e` inside a function whose exit status is tested.
  if [[ $source == *://* || $source == git@* ]]; then
    local clone=(git clone --quiet --depth=1)
    if [[ $source == *#* ]]; then clone+=("--branch=${source##*#}"); fi
    on_all_workers "$UNLESS_IT_RUNS rm -rf \"\$HOME/instructjax\" && $(quoted "${clone[@]}" "${source%%#*}") \"\$HOME/instructjax\""
  else
    on_each_slice copy_all "$archive" instructjax.tar.gz &&
      on_all_workers "$UNLESS_IT_RUNS rm -rf \"\$HOME/instructjax\" && mkdir \"\$HOME/instructjax\" && tar -xzf \"\$HOME/instructjax.tar.gz\" -C \"\$HOME/instructjax\""
  fi && on_all_workers "$WORKER install $extras && $WORKER mount $bucket && mkdir -p $mounted/logs"
}

# Nobody else on a worker may read the variables, so their file is there, with its mode, before they come.
start_run() {
  if [[ -n $env_file ]]; then
    on_all_workers "$UNLESS_IT_RUNS install -m 600 /dev/null \"\$HOME/instructjax.env\"" &&
      on_each_slice copy_all "$env_file" instructjax.env || return
  fi
  on_all_workers "$(start_command)"
}

# Whether the run would start on such slices. The devices of this machine are not used, and no data are read.
check_run() {
  if ! $dry_run && ! "$python" -c 'import absl, jax' 2>/dev/null; then
    fail "PYTHON=$python cannot import JAX, to check the run with: activate this checkout's environment, or give --no-check"
  fi
  (cd "$checkout" && perform "$python" -m instructjax.main "${main_flags[@]}" "--check=$slice_names")
}

# Prints one line per worker: NAME running, NAME ended CODE, or NAME absent. Prints nothing if the workers cannot be
# reached.
worker_states() {
  local line worker state node
  # ssh must not read this script's stdin.
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all "--command=$RUN_STATE" </dev/null 2>/dev/null || true
  done |
    while read -r line; do
      [[ $line =~ worker=([^ ]+) ]] || continue
      worker=${BASH_REMATCH[1]}
      [[ $line =~ SubState=([a-z-]*) ]] && state=${BASH_REMATCH[1]}
      case $state in
        dead) echo "$worker absent" ;;
        exited | failed)
          [[ $line =~ ExecMainCode=([0-9]+) ]] && local how=${BASH_REMATCH[1]}
          [[ $line =~ ExecMainStatus=([0-9]+) ]] && local code=${BASH_REMATCH[1]}
          # ExecMainCode is 1 after a normal exit. Otherwise a signal ended the run, which a shell reports as 128 plus
          # the signal's number.
          if ((how != 1)); then code=$((128 + code)); fi
          echo "$worker ended $code"
          ;;
        *) echo "$worker running" ;;
      esac
    done
}

# Summarises worker_states, from stdin, in one word: running, absent, unknown, or the run's exit code. This is the
# highest code of all workers. A worker ends with 69 because another worker is gone, so 69 is used only if no other code
# explains the end, and 3, waiting for people, only if nothing went wrong.
run_state() {
  local states codes telling
  states=$(cat)
  codes=$(sed -n 's/.* ended //p' <<<"$states" | sort -nu)
  if [[ -z $states ]]; then
    echo unknown
  elif [[ $states == *" running"* ]]; then
    echo running
  elif [[ $states == *" absent"* ]]; then
    echo absent
  else
    telling=$(grep -vxE '0|3|69' <<<"$codes" || grep -x 3 <<<"$codes" || true)
    tail -n 1 <<<"${telling:-$codes}"
  fi
}

# Looks at the run on all workers: sets states, and run, which is their word. A slice always has as many workers. So where
# fewer answer than have before, and those have ended, the word is unknown, and missed counts such looks in a row.
look() {
  local answers
  states=$(worker_states)
  run=$(run_state <<<"$states")
  answers=$(grep -c . <<<"$states" || true)
  if ((answers > workers)); then workers=$answers; fi
  if ((answers == workers)) || [[ $run =~ ^(running|unknown)$ ]]; then missed=0; else
    missed=$((missed + 1)) run=unknown
  fi
}

# Whether starting again at once would not help: at least one worker has ended with 1, a bug, with 2, a mistake in flags
# or data, or with 3, waiting for people, and all others with these or 69.
is_of_no_use() { grep -qE ' ended [123]$' <<<"$1" && ! grep -qvE ' ended (1|2|3|69)$' <<<"$1"; }

# Explains an exit code of instructjax.main.
meaning() {
  case $1 in
    1) echo " (a bug: please report it with the traceback in the log)" ;;
    3) echo " (waits for people, who have to rank answers)" ;;
    69) echo " (a worker is gone)" ;;
    75) echo " (told to stop, and saved)" ;;
  esac
}

fetch_logs() {
  # Workers that are gone have copied their logs to the bucket when they were told to stop.
  on_all_workers "cp \"\$HOME/instructjax-\$(hostname).log\" $mounted/logs/" ||
    say "no log from the workers; what they left in $workdir/logs is copied"
  perform mkdir -p "$logs"
  perform gcloud storage rsync --recursive "$workdir/logs" "$logs" || say "no logs in $workdir/logs"
}

# --- up ---------------------------------------------------------------------------------------------------------------

# Creates the slice if necessary, starts the run, and watches it until the run or the slice ends. Sets outcome to
# finished, stopped or lost, the latter two with a reason.
attempt() {
  outcome=lost reason='' exit_code=1 missed=0
  local state states run
  # A slice that is being suspended or deleted can be neither used nor deleted, so wait.
  while state=$(slice_state) && [[ $state =~ ^(SUSPENDING|DELETING|STOPPING|UNKNOWN)$ ]]; do sleep "$poll"; done
  if [[ $state =~ ^(SUSPENDED|PREEMPTED|FAILED|STOPPED|TERMINATED|GONE)$ ]]; then
    delete_slice || { reason="the slice is $state and could not be deleted" && return; }
    state=ABSENT
  fi
  if [[ $state == ABSENT ]]; then request_slice || { reason="the request was refused" && return; }; fi
  wait_until_ready || return 0
  look
  if [[ $run != running ]]; then
    install_everything || { reason="the installation failed" && return; }
    start_run || { reason="the run could not be started" && return; }
  fi
  say "the run is under way; Ctrl-C ends the watching, not the run"
  while true; do
    sleep "$poll"
    state=$(slice_state)
    case $state in
      READY) ;;
      UNKNOWN) continue ;;
      *) reason="the slice is $state" && return ;;
    esac
    look
    case $run in
      running) ;;
      # The others of a worker that cannot be reached for long end by themselves: it is waited for no longer.
      unknown) if ((missed == 20)); then reason="not all workers can be reached" && return; fi ;;
      absent) reason="a worker was restarted" && return ;;
      0) outcome=finished exit_code=0 && return ;;
      *)
        exit_code=$run reason="the run ended with exit code $run$(meaning "$run")"
        if is_of_no_use "$states"; then outcome=stopped; fi
        return
        ;;
    esac
  done
}

show_up() {
  if $check; then check_run; fi
  pack
  request_slice
  wait_until_ready
  install_everything
  start_run
  note "every $poll s until it has ended:"
  show_queries
  on_all_workers "$RUN_STATE"
  note "if the slice is preempted, up to $retries times, and then again from the request on:"
  delete_slice
  note "in the end:"
  fetch_logs
  if ! $keep; then delete_slice; fi
}

up() {
  trap 'echo; say "no longer watched: the slice and the run go on. up watches again, delete gives the slice back"; exit 130' INT
  if $check; then check_run || exit; fi
  [[ $(slice_state) != UNKNOWN ]] || { say "gcloud cannot be asked about the slice" && exit 1; }
  pack
  local tries=0 workers=0 missed
  while true; do
    attempt
    if [[ $outcome != lost ]] || ((tries == retries)); then break; fi
    tries=$((tries + 1))
    say "$reason; starting again ($tries of $retries)"
    sleep "$poll"
  done
  fetch_logs
  if $keep; then say "the slice is kept and costs money until: tpu_vm.sh delete"; else delete_slice || say "the slice could not be deleted: it may still cost money"; fi
  case $outcome in
    finished) say "finished: $workdir" ;;
    stopped)
      if ((exit_code == 3)); then say "$reason; then the same command goes on from $workdir"; else
        say "$reason, which starting again would not mend: see $logs"
      fi
      ;;
    lost) say "gave up after $retries retries: $reason. The same command goes on from $workdir; logs are in $logs" ;;
  esac
  exit "$exit_code"
}

show_status() {
  if $dry_run; then
    show_queries
    on_all_workers "$RUN_STATE"
    return
  fi
  local state states run
  state=$(slice_state)
  echo "slice $name: $state"
  if [[ $state != READY ]]; then return; fi
  states=$(worker_states)
  run=$(run_state <<<"$states")
  case $run in
    running) echo "run: running" ;;
    absent) echo "run: not started on every worker" ;;
    unknown) echo "run: unknown, the workers cannot be reached" ;;
    *) echo "run: ended, exit code $run$(meaning "$run")" ;;
  esac
  if [[ -n $states ]]; then echo "  ${states//$'\n'/$'\n'  }"; fi
}

# --- the command line -------------------------------------------------------------------------------------------------

need() { # FLAG VALUE WHAT
  if [[ -z $2 ]]; then fail "$command needs --$1=$3; see --help"; fi
}

is_count() { [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "--$1=$2 must be a whole number"; }

default_version() {
  case $accelerator_type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

command=${1-}
case $command in
  -h | --help | help) usage && exit ;;
  check | create | install | run | status | logs | delete | up) shift ;;
  '') fail "which command? One of check, create, install, run, status, logs, delete, up; see --help" ;;
  *) fail "no command '$command': one of check, create, install, run, status, logs, delete, up; see --help" ;;
esac

name='' zone='' project='' accelerator_type='' version='' source='' workdir='' config='' logs=''
slices=1 flex_start='' network='' subnetwork='' service_account='' extras=tpu env_file=''
spot=false reserved=false keep=false check=true dry_run=false retries=10 poll=30 extra=()
while (($#)); do
  case $1 in
    --extras=*) extras=tpu,${1#*=} ;;
    --name=* | --zone=* | --project=* | --accelerator-type=* | --version=* | --slices=* | --flex-start=* | --network=* | \
      --subnetwork=* | --service-account=* | --source=* | --workdir=* | --config=* | --env-file=* | --logs=* | \
      --retries=* | --poll=*)
      flag=${1%%=*} flag=${flag#--}
      printf -v "${flag//-/_}" %s "${1#*=}" # the variable of the flag's name
      ;;
    --spot | --reserved | --keep) printf -v "${1#--}" true ;;
    --no-check) check=false ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage && exit ;;
    --) shift && extra=("$@") && break ;;
    --config.*) fail "$1: flags of instructjax.main come after --" ;;
    --*=*) fail "no flag ${1%%=*}; see --help" ;;
    *) fail "'$1' is not --FLAG=VALUE; see --help" ;;
  esac
  shift
done

for word in ${extra[@]+"${extra[@]}"}; do
  if [[ $word =~ ^--?(workdir|scratch)(=|$) ]]; then
    fail "$word: --workdir=gs://BUCKET/DIR comes before --: what is on a worker's disk is lost with it"
  fi
done
need name "$name" NAME
need zone "$zone" ZONE
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "--name=$name must be lower-case letters, digits and hyphens"
is_count retries "$retries"
is_count poll "$poll"
[[ $slices =~ ^[1-9][0-9]{0,2}$ ]] || fail "--slices=$slices must be a whole number from 1 to 999"
[[ $extras =~ ^[a-z0-9]+(,[a-z0-9]+)*$ ]] || fail "--extras=${extras#tpu,} must be names of extras, as hub,wandb"
[[ -z $flex_start || $flex_start =~ ^[1-9][0-9]*[smhd]$ ]] || fail "--flex-start=$flex_start must be a time, as 24h"
[[ $spot$reserved$flex_start =~ ^(truefalse|falsetrue|falsefalse.*)$ ]] ||
  fail "of --spot, --reserved and --flex-start only one can be given"
if [[ -n $env_file ]]; then
  [[ -f $env_file && -r $env_file ]] || fail "--env-file=$env_file is no file that can be read"
  line=$(grep -anvE '^[A-Za-z_][A-Za-z0-9_]*=' "$env_file" | head -n 1 | cut -d: -f1 || true) # its number, not its text
  [[ -z $line ]] || fail "--env-file=$env_file must be lines NAME=VALUE, and line $line is not"
fi
case $command in check | create | up) need accelerator-type "$accelerator_type" v5litepod-256 ;; esac
case $command in
  create | up)
    version=${version:-$(default_version)}
    [[ -n $version ]] || fail "no runtime is known for --accelerator-type=$accelerator_type: give --version=RUNTIME"
    ;;
esac
case $command in
  check | install | run | logs | up)
    need workdir "$workdir" gs://BUCKET/DIR
    [[ $workdir =~ ^gs://([a-z0-9][a-z0-9._-]+)/([A-Za-z0-9._/=-]*[A-Za-z0-9._=-])/*$ ]] ||
      fail "--workdir=$workdir must be gs://BUCKET/DIR without spaces: what is on a worker's disk is lost with it"
    [[ /$workdir/ != */../* ]] || fail "--workdir=$workdir must be a folder of the bucket, without '..'"
    bucket=${BASH_REMATCH[1]} mounted=/mnt/${BASH_REMATCH[1]}/${BASH_REMATCH[2]}
    workdir=gs://$bucket/${BASH_REMATCH[2]}
    ;;
esac
case $command in check | run | up) need config "$config" FILE.py:PRESET ;; esac
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source=${source:-$checkout}
if [[ -f $source/setup.cfg ]]; then checkout=$source; fi
case $command in
  install | up)
    [[ $source == *://* || $source == git@* || -f $source/setup.cfg ]] ||
      fail "--source=$source is neither a git URL nor a checkout: there is no setup.cfg in it"
    ;;
esac
$dry_run || [[ $command == check ]] || type -P gcloud >/dev/null ||
  fail "gcloud is not on PATH: install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install"

place=("--zone=$zone")
if [[ -n $project ]]; then place+=("--project=$project"); fi
logs=${logs:-runs/$name-logs}
archive=${TMPDIR:-/tmp}/instructjax-$name.tar.gz
main_flags=("--config=$config" "--workdir=${mounted-}")
nodes=("$name") slice_names=$accelerator_type
if ((slices > 1)); then
  slice_names=${slices}x$accelerator_type
  main_flags+=("--config.mesh.slice=$slices")
  # As queued-resources names them, from --node-prefix.
  for ((i = 0; i < slices; i++)); do nodes[i]=$name-$i; done
fi
main_flags+=(${extra[@]+"${extra[@]}"})
python=${PYTHON:-python3}
readonly name zone project accelerator_type version source workdir config logs spot keep dry_run retries poll
readonly slices nodes flex_start reserved network subnetwork service_account extras env_file check checkout python main_flags

case $command in
  check) check_run ;;
  create)
    request_slice
    wait_until_ready || { say "$reason" && exit 1; }
    ;;
  install) pack && install_everything ;;
  run) start_run ;;
  status) show_status ;;
  logs) fetch_logs ;;
  delete) delete_slice ;;
  up) if $dry_run; then show_up; else up; fi ;;
esac
