"""Samples a policy's answers and measures each of them; measures answers that no policy gave in the same way.

Called by evaluate.py. The judge of answers is the gold score if the prompts are a simulated task's, and the
reward model otherwise.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from instructjax.core import terminal
from instructjax.core.errors import UserError
from instructjax.core.stages import FEW_SHOT, REFERENCE, STAGES, stage_of_policy
from instructjax.data import sources
from instructjax.data.tokenizer import prompt_ids
from instructjax.ops import kl
from instructjax.report import intervals, wording
from instructjax.report.results import Measured
from instructjax.stages import answers, judging, lineage, policies, untrained
from instructjax.stages.context import Context
from instructjax.train import damaged, manifest

# Policies that were not tuned: the bases, and the larger one with examples. They go on after an answer, so theirs is
# cut at the first newline (App. D). Their KL from the PPO initialisation is not measured.
UNTUNED = {
  FEW_SHOT.name,
  *(row.policy.name for row in STAGES.values() if row.policy and row.is_base),
}
_COLUMNS = 128  # columns of a few-shot prompt are a multiple of this many [tokens]
SHOTS = (1, 2, 3)  # numbers of worked examples that the larger base is tried with


def few_shot_prompts(
  ctx: Context, prompts: list[str], shots: int = SHOTS[-1]
) -> tuple[list[str], int]:
  """Puts worked examples before a simulated task's prompts: (texts, columns of a prompt).

  Raises:
    UserError: one of them is longer.
  """
  simulation = sources.require_simulation(ctx.config.data.prompts)
  texts = [simulation.few_shot_prompt(prompt, num_examples=shots) for prompt in prompts]
  context, answer = ctx.config.reward_model.max_length, ctx.config.data.max_response_length
  longest = max((len(prompt_ids(ctx.tokenizer, text)) for text in texts), default=0)
  if longest + answer > context:
    raise UserError(
      f"config.reward_model.max_length={context} must hold the few-shot prompt of {longest} tokens and"
      f" max_response_length={answer}; raise it to {longest + answer}"
    )
  # Rounded up, so that the numbers of examples share compiled programs; but not to a long context of which most columns
  # would be pads.
  return texts, min(context - answer, -(-longest // _COLUMNS) * _COLUMNS)


def sample(
  ctx: Context,
  name: str,
  prompts: list[str],
  stage: str,
  shots: int = SHOTS[-1],
  step: int | None = None,
) -> answers.Answers:
  """Samples a policy's answers, one to each prompt; a base model's ends at the first newline, as in App. D.

  Args:
    ctx: the run.
    name: the policy.
    prompts: what it answers.
    stage: the stage that asks; with `name` it decides the random numbers.
    shots: worked examples before a prompt, if it is the larger base with examples.
    step: of an RL policy, the checkpoint to sample; None for the last.
  """
  cfg, length = ctx.config.evaluate, ctx.config.data.max_prompt_length
  source = "reward_base" if name == FEW_SHOT.name else name
  model = ctx.model(stage_of_policy(source).require_role())
  if name == FEW_SHOT.name:
    prompts, length = few_shot_prompts(ctx, prompts, shots)
  return answers.sample(
    ctx,
    model,
    policies.load(ctx, source, step=step),
    [prompt_ids(ctx.tokenizer, text) for text in prompts],
    ctx.key(f"{stage}/{name}"),
    temperature=cfg.temperature,
    prompt_length=length,
    to_newline=name in UNTUNED,
  )


def measure(
  ctx: Context,
  name: str,
  prompts: list[str],
  stage: str,
  shots: int = SHOTS[-1],
  step: int | None = None,
) -> Measured:
  """Samples one policy's answers and measures each of them. Arguments as for `sample`."""
  sampled = sample(ctx, name, prompts, stage, shots, step)
  kl_N = None
  if name not in UNTUNED:
    # Of the very tokens that were sampled, while the reward model reads them as its tokenizer spells the text.
    policy, temperature = ctx.model("policy"), ctx.config.evaluate.temperature
    logprob_N, ref_logprob_N = (
      answers.logprob(ctx, policy, policies.load(ctx, source, step=at), sampled, temperature)
      for source, at in ((name, step), (REFERENCE, None))
    )
    kl_N = kl.estimate(logprob_N, ref_logprob_N, kl.FORM)
  scored = answers.from_text(ctx, prompts, sampled.text, sampled.ended_N)
  return _judge(ctx, prompts, scored, sampled.text, sampled.is_response_NR.sum(1), kl_N)


