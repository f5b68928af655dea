"""The first step of a stage on a cluster, for an input that only the home has: it goes to the cluster's store.

python -m components.bring PATH ARTIFACT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def bring(path: Path, artifact: Path) -> None:
    """Copies a file or a directory of the home to where an output artifact is written."""
    artifact.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, artifact, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, artifact)


if __name__ == "__main__":
    bring(Path(sys.argv[1]), Path(sys.argv[2]))
