"""Which stores there are: the Feast configuration of a home."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template

import yaml
from feast import RepoConfig

HERE = Path(__file__).resolve().parent


class StoreError(RuntimeError):
    """The feature store cannot answer; the message says what to do."""


def read_configuration(home: Path) -> RepoConfig:
    """The file that PENSTOCK_FEATURE_STORE names, or feature_store.yaml, with ${…} filled in; PENSTOCK_HOME is `home`.

    Raises:
        StoreError: there is no such file, or it names a variable that is not set.
    """
    path = Path(os.environ.get("PENSTOCK_FEATURE_STORE", HERE / "feature_store.yaml"))
    variables = {**os.environ, "PENSTOCK_HOME": str(home.resolve())}
    try:
        text = Template(path.read_text()).substitute(variables)
    except FileNotFoundError as error:
        raise StoreError(f"there is no {path}: PENSTOCK_FEATURE_STORE names a feature store's configuration") from error
    except KeyError as error:
        raise StoreError(f"{path} needs the environment variable {error.args[0]}: set it") from error
    configuration = RepoConfig(**yaml.safe_load(text))
    configuration.repo_path = HERE
    return configuration
