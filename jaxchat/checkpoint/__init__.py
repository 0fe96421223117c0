"""Checkpoints: saved in the background, verified when read, restored onto any mesh."""

from jaxchat.checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
