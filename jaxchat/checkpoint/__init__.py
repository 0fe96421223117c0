"""Checkpoints: saved behind the training's back, checked when read, restored onto any mesh."""

from jaxchat.checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
