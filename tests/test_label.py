"""The command of the labeling application: its words, and what it says where something is wrong."""

import json
import re
import socket
import sys
import types

import pytest
import uvicorn
from absl.testing import flagsaver
from starlette import testclient

from instructjax.core.errors import UserError
from instructjax.labels import accounts, personal, projects, schema
from instructjax.labels import prompts as prompts_
from tests import own_flags


@pytest.fixture(scope="module")
def label():
  with own_flags.command("instructjax.label") as module:
    yield module


@pytest.fixture
def run(label, tmp_path, capsys):
  """run(words, flag=value, ...) -> what the command prints; the project is in tmp_path/p."""

  def one(words: str, **flags):
    with flagsaver.flagsaver(**{"project": str(tmp_path / "p")} | flags):
      label.main(words.split())
    return capsys.readouterr().out

  return one


def prompts(tmp_path, count=3) -> str:
  path = tmp_path / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": f"Prompt {i}"}) + "\n" for i in range(count)))
  return f"jsonl:{path}"


def test_a_project_from_a_prompt_file(run, tmp_path):
  (tmp_path / "say.txt").write_text("Be kind.")
  flags = {"title": "Colours", "instructions": str(tmp_path / "say.txt"), "wanted": 2}
  assert run("add", prompts=prompts(tmp_path), limit=2, **flags) == "2 items added\n"
  database = schema.open_(str(tmp_path / "p"))
  assert projects.settings(database)["instructions"] == "Be kind."
  with database.read() as connection:
    items = connection.execute(schema.items.select()).all()
  assert [(item.kind, item.wanted, item.prompt) for item in items] == [
    ("demonstration", 2, '"Prompt 0"'),
    ("demonstration", 2, '"Prompt 1"'),
  ]


def test_a_users_prompts_stay_together(run, tmp_path):
  rows = [{"prompt": f"Prompt {i}", "user": [7, "bob"][i % 2]} for i in range(8)]
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  run("add", prompts=f"jsonl:{tmp_path}/prompts.jsonl", held_out="0.5")
  with schema.open_(str(tmp_path / "p")).read() as connection:
    found = {(row.author, row.split) for row in connection.execute(schema.items.select())}
  assert sorted(author for author, _ in found) == ["7", "bob"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [({"kind": "demonstration"}, "has no answers, got 4"), ({"wanted": 0}, "wanted=0 must be")],
)
def test_what_no_item_may_be_is_said_before_sampling(run, tmp_path, flags, message):
  with pytest.raises(UserError, match=message):
    run("sample", prompts=prompts(tmp_path), checkpoint=["/absent"], **flags)


def test_an_address_that_is_taken_is_a_mistake_in_a_line(run):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"--host=127.0.0.1 --port={port} cannot be used: .*in use"):
      run("serve", port=port)


@pytest.mark.parametrize(
  ("flags", "asks", "is_believed"),
  [
    ({"proxy": "10.0.0.5", "public": "a.org"}, "10.0.0.5", True),
    ({"proxy": "10.0.1.0/24, 10.0.0.5", "public": "a.org"}, "10.0.1.9", True),
    ({"proxy": "10.0.0.5", "public": "a.org"}, "10.0.0.6", False),
    ({"public": "a.org"}, "127.0.0.1", True),
    ({"public": "a.org"}, "::1", True),
    ({"public": "a.org"}, "10.0.0.5", False),
    ({}, "127.0.0.1", False),
  ],
)
def test_wrong_passwords_are_counted_by_the_browser_that_a_proxy_names(
  run, tmp_path, monkeypatch, flags, asks, is_believed
):
  configs = []

  def server(config):
    configs.append(config)
    return types.SimpleNamespace(run=lambda sockets: sockets[0].close())

  monkeypatch.setattr(uvicorn, "Server", server)
  # Its handlers would outlive what the test captures.
  monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)
  run("serve", port=0, **flags)
  (config,) = configs
  config.load()
  client = testclient.TestClient(config.loaded_app, "https://localhost", client=(asks, 1))
  (hidden,) = re.findall('name="csrf" value="(.*?)"', client.get("/sign-in").text)
  fields = {"csrf": hidden, "name": "admin", "password": "wrong"}
  client.post("/sign-in", data=fields, headers={"X-Forwarded-For": "6.6.6.6, 192.0.2.7"})
  with schema.open_(str(tmp_path / "p")).read() as connection:
    (attempt,) = connection.execute(schema.attempts.select()).all()
  assert attempt.address == ("192.0.2.7" if is_believed else asks)


