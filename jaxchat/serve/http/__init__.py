"""A server that speaks the HTTP API of OpenAI, with a page of its own."""
