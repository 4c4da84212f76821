import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What deploy/secrets.sh makes."""
    folder = tmp_path_factory.mktemp("made") / "secrets"
    command = ["sh", str(DEPLOY / "secrets.sh"), str(folder), "postgres", "nats"]
    subprocess.run(command, check=True)
    return folder
