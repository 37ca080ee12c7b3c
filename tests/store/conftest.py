import pytest

from kvoffload.store import namespace


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held namespace is refused soon."""
    monkeypatch.setattr(namespace, "NAMESPACE_LOCK_SECONDS", 0.2)
