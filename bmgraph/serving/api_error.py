"""Errors as clients of OpenAI's API read them: a status and a body `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from bmgraph.errors import BmgraphError, BusyError, InputError

LONGEST = 1000
"""Characters of a message at most."""


class ApiError(Exception):
    """An answer that is an error. `headers` are sent with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        """The type that the body names."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, object]:
        """The body as JSON."""
        message = self.message if len(self.message) <= LONGEST else f"{self.message[: LONGEST - 3]}..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)


def of_exception(error: BaseException) -> ApiError:
    """The error that a client is told; of what is not its fault only that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, InputError):
        return refused(str(error))
    if isinstance(error, BmgraphError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
