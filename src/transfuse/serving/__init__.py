"""Serving: a model behind HTTP, for many at a time. The extra `serve` has what it needs.

app ── gate ── backend ──pipe── worker        one process answers, one has the model; neither waits for the other
"""
