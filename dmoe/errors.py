"""The one error that is the user's to mend, and the one warning."""

LONGEST = 4000
"""Characters of a message; its end says what to do, so the middle is left out."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do.

    Entry points print the message and leave with exit status 2; everything that was finished stays as it is. Names and values in it
    may come from a file that somebody else made: whatever they hold, the message is one line of printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(message), LONGEST))


class DoesNotApply(UserError):
    """A method is none for this task, network or data set. Where several are compared, it is left out."""


def printable(text: str) -> str:
    """The text with line breaks, a terminal's control characters and what else cannot be printed as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, length: int) -> str:
    """At most so many characters, of the beginning and the end."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


class SuspectAdaptation(UserWarning):
    """Adapting went otherwise than in training episodes: what the adapted student says is not to be trusted unseen."""
