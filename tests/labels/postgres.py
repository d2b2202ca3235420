r"""The tests of projects in PostgreSQL instead of SQLite: a plugin of pytest.

  INSTRUCTJAX_POSTGRES=postgresql://USER@HOST:PORT pytest -n0 -p tests.labels.postgres tests/labels \
    tests/stages/test_people.py

Each folder that a test takes for a project stands for a database of its own on that server, which is made when it is
first named and dropped at the end. Tests marked `sqlite` are about the file, and are left out.
"""

import hashlib
import os

import pytest
import sqlalchemy

from instructjax.data import label_records

_is_url, _given = label_records.is_url, label_records.url_of
_made: dict[str, sqlalchemy.URL] = {}


def _server() -> sqlalchemy.URL:
  url = os.environ.get("INSTRUCTJAX_POSTGRES")
  if not url:
    raise pytest.UsageError("INSTRUCTJAX_POSTGRES must be the postgresql:// URL of a server")
  return sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")


def _admin(statement: str):
  # No database is made or dropped inside of a transaction.
  at = _server().set(database="postgres")
  engine = sqlalchemy.create_engine(at, isolation_level="AUTOCOMMIT")
  with engine.connect() as connection:
    connection.exec_driver_sql(statement)
  engine.dispose()


def _url_of(place: str, where: str) -> sqlalchemy.URL:
  if _is_url(place):
    return _given(place, where)
  name = "instructjax_" + hashlib.sha256(os.path.realpath(place).encode()).hexdigest()[:20]
  if name not in _made:
    _admin(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    _admin(f"CREATE DATABASE {name}")
    _made[name] = _server().set(database=name)
  return _made[name]


def pytest_configure():
  _server()
  label_records.is_url = lambda place: True
  label_records.url_of = _url_of


def pytest_collection_modifyitems(config, items):
  about_files = [item for item in items if item.get_closest_marker("sqlite")]
  config.hook.pytest_deselected(items=about_files)
  items[:] = [item for item in items if item not in about_files]


def pytest_unconfigure():
  for name in _made:
    _admin(f"DROP DATABASE {name} WITH (FORCE)")
