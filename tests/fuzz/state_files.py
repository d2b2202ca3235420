"""Damaged files of a run's own folders: what a stage left, checkpoints, metrics and caches; and what reads them.

A damaged file must be refused, mended or passed over. What is read all the same must be what was written.
"""

import functools
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compilation_cache

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.data import checksums, token_cache
from instructjax.data.token_store import Encoded
from instructjax.parallel import compiled
from instructjax.train import damaged, finished, manifest, metrics, saved_state
from tests.fuzz import mutants
from tests.fuzz.mutants import Files

KEYS = (
  *("stage", "step", "fingerprint", "result", "provenance", "crc32", "checksum", "files", "check"),
  *("header", "sizes", "arrays", "crcs", "dtype", "metrics", "changeable", "loss", "", "\x1b[31m"),
)
_RECORDS = [{"step": step, "loss": 2.5 - step / 10, "kl": 0.0} for step in range(1, 6)]
_DOCUMENTS = [[2 + (i * j) % 40 for j in range(1 + i % 7)] for i in range(12)]
_VOCAB = 50
_LENGTH = 8  # of packed rows
_DATA = "data.txt"


def mutate(rng: random.Random, valid: bytes, name: str) -> bytes:
  """A mutant of a file, of the kind that its name says."""
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    if name.endswith((".json", "metadata")) and rng.random() < 0.6:
      valid = mutants.json_text(rng, valid, KEYS)
    elif name.endswith(".jsonl") and rng.random() < 0.6:
      lines = valid.splitlines(keepends=True) or [b"{}\n"]
      at = rng.randrange(len(lines))
      lines[at] = mutants.json_text(rng, lines[at], KEYS) + rng.choice((b"\n", b"\n", b""))
      valid = b"".join(lines)
    else:
      valid = mutants.damaged(rng, valid)
  return valid


def mutants_of(make: Callable[[], Files]) -> Callable[[random.Random], Iterator[tuple[str, Files]]]:
  """What yields the files of `make`, one of them damaged or missing, without end."""

  def cases(rng: random.Random) -> Iterator[tuple[str, Files]]:
    while True:
      files = dict(make())
      name = rng.choice(list(files))
      if rng.random() < 0.05:
        del files[name]
      else:
        files[name] = mutate(rng, files[name], name)
      yield name, files

  return cases


def _files(folder: pathlib.Path) -> Files:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def _made(write: Callable[[pathlib.Path], object]) -> Files:
  """The files that a function writes into a folder."""
  with tempfile.TemporaryDirectory() as scratch:
    write(pathlib.Path(scratch))
    return _files(pathlib.Path(scratch))


# --- done.json ------------------------------------------------------------------------------------


def _done() -> finished.Done:
  epochs = (results.Epoch(step=3, validation_loss=0.5, pretrain_loss=2.0),)
  made_with = {"config.seed": "0", "config.sft": '{"lr": 1e-05}', "data": "c" * 64}
  return finished.Done("sft", made_with, 3, results.Tuned(epochs))


@functools.cache
def done_files() -> Files:
  """A finished stage's mark."""
  return _made(lambda folder: finished.write_done(folder, _done()))


def read_done(folder: pathlib.Path):
  """Reads it as later stages do.

  Raises:
    UserError: it is refused.
    AssertionError: another content was taken.
  """
  done = finished.read_done(folder)
  assert done is None or done == _done(), f"read as {done}"
  finished.require_done(folder)


# --- checkpoints ----------------------------------------------------------------------------------


@functools.cache
def checkpoint_files() -> Files:
  """The small files of two checkpoints, with files in the place of arrays, and their manifests."""

  def write(folder: pathlib.Path):
    for step in (3, 6):
      of_step = folder / damaged.FOLDER / str(step)
      made_with = {"config": "c" * 64, "data": "d" * 64}
      meta = {"step": step, "metrics": {"loss": 1.0 / step}, "fingerprint": made_with}
      mutants.write(
        of_step,
        {damaged.META: json.dumps(meta | {"changeable": {}}).encode(), "state/d/a": bytes(300)},
      )
      manifest.write(of_step)

  return _made(write)


