"""What a run with later rounds reads of a labeling project: what was there when the run began.

While the run waits for people, they go on with other items of the project too. The stages before must find their data
unchanged all the same. So the numbers of the last submission and the last item are kept in the workdir, and are added
to each `labels:` source of the run. Called by pipeline.py, contents.py and run_data.py.
"""

import json
import os
import pathlib

import jax

from instructjax.core.config import Config
from instructjax.core.errors import writing
from instructjax.data import label_records, readers
from instructjax.parallel import distributed
from instructjax.train import reading

FILE = "labels.json"  # of the workdir: folder or URL of a project -> [last submission, last item]


def pin(config: Config, workdir: pathlib.Path):
  """Keeps where a project's records end, if people are to rank later rounds and it is not kept yet.

  Raises:
    UserError: the project cannot be read, or the workdir not written.
  """
  project = readers.labeling_project(config.data.comparisons)
  if project is None or config.collect.rounds == 1:
    return
  place, _ = project
  if jax.process_index() == 0 and place not in (known := _known(workdir)):
    _write(workdir, known | {place: list(label_records.newest(place))})
  distributed.meet("the end of the labels kept")


def share(folder: pathlib.Path, workdir: pathlib.Path):
  """Gives a point of a sweep the ends that were kept in the sweep's folder, so that all points read the same.

  Raises:
    UserError: the file cannot be read or written.
  """
  if jax.process_index() == 0 and (known := _known(folder)):
    _write(workdir, known | _known(workdir))


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
  more = {name: str(end) for name, end in zip(("until", "items"), ends) if end} | options
  return f"labels:{place}?" + "&".join(f"{name}={value}" for name, value in more.items())


def _write(workdir: pathlib.Path, ends: dict[str, list[int]]):
  path = workdir / FILE
  with writing(path):
    workdir.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(ends, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _known(workdir: pathlib.Path) -> dict[str, list[int]]:
  path = workdir / FILE
  if not path.is_file():
    return {}
  advice = f"Delete {path}; the labels must then be those that the run began with."

  def read() -> dict[str, list[int]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    is_pair = lambda ends: isinstance(ends, list) and [type(end) for end in ends] == [int, int]
    if not isinstance(found, dict) or not all(map(is_pair, found.values())):
      raise ValueError("it must hold two numbers for each project")
    return found

  return reading.read(path, read, advice=advice)
