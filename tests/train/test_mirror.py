"""A local folder and a bucket stay the same, whatever is lost in between. The bucket is fsspec's memory."""

import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from instructjax.core.errors import Preempted, UserError, Waiting
from instructjax.train import metrics, mirror, mirrored_files
from tests import micro, quick

_NUMBER = itertools.count()


@pytest.fixture
def bucket(monkeypatch):
  """make(folder) -> the mirror of that folder in one bucket, without its thread; and the bucket as {path: text}."""
  fs, root = fsspec.core.url_to_fs(f"memory://bucket{next(_NUMBER)}/run")
  monkeypatch.setattr(mirror, "PERIOD", 3600.0)
  monkeypatch.setattr(mirror.terminal, "say", lambda line: None)

  def objects():
    return {
      name.split("/run/")[1]: fs.cat_file(name).decode()
      for name in fs.find(root)
      if not name.endswith(mirrored_files.OWNER)
    }

  return lambda folder: mirror.Mirror(fs, root, "gs://b/run", folder), objects, fs


def write(folder, **files):
  for name, text in files.items():
    path = folder / name.replace("__", "/").replace("_JSON", ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(folder, step, *, whole=True):
  write(folder / "sft" / "checkpoints" / str(step), state__d=f"weights of {step}")
  if whole:
    write(folder / "sft" / "checkpoints" / str(step), manifest_JSON=f"manifest of {step}")


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_text()
    for path in folder.rglob("*")
    if path.is_file() and path.name != ".mirrored.json"
  }


def test_another_machine_goes_on_from_the_bucket(tmp_path, bucket):
  make, objects, _ = bucket
  with make(tmp_path / "a"):
    write(tmp_path / "a", sft__metrics="1\n", cache__tokens__x="ids", compiled__x="program")
    save(tmp_path / "a", 5)
    save(tmp_path / "a", 6, whole=False)  # being written
    write(tmp_path / "a", sft__done_JSON="done")
  expected = {
    "sft/metrics": "1\n",
    "sft/done.json": "done",
    "sft/checkpoints/5/state/d": "weights of 5",
    "sft/checkpoints/5/manifest.json": "manifest of 5",
  }
  assert objects() == expected, "neither caches nor half a checkpoint"
  with make(tmp_path / "b"):
    assert files(tmp_path / "b") == expected
    write(tmp_path / "b", sft__metrics="1\n2\n")
  assert objects() == expected | {"sft/metrics": "1\n2\n"}


class Lost(Exception):
  pass


def at_step_10(make, folder):
  """A mirror in use, whose bucket has step 5; the folder has step 10 in its place, and the stage is done."""
  with make(folder):
    save(folder, 5)
  one = make(folder).__enter__()
  save(folder, 10)
  shutil.rmtree(folder / "sft" / "checkpoints" / "5")
  write(folder, sft__metrics="10\n", sft__done_JSON="done")
  return one


@pytest.mark.parametrize("after", range(9))
def test_whenever_a_machine_is_lost_the_bucket_can_be_gone_on_from(
  tmp_path, bucket, after, monkeypatch
):
  """The old checkpoint or the new one is whole there, and done.json only with all that was before it."""
  make, objects, fs = bucket
  one = at_step_10(make, tmp_path / "a")
  is_lost = lose(one, fs, after, monkeypatch)
  assert is_lost == (after < 6), "four files come and two go"
  found = objects()
  whole = [
    step
    for step in (5, 10)
    if {f"sft/checkpoints/{step}/state/d", f"sft/checkpoints/{step}/manifest.json"} <= {*found}
  ]
  assert whole
  for step in (5, 10):
    assert step in whole or f"sft/checkpoints/{step}/manifest.json" not in found
  if "sft/done.json" in found:
    assert 10 in whole and found["sft/metrics"] == "10\n"
  with make(tmp_path / "b"):
    pulled = files(tmp_path / "b")
    assert all(f"sft/checkpoints/{step}/state/d" in pulled for step in whole)
    steps = {int(name.split("/")[2]) for name in pulled if "/checkpoints/" in name}
    assert steps == {*whole}


