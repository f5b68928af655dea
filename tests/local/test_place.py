from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from local.place import HOMES, PORTS, ROOT, LocalError, Place, write_private


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.from_environment({"PENSTOCK_HOME": str(tmp_path / "my home")})


def test_defaults_and_overrides(tmp_path: Path) -> None:
    environment = {"PENSTOCK_HOME": str(tmp_path), "PENSTOCK_MLFLOW_PORT": "5001"}
    place = Place.from_environment(environment)
    assert place.home == tmp_path
    assert place.ports == {name: default for name, (_, default) in PORTS.items()} | {"mlflow": 5001}
    assert place.url("mlflow") == "http://127.0.0.1:5001"


def test_each_data_set_has_a_home_of_its_own(tmp_path: Path) -> None:
    homes = [
        Place.from_environment({}, data).home for data in ("", str(tmp_path / "a" / "log"), str(tmp_path / "b" / "log"))
    ]
    assert homes[0].name == "simulator"
    assert homes[1].name.startswith("log-")
    assert len(set(homes)) == 3
    assert {home.parent for home in homes} == {HOMES}
    assert Place.from_environment({"PENSTOCK_HOME": str(tmp_path)}, "log").home == tmp_path


def test_commands_without_a_home_mean_the_one_started_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local.place.HOMES", tmp_path)
    monkeypatch.setattr("local.place.CURRENT", tmp_path / "current")
    assert Place.from_environment({}).home == tmp_path / "simulator"
    for data in (str(tmp_path / "log"), ""):
        started = Place.from_environment({}, data)
        started.home.mkdir()
        started.make_current()
        assert Place.from_environment({}).home == started.home


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1"])
def test_a_port_that_is_none_names_its_variable(text: str) -> None:
    with pytest.raises(LocalError, match=f"PENSTOCK_GATEWAY_PORT is a port, 1 to 65535, not '{text}'"):
        Place.from_environment({"PENSTOCK_GATEWAY_PORT": text})


def test_one_port_for_two_services_is_refused() -> None:
    with pytest.raises(LocalError, match="PENSTOCK_GATEWAY_PORT=5000 is the port of mlflow too"):
        Place.from_environment({"PENSTOCK_GATEWAY_PORT": "5000"})


def test_a_port_in_use_names_service_and_variable(place: Place) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        taken = replace(place, ports={"gateway": port})
        with pytest.raises(LocalError, match=rf"port {port} \(gateway\) is in use .*PENSTOCK_GATEWAY_PORT"):
            taken.check_ports()
    taken.check_ports()


def test_a_real_model_server_needs_no_port_of_ours(tmp_path: Path) -> None:
    place = Place.from_environment({"PENSTOCK_MODEL_SERVER": "serving:8500"})
    assert set(place.own_ports) == {"airflow", "mlflow", "gateway", "features"}
    assert place.environment()["PENSTOCK_MODEL_SERVER"] == "serving:8500"


def test_another_feature_store_is_the_feast_commands_too(place: Place, tmp_path: Path) -> None:
    names = {"PENSTOCK_FEATURE_STORE", "FEAST_FS_YAML_FILE_PATH"}
    assert not names & place.environment().keys()
    for store, path in {
        "feature_repo/stores/redis.yaml": ROOT / "feature_repo/stores/redis.yaml",
        "/x.yaml": "/x.yaml",
    }.items():
        other = Place.from_environment({"PENSTOCK_HOME": str(tmp_path), "PENSTOCK_FEATURE_STORE": store})
        assert {name: other.environment()[name] for name in names} == dict.fromkeys(names, str(path))


def test_secrets_are_made_once_and_private(place: Place) -> None:
    secret = place.secret("jwt_secret")
    assert len(secret.encode()) >= 64
    assert place.secret("jwt_secret") == secret
    assert place.secret("secret_key") != secret
    assert stat.S_IMODE((place.home / "airflow" / "jwt_secret").stat().st_mode) == 0o600


def test_the_shell_file_gives_the_environment_and_no_secret(place: Place) -> None:
    secret = place.secret("jwt_secret")
    write_private(place.passwords, json.dumps({"admin": "a-password"}))
    path = place.write_shell()

    assert secret not in path.read_text()
    assert "a-password" not in path.read_text()
    names = ["AIRFLOW_HOME", "AIRFLOW__API__PORT", "PENSTOCK_HOME", "MLFLOW_TRACKING_URI", "PYTHONPATH"]
    script = f'. "{path}"; printf "%s\\n" ' + " ".join(f'"${name}"' for name in names)
    said = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    assert said.stdout.split("\n")[:-1] == [place.environment()[name] for name in names]


def test_airflow_reads_the_secret_by_command(place: Place) -> None:
    secret = place.secret("jwt_secret")
    command = place.environment()["AIRFLOW__API_AUTH__JWT_SECRET_CMD"]
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.strip() == secret
