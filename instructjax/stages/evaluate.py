"""Measures every policy of a run on test prompts and held-out text (sec 4), and writes the report.

The judge of answers is the gold score if the prompts are a simulated task's, and the reward model otherwise.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from instructjax import report
from instructjax.core import terminal
from instructjax.core.errors import writing
from instructjax.core.results import Evaluated
from instructjax.core.stages import FEW_SHOT, RL_STAGES, STAGES, RoleName, stage_of_policy
from instructjax.core.text import json_line
from instructjax.data import sources
from instructjax.data.controls import Rendered
from instructjax.data.tokenizer import prompt_ids
from instructjax.parallel import sharding
from instructjax.report import costs, equal_kl, findings, intervals
from instructjax.report import rounds as report_rounds
from instructjax.report.results import BestAtKL, Measured, Results
from instructjax.stages import judging, lineage, measuring, policies, rounds, sampled_best
from instructjax.stages.context import Context, finish, provenance_of, stage_run
from instructjax.stages.text_rows import validation_rows
from instructjax.train import accumulation, metrics, supervised


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
    names.insert(sum(name in measuring.UNTUNED for name in names), FEW_SHOT.name)
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
    measuring.few_shot_prompts(ctx, test_prompts(ctx))


def test_prompts(ctx: Context) -> list[str]:
  """The first `evaluate.num_prompts` test prompts that are not too long.

  The demo has a test split of its own, because its validation prompts have already chosen the SFT epoch. Every other
  source gives its validation prompts here.
  """
  texts = [record.prompt for record in ctx.data.records("prompts", "test")]
  limit = ctx.config.data.max_prompt_length
  fitting = [text for text in texts if len(prompt_ids(ctx.tokenizer, text)) <= limit]
  return fitting[: ctx.config.evaluate.num_prompts]


def pretraining_losses(ctx: Context, role: RoleName, names: list[str]) -> dict[str, np.ndarray]:
  """The loss of each policy on held-out pretraining text, for the alignment tax.

  Args:
    ctx: the run.
    role: the network that they have.
    names: the policies.
  Returns:
    name -> [rows, 2]: for each row of text, the sum of negative log-likelihoods (nats) and the number of tokens. The
    rows are the same for all policies, so that losses can be compared row by row. {} without documents.
  """
  if "documents" not in lineage.reads(ctx.config, "evaluate"):
    return {}
  model = ctx.model(role)
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


@dataclasses.dataclass(frozen=True)
class _Prompts:
  """The prompts of the evaluation.

  Attributes:
    every: each `evaluate.samples_per_prompt` times in a row, because findings average the answers to one before they
      resample prompts.
    seen: places in `every` on topics of training prompts; all, for prompts that are no simulated task's.
    new: places of the others.
  """

  every: list[str]
  seen: np.ndarray
  new: np.ndarray

  @property
  def judged(self) -> list[str]:
    """Those of `seen`, one for each answer."""
    return [self.every[i] for i in self.seen]

  @property
  def firsts(self) -> dict[str, int]:
    """Those of `seen`, each once -> place in `judged` of the first answer to it. Data may hold a prompt twice."""
    found: dict[str, int] = {}
    for place, prompt in enumerate(self.judged):
      found.setdefault(prompt, place)
    return found


def _prompts(ctx: Context) -> _Prompts:
  cfg, simulation = ctx.config.evaluate, judging.simulation(ctx)
  every = [prompt for prompt in test_prompts(ctx) for _ in range(cfg.samples_per_prompt)]
  is_new = np.array(
    [simulation is not None and simulation.is_new_topic(prompt) for prompt in every], bool
  )
  if is_new.all():  # with nothing beside them, they are what is judged
    is_new[:] = False
  return _Prompts(every, np.flatnonzero(~is_new), np.flatnonzero(is_new))


def _results(ctx: Context, stage: str, names: list[str], asked: _Prompts):
  """Samples and measures everything: (results, policy -> its answers to all prompts)."""
  cfg, simulation = ctx.config.evaluate, judging.simulation(ctx)
  every = {n: measuring.measure(ctx, n, asked.every, stage) for n in names if n != FEW_SHOT.name}
  shots: dict[int, float] = {}
  if FEW_SHOT.name in names:
    every[FEW_SHOT.name], shots = measuring.best_few_shot(ctx, asked.every, stage, asked.seen)
  every = {name: every[name] for name in names}
  measured = {name: found.take(asked.seen) for name, found in every.items()}
  if "reward_base" in measured and shots:
    shots = {0: float(np.mean(intervals.judged(measured["reward_base"])))} | shots
  own = _of_one_network(names)
  losses = pretraining_losses(ctx, "policy", own)
  if "reward_base" in names and not ctx.given:
    # On the same rows of the same tokens, so that it says how much larger the larger base is in effect.
    losses |= pretraining_losses(ctx, "reward_base", ["reward_base"])
  pool, firsts = None, dict(list(asked.firsts.items())[: cfg.best_of_n_prompts])
  if cfg.best_of_n >= 2:
    pool = sampled_best.draw(
      ctx,
      list(firsts),
      cfg.best_of_n,
      lambda name, prompts: measuring.sample(ctx, name, prompts, f"{stage}/best_of_n"),
      simulation,
    )
  task = sources.simulation(ctx.config.data.prompts)
  collected = ctx.done("collect") if lineage.collects(ctx.config) else None
  results = Results(
    samples_per_prompt=cfg.samples_per_prompt,
    measured=measured,
    pretraining=losses,
    reward_model=ctx.require_done("rm").result,
    agreement=collected.result.agreement if collected else None,
    best_of_n=sampled_best.curve(pool, sampled_best.powers_of_two(cfg.best_of_n)) if pool else [],
    best_at_kl=_best_at_kl(pool, [*firsts.values()], measured, cfg.samples_per_prompt)
    if pool
    else {},
    untrained=measuring.measure_untrained(ctx, asked.judged),
    new_topics={name: found.take(asked.new) for name, found in every.items()}
    if len(asked.new)
    else {},
    gold_words="" if task is None else task.GOLD_WORDS,
    shots=shots,
    curves={
      STAGES[name].require_policy().name: metrics.read_metrics(ctx.directory(name))
      for name in lineage.rl_stages(ctx.config)
    },
    rounds=rounds.measure(ctx, asked.judged, measured),
    checkpoints=measuring.measure_checkpoints(ctx, asked.judged, stage),
  )
  return results, every


def _best_at_kl(
  pool: sampled_best.Pool, firsts: Sequence[int], measured: Mapping[str, Measured], samples: int
) -> dict[str, BestAtKL]:
  """Best-of-n at the KL of each RL policy that has a KL penalty.

  Args:
    pool: answers of the PPO initialisation.
    firsts: where the policies' answers to each of the pool's prompts begin.
    measured: policy -> what was measured of its answers.
    samples: answers of a policy to each prompt, in a row.
  """
  found = {}
  for name in RL_STAGES:
    kl_N = measured[name].kl if name in measured else None
    if kl_N is not None and name != "ppo_beta0":
      judged_N = intervals.judged(measured[name])
      judged_PS = np.stack([judged_N[first : first + samples] for first in firsts])
      mean_kl = float(np.mean(kl_N))
      found[name] = sampled_best.at_kl(pool, mean_kl, judged_PS)
  return found


def run(ctx: Context, stage: str):
  """Judges all policies of the run; writes the report, and what it is made of: answers, scores and their means.

  Raises:
    UserError: files cannot be written.
    Preempted: the run was told to stop.
  """
  cfg, directory = ctx.config.evaluate, ctx.directory(stage)
  names = judged_policies(ctx)
  run_ = stage_run(ctx, stage)
  page = ctx.workdir / "report" / "index.html"
  # No stage starts from this one. So if the settings or the policies have changed, it is done anew, not refused.
  done = ctx.done(stage)
  # If somebody has deleted the report, it can only be made again from new answers.
  is_reported = page.is_file() and (page.parent / "findings.json").is_file()
  if done and done.fingerprint == run_.fingerprint and is_reported:
    if jax.process_index() == 0:
      _show(json.loads((page.parent / "findings.json").read_text()), done.result.summary, page)
    return
  asked = _prompts(ctx)
  results, every = _results(ctx, stage, names, asked)
  if jax.process_index() != 0:
    return
  if not results.pretraining:
    terminal.say(
      f"{stage} data.documents names none: the loss on pretraining text, and with it what the policies have forgotten,"
      " is not measured"
    )
  summary = findings.summary(results)
  more = {
    name: module.table(results, bootstrap=cfg.bootstrap, seed=ctx.config.seed)
    for name, module in (("equal_kl", equal_kl), ("rounds", report_rounds))
  }
  _write(directory, results, summary, asked.every, every, more)
  _write_checkpoints(directory, results.checkpoints, asked.judged)
  found = findings.find(results, bootstrap=cfg.bootstrap, seed=ctx.config.seed)
  before = [name for name in lineage.line(ctx.config, stage) if name != stage]
  made = {name: done.require_provenance() for name in before if (done := ctx.done(name))}
  made[stage] = provenance_of(ctx, stage, run_)
  took = costs.by_stage({name: metrics.read_metrics(ctx.directory(name)) for name in made}, made)
  report.write(page.parent, ctx.config, asked.judged, results, found, made, took)
  finish(ctx, stage, run_, None, Evaluated(summary), made[stage])
  _track(ctx, stage, found, asked.every, every)
  _show(found, summary, page)


def _write(
  directory: pathlib.Path,
  results: Results,
  summary: dict,
  prompts: list[str],
  every: Mapping[str, Measured],
  more: dict[str, dict],
):
  """Writes answers.jsonl, scores.jsonl with the scores of each answer, and results.json with `more` in it.

  Raises:
    UserError: they cannot be written.
  """
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  with writing(directory), open(directory / "answers.jsonl", "w", encoding="utf-8") as file:
    for i, prompt in enumerate(prompts):
      row = {name: measured.answer[i] for name, measured in every.items()}
      # What a chat template has made holds control tokens, which are text in any other prompt.
      is_rendered = {"is_rendered": True} if isinstance(prompt, Rendered) else {}
      file.write(json_line({"prompt": prompt, **is_rendered, "answers": row}) + "\n")
  with writing(directory), open(directory / "scores.jsonl", "w", encoding="utf-8") as file:
    for i, prompt in enumerate(prompts):
      row = {name: _scores(measured, i) for name, measured in every.items()}
      file.write(json_line({"prompt": prompt, "scores": row}) + "\n")
  plain = {
    "policies": summary,
    "best_of_n": [
      {"n": row.n, "kl": row.kl, "gold": row.gold, "reward": row.reward}
      for row in results.best_of_n
    ],
    **more,
    "shots": {str(number): score for number, score in results.shots.items()},
    "agreement": results.agreement and dataclasses.asdict(results.agreement),
  }
  with writing(directory):
    (directory / "results.json").write_text(json.dumps(plain, indent=1) + "\n")


def _write_checkpoints(
  directory: pathlib.Path, found: Mapping[str, Mapping[int, Measured]], prompts: list[str]
):
  """Writes checkpoints.jsonl, a line for each answer of a checkpoint; without checkpoints there is no such file.

  Raises:
    UserError: it cannot be written.
  """
  path = directory / "checkpoints.jsonl"
  with writing(path):
    path.unlink(missing_ok=True)  # of an evaluation that measured some
  if not found:
    return
  with writing(path), open(path, "w", encoding="utf-8") as file:
    for policy, by_step in found.items():
      for step, measured in by_step.items():
        for i, prompt in enumerate(prompts):
          row = {"policy": policy, "step": step, "prompt": prompt, "answer": measured.answer[i]}
          file.write(json_line({**row, "scores": _scores(measured, i)}) + "\n")


def _scores(measured: Measured, i: int) -> dict[str, float]:
  """What was measured of one answer: its scores, its KL in nats and its tokens, as far as the policy has them."""
  columns = {name: getattr(measured, name) for name in ("reward", "gold", "kl", "length")}
  return {name: float(values[i]) for name, values in columns.items() if values is not None}


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
  holds = {True: "yes", False: "no", None: "cannot be told"}[finding["holds"]]
  return {"finding": finding["id"], "measured": measured, "holds": holds}


# The columns of the two tables at the end of a run.
_SCORES = ("gold", "reward", "kl", "pretrain_loss", "names_topic", "length", "ended")
_HABITS = ("repeats", "topic_again", "copied", "distinct")


def _table(summary: Mapping[str, Mapping[str, float]], columns: tuple[str, ...], title: str):
  kept = [key for key in columns if any(key in row for row in summary.values())]
  shown = lambda row, key: f"{row[key]:.3f}" if key in row else ""
  return terminal.Table(
    columns=["answers of", *(key.replace("_", " ") for key in kept)],
    rows=[
      [name, *(shown(row, key) for key in kept)]
      for name, row in summary.items()
      if any(key in row for key in kept)
    ],
    title=title,
  )


def _show(found: list[dict], summary: dict, page: pathlib.Path):
  """Prints the tables at the end of a run: one row per policy, and one row per finding."""
  terminal.show(_table(summary, _SCORES, "means on held-out prompts"))
  terminal.show(_table(summary, _HABITS, "repetition, copying and sameness, as shares"))
  terminal.show(
    terminal.Table(
      columns=["finding", "measured", "holds"],
      rows=[[*_finding_row(finding).values()] for finding in found],
      title="the paper's findings, and what a sceptic would ask",
      prose=["measured", "holds"],
      styles={"yes": "green", "no": "red", "cannot be told": "yellow"},
    )
  )
  terminal.say(f"report: {page}")


def _value(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"  # findings.json has null for what is not finite
