"""launch/tpu_vm.sh: what it would run, and what it does with a gcloud that tells a story of preemptions.

No cloud is asked anything: dry runs are compared with recorded transcripts, and the rest meets a `gcloud` of the
test's own, which notes what it is called with and answers from a script.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
WORKER = ROOT / "launch" / "tpu_worker.sh"
TRANSCRIPTS = pathlib.Path(__file__).parent / "transcripts"

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")

# Notes each call as a word or two in `calls`. The states of the queued resource, of the node and of the run come from
# the files queue, node and run: one line a question, the last line for ever. Refuses commands that bash cannot parse.
GCLOUD = r"""#!/usr/bin/env bash
cd "$(dirname "$0")"
next() {
  local answer
  read -r answer <"$1"
  if (($(wc -l <"$1") > 1)); then sed -i 1d "$1"; fi
  if [[ $answer == ABSENT ]]; then echo "ERROR: NOT_FOUND: no such resource" >&2 && exit 1; fi
  if [[ $answer == UNREACHABLE ]]; then echo "ERROR: no network" >&2 && exit 1; fi
  echo "$answer"
}
case "$*" in *--zone=zone-a*--project=mine* | *storage*) ;; *) echo "bad place: $*" >>calls ;; esac
case "$*" in *tpu-vm*-1\ *) echo "second slice" >>calls ;; esac
for word in "$@"; do
  if [[ $word == --command=* ]]; then bash -n -c "${word#--command=}" || exit 9; fi
done
case "$*" in
  *queued-resources\ describe*) next queue ;;
  *tpu-vm\ describe*) next node ;;
  *queued-resources\ create*) echo "create" >>calls ;;
  *queued-resources\ delete*) echo "delete" >>calls ;;
  *tpu-vm\ scp*.env\ *) echo "copy variables" >>calls ;;
  *tpu-vm\ scp*) echo "copy" >>calls ;;
  *"install -m 600 /dev/null"*) echo "closed file" >>calls ;;
  *"cp \"\$HOME/instructjax-"*) echo "copy logs" >>calls ;;
  *ExecMainCode*) next run | tr ';' '\n' ;;
  *systemd-run*instructjax.main* | *instructjax.main*systemd-run*) echo "run" >>calls ;;
  *tar\ -xzf*) echo "unpack" >>calls ;;
  *tpu_worker.sh\"\ install\ tpu*mount\ bucket*) echo "install" >>calls; if [[ -f no_install ]]; then exit 1; fi ;;
  *storage\ rsync*) echo "fetch logs" >>calls ;;
  *) echo "unexpected: $*" >>calls ;;
esac
"""

# The Python that checks a run: it can import everything, and answers with the exit code in the file `verdict`.
PYTHON = r"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit 0; fi
echo "check ${!#}" >>"$(dirname "$0")/calls"
exit "$(cat "$(dirname "$0")/verdict")"
"""

PLACE = ["--name=gpt3", "--zone=zone-a", "--project=mine"]
WHAT = ["--workdir=gs://bucket/gpt3", "--config=configs/ppo_ptx.py:gpt3_1p3b", "--poll=0"]
INSTALL = ["copy", "unpack", "install"]
END = ["copy logs", "fetch logs", "delete"]

NONE = "worker=w-0 ExecMainCode=0 ExecMainStatus=0 SubState=dead"
RUNNING = "worker=w-0 ExecMainCode=0 ExecMainStatus=0 SubState=running"
DONE = "worker=w-0 ExecMainCode=1 ExecMainStatus=0 SubState=exited"


def ended(code: int, worker: int = 0) -> str:
  return f"worker=w-{worker} ExecMainCode=1 ExecMainStatus={code} SubState=failed"


ALL_DONE = f"{DONE};{ended(0, 1)}"


