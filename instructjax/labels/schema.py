"""The database of a project: its tables, and connections to it. SQLite in the project's folder, or PostgreSQL by URL.

Called by every other module of the package. data/label_records.py reads users, items, answers and submissions by the
names that they have here.

`submissions` and `audit` are append-only: triggers refuse to change or delete a row. Only the deletion of one person's
data takes the triggers away, inside its own transaction.
"""

import contextlib
import dataclasses
import os
import pathlib
import weakref
from collections.abc import Generator
from typing import Any

import sqlalchemy as sa
import sqlalchemy.event
import sqlalchemy.exc
from sqlalchemy import Boolean, Column, Double, ForeignKey, Integer, String, Text

from instructjax.core.errors import UserError, reason, writing
from instructjax.core.text import printable
from instructjax.data import label_records
from instructjax.labels import versions

APPEND_ONLY = ("submissions", "audit")
# What a database raises that is gone, hangs or refuses.
AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
_WAIT = 20.0  # seconds that a writer waits for another

metadata = sa.MetaData()


def _id() -> Column:
  return Column("id", Integer, primary_key=True)


def _of(table: str) -> Column:
  return Column(f"{table.removesuffix('s')}_id", ForeignKey(f"{table}.id"), nullable=False)


# Times are seconds since 1970, UTC. Numbers by which people, items and submissions are known outside of the database
# (as in `?until=N`) are never given twice: SQLite would give the highest again after a deletion.
settings = sa.Table(
  "settings", metadata, Column("name", String(80), primary_key=True), Column("value", Text)
)
users = sa.Table(
  "users",
  metadata,
  _id(),
  Column("name", String(80), unique=True, nullable=False),
  Column("password", String(200), nullable=False),  # hash; '' for one who cannot sign in
  Column("role", String(20), nullable=False),
  Column("cohort", String(20), nullable=False),  # training or heldout
  Column("is_active", Boolean, nullable=False),
  Column("created", Double, nullable=False),
  sqlite_autoincrement=True,
)
sessions = sa.Table(
  "sessions",
  metadata,
  Column("token", String(64), primary_key=True),  # hash of what the cookie holds
  _of("users"),
  Column("expires", Double, nullable=False),
)
attempts = sa.Table(  # failed sign-ins
  "attempts",
  metadata,
  _id(),
  Column("name", String(80), nullable=False),
  Column("address", String(80), nullable=False),
  Column("at", Double, nullable=False, index=True),
)
items = sa.Table(
  "items",
  metadata,
  _id(),
  Column("kind", String(20), nullable=False, index=True),  # one of forms.FORMS
  Column("prompt", Text, nullable=False),  # JSON: a text, or a list of messages
  Column("source", String(20), nullable=False),  # labeler or customer: who wrote the prompt
  Column("author", String(80), nullable=False),  # who wrote the prompt; '' if unknown
  Column("split", String(20), nullable=False),  # train or validation
  Column("is_screening", Boolean, nullable=False),
  Column("wanted", Integer, nullable=False),  # number of people of a cohort who are to work on it
  Column("created", Double, nullable=False),
  # what a run has put here in one go, for a later round of comparisons (see rounds.py); '' for other items
  Column("batch", String(200), nullable=False, server_default="", index=True),
  sqlite_autoincrement=True,
)
answers = sa.Table(
  "answers",
  metadata,
  _id(),
  Column("item_id", ForeignKey("items.id"), nullable=False, index=True),
  Column("position", Integer, nullable=False),
  Column("text", Text, nullable=False),
  Column("origin", String(400), nullable=False),  # the model; never shown to labelers
)
assignments = sa.Table(
  "assignments",
  metadata,
  _id(),
  _of("items"),
  Column("user_id", ForeignKey("users.id"), nullable=False, index=True),
  Column("state", String(20), nullable=False),  # open, done or skipped
  Column("token", String(64), nullable=False),  # of the form that may be sent next
  Column("opened", Double, nullable=False),
  Column("touched", Double, nullable=False),
  Column("reason", Text, nullable=False),  # for skipping
  # when one that was sent or skipped was opened to be changed; 0 if it was not since
  Column("reopened", Double, nullable=False, server_default="0"),
  sa.UniqueConstraint("item_id", "user_id"),
)
drafts = sa.Table(
  "drafts",
  metadata,
  Column("assignment_id", ForeignKey("assignments.id"), primary_key=True),
  Column("fields", Text, nullable=False),  # JSON: name of a field -> what was typed
  Column("saved", Double, nullable=False),
)
submissions = sa.Table(
  "submissions",
  metadata,
  _id(),
  Column("item_id", ForeignKey("items.id"), nullable=False, index=True),
  Column("user_id", ForeignKey("users.id"), nullable=False, index=True),
  Column("token", String(64), unique=True, nullable=False),  # the form's: it is taken once
  Column("payload", Text, nullable=False),  # JSON, see forms.parse
  Column("seconds", Double, nullable=False),  # of work
  Column("at", Double, nullable=False),
  sqlite_autoincrement=True,
)
grades = sa.Table(  # of demonstrations, by researchers
  "grades",
  metadata,
  _id(),
  Column("submission_id", ForeignKey("submissions.id"), nullable=False, index=True),
  _of("users"),
  Column("grade", Integer, nullable=False),  # 1 to 7
  Column("at", Double, nullable=False),
  sa.UniqueConstraint("submission_id", "user_id"),
)
survey = sa.Table(  # self-assessed ability to identify sensitive speech
  "survey",
  metadata,
  _id(),
  _of("users"),
  Column("subject", String(80), nullable=False),
  Column("level", Integer, nullable=False),  # 0 to 2
  sa.UniqueConstraint("user_id", "subject"),
)
prompts = sa.Table(  # that users have written in the playground, with consent, see prompts.py
  "prompts",
  metadata,
  _id(),
  Column("user_id", ForeignKey("users.id"), nullable=False, index=True),
  Column("text", Text, nullable=False),  # without what looks like personal data
  Column("prefix", String(80), unique=True, nullable=False),
  Column("at", Double, nullable=False),
)
trainings = sa.Table(  # of reward models on what was ranked here, see trainings.py
  "trainings",
  metadata,
  _id(),
  Column("identity", String(64), unique=True, nullable=False),
  Column("name", String(400), nullable=False),
  Column("accuracy", Double, nullable=False),
  Column("low", Double, nullable=False),
  Column("high", Double, nullable=False),
  Column("pairs", Integer, nullable=False),
  Column("at", Double, nullable=False),
  # Of labelers, when the reward model was trained; NULL where no item was ranked by two.
  Column("agreement", Double, nullable=True),
  Column("agreement_low", Double, nullable=False),
  Column("agreement_high", Double, nullable=False),
  Column("agreement_pairs", Integer, nullable=False),
  Column("agreement_items", Integer, nullable=False),
)
audit = sa.Table(
  "audit",
  metadata,
  _id(),
  Column("user_id", Integer, nullable=True),  # no foreign key: a row outlives its person
  Column("action", String(40), nullable=False),
  Column("about", Text, nullable=False),
  Column("at", Double, nullable=False),
)


