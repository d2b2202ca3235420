"""Measures every policy of a run on test prompts and held-out text (sec 4), and writes the report.

The judge of answers is the gold score if the prompts are the demo's, and the reward model otherwise.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from instructjax import report
from instructjax.core import terminal
from instructjax.core.errors import UserError, writing
from instructjax.core.results import Evaluated
from instructjax.core.stages import FEW_SHOT, REFERENCE, STAGES, stage_of_policy
from instructjax.core.text import json_line
from instructjax.data import sources
from instructjax.data.tokenizer import prompt_ids
from instructjax.ops import kl
from instructjax.parallel import sharding
from instructjax.report import equal_kl, findings
from instructjax.report import rounds as report_rounds
from instructjax.report.results import BestOfN, Measured, Results
from instructjax.stages import answers, lineage, policies, rounds
from instructjax.stages.context import Context, finish, provenance_of, stage_run
from instructjax.stages.text_rows import validation_rows
from instructjax.train import accumulation, metrics, supervised

# Policies that were not tuned: the bases, and the larger one with examples. They go on after an answer, so theirs is
# cut at the first newline (App. D). Their KL from the PPO initialisation is not measured.
_UNTUNED = {
  FEW_SHOT.name,
  *(row.policy.name for row in STAGES.values() if row.policy and row.is_base),
}


def judged_policies(ctx: Context) -> list[str]:
  """The names of the policies to judge, in the paper's order: bases, SFT, RL.

  `few_shot`, the larger base with worked examples in its prompt, follows the bases. Only the demo has such examples.
  """
  line = lineage.line(ctx.config, "evaluate")
  names = [row.policy.name for row in map(STAGES.__getitem__, line) if row.policy]
  # Without it where the reward model is given, so that the run has no larger base.
  has_base = lineage.stage_of(ctx.config, "reward_base") in line
  if sources.simulation(ctx.config.data.prompts) is not None and has_base:
    # Right after the bases, with which the list begins.
    names.insert(sum(name in _UNTUNED for name in names), FEW_SHOT.name)
  return names


def _of_one_network(names: list[str]) -> list[str]:
  """Those policies that have the policy's own network, because losses of different networks do not compare."""
  return [n for n in names if n != FEW_SHOT.name and stage_of_policy(n).role == "policy"]


def check(ctx: Context, stage: str):
  """Checks that the larger base has room for the few-shot prompts.

  Raises:
    UserError: it has not.
  """
  if FEW_SHOT.name in judged_policies(ctx):
    few_shot_prompts(ctx, test_prompts(ctx))


def test_prompts(ctx: Context) -> list[str]:
  """The first `evaluate.num_prompts` test prompts that are not too long.

  The demo has a test split of its own, because its validation prompts have already chosen the SFT epoch. Every other
  source gives its validation prompts here.
  """
  texts = [record.prompt for record in ctx.data.records("prompts", "test")]
  limit = ctx.config.data.max_prompt_length
  fitting = [text for text in texts if len(prompt_ids(ctx.tokenizer, text)) <= limit]
  return fitting[: ctx.config.evaluate.num_prompts]


def few_shot_prompts(ctx: Context, prompts: list[str]) -> tuple[list[str], int]:
  """Puts worked examples before the demo's prompts: (texts, tokens of a prompt that the larger base has room for).

  Raises:
    UserError: one of them is longer.
  """
  simulation = sources.require_simulation(ctx.config.data.prompts)
  texts = [simulation.few_shot_prompt(prompt) for prompt in prompts]
  context, answer = ctx.config.reward_model.max_length, ctx.config.data.max_response_length
  longest = max((len(prompt_ids(ctx.tokenizer, text)) for text in texts), default=0)
  if longest + answer > context:
    raise UserError(
      f"config.reward_model.max_length={context} must hold the few-shot prompt of {longest} tokens and"
      f" max_response_length={answer}; raise it to {longest + answer}"
    )
  return texts, context - answer


def _sample(ctx: Context, name: str, prompts: list[str], stage: str) -> answers.Answers:
  """Samples a policy's answers, one to each prompt; a base model's ends at the first newline, as in App. D."""
  cfg, length = ctx.config.evaluate, ctx.config.data.max_prompt_length
  source = "reward_base" if name == FEW_SHOT.name else name
  model = ctx.model(stage_of_policy(source).require_role())
  if name == FEW_SHOT.name:
    prompts, length = few_shot_prompts(ctx, prompts)
  return answers.sample(
    ctx,
    model,
    policies.load(ctx, source),
    [prompt_ids(ctx.tokenizer, text) for text in prompts],
    ctx.key(f"{stage}/{name}"),
    temperature=cfg.temperature,
    prompt_length=length,
    to_newline=name in _UNTUNED,
  )


