"""What is raised where a sparse step would not be what it claims to be."""


class ReplayError(RuntimeError):
    """A block that cannot be replayed on some of its rows; the message names it and says why."""