def run(*arguments, path=None, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
  path = os.pathsep.join(filter(None, [str(path or ""), os.environ["PATH"]]))
  return subprocess.run(
    ["bash", str(SCRIPT), *arguments],
    capture_output=True,
    text=True,
    cwd=cwd,
    stdin=subprocess.DEVNULL,
    env={**os.environ, "TMPDIR": "/tmp", "PATH": path, **environment},
    timeout=60,
  )


@pytest.fixture
def cloud(tmp_path):
  """cloud(queue, node, run): a folder with a gcloud that answers so; .calls() is what it was asked."""

  class Cloud:
    folder = tmp_path / "cloud"

    def __init__(self, queue, node=("READY",), run=(NONE,)):
      self.folder.mkdir()
      for name, states in {"queue": queue, "node": node, "run": run}.items():
        (self.folder / name).write_text("\n".join(states) + "\n")
      executable(self.folder / "gcloud", GCLOUD)
      executable(self.folder / "python3", PYTHON)
      (self.folder / "verdict").write_text("0")

    def calls(self) -> list[str]:
      """What was asked of gcloud, after the check of the run, which is the first of all."""
      path = self.folder / "calls"
      calls = path.read_text().splitlines() if path.exists() else []
      if calls and calls[0].startswith("check"):
        assert calls.pop(0) == f"check --check={self.checked}"
      return calls

    checked = "v5litepod-256"

    def up(self, *arguments):
      flags = [*PLACE, *WHAT, "--accelerator-type=v5litepod-256", "--spot", *arguments]
      logs = f"--logs={tmp_path / 'logs'}"
      return run("up", *flags, logs, path=self.folder, TMPDIR=str(tmp_path))

  return Cloud


def executable(path: pathlib.Path, text: str):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


# --- the text ---------------------------------------------------------------------------------------------------------


def test_shellcheck():
  path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
  shellcheck = shutil.which("shellcheck", path=path)
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install '.[test]' brings it")
  done = subprocess.run([shellcheck, str(SCRIPT), str(WORKER)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_help_tells_all():
  done = run("--help")
  assert done.returncode == 0 and run("up", "--help").stdout == done.stdout
  text = SCRIPT.read_text()
  options = text.partition("while (($#))")[2].partition("esac")[0]
  flags = set(re.findall(r"(?<=[ (])(--[a-z-]+)(?==\*|\)| \|)", options))
  assert len(flags) == 24  # else the expression has missed some
  for flag in flags:
    assert f"  {flag}" in done.stdout, flag
  for command in ("check", "create", "install", "run", "status", "logs", "delete", "up"):
    assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
  "name",
  ["create_spot_v5e", "create_two_v5p", "up", "run_extra_flags", "delete", "install_git"],
)
def test_dry_run(name, tmp_path):
  """A transcript is a command after `$ ` and all that it prints; to record it anew, run the command."""
  command, _, expected = (TRANSCRIPTS / f"{name}.txt").read_text().partition("\n")
  dollar, script, *arguments = shlex.split(command)
  assert (dollar, script) == ("$", "launch/tpu_vm.sh") and "--dry-run" in arguments
  executable(tmp_path / "gcloud", "#!/bin/sh\necho called; exit 1\n")
  done = run(*arguments, path=tmp_path)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == expected


def test_every_transcript_is_compared():
  marks = test_dry_run.pytestmark
  assert {path.stem for path in TRANSCRIPTS.iterdir()} == set(marks[0].args[1])


def test_a_dry_run_needs_no_gcloud_and_its_lines_are_commands(tmp_path):
  for tool in ("bash", "dirname", "cat"):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  done = subprocess.run(
    [shutil.which("bash"), SCRIPT, "up", *PLACE, *WHAT, "--accelerator-type=v6e-64", "--dry-run"],
    capture_output=True,
    text=True,
    env={"PATH": str(tmp_path)},
  )
  assert (done.returncode, done.stderr) == (0, "")
  for line in done.stdout.splitlines():
    words = shlex.split(line, comments=True)
    assert not words or words[0] in ("gcloud", "tar", "mkdir", "python3"), line


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "arguments, complaint",
  [
    ([], "which command?"),
    (["launch"], "no command 'launch'"),
    (["status", "--zone=z"], "status needs --name=NAME"),
    (["status", "--name=a"], "status needs --zone=ZONE"),
    (["create", *PLACE], "create needs --accelerator-type="),
    (["create", *PLACE, "--accelerator-type=v9-8"], "give --version=RUNTIME"),
    (["run", *PLACE, "--config=configs/ppo.py"], "run needs --workdir="),
    (["run", *PLACE, "--workdir=gs://bucket/a"], "run needs --config="),
    (["run", *PLACE, "--workdir=runs/demo", "--config=c.py"], "must be gs://BUCKET/DIR"),
    (["run", *PLACE, "--workdir=gs://bucket", "--config=c.py"], "must be gs://BUCKET/DIR"),
    (["run", *PLACE, "--workdir=gs://bucket/a b", "--config=c.py"], "must be gs://BUCKET/DIR"),
    (["run", *PLACE, "--workdir=gs://bucket/a/../b", "--config=c.py"], "without '..'"),
    (["run", *PLACE, *WHAT, "--config.seed=1"], "come after --"),
    (["delete", *PLACE, "--zome=z"], "no flag --zome"),
    (["delete", *PLACE, "now"], "'now' is not --FLAG=VALUE"),
    (["delete", "--name=Big One", "--zone=z"], "must be lower-case"),
    (["delete", *PLACE, "--retries=many"], "--retries=many must be a whole number"),
    (["delete", *PLACE, "--retries=08"], "--retries=08 must be a whole number"),  # bash's octal
    (["create", *PLACE, "--accelerator-type=v6e-8", "--spot", "--reserved"], "only one"),
    (["create", *PLACE, "--accelerator-type=v6e-8", "--spot", "--flex-start=1h"], "only one"),
    (["create", *PLACE, "--accelerator-type=v6e-8", "--flex-start=long"], "must be a time, as 24h"),
    (["create", *PLACE, "--accelerator-type=v6e-8", "--slices=0"], "a whole number from 1 to 999"),
    (
      ["install", *PLACE, *WHAT, "--extras=hub wandb"],
      "--extras=hub wandb must be names of extras",
    ),
    (["check", *PLACE, *WHAT], "check needs --accelerator-type="),
    (["check", *PLACE, "--workdir=gs://bucket/a", "--accelerator-type=v6e-8"], "needs --config="),
    (["install", *PLACE, *WHAT, "--source=/nowhere"], "neither a git URL nor a checkout"),
    (
      ["run", *PLACE, *WHAT, "--env-file=/nowhere"],
      "--env-file=/nowhere is no file that can be read",
    ),
    (["run", *PLACE, *WHAT, "--env-file=/tmp"], "--env-file=/tmp is no file that can be read"),
  ],
)
def test_a_mistake_is_one_line(arguments, complaint):
  done = run(*arguments, "--dry-run") if arguments else run()
  assert done.returncode == 2 and done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("tpu_vm.sh: ") and complaint in line


@pytest.mark.parametrize("flag", ["--workdir=/tmp/a", "-workdir", "--scratch=/tmp/a"])
def test_the_run_cannot_be_sent_to_a_workers_disk(flag):
  done = run("run", *PLACE, *WHAT, "--dry-run", "--", "--config.seed=1", flag)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"tpu_vm.sh: {flag}: --workdir=gs://BUCKET/DIR comes before --")


