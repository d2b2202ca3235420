"""A run's records and token lists, each read when it is first asked for and kept for the stages that follow."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from instructjax.core.config import Config
from instructjax.data import sources, tokenize
from instructjax.data.tokenizer import Tokenizer
from instructjax.stages import lineage


class RunData:
  """What the config's sources hold, in this run's tokens.

  Args:
    config: names the sources, and the seed of their order.
    workdir: of the run, where collected comparisons are.
    tokenizer: of the run.
  """

  def __init__(self, config: Config, workdir: pathlib.Path, tokenizer: Tokenizer):
    self._config, self._workdir, self._tokenizer = config, workdir, tokenizer
    self._kept: dict[tuple[str, ...], Any] = {}

  def _once(self, key: tuple[str, ...], read: Callable[[], Any]):
    if key not in self._kept:
      self._kept[key] = read()
    return self._kept[key]

  def records(self, kind: str, split: sources.Split) -> list:
    """Records of `kind` from the source that the config names, or the comparisons that were collected.

    Raises:
      UserError: they cannot be read, or a record is bad.
    """
    return self._once((kind, split), lambda: self._read(kind, split))

  def _read(self, kind: str, split: sources.Split) -> Sequence:
    data = self._config.data
    spec = getattr(data, kind)
    if kind == "comparisons" and lineage.collects(self._config):
      spec, split = f"jsonl:{self._workdir / 'collect' / split}.jsonl", "all"
    records = sources.load(
      spec,
      kind,
      split,
      seed=self._config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )
    return sources.render(records, self._tokenizer.render_chat, on_bad_record=data.on_bad_record)

  def document_tokens(self, split: sources.Split) -> list[list[int]]:
    """Token lists of the documents, each after the BOS token where the model is given one."""
    tokenizer = self._tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encode = lambda: [bos + tokenizer.encode(r.text) for r in self.records("documents", split)]
    return self._once(("document tokens", split), encode)

  def prompt_tokens(self, split: sources.Split) -> list[list[int]]:
    """Token lists of the prompts that fit max_prompt_length, as in App. C (longer ones are filtered, counted)."""

    def encode():
      limit = self._config.data.max_prompt_length
      records = self.records("prompts", split)
      return tokenize.tokenize_prompts(records, self._tokenizer, max_prompt_length=limit)[0]

    return self._once(("prompt tokens", split), encode)

  def demonstration_tokens(self, split: sources.Split) -> list:
    """Prompts and responses of the demonstrations as token lists; over-long ones are filtered and counted."""

    def encode():
      data = self._config.data
      return tokenize.tokenize_demonstrations(
        self.records("demonstrations", split),
        self._tokenizer,
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
      )[0]

    return self._once(("demonstration tokens", split), encode)
