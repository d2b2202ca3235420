"""Tables of README and docs: what they show is what was measured, of the code as it is."""

import json
import re
import subprocess

import pytest

from benchmarks import figures, preset_settings, tables
from instructjax.core.errors import UserError

MADE = dict(version="0.1.0", commit="a" * 40, date="2026-11-30", processor="AMD EPYC, AVX2")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_page_shows_what_was_measured(name):
  records, page = figures.read(name), figures.ROOT / figures.FIGURES[name].page
  if records:
    text = page.read_text(encoding="utf-8")
    assert figures.fill(text, name, figures.block(name, records)) == text, (
      "python -m benchmarks.figures write"
    )


@pytest.mark.parametrize("name", [n for n, one in figures.FIGURES.items() if not one.is_dated])
def test_what_was_measured_is_of_the_code_as_it_is(name):
  old = figures.stale(figures.FIGURES[name], figures.read(name))
  assert not old, f"changed since it was measured; python -m benchmarks.figures measure {name}"


def test_every_measured_file_belongs_to_a_figure():
  assert {path.stem for path in figures.FOLDER.glob("*.json")} <= set(figures.FIGURES)


def test_a_change_of_code_changes_its_hash_and_words_do_not(tmp_path):
  def hash_of(text):
    (tmp_path / "a.py").write_text(text)
    return figures.code_hash(["*.py"], tmp_path)

  first = hash_of('"""Says."""\ndef f(x):\n  """More."""\n  return x + 1\n')
  assert hash_of("# Another word.\ndef f(x):\n  return x + 1  # so\n") == first
  assert hash_of("def f(x):\n  return x + 2\n") != first
  (tmp_path / "b.py").write_text("")
  assert figures.code_hash(["*.py"], tmp_path) != first
  with pytest.raises(ValueError, match="matches"):
    figures.code_hash(["*.c"], tmp_path)


def test_every_version_of_python_gives_code_the_same_hash(tmp_path):
  """Trees have other empty fields in each: `type_params` of a class came with 3.12."""
  text = 'class A(B, c=1):\n  x: int = None\n  def f(self, *a, **b):\n    return f"{self.x:>{3}} {a!r}"\n'
  (tmp_path / "a.py").write_text(text)
  assert figures.code_hash(["*.py"], tmp_path) == "d2eb923eb0fff53b"


def test_a_record_of_changed_code_is_stale():
  figure = figures.FIGURES["findings"]
  now, settings = figures.code_hash(figure.code), preset_settings.now(figure.config)
  records = [
    {"command": "a", "code": now, "settings": json.dumps(settings)},
    {"command": "b", "code": "0" * 16, "settings": json.dumps(settings)},
    {"command": "c", "code": now, "settings": json.dumps(settings | {"ppo.beta": 7.0})},
  ]
  assert figures.stale(figure, records) == ["b", "c"]
  pods = figures.FIGURES["pods"]  # of no run
  assert figures.stale(pods, [{"command": "d", "code": figures.code_hash(pods.code)}]) == []


def test_a_new_record_takes_the_place_of_its_own_command_and_processor_only():
  old = [
    {"command": "a", "processor": "x", "lines": [1]},
    {"command": "a", "processor": "y", "lines": [2]},
    {"command": "b", "processor": "x", "lines": [3]},
  ]
  new = {"command": "a", "processor": "x", "lines": [4]}
  assert figures.merge(old, new) == [old[1], old[2], new]
  # Estimates are the same on any processor.
  assert figures.merge(old, new, is_timed=False) == [old[2], new]


def test_a_figure_fills_the_place_between_its_markers():
  page = "before\n<!-- f -->\nold\n<!-- end of f -->\nafter\n"
  assert figures.fill(page, "f", "<!-- f -->new<!-- end of f -->") == (
    "before\n<!-- f -->new<!-- end of f -->\nafter\n"
  )
  for bad in ("", "<!-- end of f --><!-- f -->", page + page):
    with pytest.raises(UserError, match="each once"):
      figures.fill(bad, "f", "")


