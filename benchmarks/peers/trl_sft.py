"""TRL's SFTTrainer as a worker of benchmarks.sft_step: its own training loop, held between two steps.

The loss that it reports is the sum over the predicted tokens divided by all tokens, so 2040 / 2048 of the mean.
Runs in `.venv-trl` of setup.sh; imports nothing of instructjax.
"""

import argparse
import tempfile

import worker

worker.claim_stdout()  # before libraries that print

import datasets  # noqa: E402
import gate  # noqa: E402
import numpy as np  # noqa: E402
import torch_sft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402


class FirstLoss(trl.SFTTrainer):
  """Keeps the loss of the first step; else the trainer as it is."""

  first_loss = None

  def training_step(self, *args, **kwargs):
    loss = super().training_step(*args, **kwargs)
    if self.first_loss is None:
      self.first_loss = loss.item()
    return loss


def tokenizer() -> transformers.PreTrainedTokenizerBase:
  """The trainer wants one for its padding id; no text is ever encoded."""
  import tokenizers

  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0}, unk_token="<end>"))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, eos_token="<end>", pad_token="<end>"
  )


def make_trainer(token_BL: np.ndarray, callback: gate.Gate, folder: str) -> FirstLoss:
  """A trainer that takes all rows in each step."""
  # Float32 and no recomputation, which are not its defaults: the others do the same work.
  args = trl.SFTConfig(
    output_dir=folder,
    per_device_train_batch_size=len(token_BL),
    max_steps=10**6,
    max_length=token_BL.shape[1],
    learning_rate=2e-5,
    adam_beta2=0.95,
    weight_decay=0.0,
    max_grad_norm=1.0,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
  )
  return FirstLoss(
    model=torch_sft.make_model(),
    args=args,
    train_dataset=datasets.Dataset.from_dict({"input_ids": token_BL.tolist()}),
    processing_class=tokenizer(),
    callbacks=[callback],
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", required=True, help="int32 [rows, length] in an .npy file")
  token_BL, steps = np.load(parser.parse_args().tokens), gate.Gate()

  def once() -> dict:
    steps.step()
    return {}

  def serve():
    for _ in range(2):  # the second one has the optimiser's state
      once()
    worker.serve(
      once,
      {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens": token_BL.size,
        "first_loss": trainer.first_loss,
        "libraries": f"trl {trl.__version__}, transformers {transformers.__version__}",
      },
    )

  with tempfile.TemporaryDirectory() as folder:
    trainer = make_trainer(token_BL, steps, folder)
    steps.hold(trainer.train, serve)


if __name__ == "__main__":
  main()
