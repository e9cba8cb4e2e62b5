"""fleet.yaml: the models of a fleet, and the groups to zip, each as changes to params.yaml.

version: 2
name: nightly
models:
  NAME: {source: …, network: …, data: …}      see `Model`
defaults: {…}                                  changes to params.yaml, for all groups
groups:
  NAME: {models: [NAME, …], params: {…}}       without models: those of params.yaml
auto: {…}                                      put the other models into groups, see `Auto`
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

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

from flows.spec.overrides import InvalidFleet, merge, parse_setting, suggest
from tasks.files import whole_file
from tasks.params import (
    InvalidParams,
    ModelTraits,
    Name,
    OutputParams,
    Params,
    importable_name,
    in_words,
    likeliest,
    not_text,
    read_yaml,
    validate,
    with_present_names,
)

_DEFAULT_NAME = "fleet.yaml"
FLEET_WIDE = ("storage", "tracking", "flow")
"""Blocks that say where and how, the same for all groups of a run."""

VERSION = 2

_VERSIONED = tuple(
    block for block in Params.__dataclass_fields__ if block not in (*FLEET_WIDE, "group", "models", "register")
)
"""Blocks that may be left out of params.yaml, but that DVC wants to find there."""


class _Block(BaseModel):
    """A block of the file. The text below a field is its meaning in the reference that the documentation prints."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Splits(_Block):
    """One file for each split, Parquet or Arrow."""

    calibration: str
    """Examples for calibration and light retraining: a path, or `s3://BUCKET/KEY`."""
    validation: str
    """Examples for validation, likewise."""
    test: str
    """Examples for the test, likewise."""


class Factory(_Block):
    """A function of yours that returns the data of a split."""

    factory: Annotated[str, AfterValidator(importable_name)]
    """The function, as `package.module:function`. It takes the name of the split and returns inputs and labels."""
    arguments: dict[str, Any] = {}
    """Keyword arguments for that function."""


class Model(ModelTraits):
    """One pre-trained network of the fleet."""

    source: str | None = None
    """The weights: a path, `s3://BUCKET/KEY`, or `models:/NAME@ALIAS` of the registry. Of several files, their folder
    or index."""
    network: Annotated[str, AfterValidator(importable_name)] | None = None
    """The function that builds the network, as `package.module:function`."""
    program: str | None = None
    """An exported program in place of `network`: a path, `s3://BUCKET/KEY` or `models:/NAME@ALIAS`. It holds the
    weights, too; a `source` replaces them."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments for `network`. YAML takes `1e-3` for text: write `0.001` or `1.0e-3`."""
    data: str | Splits | Factory
    """A folder with `train`, `validation` and `test`, local or `s3://…`; or a file for each split; or a function."""
    floor: Annotated[float, Field(ge=0)] | None = None
    """Percentage points of test error that the model, or each of several outputs, may lose. If it loses more, its group
    is refused. Floors of some outputs are `register.floors` of the group. Allowed: 0 or more."""
    tags: list[Name] = Field(default=[])
    """Labels for `auto.separate`."""

    @model_validator(mode="after")
    def _buildable(self) -> "Model":
        if (self.network is None) == (self.program is None):
            raise ValueError("give network, a factory, or program, an exported one, and not both")
        if self.source is None and self.program is None:
            raise ValueError("source: is missing; name the file of the weights")
        if self.program is not None and self.arguments:
            raise ValueError("arguments: are for a factory; an exported program takes none")
        return self


class Auto(_Block):
    """How the planner puts models into groups."""

    size: int = Field(default=8, ge=2)
    """The most models in one group."""
    similarity: float | None = Field(default=None, ge=0, le=1)
    """The least mean similarity of a model to the others of its group. Without it a measured value is taken, 0.6."""
    damage: float | None = Field(default=None, gt=0)
    """The largest share of its information that sharing is predicted to cost any model. Without it there is no
    limit."""
    separate: list[Name] = Field(default=[], validation_alias=AliasChoices("separate", "apart"))
    """Tags that all models of a group have, or none."""


class GroupEntry(_Block):
    """One group of the fleet."""

    models: Annotated[list[Name], Field(min_length=2)] | None = None
    """Its models, at least two. Without it, the group zips those that `params.yaml` names."""
    params: dict[str, Any] = {}
    """Changes to `params.yaml` for this group."""


