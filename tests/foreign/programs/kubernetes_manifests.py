# SPDX-License-Identifier: Apache-2.0
"""Validates manifests by Kubernetes' schemas, unknown fields included, and prints them as JSON.

Arguments: Kubernetes' version, YAML files.
"""

import json
import sys
from pathlib import Path

import kubernetes_validate  # type: ignore[import-not-found]
import yaml  # type: ignore[import-untyped, unused-ignore]


def main(version: str, *paths: str) -> None:
    found = {}
    for path in paths:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
        for document in documents:
            kubernetes_validate.validate(document, version, strict=True)
        found[Path(path).name] = documents
    print(json.dumps(found))


main(*sys.argv[1:])
