"""Exceptions that end a run in a way the commands know how to report."""


class UserError(ValueError):
    """A user's mistake: commands print it as one ``error:`` line and exit with status 2."""


class PeerError(RuntimeError):
    """This rank stopped because of another one: one line, no traceback, status 1."""
