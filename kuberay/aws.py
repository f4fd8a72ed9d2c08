"""One AWS account in one region: its clients, its errors as sentences.

Everything that asks AWS goes through `Account`, so that throttling is waited out in one place
(botocore's standard mode: exponential, with jitter) and a refusal names the permission that a
policy has to grant. Endpoints come from the environment (AWS_ENDPOINT_URL, ...), as botocore reads
them: the tests run this code against a server on this machine.
"""

import re
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
from botocore.parsers import ResponseParserError

from kuberay.errors import AwsError, InUse, PermissionMissing

# Teardown makes a few hundred calls, and controllers of the same account make theirs: ten attempts
# are about a minute of waiting for one call.
_PATIENT = Config(
    retries={"mode": "standard", "total_max_attempts": 10},
    connect_timeout=10,
    read_timeout=60,
    user_agent_extra="qwen-ray-serve",
)
# The price list is a comfort: the table stands in for it.
_BRIEF = Config(
    retries={"mode": "standard", "total_max_attempts": 2}, connect_timeout=3, read_timeout=5
)
# It is served in three regions, for all of them.
_PRICING_REGION = "us-east-1"
_DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "UnauthorizedOperation",
    "AuthorizationError",
    "NotAuthorized",
    "UnauthorizedAccess",
}
_STALE = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "AuthFailure",
    "SignatureDoesNotMatch",
    "RequestExpired",
}
# What services say when something that depends on a thing is still there, or it is still leaving.
_IN_USE = {
    "DependencyViolation",
    "VolumeInUse",
    "ResourceInUse",
    "ResourceInUseException",
    "InvalidNetworkInterface.InUse",
    "InvalidParameterValue.InUse",
    "InvalidIPAddress.InUse",
    "InvalidAddress.Locked",
    "InvalidGroup.InUse",
    "FileSystemInUse",
    "DeleteConflict",
    "ScalingActivityInProgress",
    "OperationNotPermitted.InUse",
    "IncorrectState",
    "IncorrectInstanceState",
    "InvalidSnapshot.InUse",
}
# What botocore raises. Its parsers' error is of none of its trees.
_TROUBLES = (BotoCoreError, ClientError, ResponseParserError)
_ACTION = re.compile(r"not authorized to perform: ([\w-]+:\w+)(?: on resource: (\S+))?")


class Account:
    """Clients of one account and region.

    Args:
        region: such as `us-west-2`.
        profile: of the AWS configuration; None for the default chain.
    """

    def __init__(self, region: str, profile: str | None = None) -> None:
        self.region, self._profile = region, profile
        self._elsewhere: dict[str, Account] = {}
        try:
            self._session = boto3.Session(profile_name=profile, region_name=region)
            self._session.events.register("before-parse", _refuse_web_page)
        except BotoCoreError as error:
            raise _explained(error) from error
        self._clients: dict[str, Any] = {}
        self._identity: dict[str, str] = {}

    def client(self, service: str) -> Any:
        """The client of a service, made once."""
        if service not in self._clients:
            pricing = service == "pricing"
            try:
                self._clients[service] = self._session.client(
                    service,
                    region_name=_PRICING_REGION if pricing else self.region,
                    config=_BRIEF if pricing else _PATIENT,
                )
            except BotoCoreError as error:
                raise _explained(error) from error
        return self._clients[service]

    def elsewhere(self, region: str) -> "Account":
        """The same account in another region."""
        if region == self.region:
            return self
        if region not in self._elsewhere:
            self._elsewhere[region] = Account(region, self._profile)
        return self._elsewhere[region]

    def call(self, service: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """One call, by botocore's name of it.

        Raises:
            AwsError: with a sentence; PermissionMissing and InUse where it is one of them.
        """
        try:
            answer: dict[str, Any] = getattr(self.client(service), operation)(**arguments)
        except _TROUBLES as error:
            raise _explained(error, self._action(service, operation)) from error
        return answer

    def pages(self, service: str, operation: str, key: str, **arguments: Any) -> Iterator[Any]:
        """The items under `key` of every page of a call.

        Raises:
            AwsError: as `call` does, also between pages.
        """
        client = self.client(service)
        try:
            if not client.can_paginate(operation):
                yield from self.call(service, operation, **arguments).get(key, [])
                return
            for page in client.get_paginator(operation).paginate(**arguments):
                yield from page.get(key, [])
        except _TROUBLES as error:
            raise _explained(error, self._action(service, operation)) from error

    def wait(self, service: str, waiter: str, **arguments: Any) -> None:
        """Until AWS says that it is so, by botocore's name of the state."""
        try:
            self.client(service).get_waiter(waiter).wait(**arguments)
        except _TROUBLES as error:
            raise _explained(error, f"{service} {waiter}") from error

    @property
    def identity(self) -> dict[str, str]:
        """`Account` and `Arn` of these credentials."""
        if not self._identity:
            answer = self.call("sts", "get_caller_identity")
            self._identity = {"Account": answer["Account"], "Arn": answer["Arn"]}
        return self._identity

    @property
    def id(self) -> str:
        return self.identity["Account"]

    def _action(self, service: str, operation: str) -> str:
        """A call as a policy spells it."""
        client = self.client(service)
        prefix = client.meta.service_model.signing_name
        return f"{prefix}:{client.meta.method_to_api_mapping.get(operation, operation)}"


def tags(resource: Any, key: str = "Tags") -> dict[str, str]:
    """The tags of a resource, whichever of AWS's three forms its service uses."""
    carried = resource.get(key) or {}
    if isinstance(carried, dict):
        return dict(carried)
    name, value = ("TagKey", "TagValue") if carried and "TagKey" in carried[0] else ("Key", "Value")
    return {tag[name]: tag.get(value, "") for tag in carried}


class _WebPage(BotoCoreError):  # type: ignore[misc]
    """What answered is a page, of a proxy before AWS."""

    fmt = "a web page"


def _refuse_web_page(response_dict: Any, **_: Any) -> None:
    """Look at each answer before it is parsed: a page that is XML would be read as an empty one."""
    body = response_dict.get("body")
    if isinstance(body, bytes) and body[:200].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise _WebPage


def _not_aws(action: str) -> AwsError:
    message = "a web page answered in place of AWS: is there a proxy that wants to be signed in to?"
    return AwsError(f"{action}: {message}".removeprefix(": "), "NotAws")


def _explained(error: Exception, action: str = "") -> AwsError:
    """The sentence for what AWS, or the way to it, said."""
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        message = error.response.get("Error", {}).get("Message", "") or str(error)
        if code in _DENIED:
            named = _ACTION.search(message)
            permission = (named[1], named[2] or "*") if named else (action, "*")
            return PermissionMissing(permission[0], permission[1].rstrip(".,"), code)
        if code in _STALE:
            return AwsError(f"the AWS credentials are not accepted ({code}): sign in again", code)
        if code in _IN_USE:
            return InUse(message, code)
        return AwsError(f"{action}: {code}: {message}", code)
    if isinstance(error, ResponseParserError | _WebPage):
        return _not_aws(action)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AwsError("no AWS credentials: set AWS_PROFILE, or run `aws sso login`", "none")
    if isinstance(error, TokenRetrievalError | UnauthorizedSSOTokenError):
        return AwsError("the AWS sign-in has ended: run `aws sso login`", "none")
    if isinstance(error, NoRegionError):
        return AwsError("no AWS region: give --region", "none")
    if isinstance(error, ProfileNotFound):
        return AwsError(f"{error}: see `aws configure list-profiles`", "none")
    return AwsError(f"{action}: {error}".removeprefix(": "), type(error).__name__)
