"""The errors that are meant for the user."""


class UserError(Exception):
    """One line that names the thing and the remedy; the command line prints it and exits with code 2."""


class CheckpointError(UserError):
    """A model that cannot be found, fetched, verified, converted or loaded."""