@dataclasses.dataclass(frozen=True)
class Database:
  """Connections to a project's database.

  Attributes:
    engine: for transactions that write, which exclude each other in SQLite.
    reading: for those that only read, which see one state and wait for nobody.
  """

  engine: sa.Engine
  reading: sa.Engine

  def __post_init__(self):
    # Connections that wait for their next use are closed with the last reference to this object: Python 3.13 warns of
    # those that are left to the garbage collector.
    weakref.finalize(self, self.engine.dispose)

  @contextlib.contextmanager
  def write(self) -> Generator[sa.Connection]:
    """A transaction, which is on disk when the block has ended."""
    with self.engine.begin() as connection:
      yield connection

  @contextlib.contextmanager
  def read(self) -> Generator[sa.Connection]:
    """A transaction that only reads."""
    with self.reading.connect() as connection:
      yield connection

  def close(self):
    self.engine.dispose()


def create(place: str) -> Database:
  """Opens a project's database, and makes it if there is none.

  Args:
    place: the project's folder, made if missing, or a URL of PostgreSQL.
  Raises:
    UserError: it cannot be opened or made.
  """
  if not label_records.is_url(place):
    folder = pathlib.Path(place)
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      file = folder / label_records.FILE
      # It holds hashes of passwords: others on this machine may not read it, nor the files that SQLite puts beside it.
      os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
  database = _connect(place)
  _complete(place, database)
  return database


def _complete(place: str, database: Database):
  """Makes what the database lacks: all of it, or what an earlier version did not have."""
  with _errors(place), _free_to_replace(database) as connection:
    one_at_a_time(connection)
    versions.complete(connection, metadata)
    for statement in _triggers(connection.dialect.name):
      connection.exec_driver_sql(statement)


@contextlib.contextmanager
def _free_to_replace(database: Database) -> Generator[sa.Connection]:
  """A transaction in which a table may be dropped that others refer to, and one of its name be put in its place."""
  with database.engine.connect() as connection:
    is_sqlite = connection.dialect.name == "sqlite"
    if is_sqlite:  # before the transaction, inside of which it does nothing
      _driver(connection).execute("PRAGMA foreign_keys=OFF")
    try:
      with connection.begin():
        yield connection
    finally:
      if is_sqlite:
        _driver(connection).execute("PRAGMA foreign_keys=ON")


def open_(place: str) -> Database:
  """Opens a project that is there.

  Raises:
    UserError: there is none.
  """
  if not label_records.is_url(place) and not (pathlib.Path(place) / label_records.FILE).is_file():
    raise UserError(
      f"--project={printable(place)} is no labeling project yet: make one with"
      " `python -m instructjax.label add`, `sample` or `import`"
    )
  database = _connect(place)
  with _errors(place), database.read() as connection:
    if not sa.inspect(connection).has_table("submissions"):
      raise UserError(f"--project={printable(place)} holds no labeling project")
    is_whole = versions.is_whole(connection, metadata)
  if not is_whole:
    _complete(place, database)
  return database


