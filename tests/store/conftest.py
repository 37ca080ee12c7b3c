import pytest

from kvoffload import store
from kvoffload.store import namespace
from tests.patience import PATIENCE_S


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held namespace is refused soon. A store that is closed lets go of its own, however busy the disk is."""
    monkeypatch.setattr(namespace, "NAMESPACE_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(store, "CLOSE_SECONDS", PATIENCE_S)