def test_accounts_are_made_and_reset(run, tmp_path):
  said = run("users add ann", role="researcher")
  password = re.search("password (\\S+),", said)[1]
  database = schema.open_(str(tmp_path / "p"))
  assert accounts.sign_in(database, "ann", password, "here", 0.0)
  again = re.search("password (\\S+),", run("users reset ann"))[1]
  assert accounts.sign_in(database, "ann", password, "here", 0.0) is None
  assert accounts.sign_in(database, "ann", again, "here", 0.0)
  assert run("users") == "ann\tresearcher\ttraining\tactive\n"


@pytest.mark.parametrize(
  ("words", "flags", "message"),
  [
    ("", {}, "the first argument must be one of serve, add"),
    ("paint", {}, "the first argument must be one of"),
    ("serve again", {}, "unexpected arguments"),
    ("serve", {"checkpoint": ["m"]}, "--checkpoint is for --playground"),
    ("serve", {"project": ""}, "--project must have a value"),
    ("serve", {"host": "0.0.0.0"}, "give its name as --public=NAME"),
    ("serve", {"public": "https://a.org"}, "--public='https://a.org' must be the name alone"),
    ("serve", {"public": "a.org:8443"}, "--public='a.org:8443' must be the name alone"),
    ("serve", {"host": "0.0.0.0", "public": "a.org"}, "--host=0.0.0.0 needs --proxy=ADDRESS"),
    ("serve", {"proxy": "10.0.0.5"}, "--proxy is for --public=NAME"),
    ("serve", {"public": "a.org", "proxy": "nginx"}, "--proxy='nginx' must be an address"),
    (
      "serve",
      {"public": "a.org", "proxy": "10.0.0.5,*"},
      "--proxy='10.0.0.5,*' must be an address",
    ),
    ("export", {"to": "x"}, "is no labeling project yet"),
    ("sample", {}, "--checkpoint must have a value"),
    ("sample", {"checkpoint": ["x"], "k": 10}, "--k=10 must be 2 to 9"),
    ("sample", {"checkpoint": ["x"] * 3, "k": 2}, "--k=2 must be at least the number of"),
    ("add", {"prompts": "x"}, "--prompts='x' must start with one of demo:"),
    ("serve", {"project": "postgresql://h:p/d"}, "--project must be a folder, or the URL"),
    ("users add", {}, "users takes nothing"),
    ("users add a/b", {}, "name 'a/b' must be up to 80 letters"),
    ("users add ann", {"role": "king"}, "role 'king' must be one of"),
    ("users reset ann", {}, "is no labeling project yet"),
    ("import", {}, "--from must have a value"),
    ("delete", {}, "delete takes the name of one person"),
    ("users data ann", {"to": "x"}, "is no labeling project yet"),
    ("prompts", {}, "is no labeling project yet"),
    ("close", {"batch": "b"}, "is no labeling project yet"),
    ("training", {}, "--workdir must have a value"),
    ("add", {"held_out": "2"}, "held_out='2' must be between 0 and 1"),
    ("add", {"instructions": "/absent"}, "--instructions=/absent cannot be read"),
  ],
)
def test_mistakes(run, tmp_path, words, flags, message):
  with pytest.raises(UserError, match=re.escape(message)):
    run(words, **flags)


def test_a_database_that_another_program_holds_is_told_in_a_line(run, tmp_path, monkeypatch):
  monkeypatch.setattr(schema, "_WAIT", 0.01)
  database = schema.create(str(tmp_path / "p"))
  with (
    database.write(),
    pytest.raises(UserError, match="labels.sqlite refuses: database is locked"),
  ):
    run("close", batch="b")


def test_a_labeler_named_admin_is_none(run):
  run("users add admin")
  with pytest.raises(UserError, match="make one by `label users add NAME --role=admin`"):
    run("serve")


def test_without_the_extra_the_command_names_it(run, monkeypatch):
  monkeypatch.setitem(sys.modules, "argon2", None)
  with pytest.raises(UserError, match=r"needs argon2.*: pip install 'instructjax\[label\]'"):
    run("users")


