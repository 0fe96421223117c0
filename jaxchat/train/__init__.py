"""Loss, train step and the one training loop."""
