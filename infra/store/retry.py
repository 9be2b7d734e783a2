"""Waiting for a service that is away for a moment: attempts with growing pauses, until patience ends."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import TransientError

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds
SAID_AFTER = 5.0  # seconds; shorter troubles are nobody's concern

_jitter = random.Random()  # one of its own: the global one is a training's


def patiently(attempt: Callable[[], T], patience: Callable[[], float], remedy: Callable[[], str]) -> T:
    """Call `attempt` until it returns, each pause about twice the last, so that many callers do not come back at once.

    Args:
        attempt: can be repeated; what it raises besides TransientError is passed on at once.
        patience: seconds from the first attempt's beginning after which no other one begins; asked after a failure.
        remedy: ends the error's line.

    Raises:
        TransientError: the last attempt's, with the seconds waited and the remedy.
    """
    began, pause, is_said = time.monotonic(), FIRST_PAUSE, False
    while True:
        try:
            return attempt()
        except TransientError as error:
            waited, rest = time.monotonic() - began, pause * _jitter.uniform(0.5, 1.0)
            if waited + rest > patience():
                raise TransientError(f"{error} for {waited:.0f} s; {remedy()}") from error
            if waited > SAID_AFTER and not is_said:
                log.warning("%s; trying again for up to %.0f s", error, patience() - waited)
                is_said = True
        time.sleep(rest)
        pause = min(2 * pause, LONGEST_PAUSE)
