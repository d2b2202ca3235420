"""Table 14 of the paper: what GPT, SFT, PPO and PPO-ptx scored at 1.3B, 6B and 175B. Called by evaluation.py.

TruthfulQA's prompts have the names that the published samples give them: the table's labels "instruction" and
"QA + instruct" are swapped against those (openai/following-instructions-human-feedback), and section 4.2 fits the
samples.
"""

from typing import NamedTuple

SIZES = ("1.3B", "6B", "175B")
Sizes = tuple[float, float, float]


class Cells(NamedTuple):
  """A row of the table."""

  gpt: Sizes
  sft: Sizes
  ppo: Sizes
  ppo_ptx: Sizes


MODELS = ("GPT", "SFT", "PPO", "PPO-ptx")


def _sizes(text: str) -> Sizes:
  small, middle, large = map(float, text.split("/"))
  return small, middle, large


def _cells(text: str) -> Cells:
  return Cells(*map(_sizes, text.split()))


# task/prompt/metric -> GPT SFT PPO PPO-ptx.
_PRINTED = """
winogender/basic/entropy       .750/.721/.735 .583/.535/.503 .698/.587/.618 .760/.719/.737
winogender/respectful/entropy  .774/.753/.796 .561/.446/.479 .644/.562/.527 .608/.585/.696
winogender/biased/entropy      .760/.773/.783 .561/.516/.540 .706/.567/.564 .676/.543/.690
crows_pairs/basic/entropy      .448/.430/.410 .356/.326/.241 .355/.361/.326 .448/.434/.413
crows_pairs/respectful/entropy .419/.413/.362 .302/.260/.204 .281/.258/.270 .310/.273/.243
crows_pairs/biased/entropy     .420/.419/.353 .305/.252/.187 .287/.288/.223 .314/.254/.205
real_toxicity/basic/toxicity      .228/.229/.231 .198/.211/.211 .213/.214/.228 .228/.227/.234
real_toxicity/respectful/toxicity .211/.232/.233 .196/.196/.199 .198/.176/.205 .179/.204/.196
real_toxicity/biased/toxicity     .250/.261/.285 .236/.250/.256 .254/.382/.427 .263/.512/.400
truthful_qa/qa/true                    .312/.220/.284 .324/.436/.515 .546/.586/.755 .297/.476/.712
truthful_qa/qa_instruction/true        .340/.414/.570 .360/.756/.665 .634/.928/.879 .355/.733/.815
truthful_qa/instruction/true           .335/.348/.438 .517/.659/.852 .807/.760/.944 .322/.494/.610
truthful_qa/qa/true_info               .193/.186/.251 .267/.253/.271 .524/.574/.752 .285/.464/.689
truthful_qa/qa_instruction/true_info   .212/.212/.226 .282/.213/.257 .559/.187/.382 .339/.350/.494
truthful_qa/instruction/true_info      .218/.267/.242 .288/.319/.206 .789/.704/.588 .242/.399/.315
hellaswag/zero_shot/accuracy .549/.673/.781 .528/.672/.753 .507/.646/.743 .552/.690/.807
hellaswag/few_shot/accuracy  .550/.677/.791 .516/.657/.741 .530/.671/.759 .559/.694/.820
wsc/zero_shot/accuracy .567/.635/.740 .615/.606/.654 .663/.654/.683 .692/.587/.731
wsc/few_shot/accuracy  .587/.654/.798 .615/.625/.779 .625/.596/.654 .644/.673/.788
rte/zero_shot/accuracy .527/.617/.563 .487/.516/.570 .480/.708/.704 .538/.657/.668
rte/few_shot/accuracy  .585/.682/.614 .574/.657/.700 .606/.585/.711 .545/.697/.765
sst/zero_shot/accuracy .592/.616/.898 .873/.888/.907 .817/.820/.920 .812/.901/.900
sst/few_shot/accuracy  .842/.930/.944 .909/.933/.936 .794/.880/.944 .838/.923/.938
quac/zero_shot/f1 32.13/38.19/42.55 34.52/41.19/45.22 29.02/37.64/34.52 35.04/37.35/41.60
quac/few_shot/f1  36.02/41.78/45.38 35.95/43.13/48.77 31.81/40.63/36.00 39.40/42.42/46.99
squad_v2/zero_shot/f1 51.97/58.66/64.30 36.88/46.53/57.67 45.37/47.42/43.68 45.46/47.23/59.85
squad_v2/few_shot/f1  58.86/62.33/69.75 46.62/53.91/65.90 48.11/52.34/51.95 58.33/63.78/69.93
drop/zero_shot/f1 17.68/19.96/27.53 13.29/13.23/15.79 14.70/12.34/13.08 14.71/10.64/15.23
drop/few_shot/f1  25.43/30.08/35.27 23.84/30.99/35.85 21.61/27.11/27.78 23.89/29.39/33.34
wmt15_fr_en/zero_shot/bleu 30.65/34.99/38.92 25.56/33.25/36.90 19.85/25.22/24.16 25.77/30.41/34.28
wmt15_fr_en/few_shot/bleu  31.37/35.49/39.93 24.73/31.76/35.07 21.65/29.96/26.58 27.67/33.56/36.76
cnn_dm/zero_shot/rouge_l .182/.197/.196 .198/.235/.225 .218/.231/.227 .214/.231/.220
tldr/zero_shot/rouge_l   .182/.197/.196 .198/.235/.225 .218/.231/.227 .214/.231/.220
"""
# What is hard to read in the paper's table.
_UNCERTAIN = {
  "hellaswag/few_shot/accuracy": "the paper's GPT 1.3B reads .550 or .591",
  "wsc/few_shot/accuracy": "the paper's PPO 1.3B reads .625 or .630",
}
TABLE = {
  name: _cells(cells)
  for name, cells in (line.split(maxsplit=1) for line in _PRINTED.strip().splitlines())
}

TASKS = tuple(dict.fromkeys(name.partition("/")[0] for name in TABLE))  # in the table's order


def cells(task: str, prompt: str, metric: str) -> Cells | None:
  """The paper's numbers for a metric of a prompt of a task; None for what is not in the table."""
  return TABLE.get(f"{task}/{prompt}/{metric}")


def notes(task: str, prompt: str, metric: str) -> list[str]:
  """What a reader must know of the paper's numbers for a metric."""
  name = f"{task}/{prompt}/{metric}"
  return [_UNCERTAIN[name]] if name in _UNCERTAIN else []
