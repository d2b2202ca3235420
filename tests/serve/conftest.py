"""Fixtures of the tests of answering: a finished run, and who of it sits at the table."""

import dataclasses
import functools
import json

import pytest

from instructjax.core import results
from instructjax.data import tokenizer as tokenizers
from instructjax.serve import dialogue
from tests import finished_run, micro
from tests.serve.speaking import MEAN, SETTINGS, write_stage


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  """A run's folder with `sft`, `ppo_ptx` and `rm`, and (model, params) of each stage."""
  folder = tmp_path_factory.mktemp("run")
  cfg = micro.config("ppo_ptx", micro.write_data(folder / "data")).model.network
  cfg = dataclasses.replace(cfg, max_length=100)
  documents = folder / "data" / "documents.jsonl"
  texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
  path = folder / "tokenizer" / "tokenizer.model"
  tokenizer = tokenizers.train_tokenizer(texts, micro.VOCAB_SIZE, path, 0)
  write = functools.partial(write_stage, cfg=cfg, tokenizer=tokenizer)
  nets = {
    "sft": write(folder / "sft", head="lm", item="params", seed=1, result=results.Tuned(())),
    "ppo_ptx": write(
      folder / "ppo_ptx",
      head="lm",
      item="ema_params",
      seed=2,
      result=results.Nothing(),
      blocks={"config.ppo": '{"ema_decay": 0.9}'},
    ),
    "rm": write(
      folder / "rm", head="scalar", item="params", seed=3, result=finished_run.reward_model(MEAN)
    ),
  }
  return folder, nets


@pytest.fixture(scope="session")
def seat(run):
  """seat(*stages, reward='', **settings): the panel of these stages."""

  @functools.cache
  def one(*stages, reward="", **settings):
    paths = [str(run[0] / stage) for stage in stages]
    settings = dataclasses.replace(SETTINGS, **settings)
    return dialogue.seat(paths, reward and str(run[0] / reward), settings)

  return one


@pytest.fixture(scope="session")
def sft(seat):
  return seat("sft").speakers[0]
