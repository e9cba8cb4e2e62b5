"""`params.yaml`: every setting of one group's pipeline, validated before any work.

One block per stage, plus the group's models, the runtime, and where things are kept. The blocks below compose the
core's own settings; a value that the core finds impossible is refused here, with the key's path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from datetime import date
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_type_hints
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from mtz_core.errors import MtzError
from mtz_core.settings import METRIC_NAMES, MOVES, Budget, Kind, Move, Output, RetrainConfig, ZipConfig, names_outputs


class InvalidParams(MtzError):
    """A parameter file is unreadable, or has an unknown key, a wrong type or an impossible value."""


def task_of(measured: str) -> str:
    """Return the task of what is measured: a task, or an output as `task.output`."""
    return measured.partition(".")[0]


def _written(pattern: str, allowed: str) -> AfterValidator:
    """Check that a text is written in a certain way; `allowed` says in words which."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is impossible. Allowed: {allowed}.")
        return text

    return AfterValidator(check)


Name = Annotated[
    str, _written(r"[A-Za-z0-9][A-Za-z0-9_-]*", "letters, digits, '_' and '-', with a letter or a digit first")
]
"""Names of groups and tasks: letters, digits, '_' and '-'."""


class _Block(BaseModel):
    """A block of settings. The text below a field is its meaning in the reference that the documentation prints."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_value_error(build: Callable[[], object], block: str = "") -> None:
    try:
        build()
    except MtzError as error:
        raise ValueError(str(error).removeprefix(block)) from error


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
    """Return a factory's name if it has the form `package.module:function`.

    Args:
        value: The name.

    Returns:
        The same name.

    Raises:
        ValueError: It has another form.
    """
    module, _, attribute = value.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ValueError("name a factory as 'package.module:function'")
    return value


def metric_name(value: str) -> str:
    """Return a metric's name if it is one of the core's, or has the form `package.module:function`.

    Args:
        value: The name.

    Returns:
        The same name.

    Raises:
        ValueError: It is neither.
    """
    if value in METRIC_NAMES:
        return value
    try:
        return importable_name(value)
    except ValueError:
        raise ValueError(
            f"{value!r} is no metric. Allowed: {', '.join(METRIC_NAMES)}, or a function, as 'package.module:function'"
        ) from None


class OutputParams(_Block):
    """What a network puts out, or one of several outputs. See `mtz_core.Output`."""

    kind: Kind
    """`logits`, `probabilities`, `multi-label` (logits or the outputs of a sigmoid), `regression`, `heatmap` or
    `embedding`."""
    tolerance: float | None = None
    """The error that makes no difference, in units of the outputs, for `regression` and `heatmap`. Without it each
    output counts in units of its own spread. Allowed: above 0."""
    weight: float = 1.0
    """How much it counts beside other outputs of the same network. Allowed: above 0."""

    @model_validator(mode="after")
    def _possible(self) -> OutputParams:
        _as_value_error(self.core, "output.")
        return self

    def core(self) -> Output:
        """The same for the core."""
        return Output(self.kind, self.tolerance, self.weight)


def _form(given: object) -> str:
    """Say in which form an output is declared: its kind, a block, or blocks by name."""
    if isinstance(given, Mapping):
        return "[names]" if names_outputs(given) else "[block]"
    return "[block]" if isinstance(given, OutputParams) else "[kind]"


_OneOutput = Annotated[
    Annotated[Kind, Tag("[kind]")] | Annotated[OutputParams, Tag("[block]")],
    Discriminator(lambda given: "[kind]" if _form(given) == "[kind]" else "[block]"),
]
_AnyOutput = Annotated[
    Annotated[Kind, Tag("[kind]")]
    | Annotated[OutputParams, Tag("[block]")]
    | Annotated[dict[str, _OneOutput], Field(min_length=1), Tag("[names]")],
    Discriminator(_form),
]
_OneMetric = Annotated[str, AfterValidator(metric_name)]
_AnyMetric = Annotated[
    Annotated[_OneMetric, Tag("[name]")] | Annotated[dict[str, _OneMetric], Field(min_length=1), Tag("[names]")],
    Discriminator(lambda given: "[names]" if isinstance(given, Mapping) else "[name]"),
]


class ModelTraits(_Block):
    """What zipping is told about a network."""

    keep_separate: list[str] = []
    """Paths of submodules that stay task-specific, whatever they do, or names of operators as errors show them. The
    networks of a group may differ in them. `""` is the outermost forward pass."""
    zip: list[str] = []
    """Paths of the submodules that take part in sharing; everything else stays task-specific. Without it, everything
    takes part."""
    output: _AnyOutput | None = None
    """What the network puts out: a kind, or `{kind: …, tolerance: …}`. Of several outputs, either for each, by its
    name; `weight` says how much it counts. Without it the kind is guessed from the network's last operator and its
    outputs for calibration data, and the report says so."""
    metric: _AnyMetric | None = None
    """How errors of this model are counted: `error`, `top5_error` or `balanced_error` (with labels); `agreement`,
    `output_error`, `mean_absolute_error`, `correlation` or `average_precision` (with or without); or a function of your
    own, `package.module:function`, of outputs and labels (the original's outputs without labels). All are given as
    errors, the less the better. Of several outputs, `{output: metric}`; one metric for all of them is that of each,
    and one function is given all. Without it: `error` with class labels, `mean_absolute_error` with other ones,
    `agreement` without."""


def _declared(output: Kind | OutputParams) -> Output:
    return output.core() if isinstance(output, OutputParams) else Output(output)


class ModelParams(ModelTraits):
    """One pre-trained network of the group: how to build it, its weights and its data."""

    network: Annotated[str, AfterValidator(importable_name)]
    """The function that builds the network, as `package.module:function`. It returns a `torch.nn.Module`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments for that function. YAML takes `1e-3` for text: write `0.001` or `1.0e-3`."""
    weights: Annotated[str, AfterValidator(_below("networks"))]
    """The weights, a `state_dict` as safetensors: a file, or a folder of several with or without an index. Allowed: a
    path below `networks/`."""
    data: Annotated[str, AfterValidator(_below("data"))]
    """The folder with `train`, `validation` and `test`, each `.parquet`, `.arrow` or a folder of Arrow streams.
    Allowed: a path below `data/`."""

    @property
    def declared_output(self) -> Output | Mapping[str, Output] | None:
        """What the network is declared to put out: one output, or several by name."""
        if isinstance(self.output, Mapping):
            return {name: _declared(own) for name, own in self.output.items()}
        return None if self.output is None else _declared(self.output)


class RuntimeParams(_Block):
    """The process of each stage."""

    threads: int = Field(default=1, ge=1)
    """Threads of each stage. Results depend on it in their last bits, so a change runs all stages again."""


class PretrainParams(_Block):
    """Training of one of the example's networks: Adam with a one-cycle schedule."""

    data: Annotated[str, AfterValidator(_below("data"))]
    """The folder of the training data. Allowed: a path below `data/`."""
    epochs: int = Field(default=8, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The highest rate of the schedule."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the order of examples."""


class CollectParams(_Block):
    """Calibration: which inputs of each layer are recorded."""

    images: int = Field(default=2000, ge=1)
    """Calibration examples per model, from the training split. Labels are not read."""
    patches: int = Field(default=8, ge=1)
    """Positions that one example gives to the Hessian of a convolution. Fewer than `merge.patches`, because these rows
    are stored as files, and matching, which only compares neurons, needs fewer than a fit."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of examples and positions."""


class HessiansParams(_Block):
    """Layer-wise Hessians."""

    batch_rows: int = Field(default=8192, ge=1)
    """Rows that are added at a time. It changes memory and speed only."""


class RetrainParams(_Block):
    """Light retraining: distillation from the originals. See `mtz_core.RetrainConfig`."""

    images: int = Field(default=8000, ge=1)
    """Examples of each training split."""
    iterations: int = 100
    """Steps of Adam. Allowed: 0 or more."""
    batch_size: int = 128
    """Examples per task and step. Allowed: 1 or more."""
    learning_rate: float = 1e-3
    """Rises over five steps, and is a quarter after each validation without improvement. Allowed: above 0."""
    labels: float = 0.0
    """Weight of cross-entropy with labels beside distillation. At 0 no labels are read. Allowed: 0 to 1."""
    temperature: float = 4.0
    """Temperature of distillation. Allowed: above 0."""
    balance: dict[str, float] | None = None
    """Weight of each task's loss, `{task: weight}`. Without it all tasks count equally."""
    statistics: Literal["updated", "kept"] = "updated"
    """Statistics of batch normalisation: `updated` follow each task's batches, `kept` stay as they are."""
    validate_every: int = 20
    """Steps between two validations. Allowed: 1 or more."""
    patience: int = 3
    """Validations without improvement after which training stops. Allowed: 1 or more."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of examples."""

    @model_validator(mode="after")
    def _possible(self) -> RetrainParams:
        _as_value_error(self.config)
        return self

    def config(self) -> RetrainConfig:
        """The same for the core."""
        return RetrainConfig(**self.model_dump(exclude={"images"}))


class BudgetParams(_Block):
    """What the zipped network may cost, in place of `match.share`: a size or a floor. See `mtz_core.Budget`."""

    size: float | None = None
    """The largest fraction of the originals' bytes. Allowed: above 0, at most 1."""
    floor: float | dict[str, float] | None = None
    """Percentage points of error that each task may lose on validation data: one number, or `{task: points}`. A floor
    for a task holds for each of several outputs; that of one is called `task.output`. The smallest network that keeps
    it is searched for. Allowed: 0 to 100."""
    moves: list[Move] = list(MOVES)
    """What may be done to save bytes: `share` neurons across networks, `drop` neurons within one, `round` weights to a
    few bits."""
    retrain: RetrainParams | None = None
    """With a floor: the light retraining of the search. It must be equal to the block `retrain`."""


class MatchParams(_Block):
    """Which neurons become one. See `mtz_core.ZipConfig`."""

    method: Literal["refit", "paper"] = "refit"
    """`refit` is this project's method, `paper` is MTZ as published."""
    share: float | dict[str, int] | None = None
    """How many neurons to share: a fraction of every hidden layer, or `{layer: count}`. It is 1.0 unless there is a
    budget. Allowed: 0 to 1, or counts."""
    budget: BudgetParams | None = None
    """A budget in place of `share`."""
    damping: float | Literal["auto"] = 5e-3
    """Damping of every Hessian, relative to the mean of its diagonal. `auto` chooses it for every layer on held-out
    data. Allowed: above 0, or auto."""
    balance: dict[str, float] | None = None
    """Weight of each task in shared neurons, `{task: weight}`. Without it all tasks count equally."""
    matching_rounds: int = 3
    """Rounds in which neuron groups that depend on each other are matched again. Allowed: 0 or more."""

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
        budget = None if self.budget is None else Budget(**self.budget.model_dump(exclude={"retrain"}))
        return {**self.model_dump(exclude={"budget"}), "budget": budget}


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
    """How the zipped network is fitted to the originals."""

    patches: int = Field(default=64, ge=1)
    """Positions that one calibration example gives to the refit of a convolution. One in groups takes no more than a
    neuron has inputs, or 8."""
    refit_rounds: int = Field(default=4, ge=0)
    """Refits after the first, with targets relaxed to what the activation can tell apart."""


class EvaluateParams(_Block):
    """Errors before and after, on the test split."""

    batch_size: int = Field(default=500, ge=1)
    """Examples that go through a network at a time."""


class RegisterParams(_Block):
    """The registered model."""

    name: Annotated[
        str,
        _written(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "letters, digits, '_', '.' and '-', with a letter or a digit first"),
    ]
    """Its name in the registry. Allowed: letters, digits, `_`, `.` and `-`."""
    agreement: float = Field(default=50, ge=0, le=100)
    """Percent of agreement with its original on the test split that every task, and each of several outputs, must have.
    If one has less, it has lost most of what it knew, and nothing is registered. Allowed: 0 to 100."""
    floors: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Percentage points of test error that a task may lose, `{task: points}`. A floor for a task holds for each of
    several outputs; that of one is called `task.output`. If one loses more, nothing is registered. Allowed: 0 or
    more."""


class StorageParams(_Block):
    """The S3 storage. Credentials come from the environment."""

    endpoint: Annotated[
        str,
        AfterValidator(_without_password),
        _written(r"embedded|aws|https?://\S+", "embedded, aws, and addresses with http:// or https://"),
    ] = "embedded"
    """`embedded` starts a server on this machine. Allowed: embedded, aws, or the URL of a server."""
    bucket: str = Field(default="mtz", min_length=3, max_length=63)
    """The bucket. Allowed: 3 to 63 characters."""
    prefix: str = ""
    """What all keys begin with."""
    region: str = "us-east-1"
    """The region of the bucket."""


class TrackingParams(_Block):
    """The MLflow registry."""

    uri: Annotated[str, AfterValidator(_without_password)] = Field(default="embedded", min_length=1)
    """`embedded` is a SQLite file in `.mtz`. Allowed: embedded, or any MLflow tracking URI."""
    experiment: str = Field(default="mtz", min_length=1)
    """The experiment that holds the runs. Allowed: any text but an empty one."""


class FlowParams(_Block):
    """Where groups run, how many at a time, and what is tried again."""

    executor: Literal["local", "dask", "pool"] = "local"
    """`local` runs groups on this machine, `dask` on a Dask cluster, `pool` on the workers of a Prefect work pool."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Groups at a time. `auto` takes as many as cores and memory allow. Allowed: 1 or more, or auto."""
    memory: float | None = Field(default=None, ge=1)
    """GiB that each process of a worker may take. Without it there is no limit."""
    dask: Annotated[str, _written(r"local|(tcp|tls)://\S+", "local, and addresses with tcp:// or tls://")] = "local"
    """The Dask scheduler. `local` starts a cluster on this machine. Allowed: local, tcp://… or tls://…."""
    pool: str = Field(default="mtz", min_length=1)
    """The Prefect work pool. Allowed: any text but an empty one."""
    heavy: int | None = Field(default=None, ge=1)
    """How many of the stages match, merge and retrain run at a time, on all workers together. Without it there is no
    limit."""
    retries: int = Field(default=4, ge=0)
    """How often a fault that may pass is tried again."""
    retry_delay_seconds: float = Field(default=5, ge=0)
    """Seconds before the first new try. Each further wait is twice as long."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Params:
    """All settings of one group's pipeline.

    It is a dataclass because `register` is taken on pydantic's models.
    """

    group: Name
    """The name of the group. Allowed: letters, digits, `_` and `-`."""
    models: Annotated[dict[Name, ModelParams], Field(min_length=1)]
    """The networks to zip, by the name of their task."""
    register: RegisterParams
    """The registered model."""
    runtime: RuntimeParams = RuntimeParams()
    """The process of each stage."""
    pretrain: dict[Name, PretrainParams] = field(default_factory=dict)
    """Training of the example's networks. Leave it empty if yours exist."""
    collect: CollectParams = CollectParams()
    """Calibration."""
    hessians: HessiansParams = HessiansParams()
    """Layer-wise Hessians."""
    match: MatchParams = MatchParams()
    """Which neurons become one."""
    merge: MergeParams = MergeParams()
    """How the zipped network is fitted."""
    retrain: RetrainParams = RetrainParams()
    """Light retraining."""
    evaluate: EvaluateParams = EvaluateParams()
    """Errors before and after."""
    storage: StorageParams = StorageParams()
    """The S3 storage. A change runs nothing again."""
    tracking: TrackingParams = TrackingParams()
    """The MLflow registry. A change runs nothing again."""
    flow: FlowParams = FlowParams()
    """Where and when groups run. A change runs nothing again."""

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for name in self.pretrain:
            if name not in self.models:
                raise ValueError(f"pretrain.{name}: there is no such model; models: {', '.join(self.models)}")
            if self.models[name].weights != f"networks/{name}.safetensors":
                raise ValueError(f"models.{name}.weights: pretrain writes them to networks/{name}.safetensors; say so")
        for name in self.register.floors:
            if task_of(name) not in self.models:
                raise ValueError(f"register.floors.{name}: there is no such model; models: {', '.join(self.models)}")
        named: dict[str, object] = {"match.balance": self.match.balance, "retrain.balance": self.retrain.balance}
        if self.match.budget is not None:
            named["match.budget.floor"] = self.match.budget.floor
            self._check_same_retraining(self.match.budget)
        for key, names in named.items():
            known = task_of if key.endswith("floor") else str
            if isinstance(names, dict) and {known(name) for name in names} != set(self.models):
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
        declared = {name: own.declared_output for name, own in self.models.items()}
        outputs = {name: output for name, output in declared.items() if output is not None}
        return ZipConfig(
            **self.match.core(), **self.merge.model_dump(), seed=self.collect.seed, outputs=outputs or None
        )

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
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidParams(
            f"{path}: {error.strerror}. Name the file to read, or run mtz in the folder of the project."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{path} is not valid YAML: {yaml_problem(error)}.") from error
    if content is None:
        raise InvalidParams(f"{path} is empty, and should hold a mapping of blocks.")
    if not isinstance(content, dict):
        raise InvalidParams(f"{path} should hold a mapping of blocks, not {type(content).__name__}.")
    return content


def parse_yaml(text: str) -> Any:
    """The values of a YAML text. Raises `yaml.YAMLError`, see `yaml_problem`."""
    return yaml.load(text, _Loader)


def yaml_problem(error: Exception) -> str:
    """Say in one line where a text is no YAML, and why."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    context = f" {error.context}," if error.context else ""
    hint = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}:{context} {error.problem}{hint}"


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice, nothing contains itself, and no comma cuts a number in two."""

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
        for (key, value), (rest, nothing) in pairwise(node.value):
            if value.tag == rest.tag == "tag:yaml.org,2002:int" and nothing.value == "":
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value}: {value.value},{rest.value} is no number; the decimal sign is a point: "
                    f"{value.value}.{rest.value}",
                    problem_mark=value.start_mark,
                )
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


_FORMER_KEYS = {"match": {"descents": "matching_rounds"}, "merge": {"sweeps": "refit_rounds"}}
"""Settings as they were called before version 0.2, by block."""


def with_present_names(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Give settings with former names their present ones.

    Args:
        content: Blocks of settings, all or some.
        name: Where they come from, for errors.

    Returns:
        The same settings.

    Raises:
        InvalidParams: One setting is given by both of its names.
    """
    renamed = dict(content)
    for block, keys in _FORMER_KEYS.items():
        if not isinstance(settings := content.get(block), Mapping):
            continue
        for former, present in keys.items():
            if former in settings and present in settings:
                raise InvalidParams(f"{name}: {block}.{former} is the former name of {block}.{present}. Leave it out.")
        renamed[block] = {keys.get(key, key): value for key, value in settings.items()}
    return renamed


def validate(content: Mapping[str, Any], name: str) -> Params:
    """Settings from a mapping; `name` says in errors where it came from. Raises `InvalidParams`."""
    try:
        return _PARAMS.validate_python(with_present_names(content, name))
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in likeliest(error, _path))
        raise InvalidParams(f"{name}: {problems}") from error


def likeliest(error: ValidationError, path: Callable[[Any], list[str]]) -> list[Any]:
    """Return `pydantic`'s findings without those on other forms of a value that is a number in a wrong spelling.

    Args:
        error: The findings.
        path: Returns the path of the key that a finding is about.

    Returns:
        The findings, in their order.
    """
    problems = error.errors(include_url=False)
    numbers = [path(problem) for problem in problems if _respelt(problem)]
    return [
        problem
        for problem in problems
        if _respelt(problem) or not any(number[: len(own)] == own for own in [path(problem)] for number in numbers)
    ]


def _path(problem: Any) -> list[str]:
    """The path of the key that a finding is about."""
    return [str(p) for p in problem["loc"] if p not in ("float", "constrained-int") and "[" not in str(p)]


def _describe(problem: Any) -> str:
    """One line of `pydantic`'s findings: the key's path, what is wrong with it, what is allowed."""
    parts = _path(problem)
    path, message = ".".join(parts), problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = ", ".join(_known_keys(parts[:-1]))
        return f"{path}: unknown key; allowed here: {known}"
    if problem["type"] == "value_error":  # the check of a whole block names the key in it
        return f"{path}{'.' if isinstance(problem['input'], dict) else ': '}{message}" if path else message
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path}: is missing"
    if "[key]" in problem["loc"]:
        path = ".".join(parts[:-1])
    return f"{path}: {in_words(problem)}"


def in_words(problem: Any) -> str:
    """Say what is wrong with a value.

    Args:
        problem: One of `pydantic`'s findings, other than of a check of this project.

    Returns:
        A clause without the key's path.
    """
    given = problem["input"]
    if respelt := _respelt(problem):
        return f"{given!r} is no {'whole ' if problem['type'] == 'int_parsing' else ''}number; {respelt}"
    message = problem["msg"].partition(", unable to parse")[0].partition(" after validation")[0]
    if problem["type"] == "string_type" and isinstance(given, (bool, int, float, date)):
        return not_text(given, "a name" if "[key]" in problem["loc"] else "the value")
    message = message.replace("a valid dictionary", "a mapping, {key: value}")
    return f"{message[0].lower()}{message[1:]}, not {given!r}"


def _respelt(problem: Any) -> str:
    """How to spell a number that was meant by a text, in words; empty if none was."""
    given, whole = problem["input"], problem["type"] == "int_parsing"
    if not isinstance(given, str) or not (whole or problem["type"] == "float_parsing"):
        return ""
    if whole and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+", given):
        return f"write digits alone, as in {given.replace(',', '')}"
    if whole and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d", given) and float(given).is_integer():
        return f"write digits alone, as in {float(given):.0f}"
    if re.fullmatch(r"[-+]?\d*,\d+([eE][-+]?\d+)?", given):
        return "whole numbers alone are allowed" if whole else f"the decimal sign is a point: {given.replace(',', '.')}"
    return ""


def not_text(given: object, what: str = "the value") -> str:
    """Say of something that was meant as text that YAML takes it for a truth value, a number or a date."""
    return f"YAML takes {what} for {given}, which is no text; put it in quotes"


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys of the block at a path; the second part of a longer path is a model's name, the third a key of it."""
    if not path:
        return list(Params.__dataclass_fields__)
    blocks = {name: hint for name, hint in get_type_hints(Params).items() if name not in ("models", "pretrain")}
    block = (blocks | {"models": ModelParams, "pretrain": PretrainParams})[path[0]]
    if path[0] == "models" and len(path) > 2:
        block = OutputParams
    if path[0] == "match":
        for name in path[1:]:
            block = {"budget": BudgetParams, "retrain": RetrainParams}[name]
    return list(block.model_fields)
