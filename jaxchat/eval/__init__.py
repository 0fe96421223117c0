"""What a model is worth: bits per byte on text, scores on tasks."""
