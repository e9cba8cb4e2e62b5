"""A fleet that is merged while its processes are killed and its storage misbehaves must come to the same networks.

    python -m tests.faults.harness

Real servers, S3 and MLflow, on loopback. First a small fleet is merged undisturbed. Then it is merged anew, from
nothing, while at random moments a seeded choice of processes is killed by SIGKILL: `mtz run` itself, stages, DVC, Dask
workers and scheduler, the S3 server, the MLflow server. `mtz run` is started again whenever it was killed or a group
failed; when all groups are up to date and kills are left, a setting changes and it goes on. Half of the kills meet
groups that run in the flow's own process, half those that run on a Dask cluster. Beside all that, with an S3 server and
a registry of its own, the fleet is merged from nothing through a proxy that spoils every fifth request to S3.

After each, what must hold is looked up where it lies: in the registry, in the bucket, on disk, in the processes. Ends
with status 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil  # type: ignore[import-untyped]

from tests.benchmarks.fleet_of_models import GROUP_SIZE, make_fleet
from tests.benchmarks.fleet_project import FleetProject, Run, TooSlow, clone, copy_project, with_settings
from tests.faults import verdicts
from tests.faults.killer import Kill, Killer, plan_of
from tests.faults.proxy import FaultyProxy
from tests.faults.servers import BUCKET, REGION, MlflowServer, S3Server
from tests.faults.verdicts import Bucket, Digests, Registry

SHARE_OF_FAULTS = 0.2
MOST_STARTS_WITH_PROXY = 3
ON_CLUSTER = with_settings("flow.executor=dask", "flow.dask=local")

_MARKER = "MTZ_FAULTS"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 60.0
_SHORTEST_MEAN_SECONDS = 1.5
_SHARE_OF_TIME_FOR_KILLS = 0.4
_RUNS_AFTER = 4
"""Undisturbed runs that all after the kills takes about as long as: one to finish, variants' references, checks."""


@dataclass(frozen=True)
class Start:
    """One start of `mtz run` under kills: with which settings, and how it ended (None: it was killed by us)."""

    variant: int
    executor: str
    seconds: float
    status: int | None
    reason: str


@dataclass
class Report:
    """What there is to tell at the end."""

    kills: list[Kill] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    checked: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def check(self, part: str, claim: str, wrong: list[str]) -> None:
        """Note what does not hold of a claim."""
        self.checked.append((part, claim, wrong))
        print(f"{'ok   ' if not wrong else 'WRONG'} {part}: {claim}", *wrong[:20], sep="\n        ", flush=True)

    @property
    def failed(self) -> bool:
        """Whether anything does not hold."""
        return any(wrong for _, _, wrong in self.checked)


