"""The rewards of the host in a run: what functions see of a rollout, and what becomes of them on resume.

Called by ppo.py. reward_functions.py calls and checks a single function.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from instructjax.core import foreign
from instructjax.core.errors import StageStopped, UserError
from instructjax.core.rewards import Reward
from instructjax.core.structs import Rollout
from instructjax.data.tokenizer import Tokenizer
from instructjax.parallel import agreement, distributed, sharding
from instructjax.parallel.watchdog import Team
from instructjax.rl.split import HostRewards
from instructjax.stages import answers, reward_functions
from instructjax.stages.reward_functions import Episodes, Function
from instructjax.train import stage_runs


def episodes_of(
  tokenizer: Tokenizer, token_BL: np.ndarray, is_response_BR: np.ndarray, iteration: int
) -> Episodes:
  """The texts and ids of a rollout's rows.

  Args:
    tokenizer: the run's.
    token_BL: prompts and answers, with pads.
    is_response_BR: True on the answers' tokens.
    iteration: number of the iteration.
  """
  length = token_BL.shape[1] - is_response_BR.shape[1]
  prompt_BP = token_BL[:, :length]
  answer_BR = np.where(is_response_BR, token_BL[:, length:], tokenizer.pad_id)
  ids = lambda rows: [[int(token) for token in row if token != tokenizer.pad_id] for row in rows]
  return Episodes(
    prompts=answers.decode(tokenizer, prompt_BP),
    answers=answers.decode(tokenizer, answer_BR),
    ended=np.any(np.isin(answer_BR, tokenizer.stop_ids), axis=1).tolist(),
    prompt_ids=ids(prompt_BP),
    answer_ids=ids(answer_BR),
    iteration=iteration,
  )


def make(stage: str, tokenizer: Tokenizer, functions: Sequence[Function]) -> HostRewards:
  """Makes what the split step calls between its programs: (rollout, iteration) -> name -> float32 [B].

  Process 0 calls the functions, once for the whole batch, and tells the others the values. So a function sees the same
  batch on any mesh, and need not give the same answer twice. What runs on the devices is called by all processes.
  """

  everywhere = [one for one in functions if one.everywhere]
  first = [one for one in functions if not one.everywhere]

  def values(called: Sequence[Function], episodes: Episodes) -> dict[str, np.ndarray]:
    found = {}
    for function in called:
      spelling = reward_functions.cut(function.reward.spelling)
      distributed.at(f"{stage} step {episodes.iteration}, the reward {spelling}", within=True)
      found[function.reward.name] = reward_functions.call(function, episodes)
    return found

  def on_host(rollout: Rollout, iteration: int) -> Mapping[str, np.ndarray]:
    where = f"{stage} step {iteration}"
    distributed.at(f"{where}, waiting for its answers", step=True)
    token_BL, is_response_BR = sharding.to_host((rollout.token_BL, rollout.is_response_BR))
    episodes = episodes_of(tokenizer, token_BL, is_response_BR, iteration)
    there = distributed.team()
    if there is None or not first:
      found = values(first, episodes)
    elif there.process == 0:
      found = _tell(there, stage, iteration, lambda: values(first, episodes))
    else:
      distributed.at(f"{where}, waiting for the rewards of process 0", within=True)
      found = _hear(there, stage, iteration)
    found |= values(everywhere, episodes)
    distributed.at(f"{where}, learning", step=True)
    return found

  return on_host


def _tell(team: Team, stage: str, iteration: int, compute: Callable) -> dict[str, np.ndarray]:
  """Process 0's part: computes the rewards, and tells the others, or else what is wrong."""
  tell = lambda said: agreement.follow_first(team, f"rewards/{stage}", iteration, json.dumps(said))
  try:
    found = compute()
  except UserError as error:
    tell({"error": str(error)})
    raise
  tell({"values": {name: value_B.tolist() for name, value_B in found.items()}})
  return found


