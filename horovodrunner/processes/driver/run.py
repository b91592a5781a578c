"""One run, from what is to be called to what comes back of it. Runs in: the driver."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.artifacts.driver import BroughtFiles
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.call.driver import Call
from horovodrunner.flows.call.import_path import ImportPath
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.best import BestNotes
from horovodrunner.flows.checkpoints.driver import new_history, newest_history
from horovodrunner.flows.checkpoints.retention import Retention
from horovodrunner.flows.checkpoints.saved import SavedCheckpoint, saved_in
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.logs.showing import warn
from horovodrunner.flows.metrics.driver import MetricsRecorder, ReportCalls
from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.mlflow.driver import Sources, reporters
from horovodrunner.flows.observer import Observer, Observers, RunFacts
from horovodrunner.flows.outcome.outcome import Outcome
from horovodrunner.flows.progress.driver import ProgressView
from horovodrunner.flows.progress.screens import find_screen
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.flows.results.sequence import RankResults
from horovodrunner.flows.rundir.masking import secret_variables
from horovodrunner.flows.runkeys.driver import KeyedRun
from horovodrunner.flows.telemetry.phases import Phase, Spans, format_phases
from horovodrunner.flows.tensorboard.driver import TensorBoardWriter
from horovodrunner.formatting import format_bytes, in_one_line
from horovodrunner.options import AUTO, Options
from horovodrunner.pickling import payload
from horovodrunner.placement.environment import DEVICES
from horovodrunner.placement.versions import installed_versions
from horovodrunner.processes.driver.announcement import announce
from horovodrunner.processes.driver.attempts import describe_end, run_attempts
from horovodrunner.processes.driver.interactive import is_interactive
from horovodrunner.processes.driver.queue import Turn
from horovodrunner.spark import interrupt
from horovodrunner.storage import is_url

if TYPE_CHECKING:
    from horovodrunner.flows.rundir.driver import RunDirectory

__all__ = ["LastRun", "Run", "checkpoints_of", "store_of_key"]

TOKEN_BYTES = 32

USAGE_SECONDS = 10.0
"""How often ranks report what they use, to observers that want it."""


@dataclass
class LastRun:
    """What a run leaves on the driver, and grows while it goes on."""

    results: RankResults
    history: History = field(default_factory=History)
    artifacts: ArtifactStore = field(default_factory=ArtifactStore)
    phases: tuple[Phase, ...] = ()
    directory: RunDirectory | None = None
    stored_record: str | None = None
    """The record of an earlier run, whose value this one has returned."""
    checkpoints: CheckpointStore | None = None
    """Where its own checkpoints are, if it did not go on from others'."""

    @property
    def record(self) -> str | None:
        return self.stored_record if self.directory is None else self.directory.location

    def discard(self) -> None:
        """Delete what goes with the next run."""
        self.artifacts.discard()
        if self.directory is not None:
            self.directory.discard()


