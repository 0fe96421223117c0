"""Data sets downloaded from the Hugging Face hub."""