@pytest.mark.parametrize("bad", ["hunter2", "export KEY=hunter2", "2KEY=hunter2", "# hunter2", ""])
def test_a_file_of_variables_holds_nothing_else(tmp_path, bad):
  """The line is named by its number: it may be a password."""
  (tmp_path / "a.env").write_text(f"KEY=hunter2\n{bad}\nOTHER=hunter2\n")
  done = run("run", *PLACE, *WHAT, f"--env-file={tmp_path}/a.env", "--dry-run")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.endswith("a.env must be lines NAME=VALUE, and line 2 is not\n")
  assert "hunter2" not in done.stderr


def test_no_gcloud_is_told(tmp_path):
  for tool in ("bash", "dirname"):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  done = subprocess.run(
    [shutil.which("bash"), SCRIPT, "status", *PLACE],
    capture_output=True,
    text=True,
    env={"PATH": str(tmp_path)},
  )
  assert done.returncode == 2 and "gcloud is not on PATH: install" in done.stderr


# --- up ---------------------------------------------------------------------------------------------------------------


def test_preempted_then_finished(cloud):
  """Waits for READY, runs, sees the slice go, waits until it may be deleted, and does it all again."""
  there = cloud(
    queue=[
      *("ABSENT", "ABSENT"),  # the first look, and the first attempt's
      *("ACCEPTED", "PROVISIONING", "ACTIVE", "ACTIVE"),  # the node is CREATING, then READY
      *("ACTIVE", "UNREACHABLE", "SUSPENDING"),  # watching
      *("SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"),  # the second attempt
    ],
    node=["CREATING", "READY"],
    # One worker is done before another; once ssh fails, which says nothing about the run.
    run=[NONE, RUNNING, NONE, f"{RUNNING};{DONE}", "UNREACHABLE", f"{DONE};{DONE}"],
  )
  done = there.up("--retries=3")
  assert done.returncode == 0, done.stderr
  assert there.calls() == [
    "create", *INSTALL, "run",
    "delete", "create", *INSTALL, "run",
    *END,
  ]  # fmt: skip
  assert "the slice is SUSPENDING; starting again (1 of 3)" in done.stderr
  assert done.stderr.endswith("tpu_vm.sh: finished: gs://bucket/gpt3\n")


