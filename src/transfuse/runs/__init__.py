"""Runs: a recipe resolved into what it names, and the folder it trains in."""

from .folder import Curves, held, is_kind, read_curves, read_recipe, recipe_of, run_device, settle_device, student_of
from .resolve import Run, open_recipe_autoencoder, open_run, resolve, train_tokenizer
from .sources import Sources, open_sources, unseen_noise

__all__ = [
    "Curves",
    "Run",
    "Sources",
    "held",
    "is_kind",
    "open_recipe_autoencoder",
    "open_run",
    "open_sources",
    "read_curves",
    "read_recipe",
    "recipe_of",
    "resolve",
    "run_device",
    "settle_device",
    "student_of",
    "train_tokenizer",
    "unseen_noise",
]
