"""What a run with later rounds reads of a labeling project: what was there when the run began.

While the run waits for people, they go on with other items of the project too. The stages before must find their data
unchanged all the same. So the numbers of the last submission and the last item are kept in the workdir, and are added
to each `labels:` source of the run. Called by pipeline.py, contents.py and run_data.py.
"""

import json
import os
import pathlib
from typing import Any

import jax

from instructjax.core import terminal
from instructjax.core.config import Config
from instructjax.core.errors import writing
from instructjax.data import label_records, readers
from instructjax.data.records import KINDS
from instructjax.parallel import distributed
from instructjax.stages import lineage
from instructjax.train import reading

# In the workdir: folder or URL of a project -> numbers of the last submission and the last item, and whether they are
# those of a sweep, which its points share.
FILE = "labels.json"
_KEYS = {"until": int, "items": int, "is_of_sweep": bool}


def pin(config: Config, workdir: pathlib.Path, is_begun: bool = False):
  """Keeps where a project's records end, if people are to rank later rounds and no stage has read them yet.

  Says so where there are newer ones, which do not count.

  Args:
    config: names the project.
    workdir: the folder of a run, or of a sweep.
    is_begun: whether they were read, as by a point of the sweep; else it is seen from the run's stages.
  Raises:
    UserError: the project cannot be read, or the workdir not written.
  """
  project = readers.labeling_project(config.data.comparisons)
  if project is None or config.collect.rounds == 1:
    return
  place, _ = project
  if jax.process_index() == 0:
    known, (until, items) = _known(workdir), label_records.newest(place)
    ends = known.get(place)
    if ends is None or not (is_begun or ends["is_of_sweep"] or _is_read(config, workdir)):
      new = {"until": until, "items": items, "is_of_sweep": False}
      _write(workdir, known | {place: new})
    elif until > ends["until"]:
      terminal.say(
        f"{config.data.comparisons}: read as it was when the run began, up to submission {ends['until']}; there are"
        f" newer ones, up to {until}, of which only those of later rounds count"
      )
  distributed.meet("the end of the labels kept")


def _is_read(config: Config, workdir: pathlib.Path) -> bool:
  """Whether a stage that reads a project has begun."""
  kinds = [kind for kind in KINDS if readers.labeling_project(getattr(config.data, kind))]
  return any(
    set(lineage.reads(config, stage)) & set(kinds) and (workdir / stage).exists()
    for stage in lineage.plan(config)
  )


def share(folder: pathlib.Path, workdir: pathlib.Path):
  """Gives a point of a sweep the ends that were kept in the sweep's folder, so that all points read the same.

  Raises:
    UserError: the file cannot be read or written.
  """
  if jax.process_index() == 0 and (known := _known(folder)):
    shared = {place: ends | {"is_of_sweep": True} for place, ends in known.items()}
    _write(workdir, shared | _known(workdir))


def spec(config: Config, workdir: pathlib.Path, kind: str) -> str:
  """The source of a kind of records as the run reads it: of a project whose end is kept, only what lies before it.

  Raises:
    UserError: the source's options are not known, or the file in the workdir is damaged.
  """
  source = getattr(config.data, kind)
  project = readers.labeling_project(source)
  if project is None:
    return source
  place, options = project
  ends = _known(workdir).get(place)
  if ends is None:
    return source
  more = {name: str(ends[name]) for name in ("until", "items") if ends[name]} | options
  return f"labels:{place}?" + "&".join(f"{name}={value}" for name, value in more.items())


def _write(workdir: pathlib.Path, ends: dict[str, dict[str, Any]]):
  path = workdir / FILE
  with writing(path):
    workdir.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(ends, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _known(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  path = workdir / FILE
  if not path.is_file():
    return {}
  advice = f"Delete {path}; the labels must then be those that the run began with."

  def read() -> dict[str, dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    types = lambda ends: {name: type(end) for name, end in ends.items()}
    is_whole = lambda ends: isinstance(ends, dict) and types(ends) == _KEYS
    if not isinstance(found, dict) or not all(map(is_whole, found.values())):
      raise ValueError(f"it must hold {', '.join(_KEYS)} of each project")
    return found

  return reading.read(path, read, advice=advice)
