"""The end of retries at a server that does not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity import RetryCallState


def given_up(server: str, advice: str) -> Callable[[RetryCallState], NoReturn]:
    """Make a `retry_error_callback` of tenacity that names the server and says what to do."""

    def give_up(state: RetryCallState) -> NoReturn:
        reason = state.outcome.exception() if state.outcome else None
        msg = f"{server} did not answer in {state.attempt_number} attempts: {reason!r}. {advice}"
        raise ConnectionError(msg) from reason

    return give_up
