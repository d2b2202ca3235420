"""What the files that a run reads hold: the checksums in fingerprints, so that no stage goes on with other data.

One `Contents` is made per run, by pipeline.py, before anything is read. Called by context.py and run_data.py.
"""

import contextlib
import pathlib
from collections.abc import Iterable

from instructjax.core.config import Config
from instructjax.core.errors import UserError, one_line, reason
from instructjax.core.stages import STAGES, stage_of_kind
from instructjax.data import sources
from instructjax.data.checksums import Content, FileChecksums
from instructjax.data.messages import quoted
from instructjax.parallel import distributed
from instructjax.parallel.watchdog import Team
from instructjax.stages import lineage, pinned, shared_hashing
from instructjax.train import finished
from instructjax.train.weights import Weights

# The files that a stage which collects writes, without `.jsonl`.
SPLITS = (
  "train",
  "validation",
  "heldout",
)


class NotThere(UserError):
  """A source cannot be read."""


class Contents:
  """What the sources, the given weights and the files between the stages hold.

  Args:
    config: names the sources.
    workdir: the run's folder, in which checksums are remembered.
  """

  def __init__(self, config: Config, workdir: pathlib.Path):
    self._config, self._workdir = config, workdir
    self._files = FileChecksums(workdir / "cache" / "checksums.json", distributed.progress)
    self._kept: dict[str, Content] = {}

  def of(self, kind: str) -> Content:
    """The content of the records of a kind as it was when it was first asked for.

    Args:
      kind: kind of the records; or a stage that collects comparisons in a later round, see `lineage.contents`.
    Raises:
      NotThere: a file cannot be read.
      UserError: a file is not what the stage wrote that collected it.
    """
    if kind not in self._kept:
      self._kept[kind] = self._now(kind)
    return self._kept[kind]

  def require_same(self, kind: str):
    """Checks that files which have just been read hold what they held when they were first asked for.

    Raises:
      UserError: somebody has written them since.
    """
    before, now = self.of(kind), self._now(kind)
    if before != now:
      of = f" (data.{kind})" if kind not in STAGES else ""
      other = [path for path in now.files if path not in before.files] + [
        path
        for path, *digests in zip(before.files, before.digests, now.digests)
        if len({*digests}) > 1
      ]
      raise UserError(
        f"{(other or [self._spec(kind)])[0]}{of} was changed while the run was reading it;"
        " run the same command again when nothing writes it any more"
      )

  def share(self, team: Team, name: str, kinds: Iterable[str], given: Iterable[Weights]):
    """Hashes the files of sources and weights together with the other processes, see `shared_hashing`.

    Args:
      team: the processes, which must all call it.
      name: what it is, in words; used once in a run.
      kinds: kinds of the records.
      given: the weights.
    """
    paths = [str(path) for weights in given for path in weights.files]
    for kind in kinds:
      # What cannot be read is told by `of`.
      with contextlib.suppress(Exception):
        paths += map(str, sources.files(self._spec(kind)))
    shared_hashing.share(team, name, self._files, paths)

  def of_weights(self, given: Weights) -> Content:
    """The content of the files of weights that the config gives.

    Raises:
      UserError: a file cannot be read.
    """
    key = str(given.path)
    if key not in self._kept:
      try:
        self._kept[key] = self._files.content(given.kind, given.files)
      except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return self._kept[key]

  def _spec(self, kind: str) -> str:
    return pinned.spec(self._config, self._workdir, kind)

  def _now(self, kind: str) -> Content:
    if kind in STAGES:
      return self._collected(kind)
    if kind == "comparisons" and lineage.collects(self._config):
      return self._collected(stage_of_kind("collect").name)
    spec = self._spec(kind)
    try:
      return self._files.content(sources.how(spec), sources.files(spec))
    except Exception as error:  # libraries that open sources raise many types
      why = one_line(error) if isinstance(error, UserError) else reason(error)
      raise NotThere(f"data.{kind}={quoted(spec)} cannot be read: {why}") from error

  def _collected(self, stage: str) -> Content:
    """The rankings that a stage of this run has collected.

    Raises:
      NotThere: they have not been collected yet, or their folder was deleted to collect anew.
      UserError: a file cannot be read, or is not what the stage wrote.
    """
    folder = self._workdir / stage
    done = finished.read_done(folder)
    if done is None:
      raise NotThere(f"{folder} is not finished: run this stage first")
    written = done.result.files
    content = self.of_written(stage)
    for path, digest, name in zip(content.files, content.digests, SPLITS):
      if digest != written.get(name):
        raise UserError(
          f"{path} is not the file that stage {stage} wrote: put that one back, or delete {folder} to collect"
          " anew; to train on rankings of your own, copy the file elsewhere and give"
          " --config.data.comparisons=jsonl:PATH in another --workdir"
        )
    return content

  def of_written(self, stage: str) -> Content:
    """The content of the files that a stage has just written which collects.

    Raises:
      UserError: a file cannot be read.
    """
    paths = [self._workdir / stage / f"{split}.jsonl" for split in SPLITS]
    try:
      return self._files.content(stage, paths)
    except OSError as error:
      raise UserError(
        f"cannot read {error.filename}: {error.strerror}. Delete {self._workdir / stage} to collect anew"
      ) from error