class FleetFile(_Block):
    """All of fleet.yaml, valid in itself."""

    version: Literal[2] = 2
    """The format of the file."""
    name: Name = "fleet"
    """The name of the fleet in records and on pages. Allowed: letters, digits, `_` and `-`."""
    models: dict[Name, Model] = {}
    """The networks, by name."""
    defaults: dict[str, Any] = {}
    """Changes to `params.yaml` for all groups."""
    groups: dict[Name, GroupEntry] = {}
    """The groups, by name. `groups: auto` leaves them to the planner."""
    auto: Auto | None = None
    """Lets the planner put all models into groups that no listed group has."""

    @model_validator(mode="before")
    @classmethod
    def _auto_alone(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("groups") == "auto":
            return {**content, "groups": {}, "auto": content.get("auto") or {}}
        return content

    @model_validator(mode="after")
    def _consistent(self) -> "FleetFile":
        if not self.groups and self.auto is None:
            raise ValueError("groups: list at least one group, such as 'lenet5: {}', or write 'groups: auto'")
        if not self.groups and not self.models:
            raise ValueError(
                "models: are missing, and groups are to be found among them. Declare models, or list groups"
            )
        for name, group in self.groups.items():
            for model in group.models or ():
                if model not in self.models:
                    raise ValueError(f"groups.{name}.models: there is no model '{model}'{suggest(model, self.models)}")
            if twice := _repeated(group.models or ()):
                raise ValueError(f"groups.{name}.models: '{twice}' is listed twice")
        if twice := _repeated(model for group in self.groups.values() for model in group.models or ()):
            owners = " and ".join(f"'{name}'" for name, group in self.groups.items() if twice in (group.models or ()))
            raise ValueError(f"groups: the model '{twice}' is in {owners}. Leave it in one, or declare it once more")
        changes = {"defaults": self.defaults, **{f"groups.{name}.params": g.params for name, g in self.groups.items()}}
        for where, params in changes.items():
            for block in (*FLEET_WIDE, "group"):
                if block in params:
                    raise ValueError(f"{where}.{block}: is the same for all groups; put it into params.yaml")
        for name, group in self.groups.items():
            if group.models and (taken := {"models", "pretrain"} & group.params.keys()):
                raise ValueError(f"groups.{name}.params.{min(taken)}: its models are those of the list 'models'")
        tags = {tag for model in self.models.values() for tag in model.tags}
        for tag in self.auto.separate if self.auto else ():
            if tag not in tags:
                raise ValueError(f"auto.separate: no model has the tag '{tag}'{suggest(tag, tags)}")
        return self

    def free_models(self) -> tuple[str, ...]:
        """The models that are in no group yet."""
        taken = {model for group in self.groups.values() for model in group.models or ()}
        return tuple(name for name in self.models if name not in taken)


@dataclass(frozen=True)
class GroupPlan:
    """One group with all its settings."""

    name: str
    content: dict[str, Any]
    """What its params.yaml will say."""
    params: Params
    """The same, validated."""
    models: Mapping[str, Model] = field(default_factory=dict)
    """Where its models come from; empty where they are the files that params.yaml names."""


@dataclass(frozen=True)
class Fleet:
    """A fleet file on top of a parameter file, with settings of the command line.

    Attributes:
        base: the parameters, before any group's changes.
        upgraded: the file is of the format before version 2, and was read as such.
        absent: the name of the fleet file, if there is none.
    """

    file: FleetFile
    base: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]
    origin: str
    upgraded: bool = False
    absent: str | None = None

    @property
    def name(self) -> str:
        """The fleet's name."""
        return self.file.name

    @property
    def title(self) -> str:
        """What it is called before people."""
        return f"{self.origin} alone, as there is no {self.absent}" if self.absent else f"fleet '{self.name}'"

    def common(self) -> Params:
        """Return the blocks that hold for all groups, among valid parameters. Raises `InvalidParams`."""
        return validate(self._content("fleet", {}, {}), self.origin)

    def explicit_groups(self) -> tuple[GroupPlan, ...]:
        """Return the groups that the file lists. Raises `InvalidParams`, `InvalidFleet`."""
        return tuple(self.group(name, entry.models, entry.params) for name, entry in self.file.groups.items())

    def group(self, name: str, models: Sequence[str] | None, changes: Mapping[str, Any] | None = None) -> GroupPlan:
        """Return a group of these models; of those in the parameters where `models` is None. Raises `InvalidParams`."""
        chosen = {model: self.file.models[model] for model in models or ()}
        content = self._content(name, chosen, changes or {})
        try:
            params = validate(content, f"{self.origin}, group '{name}'")
        except InvalidParams as error:
            changed, own = (changes or {}).get("models"), self.base.get("models")
            strangers = [str(n) for n in changed if n not in (own or ())] if isinstance(changed, Mapping) else []
            if chosen or not strangers:
                raise
            raise InvalidParams(
                f"{error}. The fleet file changes {', '.join(strangers)}, but {self.origin} has no such "
                "models. Correct that group, or remove the fleet file if it was written for other parameters."
            ) from error
        if len(params.models) < 2:
            raise InvalidParams(f"{self.origin}, group '{name}': models: a group needs two at least.")
        return GroupPlan(name, content, params, chosen)

    def model(self, name: str) -> GroupPlan:
        """Return the parameters under which a model's statistics are made. Raises `InvalidParams`."""
        chosen = {name: self.file.models[name]}
        content = self._content(name, chosen, {})
        # What belongs to groups may name models that are not here, and no statistics depend on it.
        content = {key: value for key, value in content.items() if key not in ("match", "merge", "retrain", "evaluate")}
        return GroupPlan(name, content, validate(content, f"{self.origin}, model '{name}'"), chosen)

    def _content(self, name: str, models: Mapping[str, Model], own: Mapping[str, Any]) -> dict[str, Any]:
        content = with_present_names(self.base, self.origin)
        if models:
            content |= {"models": {n: _as_params(n, m) for n, m in models.items()}, "pretrain": {}}
            content["register"] = {"name": name}
            floors = {n: m.floor for n, m in models.items() if m.floor is not None}
            if floors:
                content["register"]["floors"] = floors
        for change in (self.file.defaults, own, *self.changes):
            content = merge(content, with_present_names(change, f"group '{name}'"))
        missing: dict[str, Any] = {block: {} for block in _VERSIONED if block not in content}
        return {**content, **missing, "group": name}


