"""The gloo pool, started once a worker and only where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_pool import GlooPool


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooPool]:
    pool = GlooPool(4, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()
