"""Takes out of a text what looks like personal data: addresses, numbers of phones, cards, accounts and documents.

Called by the playground before a prompt is kept. The patterns are those of Presidio (the extra `privacy`), used without
its language models: so names of people and places, and what is told about somebody in words, stay.
"""

import functools

from instructjax.core.errors import UserError

EXTRA = "pip install 'instructjax[privacy]'"
_LEAST = 0.35  # score below which Presidio itself calls a pattern a bare guess
# Presidio's name of a kind -> what stands in its place.
_KINDS = {
  "EMAIL_ADDRESS": "EMAIL",
  "PHONE_NUMBER": "PHONE",
  "CREDIT_CARD": "CARD",
  "IBAN_CODE": "ACCOUNT",
  "IP_ADDRESS": "ADDRESS",
  "URL": "LINK",
  "US_SSN": "NUMBER",
  "US_ITIN": "NUMBER",
  "UK_NHS": "NUMBER",
  "CRYPTO": "ACCOUNT",
}


def require():
  """Checks that the library is there, and has it read its tables, which takes seconds.

  Raises:
    UserError: it is not.
  """
  strip("+1 212 555 0199")


@functools.cache
def _recognizers() -> tuple:
  try:
    from presidio_analyzer import PatternRecognizer
    from presidio_analyzer import predefined_recognizers as known
  except ImportError as error:
    raise UserError(
      f"the playground takes personal data out of prompts with Presidio, and {error.name} is missing: {EXTRA}"
    ) from error
  # The library's own for addresses would fetch a list of domains from the network, to let wrong ones pass.
  email = PatternRecognizer("EMAIL_ADDRESS", patterns=known.EmailRecognizer.PATTERNS)
  return (
    email,
    known.PhoneRecognizer(),
    known.CreditCardRecognizer(),
    known.IbanRecognizer(),
    known.IpRecognizer(),
    known.UrlRecognizer(),
    known.UsSsnRecognizer(),
    known.UsItinRecognizer(),
    known.NhsRecognizer(),
    known.CryptoRecognizer(),
  )


def strip(text: str) -> str:
  """The text with the kind, as [EMAIL], in place of each part that looks like personal data.

  Raises:
    UserError: the extra `privacy` is not installed.
  """
  found = []
  for recognizer in _recognizers():
    results = recognizer.analyze(text, recognizer.supported_entities, None) or ()
    found += [
      (one.start, one.end, _KINDS.get(one.entity_type, "NUMBER"))
      for one in results
      if one.score >= _LEAST
    ]
  return replaced(text, found)


def replaced(text: str, found: list[tuple[int, int, str]]) -> str:
  """The text with `[KIND]` in place of each part (start, end, kind); of parts that overlap, the longest names it."""
  parts, end = [], 0
  spans: list[tuple[int, int, str, int]] = []
  for start, stop, kind in sorted(found):
    length = stop - start
    if spans and start < spans[-1][1]:
      first, last, known, longest = spans[-1]
      best = kind if length > longest else known
      spans[-1] = (first, max(last, stop), best, max(length, longest))
    else:
      spans.append((start, stop, kind, length))
  for start, stop, kind, _ in spans:
    parts += [text[end:start], f"[{kind}]"]
    end = stop
  return "".join([*parts, text[end:]])