def test_a_checkpoint_that_is_deleted_meanwhile_holds_up_nothing_else(
  tmp_path, bucket, monkeypatch
):
  make, objects, fs = bucket
  with make(tmp_path / "a") as one:
    save(tmp_path / "a", 5)
    save(tmp_path / "a", 10)
    write(tmp_path / "a", sft__metrics="10\n")
    put_file = fs.put_file

    def put(local, remote):
      if "/5/state/" in local:  # the run deletes its oldest checkpoint just now, files first
        (tmp_path / "a" / "sft" / "checkpoints" / "5" / "state" / "d").unlink()
      put_file(local, remote)

    monkeypatch.setattr(fs, "put_file", put)
    one.push()
    found = objects()
    assert found.keys() == {
      "sft/metrics",
      "sft/checkpoints/10/state/d",
      "sft/checkpoints/10/manifest.json",
    }
    shutil.rmtree(tmp_path / "a" / "sft" / "checkpoints" / "5")
    monkeypatch.undo()
    monkeypatch.setattr(mirror.terminal, "say", lambda line: None)


def test_a_checkpoint_that_was_put_aside_stays_here(tmp_path, bucket):
  make, objects, _ = bucket
  checkpoints = tmp_path / "a" / "sft" / "checkpoints"
  with make(tmp_path / "a") as one:
    save(tmp_path / "a", 5)
    save(tmp_path / "a", 10)
    one.push()
    (checkpoints / "10").rename(checkpoints / "10.damaged")
  assert objects().keys() == {"sft/checkpoints/5/state/d", "sft/checkpoints/5/manifest.json"}
  with make(tmp_path / "a"):
    assert (checkpoints / "10.damaged").is_dir()


def test_a_machine_keeps_what_it_had_not_copied(tmp_path, bucket):
  make, objects, _ = bucket
  with make(tmp_path / "a"):
    save(tmp_path / "a", 5)
  save(tmp_path / "a", 10)  # killed before it was copied
  with make(tmp_path / "a"):
    assert "sft/checkpoints/10/state/d" in files(tmp_path / "a")
  assert "sft/checkpoints/10/manifest.json" in objects()


def test_the_bucket_counts_where_both_have_gone_on(tmp_path, bucket):
  make, objects, _ = bucket
  with make(tmp_path / "a"):
    write(tmp_path / "a", sft__metrics="1\n")
  write(tmp_path / "a", sft__metrics="1\n2a\n", cache__x="kept")
  with make(tmp_path / "b"):
    write(tmp_path / "b", sft__metrics="1\n2b\n")
  with make(tmp_path / "a"):
    assert files(tmp_path / "a") == {"sft/metrics": "1\n2b\n", "cache/x": "kept"}
  assert objects() == {"sft/metrics": "1\n2b\n"}


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path, bucket):
  make, objects, _ = bucket
  with pytest.raises(UserError, match=r"taken over by another run \(.*process \d+ on "):
    with make(tmp_path / "a"):
      with make(tmp_path / "b"):
        write(tmp_path / "b", y="2")
      write(tmp_path / "a", y="other")
  assert objects() == {"y": "2"}


def test_an_error_of_the_bucket_is_one_line(tmp_path, bucket, monkeypatch):
  make, _, fs = bucket
  one = make(tmp_path / "a")
  monkeypatch.setattr(fs, "find", lambda *_, **__: (_ for _ in ()).throw(PermissionError("403\nx")))
  with pytest.raises(UserError, match="gs://b/run cannot be read: PermissionError: 403. The buc"):
    one.__enter__()


def test_a_mistake_is_told_before_the_last_copy(tmp_path, monkeypatch):
  """Else the word of another process, which met it too, would end this one within the copy."""
  told = []

  class Bucket:
    def __enter__(self):
      return self

    def __exit__(self, *error):
      told.append("copied")

  monkeypatch.setattr(mirror, "open_bucket", lambda url, folder: Bucket())
  monkeypatch.setattr(mirror.distributed, "tell_mistake", told.append)
  with pytest.raises(UserError, match="kl is 7"), mirror.mirrored("gs://b/d", tmp_path):
    raise UserError("kl is 7")
  assert told == ["kl is 7", "copied"]
  told.clear()
  with pytest.raises(UserError, match="cannot write"), mirror.mirrored("gs://b/d", tmp_path):
    raise UserError("cannot write a") from OSError(107, "Transport endpoint is not connected")
  assert told == ["copied"]  # the others are not to end with a mistake


