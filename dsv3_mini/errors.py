"""Errors that are written for people: one line that names the thing, its value, the rule, and what to do.

Everything that a user can get wrong (a config, a folder, a corpus, a flag) raises a `UserError`. The command
line prints its one line and exits with code 2; a traceback is kept for our own mistakes.
"""


class UserError(Exception):
    """A mistake in what the program was given. `str(error)` is one line that says what to do."""


class ConfigError(UserError, ValueError):
    """A field of a model or training configuration breaks a rule."""


class CheckpointError(UserError, ValueError):
    """A checkpoint folder or one of its files cannot be used."""


class DataError(UserError, ValueError):
    """A corpus, a tokenizer file or a prompt cannot be used."""
