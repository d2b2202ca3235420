"""The tokenizer of a run: the one that the config names, else that of the given weights, else one that is trained.

Called by pipeline.py when it makes the run's Context.
"""

import contextlib
import logging
import pathlib
from collections.abc import Mapping

import jax

from instructjax.core import results
from instructjax.core.config import Config
from instructjax.core.errors import UserError, writing
from instructjax.data import chat, chat_files, sources
from instructjax.data import tokenizer as tokenizers
from instructjax.data.records import Document
from instructjax.parallel import distributed
from instructjax.stages import policies
from instructjax.stages.contents import Contents, NotThere
from instructjax.stages.context import canonical
from instructjax.train import finished
from instructjax.train.weights import Weights


def of_run(
  config: Config,
  directory: pathlib.Path,
  given: Mapping[str, Weights],
  path: str,
  contents: Contents,
) -> tokenizers.Tokenizer:
  """The run's tokenizer, which is kept in the workdir.

  Args:
    config: the run's config.
    directory: where the tokenizer is kept.
    given: weights in place of trained ones; if the config names no tokenizer, the first one's is taken.
    path: where the config's tokenizer lies on this host; '' if it names none.
    contents: what the documents hold, on which one is trained.
  Raises:
    UserError: its size is not the config's, it does not fit the given weights, or the workdir holds another one.
  """
  cfg, theirs = config.tokenizer, [weights.tokenizer_path for weights in given.values()]
  source = path or next(iter(theirs), "")
  tokenizer = tokenizers.load(source) if source else _train(config, directory, contents)
  policies.require_given_weights(config, given, tokenizer)
  if tokenizer.vocab_size != cfg.vocab_size:
    raise UserError(
      f"config.tokenizer.vocab_size={cfg.vocab_size} must be the {tokenizer.vocab_size} pieces of"
      f" {tokenizer.path}"
    )
  # After all checks: a workdir belongs to the tokenizer that it holds, so one from a mistaken flag must not get there.
  return _keep(tokenizer, directory) if source else tokenizer


def _keep(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> tokenizers.Tokenizer:
  """Copies a tokenizer from elsewhere into the workdir, so that the workdir can be used without the original.

  If its chat template asks for the date, the run's date is fixed here and kept beside it: every stage, and every run of
  the same command on a later day, reads the same prompts.

  Raises:
    UserError: the workdir holds another tokenizer, or its date is missing, or the files cannot be written.
  """
  if finished.read_done(directory):
    if tokenizers.load(directory).fingerprint != tokenizer.fingerprint:
      raise UserError(
        f"cannot go on with {directory.parent}: it was made with another tokenizer than"
        f" {tokenizer.path}. Use another --workdir, or the tokenizer in {directory}."
      )
  elif jax.process_index() == 0:
    with writing(directory):
      tokenizer.save(directory)
      if tokenizer.chats.has_clock:
        chat_files.write_clock(directory, chat.now())
    _write_done(directory, {"tokenizer": tokenizer.fingerprint})
  distributed.meet("tokenizer kept")
  if not tokenizer.chats.has_clock:
    return tokenizer
  kept = tokenizers.load(directory)
  if kept.chats.clock is None:
    raise UserError(
      f"cannot go on with {directory.parent}: the date that its chats were made with is missing in {directory}. Use"
      " another --workdir"
    )
  return kept


def _train(config: Config, directory: pathlib.Path, contents: Contents) -> tokenizers.Tokenizer:
  """Trains the tokenizer on the documents, or loads the one that an earlier run trained.

  Raises:
    UserError: that one was trained with other settings or documents or is not the one that was trained, or the
      documents cannot be read.
  """
  cfg, data = config.tokenizer, config.data
  blocks = {
    "config.tokenizer": cfg,
    "config.documents": {"validation_fraction": data.validation_fraction},
    "config.seed": config.seed,
  }
  fingerprint = {name: canonical(value) for name, value in blocks.items()}
  done = finished.read_done(directory)
  if done:
    tokenizer = tokenizers.load(directory)
    fingerprint["tokenizer"] = tokenizer.fingerprint
    files: dict[str, tuple[str, ...]] = {}
    try:
      content = contents.of("documents")
      fingerprint["data:documents"] = content.fingerprint
      files["data:documents"] = content.files
    except NotThere as error:  # whatever still reads them will say so
      logging.warning("the tokenizer is not compared with its documents: %s", error)
      fingerprint["data:documents"] = done.fingerprint.get("data:documents", "none")
    finished.require_same_run(directory, done.fingerprint, fingerprint, files)
  elif jax.process_index() == 0:
    with contextlib.suppress(NotThere):  # `load` says it better
      contents.of("documents")
    documents = sources.load(
      data.documents,
      "documents",
      "train",
      seed=config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )
    contents.require_same("documents")
    texts = [document.text for document in documents if isinstance(document, Document)]
    path = directory / "tokenizer.model"
    tokenizer = tokenizers.train_tokenizer(texts, cfg.vocab_size, path, config.seed)
    fingerprint["data:documents"] = contents.of("documents").fingerprint
    fingerprint["tokenizer"] = tokenizer.fingerprint
    _write_done(directory, fingerprint)
  distributed.meet("tokenizer trained")
  return tokenizers.load(directory)


def _write_done(directory: pathlib.Path, fingerprint: Mapping[str, str]):
  done = finished.Done(finished.TOKENIZER, fingerprint, None, results.Nothing())
  finished.write_done(directory, done)