@pytest.mark.parametrize("name", ["sft/../../x", "sft//x", "/x", "./x", "a\nb"])
def test_an_object_of_a_hostile_name_is_refused(tmp_path, bucket, name, monkeypatch):
  make, _, fs = bucket
  one = make(tmp_path / "a")
  info = {"size": 1, "created": 1.0}
  monkeypatch.setattr(fs, "find", lambda *_, **__: {f"{one._root}/{name}": info})
  with pytest.raises(UserError, match="which is no run's"):
    one.__enter__()
  assert not (tmp_path / "x").exists() and json.dumps(files(tmp_path / "a")) == "{}"


def test_a_folder_with_other_files_is_left_alone(tmp_path, bucket):
  make, _, _ = bucket
  write(tmp_path / "a", thesis="years of work")
  with pytest.raises(UserError, match="holds other files than a copy of gs://b/run"):
    make(tmp_path / "a").__enter__()
  assert files(tmp_path / "a") == {"thesis": "years of work"}


def lose(one, fs, after, monkeypatch):
  """A push of which the machine is lost after so many writes."""
  left = itertools.count(after, -1)

  def counted(call):
    def maybe(*args, **kwargs):
      if next(left) <= 0:
        raise Lost
      return call(*args, **kwargs)

    return maybe

  with monkeypatch.context() as patch:
    patch.setattr(fs, "put_file", counted(fs.put_file))
    patch.setattr(fs, "rm_file", counted(fs.rm_file))
    patch.setattr(one, "_save_record", counted_saves(one))
    try:
      one.push()
    except Lost:
      return True
    finally:
      one._stop.set()
  return False


def counted_saves(one):
  """Only the first record of a push reaches the disk: a killed process writes no other."""
  save, number = one._save_record, itertools.count()
  return lambda: save() if next(number) == 0 else None


@pytest.mark.parametrize("after", range(7))
def test_a_machine_that_is_killed_while_it_copies_keeps_what_it_has(
  tmp_path, bucket, after, monkeypatch
):
  """Its own half of a copy is no sign that another machine has gone on."""
  make, objects, fs = bucket
  one = at_step_10(make, tmp_path / "a")
  lose(one, fs, after, monkeypatch)
  mine = files(tmp_path / "a")
  with make(tmp_path / "a"):
    assert files(tmp_path / "a") == mine
  assert objects() == mine


def test_a_machine_that_is_killed_before_its_first_copy_keeps_what_it_has(tmp_path, bucket):
  make, objects, _ = bucket
  make(tmp_path / "a").__enter__()._stop.set()
  save(tmp_path / "a", 5)
  with make(tmp_path / "a"):
    assert "sft/checkpoints/5/state/d" in files(tmp_path / "a")
  assert "sft/checkpoints/5/manifest.json" in objects()


def test_a_machine_that_is_killed_while_it_is_copied_to_begins_that_again(
  tmp_path, bucket, monkeypatch
):
  make, _, fs = bucket
  with make(tmp_path / "a"):
    save(tmp_path / "a", 5)
  get_file, left = fs.get_file, itertools.count(1, -1)

  def get(*args):
    if next(left) <= 0:
      raise KeyboardInterrupt
    get_file(*args)

  with monkeypatch.context() as patch:
    patch.setattr(fs, "get_file", get)
    with pytest.raises(KeyboardInterrupt):
      make(tmp_path / "b").__enter__()
  with make(tmp_path / "b"):
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_what_a_lost_machine_had_half_copied_is_removed(tmp_path, bucket, monkeypatch):
  make, objects, fs = bucket
  with make(tmp_path / "a"):
    save(tmp_path / "a", 5)
  one = make(tmp_path / "a").__enter__()
  save(tmp_path / "a", 10)
  assert lose(one, fs, 1, monkeypatch) and "sft/checkpoints/10/state/d" in objects()
  with make(tmp_path / "b"):
    pass
  assert objects().keys() == {"sft/checkpoints/5/state/d", "sft/checkpoints/5/manifest.json"}


