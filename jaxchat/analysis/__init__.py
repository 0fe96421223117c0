"""Inspects a training instead of running it: dry run, profile, learning-rate range test, tokenizer compression."""
