"""Pushing an export, against a small HTTP server that answers as the hub does."""

import base64
import http.server
import importlib
import json
import sys
import threading

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = importlib.import_module("huggingface_hub.constants")

from instructjax.core.errors import UserError  # noqa: E402
from instructjax.serve import hub  # noqa: E402

TOKEN = "hf_secret"
# The library's use of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(http.server.ThreadingHTTPServer):
  """Answers the calls of one upload. Files that end in .safetensors and .gguf go by Git LFS.

  Attributes:
    refuse, refuse_puts: status for every call, or of those that send a large file; 0 for none.
    existing: repositories that are there already.
    created: bodies of the calls that make a repository.
    files: place -> content, of the last commit.
    tokens: what came with the calls.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Answers)
    self.refuse_puts = 0
    self.refuse, self.existing, self.created, self.tokens = 0, set(), [], set()
    self.files, self.large, self.commits = {}, {}, []

  @property
  def address(self):
    return f"http://127.0.0.1:{self.server_port}"


class Answers(http.server.BaseHTTPRequestHandler):
  """One call."""

  def log_message(self, *args):
    pass

  def _answer(self, status, body=None, **headers):
    data = json.dumps(body or {}).encode()
    self.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def do_PUT(self):
    self.server.large[self.path.rpartition("/")[2]] = self._body()
    self._answer(self.server.refuse_puts or 200)

  def _body(self):
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def do_GET(self):
    # Older versions of the library ask whether files go by Xet.
    self._answer(
      200, {"id": "org/name", "siblings": [], "xetEnabled": False}
    ) if "/revision/" in self.path else self._answer(404)

  def do_POST(self):
    server, body = self.server, self._body()
    if not self.path.startswith("/put"):
      server.tokens.add(self.headers.get("Authorization"))
    if server.refuse:
      self._answer(server.refuse, {"error": "You cannot\ndo that."})
    elif self.path == "/api/repos/create":
      wanted = json.loads(body)
      server.created.append(wanted)
      name = f"{wanted['organization']}/{wanted['name']}"
      status = 409 if name in server.existing else 200
      self._answer(status, {"url": f"{server.address}/{name}"})
    elif self.path == "/api/validate-yaml":
      self._answer(200, {"warnings": []})
    elif "/preupload/" in self.path:
      is_large = lambda path: path.endswith((".safetensors", ".gguf"))
      self._answer(
        200,
        {
          "files": [
            {
              "path": file["path"],
              "uploadMode": "lfs" if is_large(file["path"]) else "regular",
              "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
          ]
        },
      )
    elif self.path.endswith("/info/lfs/objects/batch"):
      objects = [
        {**item, "actions": {"upload": {"href": f"{server.address}/put/{item['oid']}"}}}
        for item in json.loads(body)["objects"]
      ]
      self._answer(200, {"transfer": "basic", "objects": objects})
    elif "/commit/" in self.path:
      self._commit(body)
    else:
      self.send_error(404, self.path)

  def _commit(self, body):
    server, repository = self.server, self.path.split("/commit/")[0].removeprefix("/api/models/")
    for line in map(json.loads, body.splitlines()):
      value = line["value"]
      if line["key"] == "file":
        server.files[value["path"]] = base64.b64decode(value["content"])
      elif line["key"] == "lfsFile":
        server.files[value["path"]] = server.large[value["oid"]]
    server.commits.append(repository)
    url = f"{server.address}/{repository}/commit/abc"
    self._answer(200, {"commitUrl": url, "commitOid": "abc", "success": True})


@pytest.fixture
def server(monkeypatch):
  with Hub() as hub_server:
    thread = threading.Thread(target=hub_server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    # Both are read from the environment when the library is imported, which it has been.
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub_server
    hub_server.shutdown()
    thread.join()


FILES = {
  "README.md": b"# A model\n",
  "config.json": b"{}\n",
  "model.safetensors": bytes(range(256)) * 9,
}


@pytest.fixture
def folder(tmp_path):
  out = tmp_path / "my export"
  out.mkdir()
  for name, data in FILES.items():
    (out / name).write_bytes(data)
  return out


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_becomes_one_commit(server, folder, private):
  address = hub.push(folder, "org/name", private=private)
  assert address == f"{server.address}/org/name"
  assert server.files == FILES and server.commits == ["org/name"]
  (created,) = server.created
  assert (created["organization"], created["name"]) == ("org", "name")
  assert created.get("visibility", "private" if created.get("private") else "public") == (
    "private" if private else "public"
  )
  assert server.tokens == {f"Bearer {TOKEN}"}


def test_a_gguf_file_goes_with_its_card(server, tmp_path):
  (tmp_path / "ppo.gguf").write_bytes(b"GGUF" * 99)
  (tmp_path / "ppo.md").write_bytes(b"# A card\n")
  (tmp_path / "other.txt").write_bytes(b"not of the export")
  server.existing.add("org/name")
  hub.push(tmp_path / "ppo.gguf", "org/name", private=True)
  assert server.files == {"ppo.gguf": b"GGUF" * 99, "README.md": b"# A card\n"}


@pytest.mark.parametrize(
  "status, why",
  [
    (401, "the hub does not accept the token (401); run `hf auth login`, or set HF_TOKEN"),
    (
      403,
      "the token may not write to org (403); give one that may, with `hf auth login` or HF_TOKEN",
    ),
    (400, "the hub refuses (400): You cannot"),
  ],
)
def test_a_refusal_is_one_line_and_keeps_the_export(server, folder, status, why):
  server.refuse = status
  with pytest.raises(UserError) as raised:
    hub.push(folder, "org/name", private=True)
  assert str(raised.value) == (
    f"--push=org/name: {why}. The export is kept; to push it: hf upload org/name '{folder}' --private"
  )
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_a_refusal_of_a_large_file_tells_the_cause(server, folder):
  server.refuse_puts = 403
  with pytest.raises(UserError, match=r"^--push=org/name: the token may not write to org \(403\)"):
    hub.push(folder, "org/name", private=False)
  assert not server.commits


def test_no_network_is_one_line(server, folder, monkeypatch):
  server.shutdown()
  server.server_close()
  with pytest.raises(UserError, match=r"^--push=org/name: the hub cannot be reached: .*refused"):
    hub.push(folder, "org/name", private=False)


@pytest.mark.parametrize(
  "name", ["", "name", "org/name/more", "org/", "/name", "org/na me", "org/é", "org/a\nb"]
)
def test_a_bad_name(name, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  with pytest.raises(UserError, match="must be ORG/NAME, of letters, digits, '-', '_' and '.'"):
    hub.require(name)


@pytest.mark.parametrize("name", ["org/a--b", "org/a..b", "org/name.git", "org/" + "x" * 97])
def test_a_name_that_the_hub_does_not_allow(name, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  with pytest.raises(UserError, match=r"^--push=org/.* must be a name that the hub allows: "):
    hub.require(name)


def test_no_token(monkeypatch):
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  with pytest.raises(UserError) as raised:
    hub.require("org/name")
  assert str(raised.value) == "--push=org/name needs a token: run `hf auth login`, or set HF_TOKEN"


def test_without_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"needs the hub extra: pip install 'instructjax\[hub\]'$"):
    hub.require("org/name")
