"""Exceptions that end a run in a way the commands know how to report."""


class UserError(ValueError):
    """A user's mistake: commands print it as one ``error:`` line and exit with status 2."""


class PeerError(RuntimeError):
    """This rank stopped because of another one: one line, no traceback, status 1."""


class Stopped(Exception):  # noqa: N818  # Not an error: the run can go on later.
    """The run was asked to stop, and did so after an epoch, with a checkpoint."""

    def __init__(self, signal_name: str, epoch: int) -> None:
        super().__init__(f"stopped by {signal_name} after epoch {epoch}")
        self.signal_name = signal_name
        self.epoch = epoch
