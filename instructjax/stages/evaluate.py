"""Measuring every policy of a run on test prompts and held-out text (sec 4): answers, results, findings, report.

Answers are judged by the demo's gold score where the prompts are the demo's, else by the reward model.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import rich.console
import rich.table

from instructjax import report
from instructjax.core.errors import UserError
from instructjax.core.results import Evaluated
from instructjax.core.stages import FEW_SHOT, STAGES, stage_of_policy
from instructjax.data import sources
from instructjax.ops import kl
from instructjax.parallel import sharding
from instructjax.report import findings
from instructjax.report.results import BestOfN, Measured, Results
from instructjax.stages import answers, lineage, policies
from instructjax.stages.context import Context, finish, provenance_of, stage_run
from instructjax.stages.text_rows import validation_rows
from instructjax.train import metrics, supervised

# Judged without being tuned: they answer in one line, and have no distance from the PPO initialisation.
_UNTUNED = {
  FEW_SHOT.name,
  *(row.policy.name for row in STAGES.values() if row.policy and not row.parents),
}


def judged_policies(ctx: Context) -> list[str]:
  """Names judged, in the paper's order: bases, SFT, RL. `few_shot` is the larger base shown worked examples."""
  line = lineage.line(ctx.config, "evaluate")
  names = [row.policy.name for row in map(STAGES.__getitem__, line) if row.policy]
  if sources.simulation(ctx.config.data.prompts) is not None:
    names.insert(sum(name in _UNTUNED for name in names), FEW_SHOT.name)
  return names


def _of_one_network(names: list[str]) -> list[str]:
  """The judged policies of the policy's network: of another one the loss does not compare."""
  return [n for n in names if n != FEW_SHOT.name and stage_of_policy(n).role == "policy"]


def check(ctx: Context, stage: str):
  """Raises UserError where the larger base has no room for the few-shot prompt."""
  if FEW_SHOT.name in judged_policies(ctx):
    few_shot_prompts(ctx, test_prompts(ctx))


def test_prompts(ctx: Context) -> list[str]:
  """Prompts that chose nothing before, as many as are asked for; what is too long is left out."""
  texts = [record.prompt for record in ctx.data.records("prompts", "test")]
  limit = ctx.config.data.max_prompt_length
  fitting = [text for text in texts if len(ctx.tokenizer.encode_prompt(text)) <= limit]
  return fitting[: ctx.config.evaluate.num_prompts]


def few_shot_prompts(ctx: Context, prompts: list[str]) -> tuple[list[str], int]:
  """The demo's prompts behind worked examples, and the tokens that the larger base has room for.

  Raises:
    UserError: one of them needs more.
  """
  simulation = sources.require_simulation(ctx.config.data.prompts)
  texts = [simulation.few_shot_prompt(prompt) for prompt in prompts]
  context, answer = ctx.config.reward_model.max_length, ctx.config.data.max_response_length
  longest = max((len(ctx.tokenizer.encode_prompt(text)) for text in texts), default=0)
  if longest + answer > context:
    raise UserError(
      f"config.reward_model.max_length={context} must hold the few-shot prompt of {longest} tokens and"
      f" max_response_length={answer}; raise it to {longest + answer}"
    )
  return texts, context - answer


def _sample(ctx: Context, name: str, prompts: list[str], stage: str) -> answers.Answers:
  """One answer a prompt. A base model's answer is its next line (App. D: samples are cut at the first newline)."""
  cfg, length = ctx.config.evaluate, ctx.config.data.max_prompt_length
  source = "reward_base" if name == FEW_SHOT.name else name
  model = ctx.model(stage_of_policy(source).require_role())
  if name == FEW_SHOT.name:
    prompts, length = few_shot_prompts(ctx, prompts)
  return answers.sample(
    ctx,
    model,
    policies.load(ctx, source),
    [ctx.tokenizer.encode_prompt(text) for text in prompts],
    ctx.key(f"{stage}/{name}"),
    temperature=cfg.temperature,
    prompt_length=length,
    to_newline=name in _UNTUNED,
  )


