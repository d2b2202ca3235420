"""One expected time of an iteration with its range, and the hours and the price of a whole run.

An iteration is taken apart into decoding, which reads HBM, and passes over whole rows, which multiply. Both are held
against what a chip could do at most, at shares that are stated here. Nothing has run on a TPU: all results are
estimates. Pure arithmetic and text, without JAX. Called by planning.py, whole_run.py and estimate.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from launch.topology import Chip


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of a peak rate: what is expected, and the ends of the range."""

  expected: float
  least: float
  most: float


# Model FLOPs of training that MaxText and levanter measured on v5e and v6e, as shares of the peak. Larger models that
# were tuned by hand have reached more (MaxText prints .51 to .67 for 16B to 128B on v5e). Forward passes are taken to
# be as good.
TRAINING = Share(0.47, 0.44, 0.50)
# open: the share of the memory's rate at which decode steps read. Nobody has published it for such a program on a TPU.
# Libtpu's cost model is near the lower end.
DECODING = Share(0.5, 0.25, 0.8)


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of an iteration.

  Attributes:
    name: decoding, prefill, scoring or update.
    seconds, least, most: expected time, and the ends of its range.
    built: what the expectation is built from, in words.
  """

  name: str
  seconds: float
  least: float
  most: float
  built: str


def decoding(steps: float, num_bytes: float, links: float, chip: Chip) -> Part:
  """All decode steps of a rollout, on one device.

  Args:
    steps: their number.
    num_bytes: what they read and write in HBM, all together.
    links: seconds that they send.
    chip: rates of the device.
  """
  at = lambda share: max(num_bytes / (share * chip.hbm_rate), links)
  what = f"{steps:,.0f} steps of {num_bytes / max(steps, 1e-9) / 1e9:.2f} GB"
  built = f"{what} at {DECODING.expected:.0%} of the memory's rate ({_ends(DECODING)})"
  if links > num_bytes / (DECODING.expected * chip.hbm_rate):
    built = f"{what}, bound by the links at the public rate"
  return Part("decoding", at(DECODING.expected), at(DECODING.most), at(DECODING.least), built)


def passes(
  name: str, flops: float, floors: Mapping[str, float], slowest: float, chip: Chip
) -> Part:
  """Passes over whole rows, on one device.

  Args:
    name: of the part.
    flops: FLOPs of their products.
    floors: `links`, `memory` -> seconds that they take at the public rate, with nothing else to do.
    slowest: another upper end of the range [seconds]; 0 for none.
    chip: rates of the device.
  """
  floor = max(floors.values(), default=0.0)
  at = lambda share: max(flops / (share * chip.flops), floor)
  built = (
    f"{flops / 1e12:.1f} TFLOP at {TRAINING.expected:.0%} of the peak rate ({_ends(TRAINING)})"
  )
  if floor > flops / (TRAINING.expected * chip.flops):
    binds = max(floors, key=lambda what: floors[what])
    built = f"{flops / 1e12:.1f} TFLOP, bound by the {binds} at the public rate"
  return Part(
    name, at(TRAINING.expected), at(TRAINING.most), max(at(TRAINING.least), slowest), built
  )


def _ends(share: Share) -> str:
  return f"{share.least:.0%} to {share.most:.0%}"


@dataclasses.dataclass(frozen=True)
class Expectation:
  """The time of an iteration: expected seconds, the ends of the range, and the parts that it is made of."""

  seconds: float
  least: float
  most: float
  parts: tuple[Part, ...]


def iteration(parts: Sequence[Part]) -> Expectation:
  """The parts, one after the other."""
  total = lambda name: sum(getattr(part, name) for part in parts)
  return Expectation(total("seconds"), total("least"), total("most"), tuple(parts))


@dataclasses.dataclass(frozen=True)
class StageTime:
  """What a stage of a run takes.

  Attributes:
    stage: its name.
    steps: number of its iterations or updates.
    expected: time of one.
    source: `compiled`, or `sketched` from sizes alone.
  """

  stage: str
  steps: float
  expected: Expectation
  source: str

  def hours(self, end: str = "seconds") -> float:
    """The hours of all steps; `end` is `seconds`, `least` or `most`."""
    return self.steps * getattr(self.expected, end) / 3600


def cost(stages: Sequence[StageTime], chips: int, price: float | None) -> dict:
  """The hours, chip-hours and price of a run, as JSON values with their ranges [least, expected, most]."""
  ends = ("least", "seconds", "most")
  hours = [sum(stage.hours(end) for stage in stages) for end in ends]
  chip_hours = [chips * value for value in hours]
  return {
    "stages": [
      {
        "stage": one.stage,
        "steps": one.steps,
        "seconds": one.expected.seconds,
        "source": one.source,
        "hours": [one.hours(end) for end in ends],
      }
      for one in stages
    ],
    "chips": chips,
    "hours": hours,
    "chip_hours": chip_hours,
    "price_per_chip_hour": price,
    "price": None if price is None else [price * value for value in chip_hours],
  }


def as_dict(found: Expectation) -> dict:
  """The expectation as JSON values."""
  return dataclasses.asdict(found)


def text(found: Mapping, tokens: int, token_kind: str) -> list[str]:
  """The lines about an iteration, from `as_dict`."""
  lines = [
    f"Expected: {found['seconds']:.3g} s an iteration ({found['least']:.3g} to {found['most']:.3g}),"
    f" {tokens / found['seconds']:,.0f} {token_kind} a second: an estimate, built from"
  ]
  lines += [
    f"  {part['name']:9} {part['seconds']:8.3g} s ({part['least']:.3g} to {part['most']:.3g})  {part['built']}"
    for part in found["parts"]
  ]
  lines.append(
    "  The shares: what MaxText and levanter measured for training on v5e and v6e; for decoding an assumption."
  )
  return lines


def run_text(found: Mapping) -> list[str]:
  """The lines about a whole run, from `cost`."""
  least, hours, most = found["hours"]
  lines = [
    "The whole run, expected (estimates), without compiling, saving, reading data and stops:",
    f"  for {found['for']}",
  ]
  lines += [
    f"  {one['stage']:16} {one['steps']:10,.0f} steps of {one['seconds']:8.3g} s"
    f" {one['hours'][1]:10,.1f} h  {one['source']}"
    for one in found["stages"]
  ]
  chip_hours = found["chip_hours"]
  lines.append(
    f"  all: {hours:,.1f} h ({least:,.1f} to {most:,.1f}) on {found['chips']} chips:"
    f" {chip_hours[1]:,.0f} chip-hours ({chip_hours[0]:,.0f} to {chip_hours[2]:,.0f})"
  )
  if found["left_out"]:
    lines.append(f"  not counted: {', '.join(found['left_out'])}")
  if found["price"] is not None:
    low, price, high = found["price"]
    lines.append(
      f"  at {found['price_per_chip_hour']:g} a chip-hour: {price:,.0f} ({low:,.0f} to {high:,.0f})"
    )
  else:
    lines.append("  --price_per_chip_hour=X adds what that costs.")
  return lines