@dataclass(frozen=True)
class Harness:
    """A folder with a copy of the project and a generated fleet, and the S3 server that all parts use."""

    folder: Path
    s3: S3Server
    seed: int
    deadline: float
    report: Report = field(default_factory=Report)

    def run(self, kills: int) -> None:
        """All parts. Raises `TooSlow`."""
        with ThreadPoolExecutor(1) as beside, self._mlflow("undisturbed") as registry:
            undisturbed = self._project("undisturbed", registry, self.s3)
            start = time.monotonic()
            expected = [self._undisturbed(undisturbed, 0)]
            seconds = time.monotonic() - start
            print(f"undisturbed: {len(expected[0])} groups in {seconds:.0f} s", flush=True)
            proxied = beside.submit(self._through_proxy, expected[0])
            with self._mlflow("killed") as other:
                killed = self._project("killed", other, self.s3)
                found = self._under_kills(killed, other, kills, self._mean_seconds(kills, seconds))
                expected += [self._undisturbed(undisturbed, variant) for variant in range(1, len(found))]
                for variant, digests in enumerate(found):
                    wrong = verdicts.same_digests(digests, expected[variant])
                    self.report.check("killed", f"round {variant + 1}: digests as undisturbed", wrong)
                self._look("killed", killed, other, self.s3, found, _settings(len(found) - 1))
            proxied.result()

    def _mean_seconds(self, kills: int, undisturbed: float) -> float:
        left = self.deadline - time.monotonic() - _RUNS_AFTER * undisturbed
        return max(_SHORTEST_MEAN_SECONDS, _SHARE_OF_TIME_FOR_KILLS * left / kills)

    def _mlflow(self, part: str) -> MlflowServer:
        return MlflowServer(self.folder / f"mlflow-{part}")

    def _project(self, part: str, registry: MlflowServer, s3: S3Server, endpoint: str = "") -> FleetProject:
        temporary = self.folder / f"tmp-{part}"
        temporary.mkdir()
        settings: dict[str, dict[str, object]] = {
            "storage": {"endpoint": endpoint or s3.url, "bucket": BUCKET, "prefix": part, "region": REGION},
            "tracking": {"uri": registry.url},
            "flow": {"workers": 2, "retry_delay_seconds": 0.5},
        }
        marker = f"{self.folder.name}-{part}"
        variables = {**s3.credentials, _MARKER: marker, "TMPDIR": str(temporary)}
        registry.wait()
        return clone(self.folder / part, self.folder / "original", self.folder / "fleet", settings, variables)

    def _run(self, project: FleetProject, settings: Sequence[str]) -> Run:
        return project.run(*settings, limit=max(1.0, self.deadline - time.monotonic()))

    def _undisturbed(self, project: FleetProject, variant: int) -> Digests:
        run = self._run(project, _settings(variant))
        if run.status:
            sys.exit(f"error: the undisturbed run failed:\n{run.said[-3000:]}")
        return _digests(run.report)

    def _under_kills(self, project: FleetProject, registry: MlflowServer, kills: int, mean: float) -> list[Digests]:
        """Start the fleet until all kills are delivered and all groups up to date; return each round's digests."""
        found: list[Digests] = []
        local, elsewhere = plan_of(kills, self.seed)
        flows = _Flow()
        killer = Killer([*local, *elsewhere], flows.get, (self.s3, registry), mean, self.seed)
        print(f"{len(killer.left)} kills to come, {mean:.1f} s apart on average", flush=True)
        killer.start()
        try:
            while killer.left or not found or flows.last is None or flows.last.status != 0:
                on_cluster = len(killer.left) < len(elsewhere)
                start = self._start(project, flows, len(found), on_cluster)
                self.report.starts.append(start)
                if start.status == 0:
                    found.append(_digests(project.report()))
        finally:
            killer.stop()
            self.report.kills = killer.kills
        self.s3.wait()
        registry.wait()
        return found

    def _start(self, project: FleetProject, flows: _Flow, variant: int, on_cluster: bool) -> Start:
        """Run the fleet once to its end, whatever that is."""
        log = self.folder / "logs" / f"{len(self.report.starts):03d}.log"
        log.parent.mkdir(exist_ok=True)
        begun = time.monotonic()
        with log.open("wb") as output:
            process = project.start(output, "run", *_settings(variant), *(ON_CLUSTER if on_cluster else ()))
        flows.begin(process.pid)
        while (status := process.poll()) is None:
            if time.monotonic() > self.deadline:
                raise TooSlow(f"the fleet under kills was not done in time; see {log}")
            time.sleep(_POLL_SECONDS)
        lines = log.read_text(errors="replace").strip().splitlines()
        start = Start(
            variant,
            "dask" if on_cluster else "local",
            time.monotonic() - begun,
            status if status >= 0 else None,
            lines[-1] if status > 0 and lines else "",
        )
        flows.end(start)
        return start

    def _through_proxy(self, expected: Digests) -> None:
        with (
            S3Server(self.folder / "s3-proxied") as s3,
            self._mlflow("proxied") as registry,
            FaultyProxy(s3.url, SHARE_OF_FAULTS, self.seed) as proxy,
        ):
            s3.wait()
            project = self._project("proxied", registry, s3, proxy.url)
            starts = 0
            status: int | None = None
            while status != 0 and starts < MOST_STARTS_WITH_PROXY:
                run = self._run(project, ())
                status, starts = run.status, starts + 1
            self.report.faults, self.report.requests = Counter(proxy.counts), proxy.requests
            claim = f"the fleet is done after {starts} {'start' if starts == 1 else 'starts'}"
            self.report.check("proxied", claim, [] if status == 0 else run.said.splitlines()[-10:])
            self.report.check(
                "proxied", "digests as undisturbed", verdicts.same_digests(_digests(run.report), expected)
            )
            proxy.fraction = 0.0
            self._look("proxied", project, registry, s3, [expected], _settings(0))

    def _look(
        self,
        part: str,
        project: FleetProject,
        registry: MlflowServer,
        s3: S3Server,
        rounds: Sequence[Digests],
        settings: Sequence[str],
    ) -> None:
        """Check all that must hold once a part is over."""
        again = self._run(project, settings)
        # DVC looks into each of this machine's workspaces, also where a group went on elsewhere: leftovers are used up.
        verified = self._run(project, [*settings, "--verify"])
        _wait_for_end(f"{_MARKER}={project.variables[_MARKER]}")
        bucket, versions = Bucket(s3.client(), part), Registry(registry.url)
        marker = f"{_MARKER}={project.variables[_MARKER]}"
        for claim, wrong in (
            ("a following run finds everything unchanged", verdicts.all_unchanged(again.report)),
            ("DVC finds the same in all workspaces", verdicts.same_digests(_digests(verified.report), rounds[-1])),
            ("each content is registered once", verdicts.registered_once(versions, rounds)),
            ("every version's bundle and artifacts are complete", verdicts.bundles_complete(versions, bucket)),
            (f"all {len(bucket.objects)} objects are whole", verdicts.objects_whole(bucket)),
            ("no file is left unfinished", verdicts.nothing_unfinished(project.folder)),
            ("no lock is held", verdicts.no_locks(project.folder)),
            ("no MLflow run is open", verdicts.no_runs_open(versions)),
            ("no process is left", verdicts.no_processes(marker)),
        ):
            self.report.check(part, claim, wrong)
        temporary = list((self.folder / f"tmp-{part}").iterdir())
        size = sum(path.stat().st_size for path in (self.folder / f"tmp-{part}").rglob("*") if path.is_file())
        print(
            f"      {part}: {len(temporary)} entries, {size:,} bytes left in the system's temporary folder", flush=True
        )


