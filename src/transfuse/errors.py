"""The one exception a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: one line that names the file, field or shape, what was expected and what was found.

    The command line prints the line and exits with code 2; everything else is a defect and keeps its traceback.
    """
