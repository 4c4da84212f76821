"""Tests that need several gigabytes of memory and some minutes: `make cluster` runs them."""

import os

collect_ignore_glob = [] if os.environ.get("DETFLOW_TEST_CLUSTER") else ["test_*.py"]
