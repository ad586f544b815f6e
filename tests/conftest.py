"""Fixtures that every test may use."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import settings

# An example that waits for a core is no failure: machines are shared. pytest's own timeout stands.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Asynchronous tests share a loop: gRPC's poller is one per process, and trips over loops closed under it."""
    yield  # noqa: PT022 (a generator: the loop lives for as long as this fixture)
