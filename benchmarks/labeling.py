"""Twenty labelers at once, for two minutes, with the server killed by SIGKILL in the middle and started again.

    python -m benchmarks.labeling --seconds=120

Each labeler signs in, and over and over gets the next item, reads its page, saves a draft, and submits, with a pause
between as somebody has who clicks fast. Every twentieth form is sent twice. Prints the times of requests, and checks
in the database that each acknowledged submission is there exactly once. Exits with 1 if one is lost or doubled, or a
labeler could not go on.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

from instructjax.core import provenance

_PATIENCE = 30.0  # seconds that a labeler tries again while the server is away
_HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)"')
_FIELD = re.compile(r'name="(\d+)\.(\w+)"')


@dataclasses.dataclass
class Seen:
  """What one labeler has seen."""

  times: dict[str, list[float]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  acknowledged: list[str] = dataclasses.field(default_factory=list)  # tokens
  mistakes: list[str] = dataclasses.field(default_factory=list)


def parse(words: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seconds", type=float, default=120.0, help="how long labelers work")
  parser.add_argument("--labelers", type=int, default=20, help="labelers at once")
  parser.add_argument("--pause", type=float, default=0.5, help="mean pause before a request [s]")
  parser.add_argument(
    "--project", default="", help="postgresql:// URL of an empty database, in place of SQLite"
  )
  parser.add_argument("--no-kill", action="store_true", help="do not kill the server")
  return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
  import httpx  # of the test extra

  args = parse(words)
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.project or scratch
    names = [f"labeler{i}" for i in range(args.labelers)]
    passwords = make_project(folder, names, args)
    server, address = start(folder, 0)
    port = int(address.rstrip("/").rpartition(":")[2])
    seen = {name: Seen() for name in names}
    gate = threading.Barrier(len(names) + 1)  # the time begins when all are signed in
    threads = [
      threading.Thread(
        target=work_or_tell,
        args=(httpx, address.rstrip("/"), name, passwords[name], seen[name], gate, args),
        daemon=True,
      )
      for name in names
    ]
    for thread in threads:
      thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # which is among the mistakes
      gate.wait()
      if not args.no_kill:
        time.sleep(args.seconds / 2)
        stop(server, signal.SIGKILL)
        server, _ = start(folder, port)
    for thread in threads:
      thread.join()
    stop(server, signal.SIGTERM)
    return report(folder, list(seen.values()), args)


def make_project(folder: str, names: list[str], args: argparse.Namespace) -> dict[str, str]:
  """A project with more items than can be done; returns each labeler's password."""
  from instructjax.labels import accounts, projects, schema

  database = schema.create(folder)
  answers = tuple((f"An answer, number {i}. " * 8, "m") for i in range(4))
  count = int(args.seconds * len(names) / (3 * max(args.pause, 0.05)) + 10 * len(names))
  new = [projects.Item("ranking", f"Prompt {i}", answers) for i in range(count)]
  projects.add(database, new, 0.0)
  passwords = {}
  for name in names:
    passwords[name] = accounts.new_password()
    accounts.add(database, name, "labeler", passwords[name], 0.0)
  database.close()
  return passwords


def start(folder: str, port: int) -> tuple[subprocess.Popen, str]:
  """A server process and its address."""
  command = [sys.executable, "-m", "instructjax.label", "serve", f"--project={folder}"]
  server = subprocess.Popen(
    [*command, f"--port={port}"], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
  )
  for line in server.stdout or ():
    if match := re.search(r"Labeling at (\S+)", line):
      return server, match[1]
  raise SystemExit("the server did not start")


def stop(server: subprocess.Popen, number: signal.Signals):
  """Ends a server process by a signal."""
  server.send_signal(number)
  server.wait()
  if server.stdout is not None:
    server.stdout.close()


def work_or_tell(httpx, address: str, name: str, password: str, seen: Seen, gate, args):
  """`work`; whatever ends it early is a mistake, and nobody waits for this labeler."""
  try:
    work(httpx, address, name, password, seen, gate, args)
  except Exception as error:
    seen.mistakes.append(f"{name}: {error!r}")
    gate.abort()


