"""Reinforcement learning: rollouts, and the objectives that turn their rewards into weights."""
