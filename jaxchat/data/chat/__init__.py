"""Conversations, rendered to tokens and packed into rows."""
