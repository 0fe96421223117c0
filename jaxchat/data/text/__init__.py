"""Files of text, and the rows of tokens made from them."""
