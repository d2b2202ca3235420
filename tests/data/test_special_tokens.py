import dataclasses
import json

import pytest

from instructjax.core.errors import UserError
from instructjax.data import chat_files, special_tokens


@pytest.fixture
def folder(tmp_path):
  """folder(name=content, ...): a folder of JSON files."""

  def write(**files):
    for name, content in files.items():
      (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path

  return write


FILES = {
  "tokenizer_config": {"eos_token": {"content": "<a>", "lstrip": False}, "bos_token": None},
  "special_tokens_map": {"eos_token": "<b>", "bos_token": "<bos>"},
  "generation_config": {"eos_token_id": [5, 7]},
  "config": {"eos_token_id": 9, "bos_token_id": 8},
}


@pytest.mark.parametrize(
  ("names", "eos"),
  [
    ("tokenizer_config special_tokens_map generation_config config", "<a>"),  # Llama 3 Instruct
    ("special_tokens_map generation_config config", "<b>"),
    ("generation_config config", 5),
    ("config", 9),  # GPT-2
    ("", None),
  ],
)
def test_the_first_file_that_names_an_eos_is_believed(folder, names, eos):
  path = folder(**{name: FILES[name] for name in names.split()})
  assert special_tokens.read_folder(path).eos == eos


def test_bos_is_not_taken_from_the_model_s_config(folder):
  assert special_tokens.read_folder(folder(config=FILES["config"])).bos is None
  assert special_tokens.read_folder(folder(**FILES)).bos == "<bos>"


def test_an_empty_list_of_ids_says_nothing(folder):
  path = folder(generation_config={"eos_token_id": []}, config={"eos_token_id": 9})
  assert special_tokens.read_folder(path).eos == 9


def test_chat_templates_of_all_times(folder):
  read = special_tokens.read_folder
  assert read(folder()).chat_template is None
  assert read(folder(tokenizer_config={"chat_template": "one"})).chat_template == "one"
  named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
  path = folder(tokenizer_config={"chat_template": named})
  assert read(path).chat_template == "two"
  assert read(path).where.name == "tokenizer_config.json"
  (path / "chat_template.jinja").write_text("three")
  assert read(path).chat_template == "three"
  assert read(path).where.name == "chat_template.jinja"


def test_bad_files_are_refused(folder, tmp_path):
  named = [{"name": "tool_use", "template": "x"}]
  with pytest.raises(ValueError, match=r"must have one named 'default', has 'tool_use'"):
    special_tokens.read_folder(folder(tokenizer_config={"chat_template": named}))
  for content, message in [("{", "config.json must be JSON: "), ("[]", "must be a JSON object")]:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
      special_tokens.read_folder(tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (
      "tokenizer_config.json",
      b'{"a": "\xff"}',
      r"tokenizer_config.json must be JSON: it is not UTF-8 \(byte 8\)",
    ),
    ("chat_template.jinja", b"\xff", r"chat_template.jinja is not UTF-8 \(byte 1\)"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be text, got int"),
    (
      "tokenizer_config.json",
      b'{"chat_template": ["a"]}',
      "chat_template: entry 1 must have a name",
    ),
    *[
      ("tokenizer_config.json", content, message)
      for content, message in (
        (
          b'{"add_bos_token": "true"}',
          "config.json: add_bos_token must be true or false, got 'true'",
        ),
        (b'{"eos_token": {"content": 5}}', "config.json: eos_token: content must be a text, got 5"),
        (
          b'{"eos_token": {"content": "a", "lstrip": 1}}',
          "eos_token: lstrip must be true or false",
        ),
        (b'{"pad_token": ["a"]}', r"config.json: pad_token must be a text or an id, got \['a'\]"),
        (b'{"pad_token": ""}', "config.json: pad_token must be a text or an id, got ''"),
        (b'{"unk_token": 3000000}', "unk_token must be a token's id, .* got 3000000"),
        (
          b'{"added_tokens_decoder": []}',
          r"added_tokens_decoder must hold a JSON object, got \[\]",
        ),
        (b'{"added_tokens_decoder": {"x": {}}}', r"added_tokens_decoder\['x'\] must have an id as"),
        (b'{"added_tokens_decoder": {"-1": {}}}', r"\['-1'\] must have an id as its key"),
        (b'{"added_tokens_decoder": {"1": "a"}}', r"\['1'\] must hold a JSON object, got 'a'"),
        (b'{"added_tokens_decoder": {"2147483648": {"content": "a"}}}', "got 2147483648"),
        (b'{"additional_special_tokens": "a"}', "additional_special_tokens must be a list of tok"),
        (b'{"extra_special_tokens": [null]}', r"extra_special_tokens\[0\] must be a text or an id"),
      )
    ],
    ("added_tokens.json", b'{"a": 1.0}', "added_tokens.json: 'a' must be a token's id"),
    ("added_tokens.json", b'{"a": 7, "b": 7}', "two added tokens have the id 7"),
    ("special_tokens_map.json", b'{"eos_token": [1]}', r"map.json: eos_token must be a text or an"),
    ("generation_config.json", b'{"eos_token_id": [1, "2"]}', "eos_token_id must be .* got '2'"),
    ("config.json", b'{"eos_token_id": true}', "config.json: eos_token_id must be .* got True"),
    (
      "tokenizer_config.json",
      b'{"bos_token": true}',
      "bos_token must be a text or an id, got True",
    ),
    (
      "generation_config.json",
      b'{"eos_token_id": -1}',
      "eos_token_id must be a token's id, a whole number from 0 to 2097151, got -1",
    ),
  ],
)
def test_files_of_the_wrong_kind_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    special_tokens.read_folder(tmp_path)


def test_what_is_written_is_read(tmp_path):
  special = special_tokens.SpecialTokens(
    where=tmp_path / "a" / "tokenizer_config.json",
    bos="<s>",
    eos="é",
    adds_bos=True,
    chat_template="{{ x }}\n",
  )
  special_tokens.write_folder(tmp_path / "a", special, None)
  named = tuple(special_tokens.Added(text, is_named=True) for text in ("<s>", "é"))
  again = special_tokens.read_folder(tmp_path / "a")
  assert again == dataclasses.replace(special, added=named)
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer_config.json"]
  more = dataclasses.replace(
    special,
    added=(special_tokens.Added("<|u|>", 9, rstrip=True, normalized=True, special=False),),
    named=(("pad_token", "<p>"), ("image_token", "<i>")),
    stops=(7, 2),
  )
  special_tokens.write_folder(tmp_path / "b", more, None)
  again = special_tokens.read_folder(tmp_path / "b")
  assert (again.named, again.stops) == (more.named, more.stops)
  assert again.added[0] == dataclasses.replace(more.added[0], replaces=True)


def test_named_tokens_and_the_clock_are_kept(folder, tmp_path):
  path = folder(
    tokenizer_config={"pad_token": {"content": "<pad>"}, "unk_token": None},
    special_tokens_map={"pad_token": "<other>", "unk_token": "<unk>"},
  )
  chat_files.write_clock(path, "2026-03-01T12:00:00")
  found = special_tokens.read_folder(path)
  assert dict(found.named) == {"pad_token": "<pad>", "unk_token": "<unk>"}
  assert found.clock == "2026-03-01T12:00:00"
  # What another program or another run reads has no date of this run.
  special_tokens.write_folder(tmp_path / "copy", found, None)
  again = special_tokens.read_folder(tmp_path / "copy")
  assert (dict(again.named), again.clock) == (dict(found.named), None)