def test_export_writes_the_files(run, tmp_path):
  run("add", prompts=prompts(tmp_path))
  with pytest.raises(UserError, match="holds no comparisons yet"):
    run("export", to=str(tmp_path / "out"))
  said = run("export", kind="prompts", to=str(tmp_path / "out"))
  assert "records" in said and (tmp_path / "out" / "train.jsonl").exists()


def test_in_by_import_and_out_by_export_and_away_by_deletion(run, tmp_path):
  row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1], "labeler": "ann"}
  (tmp_path / "r.jsonl").write_text(
    json.dumps(row) + "\n" + json.dumps(row | {"prompt": "q", "ranks": [2, 1]})
  )
  assert (
    run("import", **{"from": f"jsonl:{tmp_path}/r.jsonl"}) == "2 items with 2 submissions added\n"
  )
  said = run("export", to=str(tmp_path / "out"), format="label_studio")
  assert "1 rankings left out: format label_studio has no place for their ties" in said
  run("users data ann", to=str(tmp_path / "ann.json"))
  assert len(json.loads((tmp_path / "ann.json").read_text())["submissions"]) == 2
  assert "ann is deleted, with 0 drafts" in run("delete ann")
  with pytest.raises(UserError, match="holds no comparisons yet"):
    run("export", to=str(tmp_path / "out"))


def test_answers_of_two_checkpoints_share_k_and_hide_where_they_come_from(
  run, tmp_path, monkeypatch
):
  """Of three answers the first model gives two; no two answers to a prompt are drawn with the same seed."""
  from instructjax.evaluation import language_model

  asked = []

  def generate(model, requests):
    asked.extend((model.name, one.prompt, one.seed, one.max_new_tokens) for one in requests)
    return [f" {model.name} {one.seed} " for one in requests]

  fake = lambda name, mesh: types.SimpleNamespace(
    name=name, tokenizer=types.SimpleNamespace(chats=types.SimpleNamespace(has_template=False))
  )
  monkeypatch.setattr(language_model, "open_model", fake)
  monkeypatch.setattr(language_model, "generate", generate)
  flags = {"checkpoint": ["m1", "m2"], "k": 3, "items": 2, "max_new_tokens": 7}
  assert run("sample", prompts=prompts(tmp_path, 2), **flags) == "4 items added\n"
  assert len(asked) == len(set(asked)) == 12 and {row[3] for row in asked} == {7}
  first = [(name, seed) for name, prompt, seed, _ in asked if prompt == "Prompt 0"]
  assert first == [("m1", 0), ("m1", 2), ("m1", 9), ("m1", 11), ("m2", 1), ("m2", 10)]
  with schema.open_(str(tmp_path / "p")).read() as connection:
    rows = connection.execute(schema.answers.select()).all()
  assert {(row.origin, row.text) for row in rows if row.item_id in (1, 3)} == {
    (name, f"{name} {seed}") for name, seed in first
  }
  with pytest.raises(UserError, match="--temperature=nan must be a number"):
    run("sample", prompts=prompts(tmp_path, 2), **flags | {"temperature": float("nan")})
  with pytest.raises(UserError, match="--items=0 must be at least 1"):
    run("sample", prompts=prompts(tmp_path, 2), **flags | {"items": 0})


def test_users_prompts_come_out_by_user(run, tmp_path):
  run("users add una", role="user")
  database = schema.open_(str(tmp_path / "p"))
  out = str(tmp_path / "pool.jsonl")
  with pytest.raises(UserError, match="holds no prompts of users yet"):
    run("prompts", to=out)
  prompts_.keep(database, accounts.User(1, "una", "user"), "one", 1.0)
  assert f"{out}: 1 prompt of 1 user; add them with --prompts=jsonl:{out}" in run("prompts", to=out)
  row = json.loads((tmp_path / "pool.jsonl").read_text())
  assert row["prompt"] == "one" and re.fullmatch("u1:[0-9a-f]{16}", row["user"])
  run("add", prompts=f"jsonl:{out}", source="customer")
  with database.read() as connection:
    (item,) = connection.execute(schema.items.select()).all()
  assert (item.author, item.source) == (row["user"], "customer")


def test_the_playground_needs_the_extra(run, tmp_path, monkeypatch):
  personal._recognizers.cache_clear()
  monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
  with pytest.raises(UserError, match=r"pip install 'instructjax\[privacy\]'"):
    run("serve", playground=True, checkpoint=["m"])
  assert not (tmp_path / "p").exists()  # no admin's password was shown and lost
