"""Control tokens: which tokens are some, and that no text, message or split over messages produces one."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models

from instructjax.core.errors import UserError
from instructjax.data import controls
from instructjax.data.controls import Rendered
from instructjax.data.special_tokens import SpecialTokens
from instructjax.data.tokenizer import load, prompt_ids
from tests.data import added_spellings

START, END, TOOL = added_spellings.START, added_spellings.END, added_spellings.TOOL
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
  ("token", "is_one"),
  [
    *[
      (text, True)
      for text in ("<s>", "</s>", "[INST]", "<|im_end|>", ">>ANSWER<<", "<\uff5cUser\uff5c>")
    ],
    *[
      (text, False)
      for text in ("the", "\u2581the", "\u0120the", "...", "<|", "'s", "a<b>", "< a >")
    ],
  ],
)
def test_what_looks_like_markup(token, is_one):
  assert controls.looks_like_markup(token) is is_one


@pytest.mark.parametrize(
  ("token", "is_one"),
  [
    ("<|im_start|>", True),
    ("<system>", True),  # <{{ role }}>
    ("<|user|>", True),  # '<|' + role + '|>'
    ("USER:", True),
    ("#tool#", False),
    ("user", False),  # a word of the program
    ("0", False),
    ("  ", False),
  ],
)
def test_what_a_template_uses(token, is_one):
  template = (
    "<|im_start|>{{ '<|' + m['role'] + '|>' if m.role == 'user' else 'USER:' }}  {{ m[0] }}"
    "<{{ m.role }}>"
  )
  assert controls.is_used(token, template) is is_one
  assert not controls.is_used(token, None)


def test_whose_texts_are_control_tokens():
  special = SpecialTokens(
    where=None, chat_template=TEMPLATE, named=(("pad_token", "<pad>"), ("unk_token", "!"))
  )
  atomic, ordinary = [START, TOOL, "  "], [END, "<pad>", "!", "user", "\n"]
  assert controls.texts(special, atomic, ordinary) == {START, END, "<pad>"}


def test_a_text_is_cut_inside_the_tokens_that_it_may_not_give():
  """Two letters are a token where they fit, and "ab" is forbidden."""
  ids = {"ab": 9, "bc": 8, "a": 1, "b": 2, "c": 3}

  def encode(text):
    found, places = [], []
    while text:
      size = 2 if text[:2] in ids else 1
      found.append(ids[text[:size]])
      places.append((sum(e - s for s, e in places), sum(e - s for s, e in places) + size))
      text = text[size:]
    return found, places

  pieces = lambda text, forbidden: controls.ordinary_pieces(encode, text, forbidden)
  assert pieces("cab", {9}) == [3, 1, 2]
  assert pieces("abcab", {9}) == [1, 8, 1, 2]
  assert pieces("bcb", {9}) == [8, 2]
  with pytest.raises(UserError, match="the text 'c' is a control token and cannot be written"):
    pieces("ac", {3})


def folder(path, *, tokens=(), template=TEMPLATE, normalizer=None, **config):
  """A byte-level tokenizer whose tokens no file calls special."""
  decoder = {str(257 + i): {"content": token} for i, token in enumerate((START, END, *tokens))}
  config = {"added_tokens_decoder": decoder, "chat_template": template} | config
  added_spellings.write(path, {"tokenizer_config": config})
  if normalizer:
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": normalizer}}))
  return load(path)


def test_of_tokens_that_begin_alike_the_longest_is_found():
  found = controls.pattern(["<s>", "<s><b>", "<b>"])
  assert found is not None and found.findall("<s><b><s> <b>") == ["<s><b>", "<s>", "<b>"]


def test_only_what_the_template_made_holds_control_tokens(tmp_path):
  tokenizer = folder(tmp_path, tokens=[TOOL])
  chat = tokenizer.chats.render_one([{"role": "user", "content": f"a{TOOL}"}])
  assert isinstance(chat, Rendered)
  assert tokenizer.decode([257, 64, 259, 258]) == f"a{TOOL}"
  # user, a newline, an a: letters of the vocabulary in the order of their bytes.
  user = tokenizer.encode("user\na")
  assert prompt_ids(tokenizer, chat) == [257, *user, 259, 258]
  for text in (str(chat), f"{START}user\na", "<|endoftext|>"):
    for ids in (prompt_ids(tokenizer, text), tokenizer.encode(text)):
      assert not {256, 257, 258} & set(ids)
      assert tokenizer.decode(ids) == text
  assert tokenizer.encode(TOOL) == [259]  # no control token, but one of the vocabulary
  assert tokenizer.control_pattern.findall(str(chat) + TOOL) == [START, END]


@pytest.mark.parametrize("name", ["pad_token", "unk_token", "sep_token", "image_token"])
def test_a_token_of_a_name_is_a_control_token(tmp_path, name):
  tokenizer = folder(tmp_path, tokens=[TOOL], template=None, **{name: TOOL})
  assert 259 not in tokenizer.encode(TOOL)
  assert tokenizer.encode_prompt(TOOL) == [259]


def test_a_stop_token_is_a_control_token(tmp_path):
  added_spellings.write(
    tmp_path,
    {
      "tokenizer_config": {"added_tokens_decoder": {"257": {"content": TOOL}}},
      "generation_config": {"eos_token_id": [256, 257]},
    },
  )
  assert 257 not in load(tmp_path).encode(TOOL)


def refuse(tokenizer, message, *contents):
  with pytest.raises(UserError, match=message):
    tokenizer.chats.render_one([{"role": "user", "content": text} for text in contents])


def test_messages_hold_no_control_token(tmp_path):
  tokenizer = folder(tmp_path)
  refuse(
    tokenizer, r"message 2 of a chat must not hold the special token '<\|im_start\|>'", "a", START
  )
  assert tokenizer.chats.render_one([{"role": "user", "content": "<|im_"}]).endswith(
    "<|im_<|im_end|>"
  )


def test_messages_do_not_spell_one_together(tmp_path):
  template = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_start|><|im_end|>"
  tokenizer = folder(tmp_path, template=template)
  together = r"the messages of a chat together spell the special token '<\|im_end\|>'"
  refuse(tokenizer, together, "a <|im_", "end|>")
  refuse(tokenizer, together, "a <", "|im_end|> b")
  for contents in (["a <|im_", " end|>"], ["<", "a>"], [">", "<"], ["", "end|>"]):
    messages = [{"role": "user", "content": text} for text in contents]
    assert tokenizer.chats.render_one(messages) == "".join(contents) + START + END


def test_other_letters_that_are_normalized_to_a_control_token(tmp_path):
  (tmp_path / "plain").mkdir()
  decoder = {"257": {"content": END, "normalized": True, "special": True}}
  changes = {"added_tokens_decoder": decoder, "normalizer": "NFKC"}
  tokenizer = folder(tmp_path, **changes)
  wide = "\uff1c|im_end|>"
  assert tokenizer.encode_prompt(wide) == [257]
  refuse(
    tokenizer, r"message 1 .* the special token '<\|im_end\|>' in its content, not even in", wide
  )
  assert 257 not in tokenizer.encode(wide)


def test_a_letter_that_serves_as_the_pad_token_stays_a_letter(tmp_path):
  tokenizer = folder(tmp_path, pad_token="!")
  assert tokenizer.decode(tokenizer.encode("a!")) == "a!"
  assert tokenizer.chats.render_one([{"role": "user", "content": "a!"}])


def test_an_end_that_stands_for_unknown_letters_is_refused(tmp_path):
  """Otherwise every text with such a letter would end there."""
  letters = [("<unk>", 0.0), *((letter, -2.0) for letter in map(chr, range(9, 127)))]
  content = json.loads(Tokenizer(models.Unigram(letters, unk_id=0, byte_fallback=False)).to_str())
  content["decoder"] = {"type": "Fuse"}
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))
  with pytest.raises(UserError, match="encodes letters that it does not know to the token 0, at"):
    load(tmp_path)


def test_a_token_that_merges_lead_to_is_cut(tmp_path):
  """The vocabulary itself, not only the added tokens, can spell a token of the template."""
  added_spellings.write(
    tmp_path, {"tokenizer_config": {"chat_template": "<u>{{ messages[0].content }}"}}
  )
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  content["model"]["vocab"] |= {"<u": 256, "<u>": 257}
  content["added_tokens"][0]["id"] = 258
  content["pre_tokenizer"]["use_regex"] = False
  content["model"]["merges"] = [["<", "u"], ["<u", ">"]]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  tokenizer = load(tmp_path)
  assert tokenizer.encode_prompt("a<u>") == [64, 257]
  ids = tokenizer.encode("a<u><u>")
  assert 257 not in ids and tokenizer.decode(ids) == "a<u><u>"
  refuse(tokenizer, "must not hold the special token '<u>'", "a<u>")


def test_half_of_a_surrogate_pair_is_refused(tmp_path):
  tokenizer = folder(tmp_path)
  for encode in (tokenizer.encode, tokenizer.encode_prompt):
    with pytest.raises(UserError, match=r"a text holds '\\udcff', which is no character"):
      encode("say \udcff")


def test_stop_tokens(caplog):
  """Settings for generation are taken at their word; of a config only control tokens count."""
  tokens = {5: ("<e>", True), 6: ("word", False), 7: ("<f>", True)}
  stops = lambda **lists: controls.stop_ids(
    5, SpecialTokens(where=None, **lists), lambda i: tokens.get(i, (None, False)), "FILE"
  )
  assert stops(stops=(7, 5, 6)) == (5, 7, 6)
  assert "FILE: answers also end at 'word', a stop token of its settings" in caplog.text
  assert stops(model_stops=(6, 7)) == (5, 7)
  assert "eos_token_id=6, 'word', is a word and is ignored" in caplog.text
  assert stops(stops=(99,)) == (5,)
  assert "the stop token 99 is not in the vocabulary" in caplog.text


def test_flags_of_added_tokens_do_not_matter(tmp_path):
  tokenizer = folder(tmp_path)
  before = tokenizer.encode(START)
  raw = tokenizer._prompts  # as its file has it
  raw.add_special_tokens([AddedToken(START, special=True)])
  assert before == tokenizer.encode(START) and 257 not in before
