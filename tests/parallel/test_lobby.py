"""Where processes gather: who is missing, who comes twice, who counts otherwise, and whose port is taken."""

import socket
import threading
from unittest import mock

import pytest

from instructjax.core.errors import NotJoined, UserError
from instructjax.parallel import lobby
from launch.local_pod import free_port


def meet(*guests: tuple[int, int], seconds: float = 20.0, port: int | None = None) -> list[str]:
  """How it ends for each of `guests`, (num_processes, process): '' or 'Type: message'."""
  port = port or free_port()
  ends = [""] * len(guests)

  def one(place: int, num_processes: int, process: int):
    try:
      lobby.gather(f"127.0.0.1:{port}", num_processes, process, seconds)
    except UserError as error:
      ends[place] = f"{type(error).__name__}: {error}"

  threads = [
    threading.Thread(target=one, args=(place, *guest)) for place, guest in enumerate(guests)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  return ends


def test_all_come():
  assert meet((3, 0), (3, 2), (3, 1)) == [""] * 3


def test_a_number_given_twice_ends_all_with_one_line():
  ends = meet((3, 0), (3, 1), (3, 1))
  (line,) = set(ends)
  assert line.startswith("UserError: --process_id=1 was given to two processes")


def test_counting_otherwise_ends_all_with_one_line():
  ends = meet((3, 0), (2, 1), (3, 2))
  (line,) = set(ends)
  assert "process 1 (from 127.0.0.1) has --num_processes=2, and process 0 has 3" in line


def test_those_missing_are_named_after_a_while_and_end_the_wait(capsys):
  with mock.patch.multiple(lobby, FIRST_REPORT=0.1, REPORT_EVERY=0.5):
    ends = meet((8, 0), (8, 1), (8, 5), seconds=1.0)
  (line,) = set(ends)
  assert line.startswith("NotJoined: processes 2-4, 6-7 of 8 did not come to --coordinator=127.")
  told = [line for line in capsys.readouterr().err.splitlines() if "2-4, 6-7 of 8 at 127" in line]
  assert len(told) == 2  # after .1 and .6 seconds


def test_a_taken_port_is_one_line():
  with socket.socket() as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(NotJoined, match=f"cannot listen on port {port} .*in use.* choose another"):
      lobby.gather(f"127.0.0.1:{port}", 2, 0, 5.0)


def test_what_is_no_process_of_a_run_is_ignored():
  port = free_port()

  def scan():
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": true, "of": 2}\n'):
      for _ in range(50):
        try:
          with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
            link.sendall(said)
          break
        except OSError:
          threading.Event().wait(0.05)

  scanner = threading.Thread(target=scan)
  scanner.start()
  late = threading.Timer(1.0, lambda: lobby.gather(f"127.0.0.1:{port}", 2, 1, 60.0))
  late.start()
  lobby.gather(f"127.0.0.1:{port}", 2, 0, 60.0)
  scanner.join()
  late.join()


def test_a_stranger_at_the_address_is_not_taken_for_process_0():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    answer = lambda: [
      (link := server.accept()[0]).sendall(b"HTTP/1.1 400\r\n"),
      link.close(),
    ]
    threading.Thread(target=answer, daemon=True).start()
    with mock.patch.object(lobby, "_STRANGER", 0.0):
      with pytest.raises(NotJoined, match="what answers there is not process 0 of a run"):
        lobby.gather(address, 2, 1, 60.0)


@pytest.mark.parametrize(
  "processes, text", [({3}, "process 3"), ({1, 2, 3, 7}, "processes 1-3, 7")]
)
def test_numbers_in_words(processes, text):
  assert lobby.numbers(processes) == text