def finished_run(folder, seed, value, config="configs/ppo_ptx.py"):
  finding = dict(id="f", measured={"win_rate": value}, interval=[[0.5, 0.7]], holds=True)
  (folder / "report").mkdir(parents=True)
  (folder / "report" / "findings.json").write_text(json.dumps([finding]))
  (folder / "report" / "costs.json").write_text(json.dumps({"sft": {"seconds": 61.4}}))
  (folder / "report" / "report.png").write_bytes(b"picture")
  (folder / "evaluate").mkdir()
  command = f"python -m instructjax.main --config={config} --workdir=w"
  made = dict(version="0.1.0", commit="c" * 40, date="2026-11-30T10:00:00Z", command=command)
  means = {"base": {"gold": 0.5}, "ppo_ptx": {"gold": 3.25, "kl": 2.0}}
  done = {
    "provenance": made,
    "fingerprint": {"config.seed": str(seed)},
    "result": {"summary": means},
  }
  answers = dict(base="", sft="a|b", ppo="c\n d", ppo_ptx="e")
  rows = [{"prompt": f"p{n // 2}", "answers": answers | {"ppo_ptx": f"e{n}"}} for n in range(40)]
  (folder / "evaluate" / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
  (folder / "evaluate" / "done.json").write_text(json.dumps(done))
  (folder / "tokenizer").mkdir()
  (folder / "tokenizer" / "done.json").write_text(json.dumps({"provenance": None}))
  return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
  """A copy of the pages, of whose code every run is."""
  root = tmp_path / "root"
  (root / "docs").mkdir(parents=True)
  for name, page in (("findings", "results"), ("smollm2", "smollm2")):
    (root / "docs" / f"{page}.md").write_text(f"<!-- {name} -->\n<!-- end of {name} -->\n")
  hash_ = figures.code_hash(figures.FIGURES["findings"].code)
  monkeypatch.setattr(preset_settings, "at", lambda commit, config: preset_settings.now(config))
  monkeypatch.setattr(figures, "ROOT", root)
  monkeypatch.setattr(figures, "code_hash", lambda patterns: hash_)
  monkeypatch.setattr(
    figures.subprocess, "run", lambda words: subprocess.CompletedProcess(words, 0)
  )
  for name, default in (("read", figures.read), ("save", figures.save)):
    monkeypatch.setattr(
      figures, name, lambda *args, default=default: default(*args, folder=root / "docs" / "figures")
    )
  return root


def test_finished_runs_become_a_table_and_the_picture(root, tmp_path, capsys):
  runs = [finished_run(tmp_path / f"run{seed}", seed, 0.6 + seed / 10) for seed in (0, 1)]
  assert figures.main(["take", "findings", *map(str, runs)]) == 0
  page = (root / "docs" / "results.md").read_text()
  assert "| `f` | win rate | .600 (.500 to .700) | .700 (.500 to .700) | .600 to .700 |" in page
  assert "commit cccccccccc, 2026-11-30" in page and "--config.seed=1" in page
  assert (root / "docs" / "report.png").read_bytes() == b"picture"
  assert figures.main(["take", "findings", str(tmp_path)]) == 2
  assert "is it a finished run" not in capsys.readouterr().out
  assert figures.main(["measure", "findings"]) == 2
  assert figures.main(["take", "decode", str(tmp_path)]) == 2


def test_runs_of_a_real_model_become_tables_and_answers(root, tmp_path, capsys):
  config = "configs/ppo_ptx.py:smollm2"
  run = finished_run(tmp_path / "run", 3, 0.6, config)
  assert figures.main(["take", "smollm2", str(run)]) == 0
  page = (root / "docs" / "smollm2.md").read_text()
  assert "| gold score | .500 | 3.25 |" in page and "| KL from PPO init, nats |  | 2.00 |" in page
  # A prompt's first answer, of ten prompts.
  assert "| p0 | (nothing) | a\\|b | c d | e0 |" in page and "| e18 |" in page
  assert "e1 |" not in page and "| p10 |" not in page
  assert "Seconds of seed 3, 61 in all: sft 61." in page
  assert f"--config={config} --workdir=runs/seed3 --config.seed=3" in page
  assert (root / "docs" / "smollm2.png").exists() and not (root / "docs" / "report.png").exists()
  assert figures.main(["take", "findings", str(run)]) == 2
  assert "is no run of --config=configs/ppo_ptx.py:" in capsys.readouterr().err


def test_seeds_taken_one_by_one_stand_together_until_the_settings_change(
  root, tmp_path, monkeypatch
):
  runs = [finished_run(tmp_path / f"run{seed}", seed, 0.6 + seed / 10) for seed in (0, 1)]
  (runs[0] / "report" / "report.png").write_bytes(b"of seed 0")
  for run in reversed(runs):
    assert figures.main(["take", "findings", str(run)]) == 0
  page = (root / "docs" / "results.md").read_text()
  assert "| .600 (.500 to .700) | .700 (.500 to .700) | .600 to .700 |" in page
  assert (root / "docs" / "report.png").read_bytes() == b"of seed 0"
  # Another machine's run of a seed takes the place of the first one.
  assert figures.main(["take", "findings", str(finished_run(tmp_path / "again", 1, 0.8))]) == 0
  assert "| .600 to .800 |" in (root / "docs" / "results.md").read_text()
  monkeypatch.setattr(preset_settings, "now", lambda config: {"ppo.beta": 7})
  assert figures.main(["take", "findings", str(runs[1])]) == 0
  page = (root / "docs" / "results.md").read_text()
  assert "| .700 (.500 to .700) |" in page and ".600" not in page


def test_means_of_several_seeds_stand_with_their_span():
  runs = [
    {"seed": str(seed), "policies": {"ppo": {"gold": gold, **kl}}, "findings": [], "answers": []}
    for seed, gold, kl in ((0, 1.0, {}), (1, 2.0, {"kl": 3.0}), (4, 6.0, {}))
  ]
  for run in runs:
    run |= {"seconds": {"sft": 2.0}}
  page = tables.real_model([{"lines": [run]} for run in runs])
  assert "Means over seeds 0, 1, 4, with the least" in page
  assert "| gold score | 3.00 (1.00 to 6.00) |" in page  # 9 / 3
  assert "| KL from PPO init, nats | 3.00 (3.00 to 3.00, 1 of 3 seeds) |" in page
  assert "| reward |  |" in page


def test_findings_of_only_some_runs_and_numbers_that_are_not_finite_are_shown():
  one = lambda id_, measured, interval: dict(
    id=id_, measured=measured, interval=interval, holds=None
  )
  runs = [
    {"seed": "0", "findings": [one("f", {"a": 1.0, "b": None}, [[0.5, None], [1, 2]])]},
    {"seed": "1", "findings": [one("f", {"a": 3.0}, [[2.0, 4.0]]), one("g", {"c": 5.0}, [])]},
  ]
  lines = tables.findings([{"lines": runs}]).splitlines()
  assert lines[2:] == [
    "| `f` | a | 1.00 | 3.00 (2.00 to 4.00) | 1.00 to 3.00 |",
    "|  | b | - |  |  |",
    "| `g` | c |  | 5.00 | 5.00 to 5.00 |",
    "| findings that hold |  | 0 of 1 | 0 of 2 |  |",
  ]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"command": "main --config.ppo.beta=9 --config.seed=1"}, r"\(--config.ppo.beta=9\)"),
    ({"commit": "d" * 40}, "run/rm is of another commit"),
  ],
)
def test_a_run_that_is_not_the_preset_whole_is_refused(root, tmp_path, change, message, capsys):
  run = finished_run(tmp_path / "run", 0, 0.6)
  made = json.loads((run / "evaluate" / "done.json").read_text())["provenance"]
  (run / "rm").mkdir()
  (run / "rm" / "done.json").write_text(json.dumps({"provenance": made | change}))
  assert figures.main(["take", "findings", str(run)]) == 2
  assert re.search(message, capsys.readouterr().err)