def test_retries_exhausted(cloud):
  there = cloud(queue=["ABSENT", "ABSENT", "SUSPENDED"])
  done = there.up("--retries=2")
  assert done.returncode == 1
  assert there.calls() == ["create", "delete", "create", "delete", "create", *END]
  assert "gave up after 2 retries: the slice is SUSPENDED" in done.stderr
  assert "goes on from gs://bucket/gpt3" in done.stderr


def test_a_dead_worker_is_a_retry_on_the_same_slice(cloud):
  codes = f"{ended(69)};worker=w-1 ExecMainCode=2 ExecMainStatus=9 SubState=failed"
  there = cloud(queue=["ACTIVE"], run=[NONE, codes, codes, ALL_DONE])
  done = there.up("--keep")
  assert done.returncode == 0, done.stderr
  assert there.calls() == [*INSTALL, "run", *INSTALL, "run", "copy logs", "fetch logs"]
  assert "the run ended with exit code 137; starting again" in done.stderr
  assert "costs money" in done.stderr


def test_the_code_of_a_run_that_never_ends_well(cloud):
  there = cloud(queue=["ACTIVE"], run=[NONE, f"{ended(134)};{ended(2, 1)}"])
  done = there.up("--retries=1")
  assert done.returncode == 134 and there.calls().count("run") == 2


@pytest.mark.parametrize(
  ("codes", "reason"),
  [
    ((75, 75), "exit code 75 (told to stop, and saved)"),
    ((74, 69), "exit code 74"),  # a passing fault of storage
    ((74, 1), "exit code 74"),
    ((69, 0), "exit code 69 (a worker is gone)"),
  ],
)
def test_what_the_codes_of_a_run_mean(cloud, codes, reason):
  states = f"{ended(codes[0])};{ended(codes[1], 1)}"
  there = cloud(queue=["ACTIVE"], run=[NONE, states, states, ALL_DONE])
  done = there.up("--keep")
  assert done.returncode == 0, done.stderr
  assert f"the run ended with {reason}; starting again (1 of 10)" in done.stderr


@pytest.mark.parametrize("other", [2, 69])  # 69: left behind by the one with the mistake
def test_a_mistake_is_not_tried_again(cloud, other):
  there = cloud(queue=["ACTIVE"], run=[NONE, f"{ended(2)};{ended(other, 1)}"])
  done = there.up()
  assert done.returncode == 2
  assert there.calls() == [*INSTALL, "run", *END]
  assert "exit code 2, which starting again would not mend" in done.stderr


@pytest.mark.parametrize("other", [1, 2, 3, 69])
def test_a_bug_is_not_tried_again(cloud, other):
  there = cloud(queue=["ACTIVE"], run=[NONE, f"{ended(1)};{ended(other, 1)}"])
  done = there.up()
  assert done.returncode == (2 if other == 2 else 1)
  assert there.calls() == [*INSTALL, "run", *END]
  assert "which starting again would not mend" in done.stderr
  if other != 2:
    assert "exit code 1 (a bug: please report it" in done.stderr


def test_a_run_that_waits_for_people_goes_on_later(cloud):
  there = cloud(queue=["ACTIVE"], run=[NONE, f"{ended(3)};{ended(69, 1)}"])
  done = there.up()
  assert done.returncode == 3
  assert there.calls() == [*INSTALL, "run", *END]
  last = done.stderr.splitlines()[-1]
  assert last.endswith("rank answers); then the same command goes on from gs://bucket/gpt3")


def test_variables_reach_every_start_and_are_never_printed(cloud, tmp_path):
  """Their file is closed before they come, and systemd reads it before the run."""
  (tmp_path / "a.env").write_text("PGPASSWORD=hunter2\n")
  there = cloud(queue=["ACTIVE"], run=[NONE, ended(137), ended(137), DONE])
  flag = f"--env-file={tmp_path}/a.env"
  done = there.up(flag)
  assert done.returncode == 0, done.stderr
  start = [*INSTALL, "closed file", "copy variables", "run"]
  assert there.calls() == [*start, *start, *END]
  dry = there.up(flag, "--dry-run")
  for text in (done.stderr, dry.stdout):
    assert "hunter2" not in text
    assert text.count(f"scp {tmp_path}/a.env gpt3:instructjax.env ") == text.count(
      "EnvironmentFile"
    )
  assert dry.stdout.count('--property=EnvironmentFile="$HOME/instructjax.env" ') == 1


