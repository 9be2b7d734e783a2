"""Errors that are nobody's fault: trying again may help."""


class TransientError(ConnectionError):
    """A lost worker or an unreachable service; flows retry it, unlike a ValueError, which is the user's to mend."""
