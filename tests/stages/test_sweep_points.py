"""From the flags of a sweep to its points: which combinations, which names, what is refused."""

import pytest

from instructjax.core.errors import UserError
from instructjax.stages import sweep_points
from tests import micro

SPECS = {kind: "jsonl:x" for kind in ("documents", "demonstrations", "comparisons", "prompts")}
BASE = micro.config_dict("ppo_ptx", SPECS).to_dict()


def test_a_grid_has_all_combinations_and_seeds_change_last():
  points = sweep_points.points(["ppo.beta=0,.05", "ppo.gamma=1"], "3,4", BASE)
  assert [(p.config.ppo.beta, p.config.ppo.gamma, p.config.seed) for p in points] == [
    (0, 1, 3),
    (0.05, 1, 3),
    (0, 1, 4),
    (0.05, 1, 4),
  ]
  assert points[1].name == "ppo.beta_0.05-ppo.gamma_1-seed_3"
  assert points[1].values == {"seed": 3, "ppo.beta": 0.05, "ppo.gamma": 1}
  assert BASE["ppo"]["gamma"] == 0.3  # the config that it came from is as it was


def test_values_have_the_type_of_their_field():
  text = "ppo.rewards=(rm,length),(rm)"
  parts = sweep_points._axis(text, BASE)
  assert parts == ("ppo.rewards", [("rm", "length"), ("rm",)])
  assert sweep_points._axis("ppo.whiten_rewards=true,False", BASE)[1] == [True, False]
  assert sweep_points._axis("ppo.kl_controller=fixed,adaptive", BASE)[1] == ["fixed", "adaptive"]


def test_names_are_paths_and_differ():
  names = [
    sweep_points._name({"data.prompts": path})
    for path in ("jsonl:/a,b/c=d.jsonl", "jsonl:/a_b/c=d.jsonl")
  ]
  assert names[0] != names[1]
  assert not set("/,=: ") & set("".join(names))
  assert sweep_points._name({"seed": 1, "ppo.beta": 1e-7}) == "ppo.beta_1e-07-seed_1"
  assert sweep_points._name({"ppo.beta": 0.1234567891}) == "ppo.beta_0.1234567891"


@pytest.mark.parametrize(
  ("sweeps", "seeds", "message"),
  [
    (["ppo.bta=1"], None, "--sweep has no field ppo.bta; did you mean ppo.beta?"),
    (["ppo=1"], None, "--sweep has no field ppo"),
    (["ppo.beta"], None, "--sweep=ppo.beta must be of the form FIELD=VALUE,VALUE"),
    (["ppo.beta=0,,1"], None, "--sweep=ppo.beta=0,,1 has an empty value"),
    (["ppo.beta=0,abc"], None, "abc is no value of it; it is 0.2 now"),
    (["ppo.beta=.1,0.1"], None, "has the value 0.1 twice"),
    (["ppo.beta=0,-1"], None, "point ppo.beta_-1 of the sweep: config.ppo.beta=-1.0"),
    (["ppo.beta=0", "ppo.beta=1"], None, "--sweep=ppo.beta is given twice"),
    (["seed=0"], "1", "--sweep=seed and --seeds is given twice"),
    ([], "1.5", "point seed_1.5 of the sweep: config.seed=1.5 must be of type int"),
    ([], "a", "--seeds=a: a is no value of it"),
    (["stage=ppo,sft"], None, "--sweep=stage cannot be swept"),
    ([f"ppo.beta={','.join(map(str, range(101)))}"], ",".join(map(str, range(10))), "1010 points"),
  ],
)
def test_what_is_no_sweep_is_refused_in_a_line(sweeps, seeds, message):
  with pytest.raises(UserError) as error:
    sweep_points.points(sweeps, seeds, BASE)
  assert message in str(error.value) and "\n" not in str(error.value)