def test_a_run_under_way_is_only_watched(cloud):
  there = cloud(queue=["ACTIVE"], run=[RUNNING, RUNNING, DONE])
  done = there.up()
  assert done.returncode == 0 and there.calls() == END


def test_a_slice_that_is_gone_is_deleted_before_it_is_asked_for(cloud):
  """Its request remains, ACTIVE, and another of the same name would be refused."""
  there = cloud(queue=["ACTIVE"], node=["ABSENT", "ABSENT", "READY"], run=[NONE, DONE])
  done = there.up()
  assert done.returncode == 0, done.stderr
  assert there.calls() == ["delete", "create", *INSTALL, "run", *END]


def test_a_slice_that_goes_while_it_is_watched(cloud):
  there = cloud(
    queue=["ACTIVE"],
    node=["READY", "READY", "READY", "ABSENT", "ABSENT", "READY"],
    run=[RUNNING, NONE, DONE],
  )
  done = there.up()
  assert done.returncode == 0, done.stderr
  assert there.calls() == ["delete", "create", *INSTALL, "run", *END]
  assert "the slice is GONE; starting again (1 of 10)" in done.stderr


@pytest.mark.parametrize("code", [0, 2])
def test_a_worker_that_does_not_answer_has_not_ended(cloud, code):
  """Worker 0's ssh fails twice while worker 1 has ended; then it says that it runs, and that it has ended."""
  both, one = f"{RUNNING};{ended(code, 1)}", ended(code, 1)
  there = cloud(queue=["ACTIVE"], run=[both, both, one, one, RUNNING, ALL_DONE])
  done = there.up()
  assert done.returncode == 0, done.stderr
  assert there.calls() == END
  assert (there.folder / "run").read_text().splitlines() == [ALL_DONE]  # every look was needed


def test_a_worker_that_never_answers_again_is_a_retry(cloud):
  both = f"{RUNNING};{ended(69, 1)}"
  there = cloud(queue=["ACTIVE"], run=[both, both, *[ended(69, 1)] * 21, ALL_DONE])
  done = there.up()
  assert done.returncode == 0, done.stderr
  assert there.calls() == [*INSTALL, "run", *END]
  assert "not all workers can be reached; starting again (1 of 10)" in done.stderr


def test_a_failed_installation_is_a_retry(cloud):
  there = cloud(queue=["ACTIVE"])
  (there.folder / "no_install").touch()
  done = there.up("--retries=1")
  assert done.returncode == 1 and "the installation failed" in done.stderr
  assert there.calls() == [*["copy", "unpack", "install"] * 2, *END]


def test_no_answer_at_all_costs_nothing(cloud):
  there = cloud(queue=["UNREACHABLE"])
  done = there.up()
  assert done.returncode == 1 and there.calls() == []
  assert "ERROR: no network" in done.stderr and "gcloud cannot be asked" in done.stderr


def test_nothing_is_requested_for_a_run_that_would_not_start(cloud):
  there = cloud(queue=["ABSENT"])
  (there.folder / "verdict").write_text("2")
  done = there.up()
  assert done.returncode == 2 and there.calls() == []
  assert there.up("--no-check").returncode == 1  # an ABSENT slice that never comes
  assert "create" in there.calls()


def test_a_check_wants_a_python_that_can_check(cloud):
  there = cloud(queue=["ABSENT"])
  executable(there.folder / "python3", "#!/bin/sh\nexit 1\n")
  done = there.up()
  assert done.returncode == 2 and there.calls() == []
  assert "PYTHON=python3 cannot import JAX" in done.stderr and "--no-check" in done.stderr


def test_check_asks_what_a_run_on_such_slices_would_say():
  """The real command: 256 devices are no 2 x 64."""
  flags = [*PLACE, *WHAT, "--accelerator-type=v5litepod-128", "--slices=2"]
  done = run("check", *flags, "--", "--config.mesh.fsdp=64", PYTHON=sys.executable)
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert "--config.mesh.slice=2" in last and "number of devices, got 256" in last


