"""The error that the command line tells in one line."""


class CommandError(Exception):
    """A command cannot run; the message names the argument at fault and what would do."""
