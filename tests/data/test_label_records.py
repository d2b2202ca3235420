"""Where a project's database is; what is read from it is tested in tests/labels/test_exchange.py."""

import pytest
import sqlalchemy
import sqlalchemy.exc

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.data import label_records


@pytest.mark.parametrize(
  ("place", "url"),
  [
    ("/labels/one", "sqlite:////labels/one/labels.sqlite"),
    ("postgresql://ann@host/db", "postgresql+psycopg://ann@host/db"),
    ("postgresql+psycopg://host/db", "postgresql+psycopg://host/db"),
  ],
)
def test_the_database_of_a_project(place, url):
  assert str(label_records.url_of(place, "--project")) == url
  assert places.expand_source(f"labels:{place}?until=3", "--x") == f"labels:{place}?until=3"


def test_a_folders_name_is_no_query():
  found = label_records.url_of("/why?not=1", "--project")
  assert (found.database, dict(found.query)) == ("/why?not=1/labels.sqlite", {})


def test_a_url_that_is_none_is_refused_without_its_password():
  with pytest.raises(UserError, match="^--project must be a folder, or the URL") as error:
    label_records.url_of("postgresql://ann:secret@host:port/db", "--project")
  assert "secret" not in str(error.value)


def test_other_sources_are_no_urls():
  with pytest.raises(UserError, match="is not read or written"):
    places.expand_source("jsonl:postgresql://host/db", "--x")


@pytest.mark.parametrize("kind", ["comparisons", "demonstrations", "prompts"])
def test_an_empty_folder_is_no_project(tmp_path, kind):
  with pytest.raises(UserError, match="it holds no labels.sqlite"):
    label_records.rows(str(tmp_path), kind, "all")
  with pytest.raises(UserError, match="holds prompts, demonstrations and comparisons"):
    label_records.rows(str(tmp_path), "documents", "all")


@pytest.mark.parametrize(
  ("state", "said"), [("42P01", "holds no labeling project: name"), ("42501", "cannot be read")]
)
def test_a_database_without_the_tables_is_no_project(monkeypatch, state, said):
  """As psycopg says it."""
  why = Exception("refused")
  why.sqlstate = state

  def refused(url):
    raise sqlalchemy.exc.ProgrammingError("SELECT", {}, why)

  monkeypatch.setattr(sqlalchemy, "create_engine", refused)
  with pytest.raises(UserError, match=said):
    label_records.rows("postgresql://ann@host/empty", "prompts", "all")
