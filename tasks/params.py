"""`params.yaml`: every setting of one group's pipeline, validated before any work.

One block per stage, plus the group's models, the runtime, and where things are kept. The blocks below compose the
core's own settings; a value that the core finds impossible is refused here, with the key's path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_type_hints
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from mtz_core.errors import MtzError
from mtz_core.settings import Budget, RetrainConfig, ZipConfig


class InvalidParams(MtzError):
    """A parameter file is unreadable, or has an unknown key, a wrong type or an impossible value."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Names of groups and tasks: letters, digits, '_' and '-'."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_value_error(build: Callable[[], object]) -> None:
    try:
        build()
    except MtzError as error:
        raise ValueError(str(error)) from error


def _below(folder: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or path.parts[0] != folder:
            raise ValueError(f"{value!r} is not a path below {folder}/, where DVC versions it; link or copy it there")
        return value

    return check


def _without_password(value: str) -> str:
    if urlsplit(value).password:
        raise ValueError(
            "holds a password, which would be kept with every result; give secrets by the environment "
            "(AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, PGPASSWORD)"
        )
    return value


def importable_name(value: str) -> str:
    module, _, attribute = value.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ValueError("name a factory as 'package.module:function'")
    return value


class ModelParams(_Block):
    """One pre-trained network: the factory that builds it, the file of its weights, and the folder of its data.

    `weights` lie under `networks/` and `data` under `data/`, where DVC versions them. `keep_separate` are paths of
    submodules that stay task-specific, whatever they do. `metric` measures errors; see `mtz_core.evaluation.METRICS`.
    """

    network: Annotated[str, AfterValidator(importable_name)]
    arguments: dict[str, Any] = {}
    weights: Annotated[str, AfterValidator(_below("networks"))]
    data: Annotated[str, AfterValidator(_below("data"))]
    keep_separate: list[str] = []
    metric: Literal["error", "top5_error", "balanced_error"] = "error"


class RuntimeParams(_Block):
    """`threads` of each stage's process; results depend on it in their last bits, so it is a versioned parameter."""

    threads: int = Field(default=1, ge=1)


class PretrainParams(_Block):
    """Training of one of the models: Adam with a one-cycle schedule on the training split of `data`."""

    data: Annotated[str, AfterValidator(_below("data"))]
    epochs: int = Field(default=8, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    seed: int = Field(default=0, ge=0)


class CollectParams(_Block):
    """Calibration data: `images` of the training split; `patches` rows that each gives to a convolution."""

    images: int = Field(default=2000, ge=1)
    patches: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)


class HessiansParams(_Block):
    """`batch_rows` rows are folded at once."""

    batch_rows: int = Field(default=8192, ge=1)


class RetrainParams(_Block):
    """Light retraining on `images` of each training split; see `mtz_core.settings.RetrainConfig`."""

    images: int = Field(default=8000, ge=1)
    iterations: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    labels: float = 0.0
    temperature: float = 4.0
    balance: dict[str, float] | None = None
    statistics: Literal["updated", "kept"] = "updated"
    validate_every: int = 20
    patience: int = 3
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> RetrainParams:
        _as_value_error(self.config)
        return self

    def config(self) -> RetrainConfig:
        """The same for the core."""
        return RetrainConfig(**self.model_dump(exclude={"images"}))


class BudgetParams(_Block):
    """What the zipped network may cost, in place of `match.share`; see `mtz_core.Budget`.

    `retrain` is the light retraining with which a floor is to be kept: the same as the block `retrain`.
    """

    size: float | None = None
    floor: float | dict[str, float] | None = None
    moves: list[Literal["share", "drop"]] = ["share", "drop"]
    retrain: RetrainParams | None = None


class MatchParams(_Block):
    """What is shared, or the budget that decides it, and by which method; see `mtz_core.ZipConfig`."""

    method: Literal["refit", "paper"] = "refit"
    share: float | dict[str, int] | None = None
    budget: BudgetParams | None = None
    damping: float | Literal["auto"] = 5e-3
    balance: dict[str, float] | None = None
    matching_rounds: int = Field(default=3, validation_alias=AliasChoices("matching_rounds", "descents"))

    @model_validator(mode="before")
    @classmethod
    def _everything_by_default(cls, given: Any) -> Any:
        return {"share": 1.0, **given} if isinstance(given, dict) and given.get("budget") is None else given

    @model_validator(mode="after")
    def _possible(self) -> MatchParams:
        if self.budget is None and self.share is None:
            raise ValueError("share: null leaves open what to share. Give a fraction, {layer: count}, or match.budget")
        if self.budget is not None:
            if self.share is not None:
                raise ValueError("share: a budget decides what is shared. Leave out match.share, or match.budget")
            _check_retraining(self.budget)
        _as_value_error(lambda: ZipConfig(**self.core()))
        return self

    def core(self) -> dict[str, Any]:
        """The same as arguments of `ZipConfig`."""
        share = self.share if self.budget is None else Budget(**self.budget.model_dump(exclude={"retrain"}))
        return {**self.model_dump(exclude={"budget"}), "share": share}


def _check_retraining(budget: BudgetParams) -> None:
    """Raises ValueError unless a floor, and nothing else, comes with a retraining that the search can do."""
    if budget.floor is None and budget.retrain is not None:
        raise ValueError("budget.retrain: only the search for a floor retrains. Leave it out")
    if budget.floor is not None and budget.retrain is None:
        raise ValueError(f"budget.retrain: is missing, and a floor is kept with light retraining. {_WRITE_ONCE}")
    if budget.retrain is not None and budget.retrain.labels:
        raise ValueError(
            f"budget.retrain.labels: {budget.retrain.labels} is impossible, as the search for a floor retrains by "
            "distillation alone. Allowed: 0"
        )


_WRITE_ONCE = "Write it once: `retrain: &retrain {…}` in match.budget, and below, on its own, `retrain: *retrain`"


class MergeParams(_Block):
    """`patches`: rows of each calibration image in a convolution's refit; `refit_rounds`: refits after the first."""

    patches: int = Field(default=64, ge=1)
    refit_rounds: int = Field(default=4, ge=0, validation_alias=AliasChoices("refit_rounds", "sweeps"))


class EvaluateParams(_Block):
    """`batch_size` images go through a network at once."""

    batch_size: int = Field(default=500, ge=1)


class RegisterParams(_Block):
    """`name` of the registered model; `floors`: points of test error that each task may lose, or it is refused."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    floors: dict[str, Annotated[float, Field(ge=0)]] = {}


class StorageParams(_Block):
    """The S3 storage: `embedded`, `aws`, or the URL of an endpoint. Credentials come from the environment."""

    endpoint: Annotated[str, Field(pattern=r"^(embedded|aws|https?://[^\s]+)$"), AfterValidator(_without_password)] = (
        "embedded"
    )
    bucket: str = Field(default="mtz", min_length=3, max_length=63)
    prefix: str = ""
    region: str = "us-east-1"


class TrackingParams(_Block):
    """The MLflow registry: `embedded` (SQLite) or any tracking URI."""

    uri: Annotated[str, AfterValidator(_without_password)] = Field(default="embedded", min_length=1)
    experiment: str = Field(default="mtz", min_length=1)


class FlowParams(_Block):
    """Where groups run, how many at a time, and how often is tried again what may be tried again.

    `executor`: `local`, workers of this process; `dask`, those of the cluster at the address `dask`, or of one that is
    started here; `pool`, those that serve the Prefect work pool `pool`. `workers` groups run at a time; `auto`: as many
    as cores and memory allow. `memory`: GiB that each process of a worker may take. `heavy`: how many of the stages
    match, merge and retrain run at a time, on all workers together. The delay doubles from try to try.
    """

    executor: Literal["local", "dask", "pool"] = "local"
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    memory: float | None = Field(default=None, ge=1)
    dask: Annotated[str, Field(pattern=r"^(local|(tcp|tls)://[^\s]+)$")] = "local"
    pool: str = Field(default="mtz", min_length=1)
    heavy: int | None = Field(default=None, ge=1)
    retries: int = Field(default=4, ge=0)
    retry_delay_seconds: float = Field(default=5, ge=0)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Params:
    """All settings of one group's pipeline. (A dataclass, because `register` is taken on pydantic's models.)"""

    group: Name
    models: Annotated[dict[Name, ModelParams], Field(min_length=1)]
    register: RegisterParams
    runtime: RuntimeParams = RuntimeParams()
    pretrain: dict[Name, PretrainParams] = field(default_factory=dict)
    collect: CollectParams = CollectParams()
    hessians: HessiansParams = HessiansParams()
    match: MatchParams = MatchParams()
    merge: MergeParams = MergeParams()
    retrain: RetrainParams = RetrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    storage: StorageParams = StorageParams()
    tracking: TrackingParams = TrackingParams()
    flow: FlowParams = FlowParams()

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for name in self.pretrain:
            if name not in self.models:
                raise ValueError(f"pretrain.{name}: there is no such model; models: {', '.join(self.models)}")
            if self.models[name].weights != f"networks/{name}.safetensors":
                raise ValueError(f"models.{name}.weights: pretrain writes them to networks/{name}.safetensors; say so")
        for name in self.register.floors:
            if name not in self.models:
                raise ValueError(f"register.floors.{name}: there is no such model; models: {', '.join(self.models)}")
        named: dict[str, object] = {"match.balance": self.match.balance, "retrain.balance": self.retrain.balance}
        if self.match.budget is not None:
            named["match.budget.floor"] = self.match.budget.floor
            self._check_same_retraining(self.match.budget)
        for key, names in named.items():
            if isinstance(names, dict) and set(names) != set(self.models):
                raise ValueError(f"{key}: names {sorted(names)}, but models are {sorted(self.models)}")
        return self

    def _check_same_retraining(self, budget: BudgetParams) -> None:
        if budget.retrain is None or budget.retrain == self.retrain:
            return
        mine, own = self.retrain.model_dump(), budget.retrain.model_dump()
        differing = ", ".join(key for key in mine if mine[key] != own[key])
        raise ValueError(
            f"match.budget.retrain: differs from retrain in {differing}, and a floor holds only for the light "
            f"retraining that it was searched with. {_WRITE_ONCE}"
        )

    def zip_config(self) -> ZipConfig:
        """Match and merge for the core."""
        return ZipConfig(**self.match.core(), **self.merge.model_dump(), seed=self.collect.seed)

    def model_dump(self) -> dict[str, Any]:
        """All settings as plain values, as they would stand in the file."""
        dumped: dict[str, Any] = _PARAMS.dump_python(self, mode="json")
        return dumped

    def collect_config(self) -> ZipConfig:
        """Sampling of activations for the core."""
        return ZipConfig(patches=self.collect.patches, seed=self.collect.seed)


_PARAMS = TypeAdapter(Params)


def load_params(path: Path) -> Params:
    """Read and validate a parameter file. Raises `InvalidParams` with each wrong key's path and what is allowed."""
    return validate(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises `InvalidParams`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InvalidParams(f"{path}: {error.strerror}. Name the file to read, or restore it.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InvalidParams(f"{path} should hold a mapping of blocks, not {type(content).__name__}.")
    return content


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice, and nothing contains itself."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias: Any = self.peek_event()  # type: ignore[no-untyped-call]
            started = self.anchors.get(alias.anchor)
            if started is not None and started.end_mark is None:
                raise yaml.constructor.ConstructorError(
                    problem=f"'*{alias.anchor}' stands within '&{alias.anchor}'", problem_mark=alias.start_mark
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def validate(content: Mapping[str, Any], name: str) -> Params:
    """Settings from a mapping; `name` says in errors where it came from. Raises `InvalidParams`."""
    try:
        return _PARAMS.validate_python(content)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors(include_url=False))
        raise InvalidParams(f"{name}: {problems}") from error


def _describe(problem: Any) -> str:
    """One line of `pydantic`'s findings: the key's path, what is wrong with it, what is allowed."""
    parts = [str(part) for part in problem["loc"] if str(part) != "float" and "[" not in str(part)]
    path, message = ".".join(parts), problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = ", ".join(_known_keys(parts[:-1]))
        return f"{path}: unknown key; allowed here: {known}"
    if problem["type"] == "value_error":  # the check of a whole block names the key in it
        return f"{path}{'.' if isinstance(problem['input'], dict) else ': '}{message}" if path else message
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path}: is missing"
    return f"{path}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys of the block at a path; the second part of a longer path is a model's name."""
    if not path:
        return list(Params.__dataclass_fields__)
    blocks = {name: hint for name, hint in get_type_hints(Params).items() if name not in ("models", "pretrain")}
    block = (blocks | {"models": ModelParams, "pretrain": PretrainParams})[path[0]]
    if path[0] == "match":
        for name in path[1:]:
            block = {"budget": BudgetParams, "retrain": RetrainParams}[name]
    return list(block.model_fields)
