"""Transient infrastructure errors; callers may retry."""


class TransientError(ConnectionError):
    """A lost worker or an unreachable service; flows retry it, unlike a ValueError, which the user has to fix."""
