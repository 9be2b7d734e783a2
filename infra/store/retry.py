"""Retry calls to a service that is briefly unavailable, with exponential backoff and jitter."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import TransientError

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds
WARN_AFTER = 5.0  # seconds; shorter outages are not logged

_jitter = random.Random()  # its own generator: the global one belongs to training


def retry(attempt: Callable[[], T], timeout: Callable[[], float], remedy: Callable[[], str]) -> T:
    """Retry `attempt` on TransientError, doubling the pause each time, with jitter so that many callers spread out.

    Args:
        attempt: an idempotent call; any error but TransientError is raised at once.
        timeout: seconds from the start of the first attempt after which no further one starts; called after a failure.
        remedy: ends the error message.

    Raises:
        TransientError: that of the last attempt, with the seconds waited and the remedy.
    """
    began, pause, is_logged = time.monotonic(), FIRST_PAUSE, False
    while True:
        try:
            return attempt()
        except TransientError as error:
            waited, delay = time.monotonic() - began, pause * _jitter.uniform(0.5, 1.0)
            if waited + delay > timeout():
                raise TransientError(f"{error} for {waited:.0f} s; {remedy()}") from error
            if waited > WARN_AFTER and not is_logged:
                log.warning("%s; trying again for up to %.0f s", error, timeout() - waited)
                is_logged = True
        time.sleep(delay)
        pause = min(2 * pause, LONGEST_PAUSE)
