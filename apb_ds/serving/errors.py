"""Errors as OpenAI's API has them: a status, and an object that says what is wrong and with which field."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is refused, or failed.

    Parameters
    ----------
    status : of HTTP
    message : for people
    kind : the object's ``type``
    param : the field of the request that is at fault, if one is
    code : for programs, such as ``context_length_exceeded``
    retry_after_s : seconds after which trying again makes sense
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The response's further headers."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 408:
            headers["x-should-retry"] = "false"  # OpenAI's clients would send the same request twice more
        return headers


def busy(message: str, retry_after_s: int) -> ApiError:
    """Return the refusal of a request that finds the queue full."""
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


def unavailable(message: str) -> ApiError:
    """Return what open requests get from a server that ends."""
    return ApiError(503, message, kind="server_error", code="unavailable")


def failed(message: str) -> ApiError:
    """Return what a request gets whose answer failed."""
    return ApiError(500, message, kind="server_error")
