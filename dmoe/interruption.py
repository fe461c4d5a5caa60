"""Ctrl-C and SIGTERM: a training first ends its step and saves; whatever else is at work ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HEEDED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The user, or the system, wants this process to end. Like KeyboardInterrupt, no ``except Exception`` holds it up."""

    def __init__(self, signal_: signal.Signals) -> None:
        super().__init__(signal_.name)
        self.signal = signal_

    @property
    def status(self) -> int:
        """Of the process, by the shell's rule: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + int(self.signal)


_asked: signal.Signals | None = None
_held = False


def heed_signals() -> None:
    """From now on SIGINT and SIGTERM raise :class:`Interrupted` in this process's main thread, or wait, see :func:`held`.

    One that whoever started the process wants ignored stays so.
    """
    for number in HEEDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _arrives)


def ignore_signals_of_others() -> None:
    """In a child process: Ctrl-C, which reaches it too, is for its parent; SIGTERM ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait until :func:`let_through`, or the end. A second Ctrl-C does not wait."""
    global _held  # noqa: PLW0603
    outer, _held = _held, True
    try:
        yield
    finally:
        _held = outer
    if not outer:
        let_through()


@contextmanager
def not_held() -> Iterator[None]:
    """Inside :func:`held`, around what may take long and can be done again: signals do not wait."""
    global _held  # noqa: PLW0603
    outer, _held = _held, False
    try:
        let_through()
        yield
    finally:
        _held = outer


def asked() -> bool:
    """Whether a signal waits."""
    return _asked is not None


def let_through(*, anyway: bool = False) -> None:
    """Raise :class:`Interrupted` now, if a signal has waited for it; or ``anyway``, where it came to another process."""
    if _asked is not None or anyway:
        _raise(_asked or signal.SIGTERM)


def _arrives(number: int, _: FrameType | None) -> None:
    global _asked  # noqa: PLW0603
    came = signal.Signals(number)
    impatient = _asked is came is signal.SIGINT
    if _held and not impatient:
        _asked = came
    else:
        _raise(came)


def _raise(came: signal.Signals) -> None:
    global _asked  # noqa: PLW0603
    _asked = None
    raise Interrupted(came)
