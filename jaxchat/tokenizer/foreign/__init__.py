"""Other people's formats and libraries: Hugging Face's `tokenizers`, tiktoken."""
