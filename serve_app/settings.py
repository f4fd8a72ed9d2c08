"""The deployment's settings: the `args` of serve_config.yaml, parsed once, typed and frozen.

Anything unknown or impossible is a `ConfigError`, one sentence that names the key, the value and
the nearest valid choice. vLLM's own arguments (`engine`) are not checked here: engine.py checks
them against vLLM's definition, because only serve_app/replica imports vLLM.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from serve_app.errors import ConfigError, nearest
from serve_app.gateway import routing

# Arguments of `engine` that are the CORS gate's (gates/cors.py). vLLM must not add the headers a
# second time: a browser refuses an answer that has them twice.
CORS_ARGUMENTS = ("allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials")

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


def _count_or_auto(value: object) -> object:
    if value == "auto":
        return None
    if isinstance(value, str):
        raise ValueError(
            f"neither a number nor 'auto'; did you mean {nearest(value, ['auto']) or 1}?"
        )
    return value


# A number, or None for 'auto': decided from the hardware when the application is built.
CountOrAuto = Annotated[Count | None, BeforeValidator(_count_or_auto)]


def _routing_policy(name: str) -> str:
    routing.find(name)
    return name


RoutingPolicy = Annotated[str, AfterValidator(_routing_policy)]


class _Frozen(BaseModel):
    # Strict: YAML has types of its own, and `replicas: "2"` or `keys: yes` is a mistake to name.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Replicas(_Frozen):
    """Bounds of the number of replicas, and the policy that chooses it between them.

    `min == max` is a fixed number; `min: 0` lets an idle application go.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Count = 1
    policy: Literal["slo", "ongoing_requests"] = "slo"
    ttft_s: Seconds | None = 2.0
    itl_s: Seconds | None = 0.1
    percentile: Annotated[float, Field(gt=0, lt=100)] = 95.0
    start_s: Seconds = 60.0
    idle_s: Seconds = 300.0
    target_ongoing_requests: Count = 32

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: object) -> object:
        """A plain number of replicas is a range of one."""
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if self.follow_slo and self.ttft_s is None and self.itl_s is None:
            raise ValueError("policy 'slo' needs ttft_s, itl_s or both")
        return self

    @property
    def fixed(self) -> bool:
        return self.min == self.max

    @property
    def follow_slo(self) -> bool:
        return not self.fixed and self.policy == "slo"

    def check(self, ttft_s: float, itl_s: float) -> None:
        """Check that an engine with these latencies for a single request can meet the objectives.

        Raises:
            ConfigError: it cannot, however many replicas there are.
        """
        if not self.follow_slo:
            return
        for key, limit_s, found_s in (
            ("ttft_s", self.ttft_s, ttft_s),
            ("itl_s", self.itl_s, itl_s),
        ):
            if limit_s is not None and found_s > limit_s:
                raise ConfigError(
                    f"replicas.{key}",
                    limit_s,
                    f"no replica can reach it: one request alone takes {found_s:.3g} s here",
                )


class Sleep(_Frozen):
    """Whether an idle engine gives its GPU's memory back, and how many models share one GPU."""

    after_s: Seconds | None = None
    models_per_gpu: Count = 1

    @property
    def enabled(self) -> bool:
        return self.after_s is not None or self.shared

    @property
    def shared(self) -> bool:
        return self.models_per_gpu > 1


class Gateway(_Frozen):
    """Whether requests go through a gateway, which continues broken streams at another replica."""

    enabled: bool = False
    replicas: Count = 1
    cpus: Annotated[float, Field(ge=0)] = 0.5
    routing: RoutingPolicy = "prefix"
    session_header: Annotated[str, Field(min_length=1)] = "x-session-id"
    stall_timeout_s: Seconds = 10.0
    replica_timeout_s: Seconds = 30.0
    max_attempts: Count = 5
    max_deaths: Count = 2


class ApiKeys(_Frozen):
    """Where the accepted keys come from; both may be given, their keys are joined.

    A configured but empty source admits no one: an unmounted secret must not remove protection.
    """

    env: str | None = None
    file: str | None = None

    @property
    def configured(self) -> bool:
        return self.env is not None or self.file is not None


