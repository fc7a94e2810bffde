"""Serving: a model over HTTP, for many clients at once. The extra `serve` has what it needs.

client ── middleware ── app ── engine_client ──pipe── worker

One process answers HTTP, another holds the model (`worker`), and neither waits for the other. The events of a
request are those of `inference.events`, from the engine to `responses`, which writes them in OpenAI's shapes.
"""