def _measure(ctx: Context, name: str, prompts: list[str], stage: str) -> Measured:
  """Samples one policy's answers and measures each of them."""
  sampled = _sample(ctx, name, prompts, stage)
  reward_model, reward_params = ctx.model("reward"), policies.load_reward(ctx)
  scored = answers.from_text(ctx, prompts, sampled.text, sampled.ended_N)
  reward = answers.score(ctx, reward_model, reward_params, scored)
  kl_N = gold = names_topic = None
  if name not in _UNTUNED:
    # Of the very tokens that were sampled, while the reward model above reads them as its tokenizer spells the text.
    policy, temperature = ctx.model("policy"), ctx.config.evaluate.temperature
    logprob_N, ref_logprob_N = (
      answers.logprob(ctx, policy, policies.load(ctx, source), sampled, temperature)
      for source in (name, REFERENCE)
    )
    kl_N = kl.estimate(logprob_N, ref_logprob_N, kl.FORM)
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
  """The loss of each policy on held-out pretraining text, for the alignment tax.

  Args:
    ctx: the run.
    names: policies that have the policy's network.
  Returns:
    name -> [rows, 2]: for each row of text, the sum of negative log-likelihoods (nats) and the number of tokens. The
    rows are the same for all policies, so that losses can be compared row by row. {} without documents.
  """
  if "documents" not in lineage.reads(ctx.config, "evaluate"):
    return {}
  model = ctx.model("policy")
  rows = validation_rows(ctx, ctx.config.pretrain.length)
  num_chunks = ctx.config.pretrain.microbatches

  def row_sums(params, batch):
    one = functools.partial(supervised.lm_row_sums, model, params)
    return accumulation.map_rows(one, batch, num_chunks)

  sums = supervised.jit_sums(row_sums, ctx.mesh, model)
  result = {}
  for name in names:
    params = policies.load(ctx, name)
    parts = [
      np.stack(sharding.to_host(sums(params, sharding.place_batch(ctx.mesh, batch))), axis=1)
      for batch in rows
    ]
    result[name] = np.concatenate(parts)
  return result


def best_of_n(
  gold_PN: np.ndarray | None, reward_PN: np.ndarray, counts: list[int]
) -> list[BestOfN]:
  """Expected scores of the best of n answers, chosen by reward, for each n in `counts`.

  The estimate uses all N answers to a prompt and is unbiased: it averages over all subsets of n of them (Nakano et al.
  2021, App. I). Among N answers sorted by reward, the i-th (from 1) is the best of a random subset of n with
  probability C(i-1, n-1) / C(N, n), since the other n - 1 must come from the i - 1 below it.

  Choosing the best of n moves the policy by KL(best of n || policy) = log n - (n - 1) / n, in nats.

  Args:
    gold_PN, reward_PN: scores of N answers to each of P prompts; gold is None if there are no gold scores.
    counts: values of n, each at most N.
  """
  total = reward_PN.shape[1]
  order = np.argsort(reward_PN, axis=1, kind="stable")
  result = []
  for n in counts:
    weight = np.zeros(total)
    # C(i-1, n-1) / C(N, n) without computing a binomial, which may be huge. The best answer, i = N, has n / N; the
    # weight of i - 1 follows from that of i. Answers below the n-th are never the best of n and keep weight 0.
    weight[-1] = n / total
    for i in range(total - 1, n - 1, -1):
      weight[i - 1] = weight[i] * (i - n + 1) / i
    by_prompt = [
      np.take_along_axis(values, order, axis=1) @ weight
      for values in (reward_PN, gold_PN)
      if values is not None
    ]
    scores = [float(np.mean(score_P)) for score_P in by_prompt]
    gold = scores[1] if len(scores) > 1 else None
    kl_n = float(np.log(n) - (n - 1) / n)
    result.append(BestOfN(n=n, kl=kl_n, gold=gold, reward=scores[0], by_prompt=by_prompt[-1]))
  return result


def _best_of_n(ctx: Context, prompts: list[str], stage: str) -> list[BestOfN]:
  """Best-of-n from the PPO initialisation, chosen by the reward model, for n = 1, 2, 4 .. `evaluate.best_of_n`.

  [] if that is off. On other prompts than the demo's there is no gold score, and the reward model's stands alone.
  """
  total, simulation = ctx.config.evaluate.best_of_n, sources.simulation(ctx.config.data.prompts)
  if total < 2:
    return []
  repeated = [prompt for prompt in prompts for _ in range(total)]
  sampled = _sample(ctx, REFERENCE, repeated, f"{stage}/best_of_n")
  scored = answers.from_text(ctx, repeated, sampled.text, sampled.ended_N)
  reward = answers.score(ctx, ctx.model("reward"), policies.load_reward(ctx), scored)
  gold = None
  if simulation is not None:
    gold = np.asarray(simulation.gold_score(repeated, sampled.text)).reshape(-1, total)
  counts = [2**i for i in range(total.bit_length()) if 2**i <= total]
  return best_of_n(gold, reward.reshape(-1, total), counts)


