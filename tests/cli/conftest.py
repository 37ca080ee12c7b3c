import pytest

from kvoffload import store
from kvoffload.cli import scrub
from kvoffload.store import namespace
from tests.cli.helpers import Command
from tests.patience import PATIENCE_S


@pytest.fixture
def kvoffload(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, which waits less for engines that do not let go or have nothing to note."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(namespace, "NAMESPACE_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(scrub, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(store, "CLOSE_SECONDS", PATIENCE_S)
    return Command(capsys)