def test_a_local_folder_that_was_emptied_is_filled_again(tmp_path, bucket):
  """`rm -r FOLDER/*` leaves the hidden record; what it says was copied must not be deleted from the bucket."""
  make, objects, _ = bucket
  with make(tmp_path / "a"):
    save(tmp_path / "a", 5)
  before = objects()
  shutil.rmtree(tmp_path / "a" / "sft")
  with make(tmp_path / "a"):
    assert files(tmp_path / "a") == before
  assert objects() == before


def test_an_old_checkpoint_stays_while_the_new_one_is_lost(tmp_path, bucket, monkeypatch):
  """With keep=1 and a slow bucket, the checkpoint that is being copied goes when the next one is there."""
  make, objects, fs = bucket
  checkpoints = tmp_path / "a" / "sft" / "checkpoints"
  with make(tmp_path / "a") as one:
    save(tmp_path / "a", 5)
    one.push()
    save(tmp_path / "a", 10)
    shutil.rmtree(checkpoints / "5")
    put_file = fs.put_file

    def put(local, remote):
      if "/10/state/" in local:
        shutil.rmtree(checkpoints / "10")
        save(tmp_path / "a", 15)
      put_file(local, remote)

    with monkeypatch.context() as patch:
      patch.setattr(fs, "put_file", put)
      one.push()
    assert {"sft/checkpoints/5/state/d", "sft/checkpoints/5/manifest.json"} <= objects().keys()
  assert objects().keys() == {"sft/checkpoints/15/state/d", "sft/checkpoints/15/manifest.json"}


@pytest.mark.parametrize(
  ("error", "expected"), [(None, UserError), (Preempted("x"), Preempted), (Waiting("x"), Waiting)]
)
def test_a_last_copy_that_fails_is_told_and_leaves_a_stop_its_code(
  tmp_path, bucket, monkeypatch, error, expected
):
  make, _, fs = bucket
  said = []
  with pytest.raises(expected):
    with make(tmp_path / "a"):
      monkeypatch.setattr(mirror.terminal, "say", said.append)
      write(tmp_path / "a", y="1")
      monkeypatch.setattr(fs, "put_file", lambda *_: (_ for _ in ()).throw(OSError("503")))
      if error:
        raise error
  assert [line.partition(". The")[0] for line in said] == (
    ["gs://b/run cannot be written: OSError: 503"] if error else []
  )


def test_ctrl_c_copies_what_is_left_and_says_so(tmp_path, bucket, monkeypatch):
  make, objects, _ = bucket
  said = []
  with pytest.raises(KeyboardInterrupt), make(tmp_path / "a"):
    monkeypatch.setattr(mirror.terminal, "say", said.append)
    write(tmp_path / "a", y="1")
    raise KeyboardInterrupt
  assert said == ["copying what is left to gs://b/run; Ctrl-C again ends without"]
  assert objects() == {"y": "1"}


def test_a_run_that_was_taken_over_is_not_one_to_start_again(tmp_path, bucket):
  make, _, _ = bucket
  with pytest.raises(UserError, match="taken over"):
    with make(tmp_path / "a"):
      make(tmp_path / "b").__enter__()._stop.set()
      raise Preempted("told to stop")


def test_copies_beside_the_run_are_no_headway_of_the_run(tmp_path, bucket, monkeypatch):
  make, _, _ = bucket
  with make(tmp_path / "a") as one:
    told, places = [], []
    monkeypatch.setattr(mirror.distributed, "progress", lambda: told.append(1))
    monkeypatch.setattr(mirror.distributed, "at", lambda where, **how: places.append((where, how)))
    write(tmp_path / "a", x="1")
    one.push()
    assert not told
    write(tmp_path / "a", x="12")
  assert told, "the last copy is the run's own"
  assert places == [("copying to gs://b/run", {"save": True})], "after SIGTERM too"


def test_workdirs_do_not_lie_in_each_other(tmp_path, bucket):
  make, _, fs = bucket
  with make(tmp_path / "a") as one:
    inner = mirror.Mirror(fs, f"{one._root}/x", "gs://b/run/x", tmp_path / "b")
    with pytest.raises(
      UserError, match="gs://b/run/x lies in the workdir of another run, 'run'; give"
    ):
      inner.__enter__()
  fs.rm_file(f"{one._root}/{mirrored_files.OWNER}")
  with inner:
    pass
  with pytest.raises(
    UserError, match="gs://b/run holds the workdir of another run, 'x'; give each"
  ):
    make(tmp_path / "a").__enter__()