class Run:
    """A run with all that is needed for it; what it cannot have is refused when it is made."""

    def __init__(
        self,
        options: Options,
        call: Call,
        going: GoingRun,
        keyed: KeyedRun | None,
        *,
        stacklevel: int,
    ) -> None:
        self._options = options
        self._call = call
        self._going = going
        self._keyed = keyed
        self._stacklevel = stacklevel
        self._began = time.time()
        self._spans = Spans()
        self.left = LastRun(
            RankResults(why_none="the run has not ended yet"), History(abs(options.np))
        )
        self._store = self._choose_store()
        self._environment = options.variables.of_run(os.environ)
        self._files = BroughtFiles(self._environment)
        self._pickled = call.pickle()
        self._spans.add("pickle", self._began, time.time())
        self._results = ResultStore(of_all_ranks=options.keeps_all_results)

    def go(self) -> Any:
        """Launch attempts, show what happens, and return what rank 0 returned."""
        __tracebackhide__ = True
        options, size = self._options, abs(self._options.np)
        self._recorder = MetricsRecorder(self.left.history)
        view = self._progress_view()
        self._console = console = Console(
            executors_have_lines=options.np >= 0,
            shows_lines=options.shows_output,
            drawing=view,
            run=self._going,
            errors_apart=options.errors_apart,
            shows_routine=options.shows_routine,
        )
        self._observers = observers = self._make_observers(view)
        self._turn = Turn(self._going, console.wake)
        ended_by: BaseException | None = None
        try:
            announce(console, options, self._call.what, len(self._pickled.content))
            self._warn()
            first = run_attempts(
                self._launch,
                options.max_restarts,
                options.restart_on,
                store=self._store,
                console=console,
                run=self._going,
            )
            return self._with_results(first)
        except KeyboardInterrupt as error:
            ended_by = describe_end(self._going, error, size, self._store)
            raise error from None  # a second Ctrl-C comes while the first one is handled
        except BaseException as error:
            ended_by = describe_end(self._going, error, size, self._store)
            raise
        finally:
            self._turn.leave()
            self._note_end(ended_by)
            observers.end(ended_by)
            if self._store is not None:
                self._store.prune()
            console.show(0)

    def _choose_store(self) -> CheckpointStore | None:
        """Choose where this run's checkpoints are, and prove that it can be written to."""
        root, keyed = self._options.store, self._keyed
        if root is None:
            return None
        root.check()
        try:
            if keyed is not None:
                of_key = store_of_key(root, keyed)
                history = of_key.begin_epoch(keyed.epoch.number, resume=self._options.resume)
                self.left.checkpoints = history
            elif self._options.resume:
                history = newest_history(root, recover=True)
            else:
                history = self.left.checkpoints = new_history(root)
        except OSError as error:
            raise ConfigurationError(
                f"the checkpoints in {root.location} cannot be read: {error}. Choose a "
                "checkpoint_dir that this process may read"
            ) from error
        record = self._call.record(self._going.run_id, abs(self._options.np))
        return CheckpointStore(history.location, history.keep, record, history.fence)

    def _progress_view(self) -> ProgressView | None:
        """Make what shows how far the run is, unless the user wants nothing of it."""
        if not self._options.shows_progress:
            return None
        attempts = self._options.max_restarts + 1
        history = self.left.history
        return ProgressView(find_screen(), self._recorder, history, attempts, run=self._going)

    def _make_observers(self, view: ProgressView | None) -> Observers:
        """Make what follows the run on the driver: its own record first, MLflow last."""
        options, recorder, console = self._options, self._recorder, self._console
        facts = RunFacts(
            self._going.run_id,
            options.np,
            self._call.name,
            self._call.named_arguments,
            options.given,
            self._began,
            self._environment,
            self._files.paths,
            options.name,
            secret_variables(self._environment, options.variables),
        )
        record = self._make_record(facts)
        found: list[Observer | None] = [recorder, self.left.artifacts, view, record]
        if self._store is not None and self._store.keep.best is not None:
            found.append(BestNotes(self._store.keep.best, self._store.manifests, console.note))
        found += [make(facts) for make in options.other_observers]
        if options.on_report is not None:
            found.append(ReportCalls(options.on_report, recorder, console.call))
        if options.tensorboard_dir is not None:
            found.append(TensorBoardWriter(options.tensorboard_dir, facts, recorder.records_of))
        # what the record has at its end is to be in MLflow, too
        sources = Sources(recorder.records_of, self.left.artifacts, record)
        found += reporters(options.mlflow, facts, sources, console)
        return Observers([each for each in found if each is not None], console.note)

    def _make_record(self, facts: RunFacts) -> RunDirectory | None:
        """Make the directory of this run, where artifacts come to as well, if it is to have one."""
        if self._options.run_dir is None:
            return None
        from horovodrunner.flows.rundir.driver import RunDirectory

        left = self.left
        left.directory = record = RunDirectory(
            self._options.run_dir,
            facts,
            records_of=self._recorder.records_of,
            phases=lambda: left.phases,
            checkpoints=lambda: checkpoints_of(left, self._options.store),
            artifacts=lambda: left.artifacts.directory,
            best=None if self._store is None else self._store.keep.best,
        )
        self._console.note(f"the record of this run: {record.shown}", routine=True)
        left.artifacts = ArtifactStore(record.artifacts)
        return record

    def _warn(self) -> None:
        if self._options.np == 0:
            warn(
                "np=0 (all slots) is deprecated: give the number of ranks",
                DeprecationWarning,
                stacklevel=self._stacklevel,
            )
        if (size := len(self._pickled.content)) > payload.WARN_BYTES:
            warn(
                f"{self._call.what} {format_bytes(size)}, which every executor has to fetch"
                f"{self._call.advice()}",
                UserWarning,
                stacklevel=self._stacklevel,
            )

    def _launch(self, attempt: int) -> Outcome:
        self._going.check()
        self._files.begin(attempt)
        self._observers.begin(attempt)
        now = time.time()
        self._spans.add("stage start", now, now)
        job = self._job(attempt)
        outcome = self._run_locally(job) if self._options.np < 0 else self._run_on_spark(job)
        self._going.main_has_ended()
        if self._keyed is None:
            return outcome
        self._console.show(0)  # on_report may refuse the last points
        self._going.check()
        others = self._results.others()
        return self._keyed.keep(outcome, others, self.left.record, self._console)

    def _job(self, attempt: int) -> JobSpec:
        options, observers, store = self._options, self._observers, self._store
        return JobSpec(
            run_id=self._going.run_id if attempt == 1 else f"{self._going.run_id}-{attempt}",
            size=abs(options.np),
            payload=self._pickled.content,
            # its own secret: nobody of an earlier attempt gets in
            token=secrets.token_bytes(TOKEN_BYTES),
            attempt=attempt,
            early_imports=self._pickled.early_imports,
            environment=options.variables.of_attempt(
                self._environment, observers.environment, self._files.variables
            ),
            removed_variables=options.variables.removed,
            import_path=ImportPath.of_this_process(),
            stream_output=options.shows_output or observers.wants_output,
            driver_shows_output=options.shows_output,
            usage_seconds=USAGE_SECONDS if observers.wants_usage else None,
            profiles=observers.wants_profiles,
            preflight=options.preflight,
            all_results=options.keeps_all_results,
            stall_timeout=options.stall_timeout,
            checkpoint_location=None if store is None else store.location,
            retention=Retention() if store is None else store.keep,
            checkpoint_fence=None if store is None else store.fence,
            record=None if store is None else store.run,
            fail_on_checkpoint_error=options.fails_on_checkpoint_error,
            brought_files=self._files.variables,
            tf_config=options.tf_config,
            keep_warm=(
                is_interactive() if options.keep_warm == AUTO else options.keep_warm is True
            ),
        )

    def _run_locally(self, job: JobSpec) -> Outcome:
        from horovodrunner.flows.rows.driver import stored_here
        from horovodrunner.processes.driver.local import run_locally

        with stored_here(self._pickled.data, job.run_id, self._console) as rows:
            return run_locally(
                job,
                self._console,
                self._files,
                self._results,
                rows,
                run=self._going,
                artifacts=self.left.artifacts,
                flows=self._observers.handlers,
                deals_gpus=DEVICES not in self._options.variables.environment,
            )

    def _run_on_spark(self, job: JobSpec) -> Outcome:
        from horovodrunner.processes.driver import slots
        from horovodrunner.processes.driver.cluster import BarrierRun
        from horovodrunner.processes.driver.resources import task_request
        from horovodrunner.spark import session

        options, console, turn = self._options, self._console, self._turn
        console.show(0)
        spark = session.find_session()
        session.refuse_encrypted_cluster(spark)
        waiting_since = time.monotonic()
        request = task_request(spark, options.resources, options.ranks_per_task)
        if request.gpus and DEVICES in options.variables.environment:
            raise ConfigurationError(
                f"environment has {DEVICES}, and Spark decides which GPUs each rank has "
                f"({request.description}): leave it out"
            )
        with interrupt.only_this_run():
            turn.join(spark.conf.get("spark.app.id", None) or "")
            with session.end_is_told(spark):
                size = slots.require_slots(
                    spark, options.np, request, options.start_timeout, console
                )
                turn.wait(
                    request.tasks(size),
                    request,
                    lambda: slots.total_slots(spark, request),
                    waiting_since=waiting_since,
                    start_timeout=options.start_timeout,
                    console=console,
                )
            if rest := request.describe_rest(size):
                console.note(rest)
            job = replace(
                job,
                size=size,
                ranks_per_task=request.ranks,
                record=None if job.record is None else replace(job.record, size=size),
                max_result_bytes=session.max_result_bytes(spark),
                versions=installed_versions(),
                environment={**session.chosen_threads(spark), **job.environment},
                shares_terminal=session.shares_terminal(spark),
            )
            return BarrierRun(
                spark,
                job,
                request,
                console,
                self._files,
                run=self._going,
                results=self._results,
                artifacts=self.left.artifacts,
                start_timeout=options.start_timeout,
                waiting_since=waiting_since,
                on_start=turn.start,
                store=_store_on_driver(job),
                data=self._pickled.data,
                flows=self._observers.handlers,
            ).run()

    def _with_results(self, first: Any) -> Any:
        """Keep what the ranks returned, if the user wants it, and return rank 0's."""
        if self._options.keeps_all_results:
            self.left.results = RankResults.of(self._results, first)
        else:
            self.left.results = RankResults(
                why_none='only HorovodRunner(..., results="all") keeps what ranks return'
            )
        return first

    def _note_end(self, error: BaseException | None) -> None:
        left, spans, console = self.left, self._spans, self._console
        if error is not None:
            left.results = RankResults(why_none=f"the run failed: {in_one_line(error)}")
            self._results.drop()
        for phase in console.run_phases:
            spans.add(phase.name, phase.began, phase.ended, phase.last_rank)
            if phase.name == "main":
                spans.add("outcome back", phase.ended, time.time())
        left.phases = spans.phases()
        if self._options.profile_launch:
            console.note(f"where the time went:\n{format_phases(left.phases, since=self._began)}")


def checkpoints_of(run: LastRun, root: CheckpointStore | None) -> Sequence[SavedCheckpoint]:
    """List the checkpoints that runs go on from after this one, the newest one last."""
    if root is None:
        return ()
    # a run that was to start anew has its own, even if it saved nothing
    return saved_in(run.checkpoints or newest_history(root))


def store_of_key(root: CheckpointStore, keyed: KeyedRun) -> CheckpointStore:
    """Return where the checkpoints of all epochs of a key's run are."""
    return root.below(f"key-{keyed.place.name}").below(keyed.epoch.generation)


def _store_on_driver(job: JobSpec) -> CheckpointStore | None:
    """Return where checkpoints come to; None behind a URL, where rank 0 writes itself."""
    location = job.checkpoint_location
    if location is None or is_url(location):
        return None
    return CheckpointStore(location, job.retention, job.record, job.checkpoint_fence)
