"""Looks at a training instead of doing it: dry run, profile, learning-rate range test."""
