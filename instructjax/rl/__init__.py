"""Reinforcement learning (sec 3.5): rollouts, their scores, and one PPO iteration as one XLA program."""
