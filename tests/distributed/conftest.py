# SPDX-License-Identifier: Apache-2.0
"""One launcher for the whole session."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four processes that run training jobs."""
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.stop()
