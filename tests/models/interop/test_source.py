"""The cheap identity of weights files."""

from instructjax.models.interop.source import fingerprint


def test_fingerprint(tmp_path):
  path, other = tmp_path / "a", tmp_path / "b"
  content = bytearray(3 << 20)
  path.write_bytes(content)
  first = fingerprint([path])
  assert fingerprint([path]) == first
  for change in (0, (1 << 20) - 1, 2 << 20, (3 << 20) - 1):  # both edges of both ends
    path.write_bytes(content[:change] + b"x" + content[change + 1 :])
    assert fingerprint([path]) != first, change
  path.write_bytes(content + b"\0")
  assert fingerprint([path]) != first
  path.write_bytes(content)
  other.write_bytes(content)
  assert len({fingerprint(files) for files in ([path], [other], [path, other], [other, path])}) == 4


def test_fingerprint_of_small_files(tmp_path):
  path = tmp_path / "config.json"
  path.write_bytes(b"{}")
  first = fingerprint([path])
  path.write_bytes(b"[]")
  assert fingerprint([path]) != first
