"""The command `python -m instructjax.label serve --project=DIR`: people label in a browser. More: docs/labeling.md.

Words: serve; add, sample, import and simulate fill a project; export and prompts take records out; training shows
reward models beside labelers; close ends a round that a run waits for; users and delete are about people.
"""

import ipaddress
import math
import pathlib
import re
import time

from absl import flags

from instructjax.commands import cli
from instructjax.core import places
from instructjax.core.errors import UserError

_LOOPBACK = "127.0.0.1,::1"

_PROJECT = flags.DEFINE_string(
  "project", "", "The project's folder, or the postgresql:// URL of its database."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at.")
_PORT = flags.DEFINE_integer(
  "port", 8000, "serve: the port; 0 for any that is free.", lower_bound=0, upper_bound=65535
)
_PUBLIC = flags.DEFINE_string(
  "public",
  "",
  "serve: the name by which browsers reach it over https, through a proxy of yours; cookies are then marked secure.",
)
_PROXY = flags.DEFINE_string(
  "proxy",
  "",
  "serve --public: the address from which the proxy asks, as 10.0.0.5, or its network, as 10.0.0.0/24; several are"
  " separated by commas. By default the proxy is on this machine.",
)
_PLAYGROUND = flags.DEFINE_bool(
  "playground",
  False,
  "serve: also a page on which users write prompts to the model of --checkpoint, and may let them be kept.",
)
_PROMPTS = flags.DEFINE_string(
  "prompts", "", "add, sample: a source of prompts, as jsonl:prompts.jsonl, with user where known."
)
_KIND = flags.DEFINE_string(
  "kind",
  "",
  "sample: ranking or toxicity; export: comparisons, demonstrations or prompts; import: comparisons or demonstrations."
  " By default the first of these.",
)
_CHECKPOINT = flags.DEFINE_multi_string(
  "checkpoint",
  [],
  "sample, serve --playground: a stage, a Hugging Face folder, a .gguf file or hf://ORG/NAME. Several share k.",
)
_K = flags.DEFINE_integer("k", 4, "sample: answers to each prompt, 2 to 9.")
_ITEMS = flags.DEFINE_integer(
  "items", 1, "sample: items made of each prompt, each with answers of its own."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  1.0,
  "sample, serve --playground: divides the logits; 0 takes the likeliest token.",
  lower_bound=0,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "sample, serve --playground: longest answer, in tokens."
)
_CHAT = flags.DEFINE_bool(
  "chat",
  None,
  "sample, serve --playground: whether a prompt is a user's message in the chat template, or text to go on from. By"
  " default it is a message where the tokenizer has a template.",
)
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "sample, simulate: the same command with the same seed gives the same answers and rankings.",
  lower_bound=0,
)
_LIMIT = flags.DEFINE_integer(
  "limit", 0, "add, sample: the first so many prompts; 0 for all.", lower_bound=0
)
_WANTED = flags.DEFINE_integer(
  "wanted", 1, "add, sample: people of a cohort who are to work on each item."
)
_SCREENING = flags.DEFINE_bool(
  "screening", False, "add, sample: items by which labelers are compared with researchers."
)
_SOURCE = flags.DEFINE_enum(
  "source", "labeler", ["labeler", "customer"], "add, sample: who wrote the prompts."
)
_FROM = flags.DEFINE_string(
  "from",
  "",
  "import: a source of comparisons or demonstrations, as jsonl:rankings.jsonl or hh:pairs.jsonl.",
)
_FORMAT = flags.DEFINE_string("format", "own", "export: own, hh, label_studio or argilla.")
_SIMULATION = flags.DEFINE_string("simulation", "demo:", "simulate: whose labelers rank.")
_GROUP = flags.DEFINE_enum("group", "train", ["train", "heldout"], "simulate: which of them.")
_BATCH = flags.DEFINE_string(
  "batch", "", "close: the name that a waiting run gives to the items of its round."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "training: the folder of a run whose reward models learned from the project."
)
_TO = flags.DEFINE_string(
  "to", "", "export: the folder to write to; prompts, users data: the file."
)
_ROLE = flags.DEFINE_string(
  "role", "labeler", "users add: labeler, researcher, admin or user (of the playground)."
)
_COHORT = flags.DEFINE_string(
  "cohort", "training", "users add: training, or heldout for labelers who are kept from training."
)
_TITLE = flags.DEFINE_string("title", None, "add, sample, import: the project's title.")
_INSTRUCTIONS = flags.DEFINE_string(
  "instructions", None, "add, sample, import: file with instructions to labelers."
)
_WARNING = flags.DEFINE_string(
  "warning", None, "add, sample, import: a content warning that labelers see."
)
_HELD_OUT = flags.DEFINE_string(
  "held_out", None, "add, sample, import: share of prompts held out, before there are items."
)


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a flag is wrong, or something cannot be read or written.
  """
  if not arguments or arguments[0] not in _COMMANDS:
    raise UserError(
      f"the first argument must be one of {', '.join(_COMMANDS)}, as in `label serve --project=DIR`"
    )
  if not _PROJECT.value:
    raise UserError("--project must have a value: the project's folder, or a postgresql:// URL")
  try:
    import argon2
    import sqlalchemy
    import starlette
    import uvicorn

    del argon2, sqlalchemy, starlette, uvicorn
  except ImportError as error:
    raise UserError(
      f"the labeling application needs {error.name}: pip install 'instructjax[label]'"
    ) from error
  place = places.expand(_PROJECT.value, "--project", places.DATABASES)
  word, *rest = arguments
  if rest and word not in ("users", "delete"):
    raise UserError(f"unexpected arguments {ascii(rest)[:200]} after {word}")
  from instructjax.labels import schema

  with schema.refusals(place):
    _COMMANDS[word](place, rest)


def _serve(place: str, _: list[str]):
  from instructjax.labels import accounts, schema, serving

  host, public = _HOST.value, _PUBLIC.value.lower()
  is_local = host in ("127.0.0.1", "::1", "localhost")
  if not is_local and not public:
    raise UserError(
      f"--host={host} would send passwords readable over the network: put a proxy with https before it and give its"
      " name as --public=NAME"
    )
  if public and not re.fullmatch(r"[a-z0-9.-]+", public):
    raise UserError(
      f"--public={ascii(_PUBLIC.value)[:200]} must be the name alone, without https:// and port, as labels.example.org"
    )
  proxies = _proxies(is_local) if public else ""
  if _PROXY.value and not public:
    raise UserError("--proxy is for --public=NAME, which must then be given too")
  if _CHECKPOINT.value and not _PLAYGROUND.value:
    raise UserError("--checkpoint is for --playground, which must then be given too")
  play = _playground() if _PLAYGROUND.value else None  # before a password is shown once
  database = schema.create(place)
  people = accounts.everybody(database)
  if not any(person.role == "admin" for person in people):
    if any(person.name == "admin" for person in people):
      raise UserError(
        "nobody has the role admin, and a person named admin another: make one by `label users add NAME --role=admin`"
      )
    password = accounts.new_password()
    accounts.add(database, "admin", "admin", password, time.time())
    print(
      f"A new project: sign in as admin with the password {password}, which is shown this once."
    )
  hosts = [serving.shown(host), "localhost", "127.0.0.1", *filter(None, [public])]
  app = serving.make(database, hosts, is_secure=bool(public), play=play)
  tell = lambda address: print(f"Labeling at {address}", flush=True)
  serving.run(app, host, _PORT.value, tell, proxies)


def _proxies(is_local: bool) -> str:
  """Whose word on a browser's address is taken."""
  if not _PROXY.value:
    if is_local:
      return _LOOPBACK
    # All people would have the proxy's address, and thirty wrong passwords of theirs together shut all of them out.
    raise UserError(
      f"--host={_HOST.value} needs --proxy=ADDRESS, from which the proxy of --public asks (--proxy=127.0.0.1 if it is"
      " on this machine): wrong passwords are counted by the browser's address, which only this proxy may name"
    )
  for one in _PROXY.value.split(","):
    try:
      ipaddress.ip_network(one.strip())
    except ValueError as error:
      raise UserError(
        f"--proxy={ascii(_PROXY.value)[:200]} must be an address, as 10.0.0.5, or a network, as 10.0.0.0/24: {error}"
      ) from error
  return _PROXY.value