def test_a_record_without_settings_is_stale(monkeypatch):
  figure = figures.FIGURES["smollm2"]
  record = {"command": "c", "code": figures.code_hash(figure.code)}
  assert figures.stale(figure, [record]) == ["c"]
  known = {"settings": json.dumps(preset_settings.now(figure.config))}
  assert figures.stale(figure, [record | known]) == []


@pytest.mark.parametrize("commit", ["", "a" * 40 + "+changes", "0" * 40])
def test_a_run_of_other_code_is_refused(commit, tmp_path, capfd):
  with pytest.raises(UserError, match="other code"):
    figures._require_same_code(tmp_path, commit, figures.FIGURES["findings"])


def test_a_run_of_other_settings_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(
    figures.subprocess, "run", lambda words: subprocess.CompletedProcess(words, 0)
  )
  figure = figures.FIGURES["findings"]
  then = preset_settings.now(figure.config)
  monkeypatch.setattr(preset_settings, "at", lambda commit, config: then | {"ppo.beta": 7.0})
  with pytest.raises(UserError, match=r"other settings \(ppo.beta\): run it anew"):
    figures._require_same_code(tmp_path, "a" * 40, figure)
  del then["ppo.discount"]  # a setting that came after the run, and that the preset leaves alone
  monkeypatch.setattr(preset_settings, "at", lambda commit, config: then)
  assert figures._require_same_code(tmp_path, "a" * 40, figure) == then