def test_two_slices_are_one_run(cloud):
  """Both are waited for, installed and watched; the run is told how many there are."""
  there = cloud(
    queue=["ABSENT", "ABSENT", "ACTIVE"],
    node=["READY", "CREATING", "READY"],
    run=[NONE, NONE, RUNNING, RUNNING, DONE, RUNNING, DONE],
  )
  there.checked = "2xv5litepod-256"
  done = there.up("--slices=2")
  assert done.returncode == 0, done.stderr
  calls = there.calls()
  for word in (*INSTALL, "run", "copy logs"):
    assert calls.count(word) == 2, word
  assert calls.count("create") == calls.count("delete") == 1
  assert "second slice" in calls
  assert "--config.mesh.slice=2" in done.stderr and "gpt3-1" in done.stderr


# --- the other commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "queue, node, states, expected",
  [
    ("ACTIVE", "READY", RUNNING, "slice gpt3: READY\nrun: running\n  w-0 running\n"),
    ("ACTIVE", "READY", DONE, "slice gpt3: READY\nrun: ended, exit code 0\n  w-0 ended 0\n"),
    (
      *("ACTIVE", "READY", f"{DONE};{ended(75, 1)}"),
      "slice gpt3: READY\nrun: ended, exit code 75 (told to stop, and saved)\n  w-0 ended 0\n  w-1 ended 75\n",
    ),
    (
      *("ACTIVE", "READY", NONE),
      "slice gpt3: READY\nrun: not started on every worker\n  w-0 absent\n",
    ),
    ("ACTIVE", "PREEMPTED", RUNNING, "slice gpt3: PREEMPTED\n"),
    ("ACTIVE", "ABSENT", RUNNING, "slice gpt3: GONE\n"),
    ("SUSPENDED", "READY", RUNNING, "slice gpt3: SUSPENDED\n"),
    ("ABSENT", "READY", RUNNING, "slice gpt3: ABSENT\n"),
  ],
)
def test_status(cloud, queue, node, states, expected):
  there = cloud([queue], [node], [states])
  done = run("status", *PLACE, path=there.folder)
  assert (done.returncode, done.stdout) == (0, expected)


def test_create_says_why_it_failed(cloud):
  there = cloud(["FAILED"])
  flags = [*PLACE, "--accelerator-type=v5p-512", "--poll=0"]
  done = run("create", *flags, path=there.folder)
  assert done.returncode == 1 and "the slice is FAILED" in done.stderr


