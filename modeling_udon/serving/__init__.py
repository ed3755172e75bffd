"""HTTP service of `udon serve`: embeddings in OpenAI's form, search and changes of an index."""
