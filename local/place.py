"""Where the services of one machine live: home directory, ports, and the environment they share."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOMES = ROOT / "var"
CURRENT = HOMES / "current"
HOST = "127.0.0.1"
USERS = {"admin": "admin", "viewer": "viewer"}
PORTS = {
    "airflow": ("PENSTOCK_AIRFLOW_PORT", 8080),
    "mlflow": ("PENSTOCK_MLFLOW_PORT", 5000),
    "gateway": ("PENSTOCK_GATEWAY_PORT", 8000),
    "features": ("PENSTOCK_FEATURES_PORT", 6566),
    "model server (gRPC)": ("PENSTOCK_GRPC_PORT", 8500),
    "model server (REST)": ("PENSTOCK_REST_PORT", 8501),
}


def _default_home(data: str | None) -> Path:
    if data is None and CURRENT.exists():
        return CURRENT
    if not data:
        return HOMES / "simulator"
    path = Path(data).resolve()
    # two logs of one name in two places are two logs
    return HOMES / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


class LocalError(RuntimeError):
    """Something a person has to do first; the message says what, in a line."""


@dataclass(frozen=True)
class Place:
    """A home directory and the ports of its services.

    `model_server` is a real TF Serving's gRPC, if there is one, and `feature_store` another configuration of Feast.
    """

    home: Path
    ports: dict[str, int]
    model_server: str = ""
    feature_store: str = ""

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ, data: str | None = None) -> Place:
        """By PENSTOCK_HOME, PENSTOCK_*_PORT, PENSTOCK_MODEL_SERVER and PENSTOCK_FEATURE_STORE.

        Without PENSTOCK_HOME each data set has a home of its own, as models and feedback of one mean nothing for
        another: `data` is its path, "" the simulator, and None whichever was started last.

        Raises:
            LocalError: a port is no port, or two services have the same.
        """
        ports: dict[str, int] = {}
        for service, (variable, default) in PORTS.items():
            text = environment.get(variable) or str(default)
            if not text.isdecimal() or not 0 < int(text) < 65536:
                raise LocalError(f"{variable} is a port, 1 to 65535, not {text!r}")
            if other := next((name for name, port in ports.items() if port == int(text)), None):
                raise LocalError(f"{variable}={text} is the port of {other} too; give each its own")
            ports[service] = int(text)
        home = Path(environment.get("PENSTOCK_HOME") or _default_home(data)).resolve()
        store = environment.get("PENSTOCK_FEATURE_STORE", "")
        return Place(home, ports, environment.get("PENSTOCK_MODEL_SERVER", ""), store and str(ROOT / store))

    def url(self, service: str) -> str:
        return f"http://{HOST}:{self.ports[service]}"

    def make_current(self) -> None:
        """Points `var/current` here, if this is one of the default homes: what commands without a home mean."""
        if self.home.parent == HOMES:
            temporary = HOMES / f".current-{os.getpid()}"
            temporary.symlink_to(self.home.name)
            temporary.replace(CURRENT)

    @property
    def own_ports(self) -> dict[str, int]:
        """The ports that services of ours will listen on."""
        if not self.model_server:
            return self.ports
        return {service: port for service, port in self.ports.items() if not service.startswith("model server")}

    def check_ports(self) -> None:
        """Raises LocalError, naming port, service and variable, if one is in use."""
        for service, port in self.own_ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise LocalError(
                        f"port {port} ({service}) is in use ({error.strerror}): "
                        f"stop what uses it, or set {PORTS[service][0]} to a free one"
                    ) from None

    def secret(self, name: str) -> str:
        """A random text of this home, made on first use and readable by its owner only."""
        path = self.home / "airflow" / name
        if not path.exists():
            write_private(path, secrets.token_hex(48))
        return path.read_text().strip()

    @property
    def passwords(self) -> Path:
        return self.home / "airflow" / "passwords.json"

    def addresses(self) -> list[str]:
        """Where everything answers and who may log in, a line each."""
        users = " · ".join(f"{user} / {password}" for user, password in json.loads(self.passwords.read_text()).items())
        models = (
            self.model_server or f"{self.url('model server (REST)')}   gRPC on port {self.ports['model server (gRPC)']}"
        )
        rows = {
            "Airflow": f"{self.url('airflow')}   log in as {users}",
            "approvals": f"{self.url('airflow')}/required_actions",
            "MLflow": self.url("mlflow"),
            "gateway": f"{self.url('gateway')}/docs   POST /recommend, POST /feedback",
            "model server": models,
            "features": f"{self.url('features')}   POST /get-online-features, as docs/features.md says",
            "shell": f". {self.home / 'env.sh'}   then: airflow dags trigger prepare",
            "logs": str(self.home / "logs"),
        }
        return [f"{name:<13}{text}" for name, text in rows.items()]

    def environment(self) -> dict[str, str]:
        """What every service and every user's shell has in its environment. It holds no secret."""
        airflow = self.home / "airflow"
        settings = {
            "CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": "4",
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url('airflow')}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{user}:{role}" for user, role in USERS.items()),
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.passwords),
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{airflow}/airflow.db",
            "API__HOST": HOST,
            "API__PORT": str(self.ports["airflow"]),
            "API__WORKERS": "1",
            "API__BASE_URL": self.url("airflow"),
            "API__SECRET_KEY_CMD": f"cat {shlex.quote(str(airflow / 'secret_key'))}",
            "API_AUTH__JWT_SECRET_CMD": f"cat {shlex.quote(str(airflow / 'jwt_secret'))}",
            "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
            "DAG_PROCESSOR__REFRESH_INTERVAL": "30",
            # the executor hears of a task's end this late; a parked task that is resumed before it fails
            "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
            "LOGGING__LOGGING_LEVEL": "INFO",
        }
        return {
            "AIRFLOW_HOME": str(airflow),
            **{f"AIRFLOW__{name}": value for name, value in settings.items()},
            "PENSTOCK_HOME": str(self.home),
            **{variable: str(self.ports[service]) for service, (variable, _) in PORTS.items()},
            **({"PENSTOCK_MODEL_SERVER": self.model_server} if self.model_server else {}),
            **({"PENSTOCK_FEATURE_STORE": self.feature_store} if self.feature_store else {}),
            # what the feast command and FeatureStore(repo_path=…) read
            **({"FEAST_FS_YAML_FILE_PATH": self.feature_store} if self.feature_store else {}),
            "PENSTOCK_SERVED_SHARE": "1",  # of so few requests the replay gets all
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "FEAST_USAGE": "False",
            "GX_ANALYTICS_ENABLED": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "GIT_PYTHON_REFRESH": "quiet",
        }

    def write_shell(self) -> Path:
        """HOME/env.sh: sourced, it gives a shell in which airflow, feast and mlflow work on this home."""
        activate = Path(sys.executable).parent / "activate"
        lines = [f". {shlex.quote(str(activate))}"] if activate.exists() else []
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment().items()]
        path = self.home / "env.sh"
        path.write_text("# written at each start of the services: . this-file\n" + "\n".join(lines) + "\n")
        return path


def write_private(path: Path, text: str) -> None:
    """A file that only its owner reads, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    temporary.replace(path)