def test_what_is_copied(cloud, tmp_path):
  """The checkout without its history, runs, environments, weights and the file of variables."""
  there = cloud(["ACTIVE"])
  source = tmp_path / "source"
  for name in (
    *("setup.cfg", "configs/ppo.py", "instructjax/main.py"),
    *(".git/HEAD", ".venv/bin/python", "runs/demo/done.json", "a.egg-info/x", "base.gguf"),
    "benchmarks/peers/.venv-trl/bin/python",
    *("configs/__pycache__/ppo.pyc", "secrets/a.env"),
    "planner/lib/python3.12/site-packages/jax/version.py",
  ):
    executable(source / name, "")
  flags = [*PLACE, *WHAT, f"--source={source}", f"--env-file={source}/secrets/a.env"]
  done = run("install", *flags, path=there.folder, TMPDIR=str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert there.calls() == INSTALL
  with tarfile.open(tmp_path / "instructjax-gpt3.tar.gz") as archive:
    files = sorted(member.name for member in archive if member.isfile())
  assert files == ["./configs/ppo.py", "./instructjax/main.py", "./setup.cfg"]


def test_flags_reach_the_program_unchanged(tmp_path):
  """The command for the workers, run here as a worker would, with systemd's part played by stubs."""
  flags = ["--config.data.documents=jsonl:it's a $HOME.jsonl", '--x="`true`"', "--y=\\ \t%n"]
  where, home = tmp_path / "bin", tmp_path / "home"
  executable(where / "gcloud", '#!/bin/bash\ncommand=${!#}\nexec bash -c "${command#--command=}"\n')
  executable(where / "sudo", '#!/bin/sh\nexec "$@"\n')
  executable(where / "systemctl", "#!/bin/sh\n[ $1 != show ] || echo $STATE\n")
  executable(where / "systemd-run", '#!/bin/sh\nfor last; do :; done\nexec bash "$last"\n')
  executable(home / "venv/bin/python", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
  started = lambda state: run(
    *("run", *PLACE, *WHAT, "--", *flags), path=where, HOME=str(home), STATE=state
  )
  done = started("exited")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "-u", "-m", "instructjax.main",
    "--config=configs/ppo_ptx.py:gpt3_1p3b", "--workdir=/mnt/bucket/gpt3", *flags,
  ]  # fmt: skip
  again = started("running")
  assert again.returncode == 1 and "it runs already" in again.stderr


@pytest.mark.parametrize("keeps_mode", [False, True])
def test_nobody_else_on_a_worker_can_read_the_variables(tmp_path, keeps_mode):
  """The commands for the workers, run here, with an scp that keeps the mode of the file here or does not."""
  where, home, variables = tmp_path / "bin", tmp_path / "home", tmp_path / "a.env"
  variables.write_text("KEY=value\n")
  variables.chmod(0o644)
  home.mkdir()
  copy = f'{{ stat -c %a "$HOME/instructjax.env"; cp {"-p" if keeps_mode else ""} "$5" "$HOME/${{6#*:}}"; exit; }}'
  executable(
    where / "gcloud",
    f'#!/bin/bash\n[ "$4" != scp ] || {copy}\ncommand=${{!#}}\nexec bash -c "${{command#--command=}}"\n',
  )
  executable(where / "sudo", '#!/bin/sh\nexec "$@"\n')
  executable(where / "systemctl", "#!/bin/sh\n")
  executable(where / "systemd-run", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
  done = run("run", *PLACE, *WHAT, f"--env-file={variables}", path=where, HOME=str(home))
  assert done.returncode == 0, done.stderr
  before, *words = done.stdout.splitlines()
  there = home / "instructjax.env"
  assert f"--property=EnvironmentFile={there}" in words
  assert before == "600" and there.stat().st_mode & 0o777 == 0o600
  assert there.read_text() == "KEY=value\n"


@pytest.mark.parametrize("source", [str(ROOT), "https://example.org/x.git#v1"])
def test_the_files_of_a_run_under_way_stay(tmp_path, source):
  """The commands for the workers, run here while systemd's stand-in says that the run is under way."""
  where, home = tmp_path / "bin", tmp_path / "home"
  ssh = 'case "$*" in *" scp "*) exit;; esac\nexec bash -c "${command#--command=}"\n'
  executable(where / "gcloud", "#!/bin/bash\ncommand=${!#}\n" + ssh)
  executable(where / "systemctl", "#!/bin/sh\necho running\n")
  for program in ("tar", "git"):
    executable(where / program, "#!/bin/sh\n")
  executable(home / "instructjax/setup.cfg", "")
  flags = [*PLACE, *WHAT, f"--source={source}"]
  done = run("install", *flags, path=where, HOME=str(home), TMPDIR=str(tmp_path))
  assert done.returncode == 1 and "it runs already" in done.stderr
  assert (home / "instructjax/setup.cfg").exists()


# --- on a worker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
  """worker(*arguments): runs tpu_worker.sh with stand-ins that note their calls; .calls() is what they were."""
  bin, home = tmp_path / "bin", tmp_path / "home"
  note = f'echo "$(basename "$0") $*" >>{tmp_path}/calls\n'
  for name in ("systemctl", "systemd-run", "apt-get", "mkdir", "chown", "umount"):
    executable(bin / name, "#!/bin/sh\n" + note)
  executable(bin / "tee", "#!/bin/sh\ncat >/dev/null\n")
  executable(bin / "sudo", '#!/bin/sh\nexec "$@"\n')
  executable(bin / "curl", "#!/bin/sh\n")  # uv's installer is empty
  executable(bin / "lsb_release", "#!/bin/sh\necho jammy\n")
  executable(bin / "mountpoint", "#!/bin/sh\nexit 1\n")
  executable(home / ".local/bin/uv", "#!/bin/sh\n" + note)

  def call(*arguments):
    path = os.pathsep.join([str(bin), os.environ["PATH"]])
    environ = os.environ | {"PATH": path, "HOME": str(home), "PAUSE": "0"}
    return subprocess.run(
      ["bash", str(WORKER), *arguments], capture_output=True, text=True, env=environ, timeout=60
    )

  call.bin, call.calls = bin, lambda: (tmp_path / "calls").read_text().splitlines()
  call.note, call.home = note, home
  return call


def test_a_worker_installs_from_the_lock_file(worker):
  executable(worker.bin / "gcsfuse", "#!/bin/sh\n")
  assert worker("install", "tpu,hub").returncode == 0
  python = worker.home / "venv/bin/python"
  assert worker.calls() == [
    f"uv venv --quiet --clear --python=3.12 {worker.home}/venv",
    f"uv pip install --quiet --python={python} --constraints={ROOT}/constraints/lock.txt {ROOT}[tpu,hub]",
  ]


def test_a_worker_installs_gcsfuse_until_apt_lets_it(worker):
  """apt is locked twice, then brings the program."""
  executable(
    worker.bin / "apt-get",
    f"#!/bin/sh\n{worker.note}[ $(grep -c apt-get {worker.bin.parent}/calls) -gt 2 ] || exit 100\n"
    f'case "$*" in *install*) cp "$0" {worker.bin}/gcsfuse;; esac\n',
  )
  assert worker("install", "tpu").returncode == 0
  tried = [call for call in worker.calls() if call.startswith("apt-get")]
  assert tried == [
    *["apt-get -qq update"] * 3,
    "apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse",
  ]


def test_a_worker_without_gcsfuse_says_so_by_its_code(worker):
  executable(worker.bin / "apt-get", f"#!/bin/sh\n{worker.note}exit 100\n")
  assert worker("install", "tpu").returncode == 1
  assert sum(call.startswith("apt-get") for call in worker.calls()) == 6


def test_a_worker_mounts_the_bucket_once(worker):
  executable(worker.bin / "gcsfuse", "#!/bin/sh\n")
  assert worker("mount", "my-bucket").returncode == 0
  *_, mount = worker.calls()
  assert mount.startswith("systemd-run --quiet --unit=instructjax-bucket-my-bucket.service --uid=")
  assert mount.endswith(" --rename-dir-limit=100000 my-bucket /mnt/my-bucket")
  assert f"{worker.bin}/gcsfuse --implicit-dirs" in mount
  before = len(worker.calls())
  executable(worker.bin / "mountpoint", "#!/bin/sh\nexit 0\n")
  assert worker("mount", "my-bucket").returncode == 0 and len(worker.calls()) == before


@pytest.fixture
def mounts(worker):
  """A worker whose stand-ins know what is mounted and which units are loaded; a folder of files for each."""
  known = worker.bin.parent
  for name in ("mounted", "dead", "units"):
    (known / name).mkdir()
  executable(worker.bin / "gcsfuse", "#!/bin/sh\n")
  last = '#!/bin/bash\nname=$(basename "${!#}")\n'
  executable(worker.bin / "mountpoint", f'{last}[ -e {known}/mounted/"$name" ]\n')
  executable(worker.bin / "mkdir", f'{last}[ ! -e {known}/dead/"$name" ]\n')
  executable(worker.bin / "umount", f'{last}rm {known}/dead/"$name"\n')
  executable(
    worker.bin / "systemctl",
    f'{last}[ "$1" != stop ] || rm {known}/units/"$name"\n',
  )
  executable(
    worker.bin / "systemd-run",
    f"{last}unit=$(grep -o 'unit=[^ ]*' <<<\"$*\")\n"
    f'set -C && : >{known}/units/"${{unit#unit=}}" && : >{known}/mounted/"$name"\n',
  )
  worker.known = known
  return worker


def test_a_worker_mounts_again_after_gcsfuse_has_died(mounts):
  """The folder is then no mountpoint, as it cannot be looked at, and cannot be made either."""
  assert mounts("mount", "my-bucket").returncode == 0
  (mounts.known / "mounted/my-bucket").rename(mounts.known / "dead/my-bucket")
  done = mounts("mount", "my-bucket")
  assert done.returncode == 0, done.stderr
  assert (mounts.known / "mounted/my-bucket").exists()


def test_a_worker_mounts_several_buckets(mounts):
  for bucket in ("a.service", "b"):
    done = mounts("mount", bucket)
    assert done.returncode == 0, done.stderr
  units = {path.name for path in (mounts.known / "units").iterdir()}
  assert units == {"instructjax-bucket-a.service.service", "instructjax-bucket-b.service"}


def test_the_run_requires_the_unit_that_the_worker_mounts(mounts):
  assert mounts("mount", "bucket").returncode == 0
  (unit,) = (path.name for path in (mounts.known / "units").iterdir())
  done = run("run", *PLACE, *WHAT, "--dry-run")
  for name in ("Requires", "After"):
    assert f" --property={name}={unit} " in done.stdout


@pytest.mark.parametrize("arguments", [(), ("install",), ("mount", "a", "b"), ("run", "a")])
def test_a_worker_is_told_what_to_do(worker, arguments):
  done = worker(*arguments)
  assert done.returncode == 2 and done.stderr.startswith("usage: ")