def _hear(team: Team, stage: str, iteration: int) -> dict[str, np.ndarray]:
  """The others' part.

  Raises:
    UserError: what process 0 met.
  """
  said = json.loads(agreement.follow_first(team, f"rewards/{stage}", iteration, ""))
  if "error" in said:
    raise UserError(said["error"])
  return {name: np.array(values, np.float32) for name, values in said["values"].items()}


def try_out(functions: Sequence[Function], tokenizer: Tokenizer, prompts: Sequence[list[int]]):
  """Calls each function on two rows: a prompt with a text for an answer, and one with an empty answer.

  Policies do give empty answers, and a mistake that shows only then would show hours later.

  Args:
    functions: of the run.
    tokenizer: the run's.
    prompts: token ids of training prompts; a text of them stands in for an answer.
  Raises:
    UserError: see `call`.
  """
  first, last = list(prompts[0]), list(prompts[-1])
  answer_ids = [[*last, tokenizer.eos_id], [tokenizer.eos_id]]
  texts = [tokenizer.decode(ids).strip() for ids in (first, last)]
  episodes = Episodes(
    prompts=texts,
    answers=[texts[1], ""],
    ended=[True, True],
    prompt_ids=[first, last],
    answer_ids=answer_ids,
    iteration=0,
  )
  for function in functions:
    reward_functions.call(function, episodes)


def with_sources(
  run: stage_runs.StageRun, made_with: Mapping[str, str], functions: Sequence[Function]
) -> stage_runs.StageRun:
  """A stage's run with the checksums of its functions: in the fingerprint, and among what a resumed run may change.

  Args:
    run: the stage.
    made_with: its fingerprint without them.
    functions: of its rewards.
  """
  sums = {one.reward.spelling: one.checksum for one in functions if one.files}
  files = {f"reward {one.reward.spelling}": one.files for one in functions if one.files}
  return dataclasses.replace(
    run,
    fingerprint={**made_with, **{f"reward {name}": value for name, value in sums.items()}},
    files={**run.files, **files},
    changeable={**run.changeable, stage_runs.FUNCTIONS: sums},
  )


def watch_constants(
  stage: str, rewards: Sequence[Reward], limit: int, records: Sequence[Mapping[str, float]]
) -> Callable[[int, Mapping[str, np.ndarray], Callable[[], tuple[list[str], list[str]]]], None]:
  """Makes (iteration, name -> [B], texts) -> None, which stops the stage for a reward that has never varied.

  A reward that once told answers apart and no longer does may have been learned, and is let be. So is one of weight 0,
  which is only logged.

  Args:
    stage: its name.
    rewards: the list.
    limit: iterations from the stage's beginning after which it stops; 0 never does.
    records: of earlier iterations, as metrics.jsonl has them.
  """
  varied = {reward.name for reward in rewards if any(_varies(one, reward.name) for one in records)}

  def watch(iteration: int, values: Mapping[str, np.ndarray], texts: Callable):
    for reward in rewards:
      value_B = values[reward.name]
      if len(value_B) < 2 or np.ptp(value_B):
        varied.add(reward.name)
      elif reward.weight and limit and iteration >= limit and reward.name not in varied:
        (prompt, *_), (answer, *_) = texts()
        shown = lambda text: foreign.shown(text, 60)
        raise StageStopped(
          f"{stage} stopped at step {iteration}: the reward {reward_functions.cut(reward.spelling)} has never told two"
          f" answers of a batch apart; all of the last batch have {value_B[0]:.4g}, as the answer {shown(answer)} to"
          f" the prompt {shown(prompt)}. Mend it and run the same command again: it goes on from the last"
          " checkpoint; --config.ppo.constant_iterations=0 lets it be"
        )

  return watch


def _varies(record: Mapping[str, float], name: str) -> bool:
  """Whether a reward differed between the answers of a batch, by the metrics of its iteration."""
  mean, std = f"rewards/{name}", f"rewards/{name}/std"
  if name == "rm":
    mean, std = "reward", "reward_std"
  # Equal numbers may have a deviation of some rounding.
  return record.get(std, 0.0) > 1e-5 * max(1e-3, abs(record.get(mean, 0.0)))