class Tenants(_Frozen):
    """Where the tenants are (serve_app/tenants); both may be given, their tenants are joined.

    The database also has what is counted for quotas, and the ledger.
    """

    file: Annotated[str, Field(min_length=1)] | None = None
    database: Annotated[str, Field(min_length=1)] | None = None
    journal: Annotated[str, Field(min_length=1)] | None = None
    max_unread_tokens: Count = 3072

    @property
    def configured(self) -> bool:
        return self.file is not None or self.database is not None

    @property
    def address(self) -> str:
        """Of the database: beside the file, where only that is given."""
        return self.database if self.database is not None else f"{self.file}.sqlite3"

    @property
    def journal_folder(self) -> str:
        """Where this machine keeps what the database does not have yet."""
        if self.journal is not None:
            return self.journal
        if self.address.startswith(("postgresql://", "postgres://")):
            return str(Path(tempfile.gettempdir()) / "serve_app.journal")
        return f"{self.address}.journal"


class Limits(_Frozen):
    """What one request, and all of them together, may ask of one replica."""

    max_body_bytes: Count = 4 * 2**20
    max_prompt_tokens: Count | None = None
    max_tokens: Count | None = None
    max_n: Count = 8
    max_sequences: Count = 256
    max_messages: Count = 4096
    max_grammar_bytes: Count = 2**16
    max_running_requests: Count | None = None
    max_queued_requests: Annotated[int, Field(ge=0)] = 256
    queue_timeout_s: Seconds = 30.0
    request_timeout_s: Seconds = 600.0
    body_timeout_s: Seconds = 20.0
    retry_after_s: Seconds = 1.0


class Observe(_Frozen):
    """Metrics, logs and traces; serve_app/monitoring has rules and dashboards for them."""

    metrics: bool = True
    traces_endpoint: Annotated[str, Field(pattern=r"^https?://.")] | None = None
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None


class Settings(_Frozen):
    """Everything a replica needs to know. See serve_config.yaml for each value's meaning."""

    model: Annotated[str, Field(min_length=1)] = "auto"
    served_model_name: str | None = None
    tensor_parallel_size: CountOrAuto = None
    pipeline_parallel_size: CountOrAuto = None
    replicas: Replicas = Field(default_factory=Replicas)
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    sleep: Sleep = Field(default_factory=Sleep)
    lane: Literal["auto", "python"] = "auto"
    compiled: Annotated[str, Field(min_length=1)] | None = None
    template: bool | Literal["auto"] = "auto"
    keep_weights: bool = False
    engine: dict[str, Any] = Field(default_factory=dict)
    limits: Limits = Field(default_factory=Limits)
    gateway: Gateway = Field(default_factory=Gateway)
    models: list[dict[str, Any]] = Field(default_factory=list)
    api_keys: ApiKeys = Field(default_factory=ApiKeys)
    tenants: Tenants = Field(default_factory=Tenants)
    observe: Observe = Field(default_factory=Observe)
    allow_unauthenticated_network: bool = False
    stream_gap_ms: Annotated[float, Field(ge=0, le=1000)] = 50.0
    drain_s: Seconds = 60.0
    hang_timeout_s: Seconds = 20.0

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> "Settings":
        """Settings from the `args` mapping of serve_config.yaml.

        Raises:
            ConfigError: for the first value that is unknown or impossible.
        """
        try:
            settings = cls.model_validate(dict(args))
        except ValidationError as invalid:
            raise _sentence(args, invalid) from None
        for key in settings.engine:
            if key in _OWNED:
                raise ConfigError(f"engine.{key}", settings.engine[key], _OWNED[key])
        settings._check_sleep()
        settings._check_keep_weights()
        if settings.models and not settings.gateway.enabled:
            raise ConfigError(
                "models", settings.models, "more than one model needs gateway.enabled: true"
            )
        return settings

    def _check_sleep(self) -> None:
        sleep, replicas = self.sleep, self.replicas
        if not sleep.enabled:
            return
        if replicas.min == 0 and (sleep.after_s or 0.0) >= replicas.idle_s:
            problem = f"must be below replicas.idle_s ({replicas.idle_s:g}), as replicas.min is 0"
            raise ConfigError("sleep.after_s", sleep.after_s, problem)
        if self.engine.get("load_format") == "ipc_cache":
            problem = "has its weights in another process, so it cannot sleep; leave out 'sleep'"
            raise ConfigError("engine.load_format", "ipc_cache", problem)
        if sleep.shared and replicas.max > 1:
            problem = "replicas of one model would take turns on a GPU; set replicas.max to 1"
            raise ConfigError("sleep.models_per_gpu", sleep.models_per_gpu, problem)

    def _check_keep_weights(self) -> None:
        if not self.keep_weights:
            return
        if self.sleep.enabled:
            problem = "an engine whose weights are another process's cannot sleep"
            raise ConfigError(
                "keep_weights", True, f"{problem}; set either 'sleep' or 'keep_weights'"
            )
        if self.model.startswith("s3://"):
            problem = "only for a model with files on this machine: a hub id or a folder"
            raise ConfigError("keep_weights", True, problem)
        for key, possible in _WITH_KEPT_WEIGHTS.items():
            value = self.engine.get(key)
            if value is not None and str(value).lower() not in possible:
                problem = f"with keep_weights it can only be {' or '.join(possible)}"
                raise ConfigError(f"engine.{key}", value, problem)

    def limits_with(self, user_config: Mapping[str, Any]) -> Limits:
        """The limits, with those that a deployment's `user_config` replaces.

        Raises:
            ConfigError: for the first value that is unknown or impossible.
        """
        for key in user_config:
            if key != "limits":
                raise ConfigError(f"user_config.{key}", user_config[key], "only limits can change")
        changed = user_config.get("limits") or {}
        limits = {**self.limits.model_dump(), **changed}
        try:
            return Settings.model_validate({"limits": limits}).limits
        except ValidationError as invalid:
            raise _sentence(user_config, invalid) from None

    def of_each_model(self) -> "list[Settings]":
        """These settings for the first model, and for each of `models` with its own values.

        Raises:
            ConfigError: for the first value that is unknown or impossible.
        """
        base = {k: v for k, v in self.model_dump(exclude_unset=True).items() if k != "models"}
        settings = [self.model_copy(update={"models": []})]
        for place, other in enumerate(self.models):
            if shared := _SHARED & other.keys():
                key = min(shared)
                raise ConfigError(f"models.{place}.{key}", other[key], "is the same for all models")
            own = {"served_model_name": None, **other}
            try:
                settings.append(Settings.parse({**base, **own}))
            except ConfigError as error:
                key, value, problem, near = error.fields
                raise ConfigError(f"models.{place}.{key}", value, problem, near) from None
        return settings