@pytest.mark.parametrize(
  ("value", "said"),
  [(0.934, ".934"), (-0.05, "-.050"), (-3.294, "-3.29"), (41.25, "41.2"), (0, ".000")],
)
def test_numbers(value, said):
  assert tables.number(value) == said


SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0}
LINES = [
  dict(workload="W1", variant="x=1", product_gflops=180, bound_s=1.5, wall_s=SPREAD, peak_rss_gb=1),
  dict(workload="W1", variant="trl", product_gflops=180, bound_s=1.5, wall_s=SPREAD, peak_rss_gb=2),
  dict(workload="W1", over_trl={"x=1": {"wall_s": 0.5, "cpu_s": 0.4}}),
]


def test_an_iteration_beside_its_peer():
  table = tables.iterations([{**MADE, "command": "c", "lines": LINES}])
  assert table.splitlines()[2] == (
    "| W1 | AMD EPYC, AVX2, 180 GFLOP/s | 1.50 s | 2.00 (1.00 to 3.00) s, 1.0 GB"
    " | trl: 2.00 (1.00 to 3.00) s, 2.0 GB | **.500** |"
  )


def test_a_training_step_beside_its_peer():
  lines = [line | {"tokens_per_s": 400.4} for line in LINES[:2]] + LINES[2:]
  table = tables.training_steps([{**MADE, "command": "c", "lines": lines}])
  assert table.splitlines()[2].startswith(
    "| trl | AMD EPYC, AVX2, 180 GFLOP/s | 1.50 s | 400 tokens/s"
  )


def test_a_decode_step_beside_its_peer():
  times = {"batch_1_step_ms": 16.0, "batch_16_step_ms": 37.1}
  lines = [
    {"program": "instructjax", "floor_ms": 16.3, **times},
    {"program": "transformers", "floor_ms": 16.3, **times},
    {"over_transformers": {"batch_1_step_ms": 1.0, "batch_16_step_ms": 1.0}},
  ]
  table = tables.decode_steps([{**MADE, "command": "c", "lines": lines}])
  assert table.splitlines()[2:] == [
    "| 1 | AMD EPYC, AVX2 | 16.3 ms | 16.0 ms | transformers: 16.0 ms | **1.00** |",
    "| 16 | AMD EPYC, AVX2 | 16.3 ms | 37.1 ms | transformers: 37.1 ms | **1.00** |",
  ]


