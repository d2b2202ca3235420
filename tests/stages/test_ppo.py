"""The stage of PPO: the FLOPs that it counts. That it trains is in tests/rl/test_step_program.py and the pipeline's."""

import dataclasses

import pytest

from instructjax.rl import step as ppo_step
from instructjax.stages import ppo
from instructjax.train.optim import make_optimizer
from tests import tiny

VOCAB, EOS, PROMPT, RESPONSE, DOCUMENT = 23, 0, 3, 6, 8


@pytest.fixture
def nets(tiny_config, adam_config):
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = make_optimizer(adam_config, 100)
  return ppo_step.Nets(policy, scalar, tx, tx, stop_ids=(EOS,), max_response_length=RESPONSE)


def test_model_flops_of_an_iteration(ppo_config, nets):
  """16 prompts of 2 tokens on average and 50 sampled tokens; see tests/models/test_flops.py for the weights."""
  layers, head, scalar_head = 2 * 1632, 2 * 23 * 16, 2 * 17
  metrics = {"tokens": 50.0, "prompt_length": 2.0}
  read = 50 + 16 * 2
  policy = read * (layers + 2 * (PROMPT + RESPONSE) * 16) + 50 * head
  scalar = read * (layers + 2 * (PROMPT + RESPONSE) * 16 + scalar_head)
  text = 16 * 8 * DOCUMENT * (layers + 2 * DOCUMENT * 16 + head)
  plain = dataclasses.replace(ppo_config, ptx_rows=1, ptx_chunks=1)
  ptx = dataclasses.replace(ppo_config, gamma=0.5, behaviour_logprob="rescore")
  count = lambda cfg: ppo.model_flops(nets, cfg, PROMPT, metrics)
  # Sampled, scored by the reference (and anew by the policy), valued, rewarded; then two epochs, three times.
  assert count(ptx) == 3 * policy + 2 * scalar + 2 * 3 * (policy + scalar + text)
  assert count(plain) == 2 * policy + 2 * scalar + 2 * 3 * (policy + scalar)
