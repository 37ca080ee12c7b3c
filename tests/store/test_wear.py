"""What drives say of their wear, on a sysfs and with an nvme-cli of our own making."""

import os
import stat
import threading

import pytest

from kvoffload.store.wear import PAUSE_S, DriveWear


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder):
        self.now = 0.0
        self.sysfs = folder / "sys"
        self.path = folder / "kv"
        self.path.mkdir()
        self.program = folder / "nvme"
        self.asked = folder / "asked"
        (self.sysfs / "dev/block").mkdir(parents=True)

    def block(self, place: str):
        device = self.sysfs / "devices" / place
        device.mkdir(parents=True)
        return device

    def mount(self, device) -> None:
        """The nvme path lies on the device."""
        found = os.stat(self.path).st_dev
        (self.sysfs / f"dev/block/{os.major(found)}:{os.minor(found)}").symlink_to(device)

    def answers(self, script: str) -> None:
        self.program.write_text(f'#!/bin/sh\necho "$@" >> {self.asked}\n{script}\n')
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)

    def wear(self) -> DriveWear:
        return DriveWear([str(self.path)], str(self.program), str(self.sysfs), lambda: self.now)

    def known(self) -> dict[int, int]:
        wear = self.wear()
        wear.percentages()
        wear.wait()
        return wear.percentages()


@pytest.mark.parametrize("field", ["percent_used", "percentage_used"])
def test_a_partition_of_an_nvme_drive_tells_its_drives_percentage(machine, field):
    machine.mount(machine.block("pci0000:00/nvme/nvme3/nvme3n1/nvme3n1p2"))
    machine.answers(f"""echo '{{"avail_spare": 100, "{field}": 7}}'""")
    assert machine.known() == {0: 7}
    assert machine.asked.read_text() == "smart-log --output-format=json /dev/nvme3n1\n"


def test_a_device_made_of_several_is_as_worn_as_the_most_worn(machine):
    volume = machine.block("virtual/block/dm-0")
    (volume / "slaves").mkdir()
    for number in (0, 1):
        (volume / f"slaves/nvme{number}n1").symlink_to(machine.block(f"pci0000:00/nvme/nvme{number}/nvme{number}n1"))
    machine.mount(volume)
    machine.answers("""case $3 in */nvme0n1) echo '{"percent_used": 3}';; *) echo '{"percent_used": 120}';; esac""")
    assert machine.known() == {0: 120}


@pytest.mark.parametrize(
    "script", ["exit 1", "echo no", "echo '[]'", """echo '{"percent_used": "9"}'""", """echo '{"percent_used": 256}'"""]
)
def test_a_drive_that_does_not_tell_has_no_figure(machine, script):
    machine.mount(machine.block("pci0000:00/nvme/nvme0/nvme0n1"))
    machine.answers(script)
    assert machine.known() == {}


def test_what_is_no_nvme_drive_is_not_asked(machine):
    machine.mount(machine.block("pci0000:00/virtio1/block/vda"))
    machine.answers("""echo '{"percent_used": 1}'""")
    assert machine.known() == {} and not machine.asked.exists()


def test_a_file_system_without_a_block_device_has_no_figure(machine):
    machine.answers("""echo '{"percent_used": 1}'""")
    assert machine.known() == {}


def test_without_nvme_cli_no_thread_is_started(machine, monkeypatch):
    monkeypatch.setattr("kvoffload.store.wear.find_nvme", lambda: None)
    wear = DriveWear([str(machine.path)], None, str(machine.sysfs))
    assert wear.percentages() == {} and not [each for each in threading.enumerate() if each.name == "kvoffload-wear"]


def test_where_no_thread_is_to_be_had_it_is_asked_an_hour_later(machine, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    machine.mount(machine.block("pci0000:00/nvme/nvme0/nvme0n1"))
    machine.answers("""echo '{"percent_used": 5}'""")
    wear = machine.wear()
    with monkeypatch.context() as seam:
        seam.setattr(threading.Thread, "start", refuse)
        assert wear.percentages() == {}
    machine.now = PAUSE_S
    wear.percentages()
    wear.wait()
    assert wear.percentages() == {0: 5}


def test_asking_waits_for_nobody_and_is_repeated_after_an_hour(machine):
    machine.mount(machine.block("pci0000:00/nvme/nvme0/nvme0n1"))
    machine.answers("""while [ ! -e "$0.go" ]; do sleep 0.01; done; echo '{"percent_used": 5}'""")
    wear = machine.wear()
    assert wear.percentages() == {} and wear.percentages() == {}
    machine.program.with_name("nvme.go").touch()
    wear.wait()
    machine.now = PAUSE_S - 1
    assert wear.percentages() == {0: 5}
    wear.wait()
    assert len(machine.asked.read_text().splitlines()) == 1
    machine.now = PAUSE_S
    wear.percentages()
    wear.wait()
    assert len(machine.asked.read_text().splitlines()) == 2
