"""What the tasks of questions about a passage share: earlier questions with their answers, and worked passages."""

from collections.abc import Sequence

Turns = tuple[tuple[str, str], ...]  # (question, its right answer)


def conversation(head: str, turns: Sequence[tuple[str, str]], question: str) -> str:
  """A passage, the earlier questions with their answers, and a question whose answer is to follow.

  The form is that of the published samples: parts are set apart by an empty line.
  """
  earlier = "".join(f"Q: {asked}\n\nA: {answer}\n\n" for asked, answer in turns)
  return f"{head}\n\n{earlier}Q: {question}\n\nA:"


def joined(instruction: str, worked: Sequence[str], asked: str) -> str:
  """An instruction, worked examples and what is asked, an empty line between them."""
  return "\n\n".join([instruction, *worked, asked] if instruction else [*worked, asked])