def _measure(ctx: Context, name: str, prompts: list[str], stage: str) -> Measured:
  """Answers of one policy with what can be said of each."""
  sampled = _sample(ctx, name, prompts, stage)
  reward_model, reward_params = ctx.model("reward"), policies.load_reward(ctx)
  scored = answers.from_text(ctx, prompts, sampled.text, sampled.ended_N)
  reward = answers.score(ctx, reward_model, reward_params, scored)
  kl_N = gold = names_topic = None
  if name not in _UNTUNED:
    policy, temperature = ctx.model("policy"), ctx.config.evaluate.temperature
    logprob_N, ref_logprob_N = (
      answers.logprob(ctx, policy, policies.load(ctx, source), sampled, temperature)
      for source in (name, "ppo_init")
    )
    kl_N = kl.k1(logprob_N, ref_logprob_N)
  simulation = sources.simulation(ctx.config.data.prompts)
  if simulation is not None:
    gold = np.asarray(simulation.gold_score(prompts, sampled.text))
    named = [simulation.names_topic(p, a) for p, a in zip(prompts, sampled.text)]
    names_topic = np.array(named)
  return Measured(
    answer=sampled.text,
    reward=reward,
    ended=sampled.ended_N,
    length=sampled.is_response_NR.sum(1),
    kl=kl_N,
    gold=gold,
    names_topic=names_topic,
  )


def pretraining_losses(ctx: Context, names: list[str]) -> dict[str, np.ndarray]:
  """name -> [rows, 2] (sum of negative log-likelihoods, tokens) of the same held-out rows of pretraining text."""
  model = ctx.model("policy")
  rows = validation_rows(ctx, ctx.config.pretrain.length)
  sums = supervised.jit_sums(functools.partial(supervised.lm_row_sums, model), ctx.mesh, model)
  result = {}
  for name in names:
    params = policies.load(ctx, name)
    parts = [
      np.stack(sharding.to_host(sums(params, sharding.place_batch(ctx.mesh, batch))), axis=1)
      for batch in rows
    ]
    result[name] = np.concatenate(parts)
  return result


def best_of_n(gold_PN: np.ndarray, reward_PN: np.ndarray, counts: list[int]) -> list[BestOfN]:
  """Expected gold and reward of the best of n by reward, for each n; unbiased over all subsets of N samples.

  Sorted by reward, the i-th of N (from 1) is the best of a random n-subset with probability C(i-1, n-1) / C(N, n)
  (Nakano et al. 2021, App. I). KL(best of n || policy) = log n - (n - 1) / n, in nats.
  """
  total = reward_PN.shape[1]
  order = np.argsort(reward_PN, axis=1, kind="stable")
  result = []
  for n in counts:
    weight = np.zeros(total)
    # Ratio C(i-1, n-1) / C(N, n) by recurrence from the top: i = N has n / N.
    weight[-1] = n / total
    for i in range(total - 1, n - 1, -1):
      weight[i - 1] = weight[i] * (i - n + 1) / i
    expected = {
      name: float(np.mean(np.take_along_axis(values, order, axis=1) @ weight))
      for name, values in (("gold", gold_PN), ("reward", reward_PN))
    }
    result.append(BestOfN(n=n, kl=float(np.log(n) - (n - 1) / n), **expected))
  return result


def _best_of_n(ctx: Context, prompts: list[str], stage: str) -> list[BestOfN]:
  """Best-of-n of the PPO initialisation by the reward model, for n = 1, 2, 4 .. best_of_n."""
  total, simulation = ctx.config.evaluate.best_of_n, sources.simulation(ctx.config.data.prompts)
  if simulation is None or total < 2:
    return []
  repeated = [prompt for prompt in prompts for _ in range(total)]
  sampled = _sample(ctx, "ppo_init", repeated, f"{stage}/best_of_n")
  scored = answers.from_text(ctx, repeated, sampled.text, sampled.ended_N)
  reward = answers.score(ctx, ctx.model("reward"), policies.load_reward(ctx), scored)
  gold = np.asarray(simulation.gold_score(repeated, sampled.text))
  counts = [2**i for i in range(total.bit_length()) if 2**i <= total]
  return best_of_n(gold.reshape(-1, total), reward.reshape(-1, total), counts)


