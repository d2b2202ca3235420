"""A plain PyTorch loop as a worker of benchmarks.sft_step: one training step of GPT-2's shape in transformers.

Runs in an environment with torch and transformers; imports nothing of instructjax.
"""

import argparse

import worker

worker.claim_stdout()  # before libraries that print

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def make_model() -> transformers.GPT2LMHeadModel:
  """GPT-2 small with random weights, without dropout."""
  torch.manual_seed(0)
  cfg = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
  return transformers.GPT2LMHeadModel(cfg)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", required=True, help="int32 [rows, length] in an .npy file")
  token_BL = torch.from_numpy(np.load(parser.parse_args().tokens)).long()
  model = make_model().train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)

  def train() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=token_BL, labels=token_BL).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  def once() -> dict:
    train()
    return {}

  first_loss = train()
  train()  # the first one after the optimiser's state is there
  worker.serve(
    once,
    {
      "parameters": sum(p.numel() for p in model.parameters()),
      "tokens": token_BL.numel(),
      "first_loss": first_loss,
      "libraries": f"torch {torch.__version__}, transformers {transformers.__version__}",
    },
  )


if __name__ == "__main__":
  main()
