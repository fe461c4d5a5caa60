"""The one error that is the user's to mend, and the one warning."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do.

    Entry points print the message and leave with exit status 2; everything that was finished stays as it is.
    """


class SuspectAdaptation(UserWarning):
    """Adapting went otherwise than in training episodes: what the adapted student says is not to be trusted unseen."""
