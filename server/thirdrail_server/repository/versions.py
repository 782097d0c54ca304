# SPDX-License-Identifier: Apache-2.0
"""Which of a model's versions are served."""

from collections.abc import Sequence

from thirdrail_server.inference.grpc_service_pb2 import ModelVersionPolicy
from thirdrail_server.repository.errors import RepositoryError


def chosen(policy: ModelVersionPolicy, available: Sequence[int]) -> list[int]:
    """The versions to serve, ascending; without a policy the highest one. May be empty.

    Raises RepositoryError when the policy names a version that no folder can have.
    """
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return sorted(available)
    if choice == "specific":
        return sorted(_named(policy) & set(available))
    return sorted(available)[-max(policy.latest.num_versions, 1) :]


def missing(policy: ModelVersionPolicy, available: Sequence[int]) -> list[int]:
    """The versions, ascending, that the policy names although they have no folder."""
    if policy.WhichOneof("policy_choice") != "specific":
        return []
    return sorted(_named(policy) - set(available))


def _named(policy: ModelVersionPolicy) -> set[int]:
    versions = set(policy.specific.versions)
    if not versions or min(versions) < 1:
        raise RepositoryError(
            "version_policy.specific needs version numbers above 0, "
            f"got {sorted(versions) if versions else 'none'}"
        )
    return versions
