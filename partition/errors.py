"""The one exception of this package that means "the user can mend this"."""


class PartitionError(ValueError):
    """A partition that cannot be made as asked; commands print it and exit with status 2."""
