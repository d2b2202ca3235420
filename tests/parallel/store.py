"""A store like the coordination service's, inside one process."""

from instructjax.parallel.watchdog import Team


class Store:
  def __init__(self):
    self.values: dict[str, str] = {}

  def key_value_set(self, key: str, value: str, allow_overwrite: bool = False):
    self.values[key] = value

  def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
    return [(name, text) for name, text in list(self.values.items()) if name.startswith(key + "/")]


def teams(num_processes: int) -> list[Team]:
  """The processes of a run, which share a store."""
  store = Store()
  return [Team(store, process, num_processes) for process in range(num_processes)]
