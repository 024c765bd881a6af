"""One teacher and one server of it for all tests that leave it as it is."""

from collections.abc import Iterator

import pytest

from real_vllm.serving import TEACHER, Server, served_teacher
from sg_opd_trl.tasks import resolve


@pytest.fixture(scope="session")
def teacher_folder() -> str:
    return resolve(TEACHER)


@pytest.fixture(scope="session")
def server(teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = served_teacher(teacher_folder, tmp_path_factory.mktemp("server") / "log.txt").start()
    try:
        yield server.wait()
    finally:
        server.kill()
