"""Other people's tokenizer formats."""