def _playground():
  from instructjax.labels import personal, playground

  personal.require()
  from instructjax.commands import label_models  # after the check: JAX takes seconds

  answer = label_models.answerer(_CHECKPOINT.value, _sampling(label_models))
  return playground.Playground(playground.Model(answer), personal.strip)


def _prompts() -> list:
  """The records of --prompts."""
  from instructjax.data import sources

  if not _PROMPTS.value:
    raise UserError("--prompts must have a value, as jsonl:prompts.jsonl")
  spec = places.expand_source(_PROMPTS.value, "--prompts")
  # A simulated task has a split of its own for each purpose.
  split = "train" if sources.simulation(spec) else "all"
  found = sources.load(
    spec,
    "prompts",
    split,
    seed=_SEED.value,
    validation_fraction=0.5,
    on_bad_record="raise",
    setting="--prompts",
  )
  return list(found[: _LIMIT.value or None])


def _settings(database):
  from instructjax.labels import projects

  values = {"title": _TITLE.value, "warning": _WARNING.value, "held_out": _HELD_OUT.value}
  if _INSTRUCTIONS.value is not None:
    path = places.require(_INSTRUCTIONS.value, "--instructions")
    try:
      with open(path, encoding="utf-8") as file:
        values["instructions"] = file.read()
    except (OSError, ValueError) as error:
      raise UserError(f"--instructions={path} cannot be read: {error}") from error
  projects.change(database, {name: value for name, value in values.items() if value is not None})


