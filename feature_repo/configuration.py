"""Which stores there are: the Feast configuration of a home."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from string import Template

import yaml
from feast import RepoConfig
from feast.infra.utils.postgres.postgres_config import PostgreSQLConfig
from sqlalchemy.engine import make_url

HERE = Path(__file__).resolve().parent


class StoreError(RuntimeError):
    """The feature store cannot answer; the message says what to do."""


def read_configuration(home: Path) -> RepoConfig:
    """The file that PENSTOCK_FEATURE_STORE names, or feature_store.yaml, with ${…} filled in; PENSTOCK_HOME is `home`.

    A relative path begins at the repository's root, whatever the working directory.

    Raises:
        StoreError: there is no such file, or it names a variable that is not set.
    """
    path = HERE.parent / (os.environ.get("PENSTOCK_FEATURE_STORE") or HERE / "feature_store.yaml")
    variables = {**os.environ, "PENSTOCK_HOME": str(home.resolve())}
    try:
        text = Template(path.read_text()).substitute(variables)
    except FileNotFoundError as error:
        raise StoreError(f"there is no {path}: PENSTOCK_FEATURE_STORE names a feature store's configuration") from error
    except KeyError as error:
        raise StoreError(f"{path} needs the environment variable {error.args[0]}: set it") from error
    configuration = RepoConfig(**yaml.safe_load(text))
    configuration.repo_path = HERE
    if hasattr(configuration.offline_store, "spark_conf"):
        # told again at each source that is read from the registry
        warnings.filterwarnings("ignore", "The spark data source API is an experimental", RuntimeWarning)
    return configuration


def addresses(configuration: RepoConfig) -> dict[str, str]:
    """Where registry, offline store and online store are, without passwords; servers as "redis at host:port"."""
    url = make_url(configuration.registry.path)
    found = {"registry": url.render_as_string(hide_password=True)}
    if url.get_backend_name() == "postgresql":
        found["registry"] = f"postgresql at {url.host}:{url.port}/{url.database}"
    for role in ("offline_store", "online_store"):
        settings = getattr(configuration, role)
        if isinstance(settings, PostgreSQLConfig):
            where = f"postgresql at {settings.host}:{settings.port}/{settings.database}"
        elif settings.type == "redis":
            parts = settings.connection_string.split(",")
            where = "redis at " + ",".join(part for part in parts if "=" not in part or part.startswith("db="))
        else:
            where = str(getattr(settings, "path", None) or settings.type)
        found[role.replace("_", " ")] = where
    return found


@contextlib.contextmanager
def reaching(configuration: RepoConfig) -> Iterator[None]:
    """Within the block, what a server that does not answer raises becomes a StoreError that names its address."""
    try:
        yield
    except Exception as error:
        if (kind := _kind_of_server(error)) is None:
            raise
        where = dict.fromkeys(address for address in addresses(configuration).values() if address.startswith(kind))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"no answer from {' or '.join(where)}: {reason}") from error


def _kind_of_server(error: Exception) -> str | None:
    # imported when something has failed: loading them takes a while, and most homes have neither
    import psycopg
    import redis
    import sqlalchemy.exc

    if isinstance(error, sqlalchemy.exc.DBAPIError):
        error = error.orig if isinstance(error.orig, Exception) else error
    if isinstance(error, psycopg.OperationalError):
        return "postgresql"
    return "redis" if isinstance(error, redis.ConnectionError | redis.TimeoutError) else None