@contextlib.contextmanager
def _errors(place: str):
  try:
    yield
  except sqlalchemy.exc.SQLAlchemyError as error:
    raise UserError(f"the database {_shown(place)} cannot be opened: {reason(error)}") from error


@contextlib.contextmanager
def refusals(place: str) -> Generator[None]:
  """Turns what a database refuses (the disk is full, another program holds it, it has gone) into a UserError.

  Raises:
    UserError: it refused something inside the `with` block.
  """
  try:
    yield
  except AWAY as error:
    raise UserError(
      f"the database {_shown(place)} refuses: {why(error)}. What was saved before is untouched"
    ) from error


def why(error: Exception) -> str:
  """What the database's driver says of an error, in one line, without the statement."""
  return reason(getattr(error, "orig", None) or error)


def _shown(place: str) -> str:
  return label_records.url_of(place, "--project").render_as_string(hide_password=True)


def _connect(place: str) -> Database:
  url = label_records.url_of(place, "--project")
  if label_records.is_url(place):
    try:
      # Transactions see what was committed before each statement; rows that are changed are locked.
      engine = sa.create_engine(url, pool_size=20, pool_pre_ping=True)
    except ImportError as error:
      raise UserError(f"a postgresql:// project needs psycopg: {label_records.EXTRA}") from error
    return Database(engine, engine)
  engine = sa.create_engine(url, pool_size=20, connect_args={"timeout": _WAIT})
  sqlalchemy.event.listen(engine, "connect", _set_up)
  sqlalchemy.event.listen(engine, "begin", _begin)
  return Database(engine, engine.execution_options(only_reads=True))


def _set_up(connection, _):
  """A new connection to SQLite: what is committed is on disk, and readers do not wait for the writer."""
  connection.isolation_level = (
    None  # transactions begin as `_begin` says, not as the driver guesses
  )
  for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
    connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection):
  # A transaction that reads first and writes then would fail if another has written in between.
  is_reading = connection.get_execution_options().get("only_reads")
  connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")


def _triggers(dialect: str) -> list[str]:
  if dialect == "sqlite":
    return [
      f"CREATE TRIGGER IF NOT EXISTS {table}_no_{verb.lower()} BEFORE {verb} ON {table}"
      f" BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
      for table in APPEND_ONLY
      for verb in ("UPDATE", "DELETE")
    ]
  function = (
    "CREATE OR REPLACE FUNCTION append_only() RETURNS trigger AS $$"
    " BEGIN RAISE EXCEPTION USING MESSAGE = TG_TABLE_NAME || ' is append-only'; END $$ LANGUAGE plpgsql"
  )
  return [function] + [
    f"CREATE OR REPLACE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table}"
    " FOR EACH ROW EXECUTE FUNCTION append_only()"
    for table in APPEND_ONLY
    for verb in ("UPDATE", "DELETE")
  ]


@contextlib.contextmanager
def without_triggers(connection: sa.Connection) -> Generator[None]:
  """Inside of it, rows of append-only tables may be deleted; only this transaction sees the triggers gone."""
  dialect = connection.dialect.name
  for table in APPEND_ONLY:
    for verb in ("update", "delete"):
      on = "" if dialect == "sqlite" else f" ON {table}"
      connection.exec_driver_sql(f"DROP TRIGGER {table}_no_{verb}{on}")
  yield
  for statement in _triggers(dialect):
    connection.exec_driver_sql(statement)


def one_at_a_time(connection: sa.Connection):
  """Until this transaction ends, no other passes here: what it reads stays true until it has written.

  In SQLite every transaction that writes is like that.
  """
  if connection.dialect.name == "postgresql":
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(17)")


def forget_pages(database: Database):
  """Makes SQLite overwrite what deleted rows have left in the file and in its log."""
  if database.engine.dialect.name == "sqlite":
    with database.engine.connect() as connection:
      raw = _driver(connection)
      raw.execute("VACUUM")
      raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _driver(connection: sa.Connection) -> Any:
  """SQLite's own connection, on which no transaction begins by itself."""
  raw = connection.connection.driver_connection
  if raw is None:
    raise ValueError("a connection to SQLite has a driver's connection")
  return raw


def insert(connection: sa.Connection, table: sa.Table, **values) -> int:
  """Adds a row, and returns its number."""
  key = connection.execute(table.insert().values(**values)).inserted_primary_key
  if key is None:
    raise ValueError(f"{table.name} numbers its rows")
  return key[0]


def log(connection: sa.Connection, user_id: int | None, action: str, about: str, now: float):
  """Adds a row to the audit table."""
  connection.execute(audit.insert().values(user_id=user_id, action=action, about=about, at=now))