def run(ctx: Context, stage: str):
  """Judges all finished policies; writes answers.jsonl, results.json, findings.json and the report."""
  cfg, directory = ctx.config.evaluate, ctx.directory(stage)
  names = judged_policies(ctx)
  run_ = stage_run(ctx, stage, cfg)
  page = ctx.workdir / "report" / "index.html"
  # Nothing starts from here: with other settings, or another policy to judge, it is done anew.
  done = ctx.done(stage)
  if done and done.fingerprint == run_.fingerprint:
    if jax.process_index() == 0:
      _show(json.loads((page.parent / "findings.json").read_text()), done.result.summary, page)
    return
  unique = test_prompts(ctx)
  prompts = [prompt for prompt in unique for _ in range(cfg.samples_per_prompt)]
  measured = {name: _measure(ctx, name, prompts, stage) for name in names}
  collected = ctx.done("collect") if lineage.collects(ctx.config) else None
  results = Results(
    samples_per_prompt=cfg.samples_per_prompt,
    measured=measured,
    pretraining=pretraining_losses(ctx, _of_one_network(names)),
    reward_model=ctx.require_done("rm").result,
    agreement=collected.result.agreement if collected else None,
    best_of_n=_best_of_n(ctx, unique[: cfg.best_of_n_prompts], stage),
    curves={
      STAGES[stage].require_policy().name: metrics.read_metrics(ctx.directory(stage))
      for stage in lineage.rl_stages(ctx.config)
    },
  )
  if jax.process_index() != 0:
    return
  directory.mkdir(parents=True, exist_ok=True)
  with open(directory / "answers.jsonl", "w", encoding="utf-8") as file:
    for i, prompt in enumerate(prompts):
      row = {name: measured[name].answer[i] for name in names}
      file.write(json.dumps({"prompt": prompt, "answers": row}, ensure_ascii=False) + "\n")
  summary = findings.summary(results)
  plain = {
    "policies": summary,
    "best_of_n": [dataclasses.asdict(row) for row in results.best_of_n],
    "agreement": results.agreement and dataclasses.asdict(results.agreement),
  }
  (directory / "results.json").write_text(json.dumps(plain, indent=1) + "\n")
  found = findings.find(results, bootstrap=cfg.bootstrap, seed=ctx.config.seed)
  before = [name for name in lineage.line(ctx.config, stage) if name != stage]
  made = {name: done.require_provenance() for name in before if (done := ctx.done(name))}
  made[stage] = provenance_of(ctx, stage, run_)
  report.write(page.parent, ctx.config, prompts, results, found, made)
  finish(ctx, stage, run_, None, Evaluated(summary))
  _show(found, summary, page)


def _show(found: list[dict], summary: dict, page: pathlib.Path):
  """The end-of-run tables: a row a policy, a row a finding."""
  console = rich.console.Console()
  columns = sorted({key for row in summary.values() for key in row})
  policies_table = rich.table.Table(
    "policy", *columns, title="means on held-out prompts", title_justify="left"
  )
  for name, row in summary.items():
    policies_table.add_row(name, *(f"{row[key]:.3f}" if key in row else "" for key in columns))
  console.print(policies_table)
  table = rich.table.Table(
    "finding", "measured", "holds", title="the paper's findings", title_justify="left"
  )
  for finding in found:
    measured = ", ".join(f"{key} {value:.3f}" for key, value in finding["measured"].items())
    table.add_row(finding["id"], measured, "[green]yes[/]" if finding["holds"] else "[red]no[/]")
  console.print(table)
  console.print(f"report: {page}", soft_wrap=True)