def _as_params(name: str, model: Model) -> dict[str, Any]:
    """A model as params.yaml of its group has it: its files have places of their own in the workspace."""
    built: dict[str, Any] = {"network": model.network}
    if model.arguments:
        built["arguments"] = model.arguments
    if model.program is not None:
        built = {"network": "tasks.models.programs:exported", "arguments": {"program": f"networks/{name}.pt2"}}
    places = {"weights": f"networks/{name}.safetensors", "data": f"data/{name}"}
    return {**built, **places, **model.model_dump(include=set(ModelTraits.model_fields))}


def read_fleet(params_file: Path, fleet_file: Path, settings: Sequence[str] = ()) -> Fleet:
    """Read a fleet.

    A group's changes are merged key by key, anything else replaces; null removes a key. Settings on the command line
    come last and hold for all groups. Without a fleet file there is one group, that of params.yaml.

    Args:
        params_file: The parameters file.
        fleet_file: The fleet file, which need not exist if it is called fleet.yaml.
        settings: Changes on the command line, as `key.path=value`; the value is YAML.

    Returns:
        The fleet.

    Raises:
        InvalidFleet: The fleet file is inconsistent, one of another name than fleet.yaml is missing, or a setting is
            not `key.path=value`.
        InvalidParams: A file is not readable YAML.
    """
    base = read_yaml(params_file)
    changes = tuple(parse_setting(setting) for setting in settings)
    origin = params_file.name
    if not fleet_file.exists():
        if fleet_file.name != _DEFAULT_NAME:
            raise InvalidFleet(f"{fleet_file}: there is no such file. Name a fleet file that exists.")
        alone = FleetFile(groups={_name_of_group(base, origin): GroupEntry()})
        return Fleet(alone, base, changes, origin, absent=fleet_file.name)
    content = read_yaml(fleet_file)
    upgraded = upgrade(content)
    return Fleet(_validated(upgraded or content, fleet_file), base, changes, origin, upgraded is not None)


def _name_of_group(base: Mapping[str, Any], origin: str) -> str:
    """Return the name of the group that a parameters file describes. Raises `InvalidParams`."""
    name = base.get("group", "group")
    if not isinstance(name, str):
        raise InvalidParams(f"{origin}: group: {not_text(name)}.")
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise InvalidParams(f"{origin}: group: {error.errors()[0]['ctx']['error']}") from error


def fleet_name(fleet_file: Path) -> str:
    """Return the name of the fleet that a file declares. Raises `InvalidFleet`, `InvalidParams`."""
    if not fleet_file.exists():
        return FleetFile.model_fields["name"].default
    content = read_yaml(fleet_file)
    return _validated(upgrade(content) or content, fleet_file).name


