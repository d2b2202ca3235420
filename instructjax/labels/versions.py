"""What the database of an earlier version lacks: tables, columns, numbers that are given once, and the project's token.

Called by schema.py, which hands over its tables, and by prompts.py for the token. It imports neither.
"""

import json
import secrets

import sqlalchemy as sa

_NEW_COLUMNS = ("items.batch", "assignments.reopened")
_TOKEN = "token"  # the setting that holds the project's


def is_whole(connection: sa.Connection, metadata: sa.MetaData) -> bool:
  """Whether `complete` has nothing to do."""
  found = sa.inspect(connection)
  return bool(
    metadata.tables.keys() <= set(found.get_table_names())
    and not _missing(found, metadata)
    and not _reusing(connection, metadata)
    and project_token(connection)
  )


def complete(connection: sa.Connection, metadata: sa.MetaData):
  """Makes what the database lacks: all of it, or what an earlier version did not have.

  Args:
    connection: a transaction that excludes others, in which SQLite looks at no references.
    metadata: the tables as they are made now.
  """
  metadata.create_all(connection)
  for column in _missing(sa.inspect(connection), metadata):
    _add(connection, column)
  for table in _reusing(connection, metadata):
    _replace(connection, table)
  _name_project(connection, metadata)


def _missing(found: sa.Inspector, metadata: sa.MetaData) -> list[sa.Column]:
  """The columns that tables of an earlier version lack."""
  columns = []
  for table, _, name in (one.partition(".") for one in _NEW_COLUMNS):
    if name not in {one["name"] for one in found.get_columns(table)}:
      columns.append(metadata.tables[table].c[name])
  return columns


def _add(connection: sa.Connection, column: sa.Column):
  """Gives a table a column that it lacks, with its index."""
  described = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
  connection.exec_driver_sql(f"ALTER TABLE {column.table.name} ADD COLUMN {described}")
  for index in column.table.indexes:
    if index.columns.keys() == [column.name]:
      index.create(connection)


def _reusing(connection: sa.Connection, metadata: sa.MetaData) -> list[sa.Table]:
  """The tables of an earlier version whose numbers SQLite would give again."""
  if connection.dialect.name != "sqlite":
    return []
  rows = connection.execute(sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
  made: dict[str, str] = {name: statement for name, statement in rows}
  return [
    table
    for name, table in metadata.tables.items()
    if table.dialect_kwargs.get("sqlite_autoincrement") and "AUTOINCREMENT" not in made[name]
  ]


def _replace(connection: sa.Connection, table: sa.Table):
  """Puts a table as it is made now in the place of one of an earlier version, with its rows.

  In the order that https://www.sqlite.org/lang_altertable.html#otheralter gives, so that references to it stay.
  """
  name, columns = table.name, ", ".join(table.c.keys())
  made = str(sa.schema.CreateTable(table).compile(dialect=connection.dialect))
  for statement in (
    made.replace(f"CREATE TABLE {name} ", f"CREATE TABLE new_{name} ", 1),
    f"INSERT INTO new_{name} ({columns}) SELECT {columns} FROM {name}",
    f"DROP TABLE {name}",
    f"ALTER TABLE new_{name} RENAME TO {name}",
  ):
    connection.exec_driver_sql(statement)
  for index in table.indexes:
    index.create(connection)


def project_token(connection: sa.Connection) -> str:
  """What stands for the project where its numbers of people go to others, see `prompts.author`; '' if it has none."""
  query = sa.text("SELECT value FROM settings WHERE name = :name")
  return connection.execute(query, {"name": _TOKEN}).scalar() or ""


def _name_project(connection: sa.Connection, metadata: sa.MetaData):
  """Gives a project its token, and the token to those authors of items who are users of this very project.

  Earlier versions called user 7 of any project `u7`. Whose prompt is still kept here is told from another project's.
  """
  if project_token(connection):
    return
  settings, items, prompts = (metadata.tables[name] for name in ("settings", "items", "prompts"))
  token = secrets.token_hex(8)
  connection.execute(settings.insert().values(name=_TOKEN, value=token))
  for row in connection.execute(sa.select(prompts)).all():
    author, prompt = f"u{row.user_id}", json.dumps(row.text, ensure_ascii=False)
    is_own = (items.c.author == author) & (items.c.prompt == prompt)
    connection.execute(items.update().where(is_own).values(author=f"{author}:{token}"))
