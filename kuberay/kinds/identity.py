"""Roles, users, policies, instance profiles, identity providers, keys and secrets.

IAM is global: two regions may each have a cluster of one name. Something of IAM is removed only
where a tag, or the provider's address, names the region too.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from kuberay import prices
from kuberay.aws import Account, tags
from kuberay.owned import regions
from kuberay.search import Found, Search


def _global(search: Search, kind: str, name: str, carried: dict[str, str], address: str = "",
            detail: str = "") -> Iterator[Found]:  # fmt: skip
    """What belongs to no region, unless it is that of a namesake in another one."""
    named = regions(carried, address)
    for resource in search.resource(kind, name, carried, 0.0, detail or address):
        if not named:
            unknown = f"{resource.detail} its region is not known".strip()
            yield dataclasses.replace(resource, detail=unknown, tagged=False)
        elif search.owner.region in named:
            yield resource


def identity_providers(search: Search) -> Iterator[Found]:
    listed = search.account.call("iam", "list_open_id_connect_providers")
    for item in listed["OpenIDConnectProviderList"]:
        arn = item["Arn"]
        key = "OpenIDConnectProviderArn"
        answer = search.account.call("iam", "list_open_id_connect_provider_tags", **{key: arn})
        address = arn.partition("oidc-provider/")[2]
        yield from _global(search, "identity provider", arn, tags(answer), address)


def roles(search: Search) -> Iterator[Found]:
    for role in search.identities["RoleDetailList"]:
        for role_found in _global(search, "role", role["RoleName"], tags(role)):
            # Once the role is gone, nothing says whose profile it was.
            profiles = role.get("InstanceProfileList") or ()
            search.memory.profiles |= {profile["InstanceProfileName"] for profile in profiles}
            yield role_found


def remove_role(account: Account, name: str) -> None:
    of = {"RoleName": name}
    for policy in list(account.pages("iam", "list_role_policies", "PolicyNames", **of)):
        account.call("iam", "delete_role_policy", PolicyName=policy, **of)
    attached = account.pages("iam", "list_attached_role_policies", "AttachedPolicies", **of)
    for entry in list(attached):
        account.call("iam", "detach_role_policy", PolicyArn=entry["PolicyArn"], **of)
    profiles = account.pages("iam", "list_instance_profiles_for_role", "InstanceProfiles", **of)
    for profile in list(profiles):
        of_profile = {"InstanceProfileName": profile["InstanceProfileName"]}
        account.call("iam", "remove_role_from_instance_profile", **of_profile, **of)
    account.call("iam", "delete_role", **of)


def users(search: Search) -> Iterator[Found]:
    for user in search.identities["UserDetailList"]:
        yield from _global(search, "user", user["UserName"], tags(user))


def policies(search: Search) -> Iterator[Found]:
    for item in search.account.pages("iam", "list_policies", "Policies", Scope="Local"):
        arn, name = item["Arn"], item["PolicyName"]
        # A call for each policy of an account would be throttled: the index knows the tagged ones
        # after minutes, and the name says it of most.
        if arn in search.global_index or search.owner.name in name:
            answer = search.account.call("iam", "list_policy_tags", PolicyArn=arn)
            yield from _global(search, "policy", arn, tags(answer), detail=name)


def remove_policy(account: Account, arn: str) -> None:
    of = {"PolicyArn": arn}
    attached = account.call("iam", "list_entities_for_policy", **of)
    for role in attached.get("PolicyRoles", []):
        account.call("iam", "detach_role_policy", RoleName=role["RoleName"], **of)
    for user in attached.get("PolicyUsers", []):
        account.call("iam", "detach_user_policy", UserName=user["UserName"], **of)
    for group in attached.get("PolicyGroups", []):
        account.call("iam", "detach_group_policy", GroupName=group["GroupName"], **of)
    for version in list(account.pages("iam", "list_policy_versions", "Versions", **of)):
        if not version["IsDefaultVersion"]:
            name = version["VersionId"]
            account.call("iam", "delete_policy_version", VersionId=name, **of)
    account.call("iam", "delete_policy", **of)


def instance_profiles(search: Search) -> Iterator[Found]:
    for item in search.account.pages("iam", "list_instance_profiles", "InstanceProfiles"):
        arn, name = item["Arn"], item["InstanceProfileName"]
        related = name in search.memory.profiles
        if not related and arn not in search.global_index and search.owner.name not in name:
            continue
        of = {"InstanceProfileName": name}
        carried = tags(search.account.call("iam", "get_instance_profile", **of)["InstanceProfile"])
        profiles = list(_global(search, "instance profile", name, carried))
        yield from profiles
        if related and not profiles and not carried:
            detail = "it had a role of the cluster"
            yield Found("instance profile", name, 0.0, detail, tagged=False)


def remove_instance_profile(account: Account, name: str) -> None:
    of = {"InstanceProfileName": name}
    profile = account.call("iam", "get_instance_profile", **of)["InstanceProfile"]
    for role in profile["Roles"]:
        role_name = role["RoleName"]
        account.call("iam", "remove_role_from_instance_profile", RoleName=role_name, **of)
    account.call("iam", "delete_instance_profile", **of)


def keys(search: Search) -> Iterator[Found]:
    for arn, carried in search.indexed("kms"):
        metadata: dict[str, Any] = search.account.call("kms", "describe_key", KeyId=arn)[
            "KeyMetadata"
        ]
        # A key on its way out costs nothing, and cannot go faster than in seven days.
        if metadata["KeyState"] not in ("PendingDeletion", "PendingReplicaDeletion"):
            detail = f"{metadata['KeyState']} {metadata.get('Description', '')}".rstrip()
            usd = prices.KEY_PER_MONTH
            yield from search.resource("key", metadata["KeyId"], carried, usd, detail)


def secrets(search: Search) -> Iterator[Found]:
    # Those that are scheduled for deletion are not in this list, and cost nothing.
    for item in search.account.pages("secretsmanager", "list_secrets", "SecretList"):
        usd, name = prices.SECRET_PER_MONTH, item.get("Name", "")
        yield from search.resource("secret", item["ARN"], tags(item), usd, name)
