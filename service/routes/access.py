"""How a route reaches the running service."""

from fastapi import Request

from service.runtime import Runtime


def runtime_of(request: Request) -> Runtime:
    """The runtime of the application that serves this request; shows one model to its end."""
    runtime = request.app.state.runtime
    assert isinstance(runtime, Runtime)
    runtime.pin()
    return runtime