# What belongs to the gateway, or to all.
_SHARED = frozenset(
    {"gateway", "models", "template", "api_keys", "tenants", "allow_unauthenticated_network"}
)

# Engine arguments that move the weights, or change them, or load what is no file; and the values
# that do not.
_WITH_KEPT_WEIGHTS = {
    "load_format": ("auto", "safetensors", "dummy"),
    "cpu_offload_gb": ("0", "0.0"),
    "data_parallel_size": ("1",),
    "enable_eplb": ("false",),
}

# Engine arguments that have a key of their own here, and two places for one value would disagree.
_OWNED = {
    "model": "set the top-level key 'model' instead",
    "served_model_name": "set the top-level key 'served_model_name' instead",
    "tensor_parallel_size": "set the top-level key 'tensor_parallel_size' instead",
    "pipeline_parallel_size": "set the top-level key 'pipeline_parallel_size' instead",
    "distributed_executor_backend": "follows from tensor_parallel_size and pipeline_parallel_size",
    "enable_sleep_mode": "set the top-level key 'sleep' instead, which also wakes the engine",
    "api_key": "set 'api_keys' instead, which guards every route and can be rotated",
    "host": "set http_options.host instead",
    "port": "set http_options.port instead",
}


def _sentence(args: Mapping[str, Any], invalid: ValidationError) -> ConfigError:
    """The first of pydantic's errors, as one sentence about one key."""
    error = invalid.errors()[0]
    path = [str(word) for word in error["loc"]]
    key, value = ".".join(path), error["input"]
    if error["type"] == "extra_forbidden":
        return ConfigError(key, value, "unknown key", nearest(path[-1], _fields_of(path[:-1])))
    problem = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return ConfigError(key, value, problem.replace("must be a valid", "must be a"))


def _fields_of(path: list[str]) -> list[str]:
    """The keys that are valid inside `path`, a list of keys from the top."""
    model: type[BaseModel] = Settings
    for key in path:
        model = model.model_fields[key].annotation  # type: ignore[assignment]
    return list(model.model_fields)
