"""Sums of a checkpoint's files: each process sums what it wrote, and the manifest is that of one process."""

import collections
import threading

import pytest

from instructjax.train import manifest, shared_sums
from instructjax.train.shared_sums import SharedSums
from tests.parallel.store import teams

NAMES = [
  "meta/metadata",
  "state/d/0",
  "state/ocdbt.process_0/d/1",
  "state/ocdbt.process_1/d/2",
  "state/ocdbt.process_1/d/3",
  "state/ocdbt.process_12/d/4",
]


@pytest.fixture
def folder(tmp_path):
  for name in NAMES:
    path = tmp_path / "7.tmp" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  return tmp_path / "7.tmp"


@pytest.fixture
def read(monkeypatch):
  """Thread -> names that it summed."""
  found = collections.defaultdict(list)
  sums = manifest.sums

  def spy(folder, names):
    found[threading.current_thread().name].extend(names)
    return sums(folder, names)

  monkeypatch.setattr(manifest, "sums", spy)
  return found


def shared(folders) -> list[SharedSums]:
  return [SharedSums(team, folder) for team, folder in zip(teams(len(folders)), folders)]


@pytest.fixture
def same_place(monkeypatch):
  """All that are made have one place in the store, as in processes that each count for themselves."""
  monkeypatch.setattr(shared_sums, "_opened", iter([1] * 8))


@pytest.mark.usefixtures("same_place")
def test_each_sums_what_it_wrote(folder, read):
  processes = shared([folder.parent] * 3)
  for process in processes:
    process.expect()
  processes[1]._thread.name = "process 1"
  manifest.write(folder, processes[0].of)
  for process in processes:
    process.close()
  # Nobody is process 12 of 3: process 0 takes its files.
  assert read == {
    "MainThread": [NAMES[0], NAMES[1], NAMES[2], NAMES[5]],
    "process 1": NAMES[3:5],
  }
  together = (folder / manifest.NAME).read_text()
  (folder / manifest.NAME).unlink()
  manifest.write(folder)
  assert (folder / manifest.NAME).read_text() == together


@pytest.mark.usefixtures("same_place")
def test_save_by_save(folder, read):
  processes = shared([folder.parent] * 2)
  for number in range(1, 4):
    for process in processes:
      process.expect()
    changed = folder / NAMES[3]
    changed.write_text(f"save {number}")
    assert processes[0].of(folder, NAMES) == manifest.sums(folder, NAMES)
  assert len(read["sums"]) == 3 * 2
  for process in processes:
    process.close()


@pytest.mark.usefixtures("same_place")
def test_what_another_process_cannot_read_process_0_does(folder, read, tmp_path):
  processes = shared([folder.parent, tmp_path / "elsewhere"])
  for process in processes:
    process.expect()
  assert processes[0].of(folder, NAMES) == manifest.sums(folder, NAMES)
  for process in processes:
    process.close()


@pytest.mark.usefixtures("same_place")
def test_a_process_that_does_not_answer_is_not_waited_for(folder, read, monkeypatch):
  monkeypatch.setattr(shared_sums, "_LEAST_PATIENCE", 0.1)
  first, _ = shared([folder.parent] * 2)
  first.expect()
  assert first.of(folder, NAMES) == manifest.sums(folder, NAMES)
  assert set(read) == {"MainThread"}


@pytest.mark.usefixtures("same_place")
def test_a_process_that_has_missed_a_save_goes_on(folder):
  """It wrote nothing, so nobody waited for its answer."""
  names = [name for name in NAMES if "process_1/" not in name]
  first, second = shared([folder.parent] * 2)
  for process in (first, second):
    process.expect()
  first.of(folder, names)
  for process in (first, second):
    process.expect()
  assert first.of(folder, NAMES) == manifest.sums(folder, NAMES)
  second.close()
  assert second._thread is None


@pytest.mark.usefixtures("same_place")
def test_a_file_that_is_gone_is_an_error(folder):
  processes = shared([folder.parent] * 2)
  for process in processes:
    process.expect()
  (folder / NAMES[3]).unlink()
  with pytest.raises(FileNotFoundError):
    processes[0].of(folder, NAMES)
  for process in processes:
    process.close()


def test_one_process_sums_alone(folder):
  alone = SharedSums(None, folder.parent)
  alone.expect()
  assert alone.of(folder, NAMES) == manifest.sums(folder, NAMES)
  alone.close()
