"""The one error that is the user's to mend."""


class InputError(Exception):
    """A config, shard, index or checkpoint is at fault.

    The message names what and where (file, key or shard), what was found, and what would be right. The commands
    print it without a traceback and exit with status 2.
    """