class _Flow:
    """The run under way, as the killer sees it."""

    def __init__(self) -> None:
        self.last: Start | None = None
        self._process: psutil.Process | None = None

    def get(self) -> psutil.Process | None:
        process = self._process
        return process if process is not None and process.is_running() else None

    def begin(self, number: int) -> None:
        self._process = psutil.Process(number)

    def end(self, start: Start) -> None:
        self._process = None
        self.last = start


def _settings(variant: int) -> Sequence[str]:
    """Settings that differ from round to round, so that stages run again: from collect on, or from retrain on."""
    if not variant:
        return ()
    return with_settings(f"{'retrain' if variant % 2 else 'collect'}.seed={variant}")


def _digests(report: Mapping[str, Any]) -> Digests:
    return {group["group"]: group["content_digest"] for group in report.get("groups", ())}


def _wait_for_end(marker: str) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    while verdicts.marked(marker) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _print(report: Report, seconds: float) -> None:
    print(f"\n{len(report.kills)} kills:\n")
    print(f"{'s':>6}  {'killed':<12}{'process':>8}  while these stages ran")
    for kill in report.kills:
        print(f"{kill.seconds:>6.1f}  {kill.target:<12}{kill.process:>8}  {kill.doing or '-'}")
    print(
        f"\n{', '.join(f'{n} {target}' for target, n in Counter(kill.target for kill in report.kills).most_common())}"
    )
    print(f"\n{len(report.starts)} starts under kills:\n")
    for start in report.starts:
        ended = "killed" if start.status is None else f"status {start.status}"
        print(f"{start.seconds:>6.1f} s, round {start.variant + 1}, {start.executor}, {ended} {start.reason[:200]}")
    share = sum(report.faults.values()) / max(1, report.requests)
    print(f"\n{report.requests} requests through the proxy, {share:.0%} with a fault:\n")
    for fault, count in sorted(report.faults.items()):
        print(f"{count:>6}  {fault}")
    wrong = sum(1 for _, _, found in report.checked if found)
    print(f"\n{len(report.checked) - wrong} of {len(report.checked)} claims hold; {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--groups", type=int, default=6, help="pairs of networks in the fleet")
    parser.add_argument("--seed", type=int, default=0, help="decides which processes are killed, and when")
    parser.add_argument("--minutes", type=float, default=9.5, help="most that all of it may take")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all files and logs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped"))  # what was started is ended on the way out
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"mtz-faults-{uuid4().hex[:6]}-"))
    deadline = begun + 60 * options.minutes
    copy_project(folder / "original")
    make_fleet(folder / "fleet", GROUP_SIZE * options.groups, options.seed, "faults")
    error = ""
    with ExitStack() as stack:
        s3: S3Server = stack.enter_context(S3Server(folder / "s3"))
        harness = Harness(folder, s3, options.seed, deadline)
        stack.callback(_stop_all, folder.name)
        s3.wait()
        try:
            harness.run(options.kills)
        except TooSlow as reason:
            error = str(reason)
        _print(harness.report, time.monotonic() - begun)
    failed = bool(error) or harness.report.failed
    if failed or options.keep:
        print(f"all files and logs: {folder}")
    else:
        shutil.rmtree(folder)
    if failed:
        sys.exit(f"error: {error or 'not everything holds'}")


def _stop_all(name: str) -> None:
    """End what is left of the runs when this program ends, for whatever reason."""
    for part in ("undisturbed", "killed", "proxied"):
        for process in verdicts.marked(f"{_MARKER}={name}-{part}"):
            process.kill()


if __name__ == "__main__":
    main()