def test_what_the_planner_says_of_programs():
  found = {
    **dict(stage="ppo_ptx", preset="p", topology="v5e:2x2", mesh={"data": 1, "fsdp": 4}),
    "compiler": {"libtpu": "0.0.52"},
    "fits": True,
    "memory": {"allocated": 3 * 2**30, "peak": 2**31},
    "expected": {"seconds": 10.0, "least": 8.0, "most": 20.0},
    "timing": {
      "estimates": {
        n: {"seconds": s} for n, s in zip(("roofline", "overlapped", "serial"), (5, 9, 12))
      }
    },
    "collectives": {"all-gather": [3, 2e9], "all-reduce": [1, 1e9]},
    "decode": {"step": {"hbm_bytes": 1.5e9, "wire_bytes": 2e6}},
    "compilation": {"cpu_seconds": 100.0},
    "tokens": 1000,
  }
  command = "python -m launch.plan --config=configs/ppo_ptx.py:p --config.rollout.slots=8"
  record = {**MADE, "command": command, "lines": [found]}
  refused = found | {"fits": False, "out_of_memory": {"needed": 20.04}}
  rows = tables.pods([record, record | {"lines": [refused]}]).splitlines()[2:]
  name = "ppo_ptx p, v5e:2x2, `fsdp:4`, rollout.slots=8"
  assert rows[0] == (
    f"| {name} | 3.00, 2.00 | **10** (8 to 20) | 100 | 5.00, 9.00, 12.00 | 3 GB | 1.50 GB, 2.00 MB | 100"
    " | aaaaaaaaaa, 0.0.52 |"
  )
  changed = tables.pods([record | {"commit": "b" * 40 + "+changes"}])
  assert changed.endswith("| bbbbbbbbbb+changes, 0.0.52 |")
  assert rows[1] == f"| {name} | does not fit: 20.0 GiB |  |  |  |  |  |  | aaaaaaaaaa, 0.0.52 |"


def test_only_commands_that_match_are_run(monkeypatch, tmp_path, capsys):
  ran = []

  def run(words, **kwargs):
    ran.append(" ".join(words[2:]))
    return subprocess.CompletedProcess(words, 1, stdout='{"fits": false}')

  monkeypatch.setattr(figures.subprocess, "run", run)
  monkeypatch.setattr(figures, "save", lambda name, records: None)
  monkeypatch.setattr(figures, "write", lambda: None)
  monkeypatch.setattr(figures.provenance, "commit", lambda root: "a" * 40)
  assert figures.main(["measure", "pods", "--matching=sft.py:gpt3_1p3b"]) == 0
  assert len(ran) == 2 and all("sft.py:gpt3_1p3b" in command for command in ran)
  assert figures.main(["measure", "pods", "--matching=nothing"]) == 2


def test_a_record_is_of_the_code_that_the_command_started_with(monkeypatch):
  now, saved = ["before"], []

  def run(words, **kwargs):
    now[0] = "later"
    return subprocess.CompletedProcess(words, 0, stdout='{"x": 1}\n{"x": 2}\n')

  monkeypatch.setattr(figures.subprocess, "run", run)
  monkeypatch.setattr(figures, "code_hash", lambda patterns: now[0])
  monkeypatch.setattr(figures.provenance, "commit", lambda root: now[0])
  monkeypatch.setattr(figures, "save", lambda name, records: saved.extend(records))
  figures.measure("decode")
  record = saved[-1]
  assert (record["code"], record["commit"]) == ("before", "before")
  assert record["lines"] == [{"x": 1}, {"x": 2}]


def test_a_command_that_fails_after_some_lines_is_no_measurement(monkeypatch):
  failed = subprocess.CompletedProcess([], 1, stdout='{"program": "instructjax"}\n')
  monkeypatch.setattr(figures.subprocess, "run", lambda words, **kwargs: failed)
  with pytest.raises(UserError, match="ended with 1"):
    figures.measure("decode")