def work(httpx, address: str, name: str, password: str, seen: Seen, gate, args):
  """One labeler's time at the screen."""
  rng = random.Random(name)
  with httpx.Client(base_url=address, timeout=20.0, follow_redirects=False) as client:

    def ask(kind: str, method: str, path: str, **more):
      """A request, tried again while the server is away; only tries that were answered are timed."""
      time.sleep(rng.expovariate(1 / args.pause))
      patience = time.monotonic() + _PATIENCE
      while True:
        begun = time.monotonic()
        try:
          answer = client.request(method, path, **more)
        except httpx.TransportError:
          if time.monotonic() > patience:
            raise
          time.sleep(0.2)
          continue
        seen.times[kind].append(time.monotonic() - begun)
        return answer

    html = ask("sign-in page", "GET", "/sign-in").text
    fields = dict(_HIDDEN.findall(html)) | {"name": name, "password": password}
    ask("sign-in", "POST", "/sign-in", data=fields)
    gate.wait()
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
      path = ask("next", "GET", "/next").headers.get("location", "")
      html = ask("item", "GET", path).text
      fields = dict(_HIDDEN.findall(html)) | filled(html, rng)
      token = fields.get("token", "")
      ask("draft", "POST", f"{path}/draft", data=fields)
      for _ in range(1 + (rng.random() < 0.05)):
        answer = ask("submit", "POST", f"{path}/submit", data=fields)
        if answer.status_code != 303:
          seen.mistakes.append(f"{path}: {answer.status_code}")
          break
        seen.acknowledged.append(token)


def filled(html: str, rng: random.Random) -> dict[str, str]:
  """A whole form: no to each question, quality and ranks at random."""
  fields = {}
  for number, name in _FIELD.findall(html):
    value = {"overall": str(rng.randint(1, 7)), "rank": str(rng.randint(1, 4)), "note": ""}
    fields[f"{number}.{name}"] = value.get(name, "no")
  return fields


def report(folder: str, seen: list[Seen], args: argparse.Namespace) -> int:
  """Prints what was measured; 0 if every acknowledged submission is there once."""
  from instructjax.labels import schema

  database = schema.open_(folder)
  with database.read() as connection:
    rows = connection.execute(schema.submissions.select()).all()
  tokens = [row.token for row in rows]
  pairs = [(row.item_id, row.user_id) for row in rows]
  acknowledged = {token for one in seen for token in one.acknowledged}
  lost = acknowledged - set(tokens)
  doubled = len(pairs) - len(set(pairs))
  mistakes = [mistake for one in seen for mistake in one.mistakes]
  everything = sorted(t for one in seen for kind in one.times for t in one.times[kind])
  killed = "" if args.no_kill else ", killed in the middle"
  cpu = f"{len(os.sched_getaffinity(0))} cores of {provenance.cpu_model()}"
  place = "PostgreSQL" if args.project else "SQLite"
  print(
    f"{len(seen)} labelers, {args.seconds:.0f} s, pauses of {args.pause} s{killed}; {place}; {cpu}"
  )
  print(f"{'request':14}{'count':>8}{'median ms':>11}{'95% ms':>9}{'most ms':>9}")
  for kind in ("sign-in", "next", "item", "draft", "submit"):
    times = sorted(t for one in seen for t in one.times[kind])
    print(
      f"{kind:14}{len(times):8}"
      + "".join(f"{1000 * q(times, p):{w}.0f}" for p, w in ((0.5, 11), (0.95, 9), (1, 9)))
    )
  print(
    f"{'all':14}{len(everything):8}{1000 * q(everything, 0.5):11.0f}{1000 * q(everything, 0.95):9.0f}"
  )
  print(
    f"acknowledged {len(acknowledged)}, in the database {len(tokens)}, lost {len(lost)}, doubled {doubled}"
  )
  print(f"requests that were not answered as they should: {len(mistakes)} {mistakes[:3]}")
  return 1 if lost or doubled or mistakes or not acknowledged else 0


def q(times: list[float], share: float) -> float:
  """A quantile of sorted times."""
  return times[min(int(share * len(times)), len(times) - 1)] if times else float("nan")


if __name__ == "__main__":
  sys.exit(main())
