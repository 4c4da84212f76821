"""Exports of all models: minutes of both processors. `make models` runs them."""

import os

collect_ignore_glob = [] if os.environ.get("DETFLOW_TEST_MODELS") else ["test_*.py"]