def _item(kind: str, record, answers: tuple[tuple[str, str], ...] = ()):
  """An item as the flags want it, of a record of --prompts."""
  from instructjax.labels import projects

  return projects.Item(
    kind,
    record.prompt,
    answers,
    source=_SOURCE.value,
    author=record.user or "",
    is_screening=_SCREENING.value,
    wanted=_WANTED.value,
  )


def _add(place: str, _: list[str]):
  from instructjax.labels import projects, schema

  database = schema.create(place)
  _settings(database)
  if not _PROMPTS.value:
    return
  new = [_item(_KIND.value or "demonstration", record) for record in _prompts()]
  print(f"{len(projects.add(database, new, time.time()))} items added")


def _sample(place: str, _: list[str]):
  from instructjax.labels import projects, schema

  if not _CHECKPOINT.value:
    raise UserError("--checkpoint must have a value: runs/demo/sft, a model folder or a .gguf")
  if not 2 <= _K.value <= projects.MOST_ANSWERS:
    raise UserError(f"--k={_K.value} must be 2 to {projects.MOST_ANSWERS}")
  if len(_CHECKPOINT.value) > _K.value:
    raise UserError(
      f"--k={_K.value} must be at least the number of --checkpoint, {len(_CHECKPOINT.value)}"
    )
  if _ITEMS.value < 1:
    raise UserError(f"--items={_ITEMS.value} must be at least 1")
  kind, prompts = _KIND.value or "ranking", _prompts()
  for record in prompts:  # what is wrong with an item is said before hours of sampling
    projects.require_whole(_item(kind, record, (("", ""),) * _K.value))
  database = schema.create(place)
  _settings(database)
  from instructjax.commands import label_models

  answers = label_models.answers(
    prompts, _ITEMS.value, _CHECKPOINT.value, _K.value, _sampling(label_models)
  )
  new = [
    _item(kind, record, own) for record, own in zip(prompts * _ITEMS.value, answers, strict=True)
  ]
  print(f"{len(projects.add(database, new, time.time(), _SEED.value))} items added")


def _sampling(label_models):
  if not math.isfinite(_TEMPERATURE.value):
    raise UserError(f"--temperature={_TEMPERATURE.value} must be a number, as 1")
  return label_models.Sampling(_TEMPERATURE.value, _MAX_NEW_TOKENS.value, _SEED.value, _CHAT.value)


def _export(place: str, _: list[str]):
  from instructjax.labels import exchange, schema

  schema.open_(place)
  folder = places.require(_TO.value, "--to")
  kind = _KIND.value or "comparisons"
  counts, left_out = exchange.export(place, kind, folder, _FORMAT.value)
  for name, count in counts.items():
    print(f"{folder}/{name}: {count} records")
  if left_out:
    print(
      f"{left_out} rankings left out: format {_FORMAT.value} has no place for their ties or roles"
    )


