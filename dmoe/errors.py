"""The one error that is the user's to mend."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do.

    Entry points print the message and leave with exit status 2; everything that was finished stays as it is.
    """