def read_checkpoints(folder: pathlib.Path):
  """Looks for checkpoints, the best of them, and the newest to go on from.

  Raises:
    UserError: none is left.
    AssertionError: one is taken whose files are others than were saved.
  """
  saved = checkpoint_files()
  for step in damaged.saved_steps(folder):
    try:
      meta = saved_state.read_meta(folder, step)
    except UserError:
      continue
    assert meta == json.loads(saved[f"{damaged.FOLDER}/{step}/{damaged.META}"])
  damaged.put_aside(folder)
  best, loss = saved_state.best_step(folder, "loss")
  assert loss == 1.0 / best
  newest = damaged.saved_steps(folder)[-1]
  found = _files(folder / damaged.FOLDER / str(newest))
  for name, content in found.items():
    # Files beside those of the manifest do no harm.
    if name not in (manifest.NAME, "x"):
      assert content == saved[f"{damaged.FOLDER}/{newest}/{name}"], f"{name} of step {newest}"


# --- metrics.jsonl --------------------------------------------------------------------------------


@functools.cache
def metric_files() -> Files:
  """The metrics of five steps."""
  lines = "".join(json.dumps(record) + "\n" for record in _RECORDS)
  return {"metrics.jsonl": lines.encode()}


def read_metrics(folder: pathlib.Path):
  """Reads them for the report, and goes on after step 3.

  Raises:
    AssertionError: what is no number is among them, or a line of a step to come stays.
  """
  for record in metrics.read_metrics(folder):
    assert all(np.isfinite(float(value)) for value in record.values()), record
  writer = metrics.MetricsWriter(folder, start_step=3)
  writer.write(4, {"loss": 1.0})
  writer.close()
  records = metrics.read_metrics(folder)
  assert records[-1] == {"step": 4, "loss": 1.0}
  assert all(record["step"] <= 3 for record in records[:-1])


# --- caches ---------------------------------------------------------------------------------------


def _no_progress():
  """For the watchdog of a run, of which there is none."""


@functools.cache
def checksum_files() -> Files:
  """A file of data and the memory of its checksum."""

  def write(folder: pathlib.Path):
    (folder / _DATA).write_bytes(b"Once upon a time\n" * 9)
    checksums.FileChecksums(folder / "checksums.json", _no_progress).content(
      "jsonl:", [folder / _DATA]
    )

  return _made(write)


def read_checksums(folder: pathlib.Path):
  """Asks for the checksum of the data, with a memory that may be damaged.

  Raises:
    AssertionError: it is another file's.
  """
  path, expected = folder / _DATA, checksums.hashlib.sha256()
  if not path.exists():
    raise UserError(f"{path} is missing")
  expected.update(path.read_bytes())
  for _ in range(2):
    found = checksums.FileChecksums(folder / "checksums.json", _no_progress).content(
      "jsonl:", [path]
    )
    assert found.digests == (expected.hexdigest(),)


def _cached(root: pathlib.Path) -> token_cache.CachedTokens:
  tokenize = lambda: token_cache.Tokenized(
    map(Encoded, _DOCUMENTS), len(_DOCUMENTS), {"long": [2, "a.jsonl:3"]}
  )
  return token_cache.CachedTokens(
    root, "documents (train)", _VOCAB, {"about": 0}, tokenize, _no_progress
  )


def _rows(root: pathlib.Path) -> list:
  rows = _cached(root).rows(_LENGTH, splits=True)
  return rows.gather(np.arange(rows.num_rows)).token_BL.tolist()


@functools.cache
def token_files() -> Files:
  """The token cache of a few documents, with packed rows."""
  return _made(_rows)


@functools.cache
def _expected_rows() -> list:
  with tempfile.TemporaryDirectory() as scratch:
    return _rows(pathlib.Path(scratch))


def read_tokens(folder: pathlib.Path):
  """Reads rows and sequences from the cache, which is mended where it is damaged.

  Raises:
    AssertionError: they are others than were written.
  """
  assert _rows(folder) == _expected_rows()
  assert [one.ids for one in _cached(folder).sequences()] == _DOCUMENTS
  assert _cached(folder).store().left_out == {"long": [2, "a.jsonl:3"]}


@functools.cache
def program_files() -> Files:
  """An entry of the cache of compiled programs."""
  program = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile().runtime_executable()
  entry = compilation_cache.combine_executable_and_time(program.serialize(), 1)
  return {"compiled/jit_f-0123-cache": compilation_cache.compress_executable(entry)}


def read_programs(folder: pathlib.Path):
  """Drops the entries that cannot be unpacked, as the start of a run does.

  Raises:
    AssertionError: an entry is left that cannot be unpacked.
  """
  compiled._drop_half_written(folder / "compiled")
  for path in (folder / "compiled").glob("*-cache"):
    compilation_cache.decompress_executable(path.read_bytes())
  shutil.rmtree(folder / "compiled", ignore_errors=True)
