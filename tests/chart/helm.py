"""Helm itself, with folders of its own and the cluster that a file describes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kvoffload-inference"
HELM = Path(sys.executable).with_name("helm")


class Helm:
    def __init__(self, home: Path, kubeconfig: Path):
        self.environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "KUBECONFIG": str(kubeconfig)}

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in (HELM, *words)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)

    def __call__(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
