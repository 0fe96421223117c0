"""Files of text, and rows of tokens made of them."""