def test_an_account_need_not_see_what_is_above_its_folder(tmp_path, bucket, monkeypatch):
  make, _, fs = bucket
  monkeypatch.setattr(fs, "exists", lambda _: (_ for _ in ()).throw(PermissionError("403")))
  with make(tmp_path / "a"):
    pass


def test_objects_that_stand_for_folders_are_no_files(tmp_path, bucket, monkeypatch):
  make, _, fs = bucket
  one = make(tmp_path / "a")
  info = {"size": 0, "generation": "1"}
  monkeypatch.setattr(
    fs, "find", lambda *_, **__: {f"{one._root}/{name}": info for name in ("", "sft/")}
  )
  assert one._there() == {}


RUN = """
import sys
from instructjax.train import mirror
mirror.PERIOD = 0.5
from instructjax import main
from instructjax.commands import cli
cli.run(main.main, interrupted="")
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_machine_is_lost_goes_on_elsewhere(tmp_path, processes):
  """Killed by SIGKILL, its disk gone; the same command on another machine comes to the same numbers.

  Against a server of Cloud Storage's own protocol on this machine, through gcsfs.
  """
  pytest.importorskip("gcsfs")
  server_module = pytest.importorskip("gcp_storage_emulator.server")
  specs = micro.write_data(tmp_path / "data")
  config = tmp_path / "mine.py"
  config.write_text(
    "from tests import micro\ndef get_config(stage):\n"
    f"  config = micro.config_dict(stage, {specs!r})\n"
    "  config.pretrain.num_steps = 240\n"
    "  config.checkpoint.every_steps = 10\n  return config\n"
  )
  logging.disable(logging.CRITICAL)  # the server's own lines
  server = server_module.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
  server.start()
  port = server._api._httpd.socket.getsockname()[1]
  env = (
    os.environ
    | {
      "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask by gRPC what kind of bucket this is, for a minute
      "XLA_FLAGS": quick.FLAGS,
      "PYTHONWARNINGS": "",
    }
  )

  def start(workdir, *flags):
    pod = [sys.executable, "-m", "launch.local_pod", f"--processes={processes}", "--"]
    command = [sys.executable, "-c", RUN, f"--config={config}:sft", f"--workdir={workdir}", *flags]
    command = [*(pod if processes > 1 else ()), *command]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

  def end(run):
    said = run.communicate(timeout=300)[0].decode()
    assert run.returncode == 0, said
    return said

  def numbers(workdir):
    return {
      stage: [
        {name: value for name, value in row.items() if not name.startswith(metrics.MEASURED)}
        for row in metrics.read_metrics(workdir / stage)
      ]
      for stage in ("pretrain", "sft")
    }

  try:
    end(start(tmp_path / "alone"))
    url = "gs://bucket/runs/demo"
    run = start(url, f"--scratch={tmp_path / 'lost'}")
    mirrored = tmp_path / "lost" / ".mirrored.json"

    def is_saved():
      rows = json.loads(mirrored.read_text())["files"] if mirrored.is_file() else {}
      return any(name.endswith("/manifest.json") and row[2] for name, row in rows.items())

    while not is_saved():
      assert run.poll() is None, run.communicate()[0].decode()
      time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    shutil.rmtree(tmp_path / "lost")
    said = end(start(url, f"--scratch={tmp_path / 'elsewhere'}"))
    assert "going on after step" in said and f"workdir {url}: this machine works in" in said
  finally:
    server.stop()
    logging.disable(logging.NOTSET)
  found, expected = numbers(tmp_path / "elsewhere"), numbers(tmp_path / "alone")
  for stage, rows in expected.items():
    assert [row["step"] for row in found[stage]] == [row["step"] for row in rows]
    other = [pair for pair in zip(found[stage], rows) if pair[0] != pair[1]]
    assert not other, (stage, other)
  rows = metrics.read_metrics(tmp_path / "elsewhere" / "pretrain")
  assert any("seconds/redone" in row or "seconds/restore" in row for row in rows)