def _import(place: str, _: list[str]):
  from instructjax.labels import filling, schema

  if not _FROM.value:
    raise UserError("--from must have a value, as jsonl:rankings.jsonl")
  spec = places.expand_source(_FROM.value, "--from")
  database = schema.create(place)
  _settings(database)
  counts = filling.bring_in(database, spec, _KIND.value or "comparisons", time.time())
  print(f"{counts[0]} items with {counts[1]} submissions added")


def _pool(place: str, _: list[str]):
  """`prompts`: what users have let the project keep of the playground."""
  from instructjax.labels import exchange, prompts, schema

  rows = prompts.records(schema.open_(place))
  if not rows:
    raise UserError(f"{place} holds no prompts of users yet: they write them in serve --playground")
  path = pathlib.Path(places.require(_TO.value, "--to"))
  exchange.write_lines(path, rows)
  users = len({row["user"] for row in rows})
  many = lambda count, what: f"{count} {what}{'s' * (count != 1)}"
  print(
    f"{path}: {many(len(rows), 'prompt')} of {many(users, 'user')}; add them with --prompts=jsonl:{path}"
    " --source=customer"
  )


def _simulate(place: str, _: list[str]):
  from instructjax.labels import filling, schema

  now = time.time()
  database = schema.open_(place)
  count, left = filling.simulate(database, _SIMULATION.value, _GROUP.value, _SEED.value, now)
  print(f"{count} rankings added, with overall quality by rank and no yes/no question answered")
  if left:
    print(f"{left} more are wanted: there are not as many simulated labelers as --wanted asks for")


def _close(place: str, _: list[str]):
  from instructjax.labels import rounds, schema

  left = rounds.close(schema.open_(place), _BATCH.value, time.time())
  print(f"batch {_BATCH.value} is closed; nobody has ranked {left} of its items")


def _training(place: str, _: list[str]):
  from instructjax.commands import label_training

  workdir = places.require(_WORKDIR.value, "--workdir")
  for line in label_training.register(place, workdir, time.time()):
    print(line)


def _delete(place: str, rest: list[str]):
  from instructjax.labels import privacy, schema

  if len(rest) != 1:
    raise UserError("delete takes the name of one person, as in `label delete ann --project=DIR`")
  counts = privacy.delete(schema.open_(place), rest[0], time.time())
  print(f"{rest[0]} is deleted, with {', '.join(f'{n} {table}' for table, n in counts.items())}")


def _users(place: str, rest: list[str]):
  """`users`, `users add NAME`, `users reset NAME`, `users data NAME`."""
  from instructjax.labels import accounts, exchange, privacy, schema

  if not rest:
    for person in accounts.everybody(schema.open_(place)):
      print(
        f"{person.name}\t{person.role}\t{person.cohort}\t{'active' if person.is_active else 'shut out'}"
      )
    return
  if len(rest) != 2 or rest[0] not in ("add", "reset", "data"):
    raise UserError("users takes nothing, `add NAME`, `reset NAME` or `data NAME`")
  word, name = rest
  if word == "data":
    path = pathlib.Path(places.require(_TO.value, "--to"))
    exchange.write_lines(path, [privacy.data_of(schema.open_(place), name)])
    print(f"everything of {name} is in {path}")
    return
  if word == "add":
    database = schema.create(place)
    password = accounts.new_password()
    accounts.add(database, name, _ROLE.value, password, time.time(), _COHORT.value)
  else:
    password = accounts.reset_password(schema.open_(place), name, time.time())
  print(f"{name} can sign in with the password {password}, which is shown this once.")


_COMMANDS = {
  "serve": _serve,
  "add": _add,
  "sample": _sample,
  "export": _export,
  "import": _import,
  "prompts": _pool,
  "simulate": _simulate,
  "training": _training,
  "close": _close,
  "delete": _delete,
  "users": _users,
}

if __name__ == "__main__":
  cli.run(main, interrupted="stopped; everything that was sent is in the database")
