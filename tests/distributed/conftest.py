# SPDX-License-Identifier: Apache-2.0
"""One launcher for each process of pytest, which there is one of, or several at once."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """What runs training jobs."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each of several processes has a folder in that of the session.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "known-jobs"
    shared.mkdir(exist_ok=True)
    running = Cluster(tmp_path_factory.mktemp("cluster"), shared)
    yield running
    running.stop()
