"""What the fuzz targets of the store share."""

from kvoffload.errors import StoreError
from kvoffload.store.slotfile import REMEDY

SENTENCE_CHARACTERS_MAX = 400


def put_file(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def check_sentence(error: StoreError, folder: str) -> None:
    """One sentence that names the file and the remedy, and can be written to any log."""
    text = str(error)
    assert folder in text and text.endswith(REMEDY), text
    assert len(text) - len(folder) <= SENTENCE_CHARACTERS_MAX, text
    assert "\n" not in text
    text.encode()