def upgrade(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a fleet file of the format before version 2, where a group was its changes, in this one; else None."""
    groups = content.get("groups")
    if set(content) != {"groups"} or not isinstance(groups, Mapping):
        return None
    if any(isinstance(g, Mapping) and ("params" in g or isinstance(g.get("models"), list)) for g in groups.values()):
        return None  # as version 2 has them; only the line that says so is missing
    return {"version": VERSION, "groups": {n: {"params": g} if g else {} for n, g in groups.items()}}


def upgrade_file(file: Path) -> str:
    """Rewrite a file of the format before version 2, keeping the old one beside it.

    Args:
        file: The fleet file.

    Returns:
        What was done, in a sentence.

    Raises:
        InvalidFleet: The file is of neither format.
        InvalidParams: The file is not readable YAML.
    """
    content = read_yaml(file)
    upgraded = upgrade(content)
    if upgraded is None:
        _validated(content, file)
        return f"{file} is of version {VERSION} already."
    _validated(upgraded, file)
    old = file.with_name(f"{file.name}.old")
    shutil.copy2(file, old)
    with whole_file(file) as partial:
        partial.write_text(yaml.safe_dump(upgraded, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return f"{file} is of version {VERSION} now; the old one is {old}."


def select(plans: Sequence[GroupPlan], names: Sequence[str]) -> tuple[GroupPlan, ...]:
    """Return the plans of these names, all where there are none. Raises `InvalidFleet`."""
    known = {plan.name: plan for plan in plans}
    for name in names:
        if name not in known:
            raise InvalidFleet(f"there is no group '{name}'{suggest(name, known)} Groups: {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names or known))


def check_names(plans: Sequence[GroupPlan]) -> None:
    """Refuse groups that would register under one name, or zip what a group registers. Raises `InvalidFleet`."""
    names = Counter(plan.params.register.name for plan in plans)
    for name, count in names.items():
        if count > 1:
            groups = " and ".join(f"'{plan.name}'" for plan in plans if plan.params.register.name == name)
            raise InvalidFleet(
                f"the groups {groups} would register under one name, '{name}'. Give each its own register.name."
            )
    for plan in plans:
        for model, declared in plan.models.items():
            registered = (declared.source or "").removeprefix("models:/").partition("#")[0]
            target = registered.partition("@")[0].partition("/")[0]
            if (declared.source or "").startswith("models:/") and target in names:
                raise InvalidFleet(
                    f"models.{model}.source: {declared.source} is what this fleet registers itself, so group "
                    f"'{plan.name}' would wait for a zipped network. Name a pre-trained one."
                )


_BLOCKS: dict[str, type[BaseModel]] = {"models": Model, "groups": GroupEntry, "auto": Auto}


def _validated(content: Mapping[str, Any], file: Path) -> FleetFile:
    version = content.get("version")
    if version is None and content:
        raise InvalidFleet(f"{file}: version: is missing. Write 'version: {VERSION}' above all else.")
    if version != VERSION:
        raise InvalidFleet(
            f"{file}: version: {version!r} is not known here. Allowed: {VERSION}"
            + (
                "; a newer mtz has written it, so update this one."
                if isinstance(version, int) and version > VERSION
                else ""
            )
        )
    try:
        return FleetFile.model_validate(content)
    except ValidationError as error:
        raise InvalidFleet(f"{file}: {'; '.join(_problems(error))}") from error


def _path(problem: Any) -> list[str]:
    """The path of the key that a finding is about."""
    return [str(p) for p in problem["loc"] if p not in ("str", "Splits", "Factory") and "[" not in str(p)]


def _problems(error: ValidationError) -> list[str]:
    """One line for each finding: the key's path, what is wrong, what is allowed. Of a union, the likeliest member's."""
    lines = []
    for problem in likeliest(error, _path):
        path = _path(problem)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            block = _BLOCKS.get(path[0], FleetFile) if len(path) > 1 else FleetFile
            if path[0] == "models" and path[2:3] == ["output"] and len(path) > 3:
                block = OutputParams
            message = f"unknown key; allowed here: {', '.join(block.model_fields)}"
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] != "value_error":
            message = in_words(problem)
            path = path[: -1 if "[key]" in problem["loc"] else None]
        lines.append(": ".join(filter(None, (".".join(path), message))))
    return list(dict.fromkeys(lines))


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
