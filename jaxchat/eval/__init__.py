"""Evaluation: bits per byte on text, scores on tasks."""
