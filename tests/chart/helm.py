"""Helm itself, in a folder of its own and with the cluster that a file describes."""

import subprocess
from pathlib import Path

from tests.chart.rendering import helm


class Helm:
    def __init__(self, home: Path, kubeconfig: Path):
        self.home = home
        self.environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "KUBECONFIG": str(kubeconfig)}

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return helm(*words, cwd=self.home, env=self.environment)

    def __call__(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
