"""The server: OpenAI's API over one engine, with a cache of documents."""