def run(ctx: Context, stage: str):
  """Judges all policies of the run; writes answers.jsonl, results.json, findings.json and the report.

  Raises:
    UserError: files cannot be written.
    Preempted: the run was told to stop.
  """
  cfg, directory = ctx.config.evaluate, ctx.directory(stage)
  names = judged_policies(ctx)
  run_ = stage_run(ctx, stage, cfg)
  page = ctx.workdir / "report" / "index.html"
  # No stage starts from this one. So if the settings or the policies have changed, it is done anew, not refused.
  done = ctx.done(stage)
  # If somebody has deleted the report, it can only be made again from new answers.
  is_reported = page.is_file() and (page.parent / "findings.json").is_file()
  if done and done.fingerprint == run_.fingerprint and is_reported:
    if jax.process_index() == 0:
      _show(json.loads((page.parent / "findings.json").read_text()), done.result.summary, page)
    return
  unique = test_prompts(ctx)
  # Answers to one prompt stand in a row: the findings average them before they resample prompts.
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
    rounds=rounds.measure(ctx, prompts, measured),
  )
  if jax.process_index() != 0:
    return
  if not results.pretraining:
    terminal.say(
      f"{stage} data.documents names none: the loss on pretraining text, and with it what the policies have forgotten,"
      " is not measured"
    )
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  with writing(directory), open(directory / "answers.jsonl", "w", encoding="utf-8") as file:
    for i, prompt in enumerate(prompts):
      row = {name: measured[name].answer[i] for name in names}
      file.write(json_line({"prompt": prompt, "answers": row}) + "\n")
  summary = findings.summary(results)
  plain = {
    "policies": summary,
    "best_of_n": [
      {"n": row.n, "kl": row.kl, "gold": row.gold, "reward": row.reward}
      for row in results.best_of_n
    ],
    "equal_kl": equal_kl.table(results, bootstrap=cfg.bootstrap, seed=ctx.config.seed),
    "rounds": report_rounds.table(results, bootstrap=cfg.bootstrap, seed=ctx.config.seed),
    "agreement": results.agreement and dataclasses.asdict(results.agreement),
  }
  with writing(directory):
    (directory / "results.json").write_text(json.dumps(plain, indent=1) + "\n")
  found = findings.find(results, bootstrap=cfg.bootstrap, seed=ctx.config.seed)
  before = [name for name in lineage.line(ctx.config, stage) if name != stage]
  made = {name: done.require_provenance() for name in before if (done := ctx.done(name))}
  made[stage] = provenance_of(ctx, stage, run_)
  report.write(page.parent, ctx.config, prompts, results, found, made)
  finish(ctx, stage, run_, None, Evaluated(summary), made[stage])
  _track(ctx, stage, found, prompts, measured)
  _show(found, summary, page)


def _track(
  ctx: Context,
  stage: str,
  found: list[dict],
  prompts: list[str],
  measured: Mapping[str, Measured],
):
  """Gives the trackers the findings and all answers."""
  numbers = {row["id"]: {**row["measured"], "holds": row["holds"]} for row in found}
  answered = [
    {"prompt": prompt, **{name: policy.answer[i] for name, policy in measured.items()}}
    for i, prompt in enumerate(prompts)
  ]
  tables = {"findings": [_finding_row(row) for row in found], "answers": answered}
  ctx.tracking.report(stage, {"findings": numbers}, tables)


def _finding_row(finding: Mapping) -> dict[str, str]:
  measured = ", ".join(f"{key} {_value(value)}" for key, value in finding["measured"].items())
  return {
    "finding": finding["id"],
    "measured": measured,
    "holds": "yes" if finding["holds"] else "no",
  }


def _show(found: list[dict], summary: dict, page: pathlib.Path):
  """Prints the tables at the end of a run: one row per policy, and one row per finding."""
  columns = sorted({key for row in summary.values() for key in row})
  terminal.show(
    terminal.Table(
      columns=["policy", *(key.replace("_", " ") for key in columns)],
      rows=[
        [name, *(f"{row[key]:.3f}" if key in row else "" for key in columns)]
        for name, row in summary.items()
      ],
      title="means on held-out prompts",
    )
  )
  terminal.show(
    terminal.Table(
      columns=["finding", "measured", "holds"],
      rows=[[*_finding_row(finding).values()] for finding in found],
      title="the paper's findings",
      prose=["measured", "holds"],
      styles={"yes": "green", "no": "red"},
    )
  )
  terminal.say(f"report: {page}")


def _value(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"  # findings.json has null for what is not finite
