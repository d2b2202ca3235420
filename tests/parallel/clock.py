"""A stand-in for the module `time`."""


class Clock:
  """Time that goes on only when a test says so: a busy machine changes nothing."""

  def __init__(self):
    self.now = 1000.0

  def monotonic(self) -> float:
    return self.now

  def sleep(self, seconds: float):
    self.now += seconds
