"""Which modules are mutated, which tests can see them, and which mutants a run takes.

Called by `__main__`. Imports nothing of the project.
"""

import hashlib
import pathlib
from collections.abc import Iterable

from tests.mutation import operators, written
from tests.mutation.operators import Mutant

# Area -> module -> generated mutants of a run. The numbers follow the size of the modules and the time of their tests.
AREAS = {
  "ops": {
    "ops/gae": 8,
    "ops/kl": 8,
    "ops/lm": 18,
    "ops/masked": 8,
    "ops/preference": 12,
    "ops/rewards": 4,
    "ops/surrogate": 14,
  },
  "rl": {
    "rl/experience": 16,
    "rl/rows": 3,
    "rl/sampling": 6,
    "rl/scoring": 5,
    "rl/shared_prompts": 6,
    "rl/shared_rows": 5,
    "rl/split": 3,
    "rl/step": 10,
  },
  "rm": {"models/heads": 3, "stages/answers": 0, "stages/ranking_accuracy": 5, "stages/rm": 11},
  "train": {
    "train/accumulation": 4,
    "train/checkpoint": 6,
    "train/damaged": 4,
    "train/finished": 5,
    "train/loop": 7,
    "train/manifest": 6,
    "train/metrics": 5,
    "train/optim": 10,
    "train/saved_state": 2,
    "train/shared_sums": 3,
    "train/supervised": 5,
    "train/weight_hash": 3,
  },
  "stages": {
    "stages/collect": 4,
    "stages/contents": 3,
    "stages/evaluate": 4,
    "stages/measuring": 4,
    "stages/people": 3,
    "stages/pinned": 2,
    "stages/policies": 4,
    "stages/ppo": 4,
    "stages/rl_nets": 4,
    "stages/pretrain": 2,
    "stages/room": 5,
    "stages/sampled_best": 3,
    "stages/sft": 6,
    "stages/shared_hashing": 3,
    "stages/sft_select": 2,
  },
  "data": {
    "data/batching": 8,
    "data/chat": 4,
    "data/checksums": 5,
    "data/file_places": 4,
    "data/controls": 5,
    "data/packing": 8,
    "data/ranking": 3,
    "data/records": 9,
    "data/sources": 6,
    "data/token_cache": 5,
    "data/token_store": 6,
    "data/tokenize": 8,
    "data/trees": 6,
  },
  "processes": {
    "core/environment": 0,
    "parallel/agreement": 5,
    "parallel/supervisor": 3,
    "parallel/watchdog": 6,
  },
}
# Tests that see a module besides its own, after them and fastest first: a run stops at the first failure.
ALSO = {
  "models/heads": ("stages/test_rm",),
  "rl/scoring": ("rl/test_experience", "rl/test_step"),
  "rl/shared_rows": ("rl/test_rows",),
  "rl/step": ("rl/test_step_program",),
  "stages/answers": ("stages/test_rm",),
  "stages/collect": ("stages/test_pipeline",),
  "stages/contents": ("stages/test_run_data",),
  "stages/evaluate": ("stages/test_pipeline",),
  "stages/measuring": ("stages/test_pipeline",),
  "stages/pinned": ("stages/test_people",),
  "stages/policies": ("stages/test_pipeline",),
  "stages/ppo": ("stages/test_pipeline",),
  "stages/rl_nets": ("stages/test_ppo", "stages/test_pipeline"),
  "stages/ranking_accuracy": ("stages/test_rm", "stages/test_pipeline"),
  "stages/rm": ("stages/test_pipeline",),
  "stages/sft": ("stages/test_pipeline",),
  "train/checkpoint": ("train/test_damaged", "train/test_loop"),
  "train/damaged": ("train/test_checkpoint",),
  "train/finished": ("train/test_checkpoint",),
  "data/packing": ("data/test_batching", "data/test_token_store"),
  "data/sources": ("data/test_checksums",),
  "data/token_cache": ("stages/test_run_data",),
  "data/tokenize": ("stages/test_run_data",),
}


def modules() -> list[str]:
  """All modules that are mutated."""
  return [module for area in AREAS.values() for module in area]


def area_of(module: str) -> str:
  """The area that a module belongs to."""
  return next(name for name, area in AREAS.items() if module in area)


def tests_of(module: str) -> list[str]:
  """The test files that can see a module, below the project's folder."""
  folder, _, name = module.rpartition("/")
  return [f"tests/{test}.py" for test in (f"{folder}/test_{name}", *ALSO.get(module, ()))]


def read_sources(root: pathlib.Path) -> dict[str, str]:
  """Module -> source."""
  return {
    module: (root / "instructjax" / f"{module}.py").read_text(encoding="utf-8")
    for module in modules()
  }


def choose(sources: dict[str, str], seed: int, share: float) -> tuple[list[Mutant], list[str]]:
  """The mutants of a run: all that are written by hand, and a sample of those that operators make.

  Args:
    sources: module -> source.
    seed: of the sample.
    share: multiple of the numbers in AREAS to draw; 0 for the written ones only.
  Returns:
    (mutants, written ones whose text is gone), in the order of the modules.
  """
  by_hand, stale = written.written(sources)
  chosen = []
  for area in AREAS.values():
    for module, count in area.items():
      # The first by a hash of the id, so that a change in a module leaves most of its sample as it was.
      drawn = sorted(
        operators.generate(module, sources[module]), key=lambda mutant: _lot(seed, mutant)
      )[: round(share * count)]
      chosen += [mutant for mutant in by_hand if mutant.module == module]
      chosen += sorted(drawn, key=lambda mutant: mutant.start)
  return chosen, stale


def without_mutant(ids: Iterable[str], sources: dict[str, str]) -> list[str]:
  """Those ids that no mutant of these sources has, sampled or not."""
  made = [mutant for module in sources for mutant in operators.generate(module, sources[module])]
  known = {mutant.id for mutant in made + written.written(sources)[0]}
  return [name for name in ids if name not in known]


def _lot(seed: int, mutant: Mutant) -> str:
  return hashlib.sha256(f"{seed} {mutant.id}".encode()).hexdigest()