def measure_checkpoints(
  ctx: Context, prompts: list[str], stage: str
) -> dict[str, dict[int, Measured]]:
  """Measures what RL policies answered on their way, at the steps of `lineage.kept_steps`; says which are not there.

  Such a step was not kept if `evaluate.checkpoints` had another value while the stage was trained.

  Args:
    ctx: the run.
    prompts: what they answer.
    stage: the stage that asks. The random numbers are others at each step, and others than those of `measure`.
  Returns:
    policy -> step, growing -> its answers. Without policies of which nothing was kept.
  """
  wanted = {name: lineage.kept_steps(ctx.config, name) for name in lineage.rl_stages(ctx.config)}
  saved = {name: damaged.saved_steps(ctx.directory(name)) for name in wanted}
  lacking = {
    name: missing
    for name, steps in wanted.items()
    if (missing := [step for step in steps if step not in saved[name]])
  }
  if lacking and jax.process_index() == 0:
    terminal.say(_lack(stage, ctx.config.evaluate.checkpoints, lacking))
  found: dict[str, dict[int, Measured]] = {}
  for name, steps in wanted.items():
    policy = STAGES[name].require_policy().name
    for step in _whole(ctx, name, [step for step in steps if step in saved[name]], stage):
      answered = measure(ctx, policy, prompts, f"{stage}/step_{step}", step=step)
      found.setdefault(policy, {})[step] = answered
  return found


def _whole(ctx: Context, name: str, steps: Sequence[int], stage: str) -> list[int]:
  """Those steps whose checkpoint is not damaged; says which are. All processes must call it.

  No stage goes on from these checkpoints, so a run need not end because of one.
  """
  whole = []
  for step in steps:
    damage = manifest.find_damage(ctx.directory(name) / damaged.FOLDER / str(step))
    if damage is None:
      whole.append(step)
    elif jax.process_index() == 0:
      terminal.say(f"{stage} leaves out step {step} of {name}: {damage}")
  return whole


def _lack(stage: str, asked: int, lacking: Mapping[str, Sequence[int]]) -> str:
  """The line that says which checkpoints were not kept."""
  each = "; ".join(f"{name}: {', '.join(map(str, steps))}" for name, steps in lacking.items())
  return (
    f"{stage} measures no checkpoints of steps that were not kept, though evaluate.checkpoints={asked} asks for them:"
    f" {each}"
  )


def _judge(
  ctx: Context,
  prompts: list[str],
  scored: answers.Answers,
  texts: list[str],
  length: np.ndarray,
  kl_N: np.ndarray | None = None,
) -> Measured:
  """Measures answers, whoever they are by."""
  reward = answers.score(ctx, ctx.model("reward"), policies.load_reward(ctx), scored)
  gold = names_topic = topic_again = None
  simulation = judging.simulation(ctx)
  if simulation is not None:
    gold = np.asarray(simulation.gold_score(prompts, texts))
    times = np.array([simulation.topic_count(p, a) for p, a in zip(prompts, texts)])
    names_topic, topic_again = times > 0, times > 1
  return Measured(
    answer=texts,
    reward=reward,
    ended=scored.ended_N,
    length=length,
    kl=kl_N,
    gold=gold,
    repeats=np.array([wording.repeats_pair(text) for text in texts]),
    copied=np.array([wording.copied(p, a) for p, a in zip(prompts, texts)]),
    names_topic=names_topic,
    topic_again=topic_again,
  )


def measure_untrained(ctx: Context, prompts: list[str]) -> dict[str, Measured]:
  """Measures answers that need no training."""
  found = {}
  for name, texts in untrained.answers_without_training(ctx, prompts).items():
    scored = answers.from_text(ctx, prompts, texts, np.ones(len(texts), bool))
    found[name] = _judge(ctx, prompts, scored, texts, scored.is_response_NR.sum(1))
  return found


def best_few_shot(
  ctx: Context, prompts: list[str], stage: str, counted: np.ndarray
) -> tuple[Measured, dict[int, float]]:
  """The larger base's answers with the number of worked examples whose answers score best, and all numbers' scores.

  Chosen by what judges, on the prompts that it judges on: the choice favours the baseline.

  Args:
    ctx: the run.
    prompts: the prompts of the evaluation.
    stage: the stage that asks.
    counted: places of the prompts whose scores choose.
  """
  tried = {shots: measure(ctx, FEW_SHOT.name, prompts, stage, shots) for shots in SHOTS}
  scores = {
    shots: float(np.mean(intervals.judged(found.take(counted)))) for shots, found in tried.items()
  }
  return tried[max(scores, key=scores.__getitem__)], scores
