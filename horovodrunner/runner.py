"""HorovodRunner itself: choose cluster or local, launch, return or raise. Runs in: the driver."""

from __future__ import annotations

import functools
import html
import inspect
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError, ConfigurationError, RunStoppedError
from horovodrunner.flows.artifacts.driver import BroughtFiles
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.call.called import name_of
from horovodrunner.flows.call.early_imports import early_imports
from horovodrunner.flows.call.import_path import ImportPath
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.driver import new_history, newest_history
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.logs.showing import warn
from horovodrunner.flows.metrics.driver import MetricsRecorder, ReportCalls
from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.mlflow.driver import Sources, reporters, require_mlflow
from horovodrunner.flows.observer import Observer, Observers, RunFacts
from horovodrunner.flows.outcome.outcome import Outcome
from horovodrunner.flows.progress.driver import ProgressView
from horovodrunner.flows.progress.screens import find_screen
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.flows.results.sequence import RankResults
from horovodrunner.flows.rundir.masking import Mask, secret_variables, without_secrets
from horovodrunner.flows.runkeys.driver import REFUSE, RERUN, KeyedRun, KeyRequest, keyed_run
from horovodrunner.flows.script.driver import ScriptCall, prepare_script
from horovodrunner.flows.telemetry.phases import Phase, Spans, format_phases
from horovodrunner.flows.tensorboard.driver import TensorBoardWriter, checked_directory
from horovodrunner.formatting import format_bytes, in_one_line
from horovodrunner.pickling import payload
from horovodrunner.placement.environment import DEVICES
from horovodrunner.placement.forwarding import Variables, checked_patterns, checked_variables
from horovodrunner.placement.versions import installed_versions
from horovodrunner.processes.driver.announcement import PICKLED, announce
from horovodrunner.processes.driver.attempts import STOPPED, describe_end, run_attempts
from horovodrunner.processes.driver.interactive import is_interactive, program_arguments
from horovodrunner.processes.driver.queue import Turn
from horovodrunner.spark import interrupt
from horovodrunner.storage import is_url, open_storage
from horovodrunner.usage import explained, wrong_options, wrong_run, wrong_script
from horovodrunner.wire.events import Handlers

if TYPE_CHECKING:
    from horovodrunner.data.unshared import UnsharedDataSet
    from horovodrunner.flows.metrics.records import Point
    from horovodrunner.flows.rundir.driver import RunDirectory

__all__ = ["HorovodRunner", "SavedCheckpoint"]

AUTO = "auto"
TOKEN_BYTES = 32
MAX_KEY = 200

MAX_NAME = 100
"""Characters of a run's name."""

USAGE_SECONDS = 10.0
"""How often ranks report what they use, to observers that want it."""


_OLD_OPTIONS = {"checkpoint_errors": "on_checkpoint_error", "show_phases": "profile_launch"}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is kept.

    Parameters
    ----------
    step
        The step that :func:`horovodrunner.checkpoint.save` was given.
    path
        Its directory: a path on the driver, or a URL.
    size
        Bytes of all its files.
    time
        When it was complete, in UTC.
    """

    step: int
    path: str
    size: int
    time: datetime


class HorovodRunner:
    """Runs a training function on every rank of a Horovod job, on Spark or on this machine.

    The interface and its behaviour are those documented for Databricks' HorovodRunner.

    Parameters
    ----------
    np
        Number of ranks. Positive: tasks of a Spark barrier stage, one slot each unless
        ``ranks_per_task`` says otherwise, on the active SparkSession (one is created when there is
        none). Negative: ``-np`` processes on this
        machine, without Spark, for debugging. 0: all slots of the cluster; deprecated.
    driver_log_verbosity
        ``"log_callback_only"``: show here only what :func:`horovodrunner.log_to_driver` is given.
        ``"all"``: show everything the ranks print, while it happens. A negative np always does.
    horovodrun_args
        Options of the ``horovodrun`` command, as a list or as one would type them:
        ``["--fusion-threshold-mb", "32", "--autotune"]``. They win over the driver's ``HOROVOD_``
        variables. The file of ``--timeline-filename``, or of the variable ``HOROVOD_TIMELINE``,
        is written here, on the driver, at the end of the run, even of one that fails. Options
        about hosts, ssh, MPI and elastic runs are refused.
    resources
        What each task of this run takes of its executor, when that is not what the session's
        settings say: ``{"cpus": 4, "gpu": 1}``. Needs pyspark 4.0 and a cluster (standalone, YARN
        or Kubernetes); a negative np ignores it.
    ranks_per_task
        How many ranks one task of Spark's runs. ``"gpu"``: as many as it owns GPUs, so that one
        task on each node uses all of them (``resources={"gpu": 8}``). np counts ranks; the last
        task has fewer if they do not divide. A negative np ignores it.
    preflight
        Whether hosts, links and GPUs are tried before main: every pair of hosts is connected, and a
        small and a large allreduce are timed over what main imports, Horovod or PyTorch. True
        refuses the run and names the host or the link that is out of reach, broken or ten times
        slower than the others; ``"warn"`` runs all the same.
    results
        Whose return values come back. ``"rank-0"``: what ``run()`` returns. ``"all"``: those of
        the other ranks as well, in :attr:`results`.
    start_timeout
        Seconds that the Spark tasks may take to start.
    stall_timeout
        Seconds that a rank may wait for others in one collective, or not answer at all, before
        the run fails with every rank's Python stack. None waits for ever; a warning after 60
        seconds names the missing ranks in any case.
    checkpoint_dir
        Where :func:`horovodrunner.checkpoint.save` keeps checkpoints: a path on the driver, to
        which the files travel, or a URL of any fsspec file system (``s3://...``, ``hdfs://...``,
        ``file://...`` for a path that all machines share), to which rank 0 writes itself.
    keep_checkpoints
        How many checkpoints are kept; older ones are deleted.
    resume
        Whether main finds the newest checkpoint in ``checkpoint_dir``. False starts anew: older
        ones are kept beside the new ones and are neither found nor deleted. Restarts within the
        run find the run's own in any case.
    on_checkpoint_error
        ``"warn"``: training goes on when a checkpoint cannot be stored. ``"raise"``: the run ends
        with a :class:`CheckpointError`.
    max_restarts
        How many times the run is launched again when a worker process or an executor is lost.
    restart_on
        Types of exceptions of main, or of this package, after which it is launched again, too.
    tf_config
        Whether every rank gets ``TF_CONFIG`` with all ranks as workers, for
        ``tf.distribute.MultiWorkerMirroredStrategy``. Without it no rank has the variable.
    environment
        Variables for every rank, from the start of its process: ``{"WANDB_MODE": "offline"}``.
        They win over the driver's and the executors'; None takes a variable of theirs away.
    forward
        Names of the driver's variables that every rank gets, beside those of Horovod and the
        frameworks: ``["AWS_*", "MY_TOKEN"]``. No record or log shows their values.
    profile_launch
        Whether a table at the end of the run shows how long each phase took: pickling, the start
        of the stage and of the workers, imports, the gather step, main, the way back. ``phases``
        has the same in any case.
    keep_warm
        Whether a process that has PyTorch and Horovod imported stays on every executor (on the
        driver for a negative np) and forks the workers, so that the next runs start sooner. It
        holds about 300 MiB, and ends with the session or after ten minutes without a run.
        ``"auto"``: in notebooks and other interactive sessions, not in scripts. Mains that use
        TensorFlow, or that change how frameworks are imported (``os.environ``, ``sys.path``),
        get fresh processes in any case.
    progress
        Whether the progress and the metrics that main reports (:mod:`horovodrunner.metrics`) are
        shown while the run goes on: in a notebook in an area that is updated in place, in a
        terminal as tqdm's bars, elsewhere as a line every 30 seconds. ``"auto"`` is as True.
    run_dir
        Where a record of every run is kept, in a directory of its own: a path on the driver, or a
        URL of any fsspec file system, to which what is new is uploaded every 30 seconds. It has
        arguments, versions, metrics, all output, where the time went, and ``report.html``, and
        it is there after a crash as well. Passwords, tokens and keys are masked.
    mlflow
        Whether the run is reported to MLflow, from the driver: metrics, parameters, versions, what
        the hosts use, and the outcome. ``"auto"``: to the run that is active here, if there is
        one. True starts one otherwise, and ends it. ``mlflow.start_run()`` in main goes on with it
        where the tracking server can be reached.
    tensorboard_dir
        A directory on the driver for event files of what main reports, which TensorBoard shows;
        each run has a directory of its own in it.
    on_report
        A function that is called with each point that rank 0 reports
        (:class:`~horovodrunner.flows.metrics.records.Point`: ``step``, ``values``), in the thread
        that called :meth:`run`. What it raises ends the run, and ``run()`` raises it.
    name
        What the run is called in the lines that it prints, in its progress, in Spark's UI, in its
        record, in MLflow and in TensorBoard: to tell several runs at once apart.

    Raises
    ------
    ArgumentTypeError
        If np is not an int (a bool is not), or another argument has the wrong type.
    ArgumentValueError
        If an argument has a value that cannot work.
    ConfigurationError
        If ``horovodrun_args`` is given where Horovod is not installed, ``mlflow=True`` where
        MLflow is not, or ``tensorboard_dir`` where TensorBoard is not.

    Examples
    --------
    >>> from horovodrunner import HorovodRunner
    >>> def main(greeting):
    ...     import horovod.torch as hvd
    ...     hvd.init()
    ...     return f"{greeting} from rank {hvd.rank()} of {hvd.size()}"
    >>> HorovodRunner(np=-2).run(main, greeting="Hello")  # doctest: +SKIP
    'Hello from rank 0 of 2'
    """

    _frames_to_user = 6
    """From a warning of run() to the line that called it; a subclass adds its own frames."""

    @explained(wrong_options, **_OLD_OPTIONS)
    def __init__(
        self,
        *,
        np: int,
        driver_log_verbosity: str = "log_callback_only",
        horovodrun_args: str | Sequence[str] | None = None,
        resources: Mapping[str, float] | None = None,
        ranks_per_task: int | str = 1,
        preflight: bool | str = False,
        results: str = "rank-0",
        start_timeout: float = 600.0,
        stall_timeout: float | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        keep_checkpoints: int = 3,
        resume: bool = True,
        on_checkpoint_error: str = "warn",
        max_restarts: int = 0,
        restart_on: tuple[type[BaseException], ...] = (),
        tf_config: bool = False,
        environment: Mapping[str, str | None] | None = None,
        forward: Sequence[str] = (),
        profile_launch: bool = False,
        keep_warm: bool | str = AUTO,
        progress: bool | str = AUTO,
        run_dir: str | os.PathLike[str] | None = None,
        mlflow: bool | str = AUTO,
        tensorboard_dir: str | os.PathLike[str] | None = None,
        on_report: Callable[[Point], object] | None = None,
        name: str | None = None,
    ) -> None:
        given = locals()
        self._options = {
            option: given[option]
            for option, parameter in inspect.signature(HorovodRunner).parameters.items()
            if _differs(given[option], parameter.default)
        }
        self._np = checked.integer("np", np)
        self._verbosity = checked.choice(
            "driver_log_verbosity", driver_log_verbosity, ("all", "log_callback_only")
        )
        self._resources = None if resources is None else checked.resources("resources", resources)
        self._ranks_per_task = checked.integer_or("gpu", "ranks_per_task", ranks_per_task, 1)
        self._preflight = checked.boolean_or("warn", "preflight", preflight)
        self._keeps_all_results = checked.choice("results", results, ("rank-0", "all")) == "all"
        self._start_timeout = checked.seconds("start_timeout", start_timeout)
        self._stall_timeout = (
            None if stall_timeout is None else checked.seconds("stall_timeout", stall_timeout)
        )
        keep = checked.integer("keep_checkpoints", keep_checkpoints, at_least=1)
        self._store = (
            None
            if checkpoint_dir is None
            else CheckpointStore(checked.path("checkpoint_dir", checkpoint_dir), keep)
        )
        self._resume = checked.boolean("resume", resume)
        self._on_checkpoint_error = checked.choice(
            "on_checkpoint_error", on_checkpoint_error, ("warn", "raise")
        )
        self._max_restarts = checked.integer("max_restarts", max_restarts, at_least=0)
        self._restart_on = checked.exception_types("restart_on", restart_on)
        self._tf_config = checked.boolean("tf_config", tf_config)
        self._variables = Variables(
            checked_variables("environment", {} if environment is None else environment),
            checked_patterns("forward", checked.names("forward", forward)),
            _horovod_variables(horovodrun_args),
        )
        if environment:
            self._options["environment"] = without_secrets(self._variables.environment)
        self._profile_launch = checked.boolean("profile_launch", profile_launch)
        self._keep_warm = checked.boolean_or(AUTO, "keep_warm", keep_warm)
        self._progress = checked.boolean_or(AUTO, "progress", progress)
        self._mlflow = checked.boolean_or(AUTO, "mlflow", mlflow)
        if self._mlflow is True:
            require_mlflow()
        self._tensorboard_dir = (
            None
            if tensorboard_dir is None
            else checked_directory(
                "tensorboard_dir", checked.path("tensorboard_dir", tensorboard_dir)
            )
        )
        self._run_dir = None if run_dir is None else checked.path("run_dir", run_dir)
        self._on_report = (
            None
            if on_report is None
            else checked.callback("on_report", on_report, "a point that rank 0 reported")
        )
        self._name = "" if name is None else checked.name("name", name, MAX_NAME)
        self._going: list[GoingRun] = []
        self._run_directory: RunDirectory | None = None  # of the last run
        self._stored_record: str | None = None  # of the run whose value was stored
        self._own_history: CheckpointStore | None = None  # of the last run that has one
        self._phases: tuple[Phase, ...] = ()
        self._history = History()
        self._artifacts = ArtifactStore()
        self._results = RankResults(why_none="nothing has run yet")

    @property
    def results(self) -> RankResults:
        """What main returned on every rank of the last run, with ``results="all"``.

        There are none of a run that failed. They go with the next run, unless somebody still has
        them.

        Examples
        --------
        >>> runner = HorovodRunner(np=-2, results="all")
        >>> runner.run(evaluate)  # doctest: +SKIP
        0.91
        >>> runner.results[1]  # doctest: +SKIP
        0.93
        """
        return self._results

    @property
    def checkpoints(self) -> tuple[SavedCheckpoint, ...]:
        """The checkpoints in ``checkpoint_dir`` that runs go on from now, the newest one last.

        With ``resume=False`` the last run's own, as soon as there was one.
        """
        if self._store is None:
            return ()
        # a run that was to start anew has its own, even if it saved nothing
        store = self._own_history or newest_history(self._store)
        return tuple(
            SavedCheckpoint(
                step=manifest.step,
                path=store.path_of(manifest.step),
                size=manifest.size,
                time=datetime.fromisoformat(manifest.saved_at),
            )
            for manifest in reversed(store.manifests())
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the last run that ended, or of its last attempt, and when they were."""
        return self._phases

    @property
    def history(self) -> History:
        """What the last run reported with :mod:`horovodrunner.metrics`, also one that failed.

        It grows while the run goes on, for whoever looks at it in another thread.
        """
        return self._history

    @property
    def artifacts(self) -> Path | None:
        """The directory with what the last run's ranks left, ``rank-N/...``; None if nothing.

        See :mod:`horovodrunner.artifacts`. It is a part of the run's record in ``run_dir``. Without
        one, or behind a URL, the directory goes with the next run of this runner, and with this
        process.
        """
        return self._artifacts.directory

    @property
    def record(self) -> str | None:
        """The directory of the last run in ``run_dir``, a path or a URL; None without any.

        Examples
        --------
        >>> runner = HorovodRunner(np=-1, run_dir="runs")
        >>> runner.run(train)  # doctest: +SKIP
        >>> runner.record  # doctest: +SKIP
        '/home/me/runs/20260131-101500-1f0c22ab'
        """
        if self._run_directory is None:
            return self._stored_record
        return self._run_directory.location

    def __repr__(self) -> str:
        """Return the call that makes this runner, without what a URL has before its ``@``."""
        options = ", ".join(f"{name}={checked.shown(it)}" for name, it in self._options.items())
        return Mask().text(f"{type(self).__name__}({options})")

    def _repr_html_(self) -> str:
        """Return the same, and what the last run reported; notebooks show it."""
        parts = [f"<code>{html.escape(repr(self))}</code>"]
        if self._history.last is not None:
            parts.append(self._history._repr_html_())
        if self.record is not None:
            parts.append(f"<div>record: <code>{html.escape(self.record)}</code></div>")
        return "".join(parts)

    @explained(wrong_run)
    def run(
        self,
        /,
        main: Callable[..., Any],
        *,
        run_key: str | None = None,
        on_change: str = REFUSE,
        **kwargs: Any,
    ) -> Any:
        """Run ``main(**kwargs)`` once on every rank and return what rank 0 returned.

        Parameters
        ----------
        main
            The training function; it and its arguments travel by cloudpickle.
        run_key
            What this run is called in ``run_dir``, so that it is not done twice: any text, such as
            ``"nightly-2026-11-27"``. If it was done before, its value comes back and nothing is
            launched. If it has failed, or its driver is gone, it goes on from its own newest
            checkpoint. If another driver is doing it, this one waits for its value, at most
            ``start_timeout`` seconds.
        on_change
            ``"refuse"``: another main, other code or other arguments under the same key are an
            error, which names what differs. ``"rerun"``: they start anew under this key.
        **kwargs
            Its keyword arguments.

        Returns
        -------
        object
            Rank 0's return value; the other ranks' are dropped, or in :attr:`results`.

        Raises
        ------
        ArgumentTypeError
            If main is not callable or does not accept the arguments.
        PayloadError
            If main, an argument or the result cannot be pickled.
        ConfigurationError
            If the executors or this machine lack Horovod, Spark's settings rule the run out, or a
            file such as the timeline cannot be written where it should.
        ClusterCapacityError
            If the cluster has fewer slots than np.
        StartTimeoutError
            If the tasks do not start within ``start_timeout``, or another driver is not done by
            then with the run of this ``run_key``.
        RunSupersededError
            If another driver has taken over the run of this ``run_key``, because this one was not
            heard of.
        WorkerFailedError
            If a rank fails; its own exception is the ``__cause__``.
        StallTimeoutError
            If ranks wait for others for longer than ``stall_timeout``.
        CheckpointError
            If a checkpoint cannot be stored and ``on_checkpoint_error="raise"``.
        DataError
            If a data set that travels with the run cannot be computed or stored.
        BarrierStageError
            If Spark lost or cancelled the run's stage.
        RunStoppedError
            If :meth:`stop` has ended the run. What ``on_report`` raises is raised as it is.
        """
        __tracebackhide__ = True
        on_change = checked.choice("on_change", on_change, (REFUSE, RERUN))
        checked.free_names(main, "run_key", "on_change")
        if run_key is None and on_change != REFUSE:
            raise ArgumentValueError(f"on_change={on_change!r} needs a run_key")
        return self._call(main, kwargs, run_key, on_change)

    def _call(
        self,
        main: Callable[..., Any],
        kwargs: Mapping[str, Any],
        run_key: str | None = None,
        on_change: str = REFUSE,
    ) -> Any:
        __tracebackhide__ = True
        run = GoingRun(secrets.token_hex(4), self._name)
        self._going.append(run)
        try:
            with run.going():
                if run_key is None:
                    return self._run(run, main, kwargs)
                checked.main(main, kwargs, runner_options=_OPTIONS)
                with keyed_run(self._request(run, run_key, on_change, main, kwargs), run) as keyed:
                    if keyed.is_done:
                        return self._stored_value(keyed)
                    return self._run(run, main, kwargs, keyed)
        finally:
            self._going.remove(run)

    def _request(
        self,
        run: GoingRun,
        run_key: str,
        on_change: str,
        main: Callable[..., Any],
        kwargs: Mapping[str, Any],
    ) -> KeyRequest:
        from horovodrunner.flows.call.recording import record_call

        key = checked.name("run_key", run_key, MAX_KEY)
        if self._run_dir is None:
            raise ArgumentValueError(
                f"run_key={key!r} needs run_dir, where what was done is kept: "
                'HorovodRunner(..., run_dir="runs")'
            )
        record = record_call(run.run_id, abs(self._np), main, kwargs, exactly=True)
        return KeyRequest(key, self._run_dir, record, on_change, self._start_timeout)

    def _stored_value(self, keyed: KeyedRun) -> Any:
        """Return the value of a run that was done before, and be as after that run."""
        self._forget_last_run()
        self._results = RankResults(
            why_none="the run of this run_key was done before, and rank 0's value alone is stored"
        )
        self._history, self._phases = History(), ()
        self._artifacts = ArtifactStore()
        if keyed.stored is not None and keyed.stored.record and self._run_dir is not None:
            self._stored_record = open_storage(self._run_dir).url(keyed.stored.record)
        if self._store is not None:
            self._own_history = self._store_of_key(self._store, keyed).newest_epoch()
        return keyed.value()

    def stop(self, reason: str = "") -> bool:
        """End the run that is going, from another thread, a handler of signals or ``on_report``.

        All ranks end within seconds, and :meth:`run` raises a :class:`RunStoppedError`; there is no
        restart. What was reported, artifacts and checkpoints stay.

        Parameters
        ----------
        reason
            Why; the error tells it.

        Returns
        -------
        bool
            Whether there was a run to end: True means that ``run()`` raises the error. A run that
            begins later is not affected.

        Examples
        --------
        >>> runner = HorovodRunner(np=2)
        >>> threading.Timer(3600, runner.stop, ["an hour is over"]).start()  # doctest: +SKIP
        >>> runner.run(train)  # doctest: +SKIP
        Traceback (most recent call last):
        horovodrunner.errors.RunStoppedError: an hour is over: the run of 2 ranks was stopped; ...
        """
        reason = checked.text("reason", reason)
        text = f"{reason}: {STOPPED}" if reason else STOPPED
        stops = [run.stop(RunStoppedError(text, reason=reason)) for run in [*self._going]]
        return any(stops)

    def _run(
        self,
        run: GoingRun,
        main: Callable[..., Any],
        kwargs: Mapping[str, Any],
        keyed: KeyedRun | None = None,
    ) -> Any:
        __tracebackhide__ = True
        began, spans = time.time(), Spans()
        checked.main(main, kwargs, runner_options=_OPTIONS)
        store = self._store_of_run(run.run_id, main, kwargs, keyed)
        environment = self._variables.of_run(os.environ)
        files = BroughtFiles(environment)
        call, data_sets, frameworks = _pickle(main, kwargs)
        spans.add("pickle", began, time.time())
        self._history = History(abs(self._np))
        recorder = MetricsRecorder(self._history)
        view = self._progress_view(recorder, run)
        shows_output = self._verbosity == "all" or self._np < 0
        console = self._make_console(run, shows_lines=shows_output, drawing=view)
        facts = RunFacts(
            run.run_id,
            self._np,
            name_of(main),
            main.named_arguments if isinstance(main, ScriptCall) else kwargs,
            self._options,
            began,
            environment,
            files.paths,
            self._name,
            secret_variables(environment, self._variables),
        )
        artifacts = self._make_stores(facts, recorder, console)
        own = (recorder, artifacts, view, self._run_directory)
        others = self._observers(facts, recorder, console)
        observers = Observers([*filter(None, own), *others], console.note)
        results = self._result_store()

        turn = Turn(run, console.wake)

        def launch(attempt: int) -> Outcome:
            run.check()
            files.begin(attempt)
            observers.begin(attempt)
            now = time.time()
            spans.add("stage start", now, now)
            job = JobSpec(
                run_id=run.run_id if attempt == 1 else f"{run.run_id}-{attempt}",
                size=abs(self._np),
                payload=call,
                # its own secret: nobody of an earlier attempt gets in
                token=secrets.token_bytes(TOKEN_BYTES),
                attempt=attempt,
                early_imports=frameworks,
                environment=self._variables.of_attempt(
                    environment, observers.environment, files.variables
                ),
                removed_variables=self._variables.removed,
                import_path=ImportPath.of_this_process(),
                stream_output=shows_output or observers.wants_output,
                driver_shows_output=shows_output,
                usage_seconds=USAGE_SECONDS if observers.wants_usage else None,
                profiles=observers.wants_profiles,
                preflight="refuse" if self._preflight is True else self._preflight or "",
                all_results=self._keeps_all_results,
                stall_timeout=self._stall_timeout,
                checkpoint_location=None if store is None else store.location,
                keep_checkpoints=3 if store is None else store.keep,
                checkpoint_fence=None if store is None else store.fence,
                record=None if store is None else store.run,
                fail_on_checkpoint_error=self._on_checkpoint_error == "raise",
                brought_files=files.variables,
                tf_config=self._tf_config,
                keep_warm=is_interactive() if self._keep_warm == AUTO else self._keep_warm is True,
            )
            on_spark = functools.partial(self._run_on_spark, turn=turn)
            run_job = self._run_locally if self._np < 0 else on_spark
            outcome = run_job(
                job,
                console,
                files,
                results,
                data=tuple(data_sets.values()),
                flows=observers.handlers,
            )
            return outcome if keyed is None else keyed.keep(outcome, self.record, console)

        ended_by: BaseException | None = None
        try:
            announce(
                console,
                self._np,
                self._verbosity,
                len(call),
                tf_config=self._tf_config,
                what=main.what if isinstance(main, ScriptCall) else PICKLED,
            )
            self._warn(main, kwargs, len(call))
            first = run_attempts(
                launch,
                self._max_restarts,
                self._restart_on,
                store=store,
                console=console,
                run=run,
            )
            return self._keep_results(results, first)
        except KeyboardInterrupt as error:
            ended_by = describe_end(run, error, abs(self._np), store)
            raise error from None  # a second Ctrl-C comes while the first one is handled
        except BaseException as error:
            ended_by = describe_end(run, error, abs(self._np), store)
            raise
        finally:
            turn.leave()
            self._note_end(spans, console, began, ended_by)
            observers.end(ended_by)
            if store is not None:
                store.prune()
            console.show(0)

    @explained(wrong_script)
    def run_script(
        self,
        script: str | os.PathLike[str],
        /,
        *arguments: object,
        code_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Run a Python script on every rank, as ``horovodrun`` and ``torchrun`` do.

        Each rank runs it as ``python train.py ...`` would: as ``__main__``, with these arguments in
        ``sys.argv`` and its directory first in ``sys.path``. With a negative np it runs where it
        is. On Spark, its directory travels to the executors, and each rank runs in a copy, which
        is deleted with the run.

        Parameters
        ----------
        script
            Path of the script on the driver, or ``"-m"``: then the first argument is a module's
            name, and the directory that its package lies in travels.
        *arguments
            The script's arguments: texts, numbers and paths.
        code_dir
            The directory that travels, if it is not the script's: one that the script is in.
            Hidden directories, ``__pycache__``, ``node_modules`` and virtual environments in it
            stay behind. At most 100 MB travel.

        Raises
        ------
        ArgumentTypeError
            If an argument is neither text nor a number nor a path.
        ArgumentValueError
            If there is no such script or module, or it is not in ``code_dir``.
        ConfigurationError
            If the script is no Python, or the code directory is too large or cannot be read; and
            as for :meth:`run`.
        WorkerFailedError
            If a rank fails; ``exit_code`` is that of the script, where it has left with one.
        HorovodRunnerError
            As for :meth:`run`.

        Examples
        --------
        >>> HorovodRunner(np=4).run_script("train.py", "--epochs", 3)  # doctest: +SKIP
        >>> HorovodRunner(np=-2).run_script("-m", "package.train")  # doctest: +SKIP
        """
        __tracebackhide__ = True
        call = prepare_script(
            script, arguments, code_dir, travels=self._np >= 0, left_out=self._left_out()
        )
        self._call(call, {})

    def _left_out(self) -> list[str]:
        """List directories of the run's own, which do not travel with the code around them."""
        own = (self._run_dir, self._tensorboard_dir, self._store and self._store.location)
        return [str(each) for each in own if each is not None and not is_url(str(each))]

    def _observers(
        self, facts: RunFacts, recorder: MetricsRecorder, console: Console
    ) -> list[Observer]:
        """Make what follows a run on the driver, beside what belongs to every run."""
        observers: list[Observer] = []
        if self._on_report is not None:
            observers.append(ReportCalls(self._on_report, recorder, console.call))
        if self._tensorboard_dir is not None:
            observers.append(TensorBoardWriter(self._tensorboard_dir, facts, recorder.records_of))
        # the last one: what the record has at its end is to be in MLflow, too
        sources = Sources(recorder.records_of, self._artifacts, self._run_directory)
        observers += reporters(self._mlflow, facts, sources, console)
        return observers

    def _make_stores(
        self, facts: RunFacts, recorder: MetricsRecorder, console: Console
    ) -> ArtifactStore:
        """Make the directory of this run, if the user wants one, and where artifacts come to."""
        self._forget_last_run()
        if self._run_dir is None:
            self._artifacts = ArtifactStore()
            return self._artifacts
        from horovodrunner.flows.rundir.driver import RunDirectory

        self._run_directory = record = RunDirectory(
            self._run_dir,
            facts,
            records_of=recorder.records_of,
            phases=lambda: self.phases,
            checkpoints=lambda: self.checkpoints,
            artifacts=lambda: self._artifacts.directory,
        )
        console.note(f"the record of this run: {record.shown}", routine=True)
        self._artifacts = ArtifactStore(record.artifacts)
        return self._artifacts

    def _forget_last_run(self) -> None:
        """Delete what goes with the next run."""
        self._artifacts.discard()
        self._stored_record = None
        if self._run_directory is not None:
            self._run_directory.discard()
            self._run_directory = None

    def _make_console(
        self, run: GoingRun, *, shows_lines: bool, drawing: ProgressView | None
    ) -> Console:
        return Console(
            executors_have_lines=self._np >= 0, shows_lines=shows_lines, drawing=drawing, run=run
        )

    def _progress_view(self, recorder: MetricsRecorder, run: GoingRun) -> ProgressView | None:
        """Make what shows how far the run is, unless the user wants nothing of it."""
        if self._progress is False:
            return None
        attempts = self._max_restarts + 1
        return ProgressView(find_screen(), recorder, self._history, attempts, run=run)

    def _result_store(self) -> ResultStore:
        """Make what takes the results of a run; those of the last one go, if nobody has them."""
        self._results = RankResults(why_none="the run has not ended yet")
        return ResultStore(of_all_ranks=self._keeps_all_results)

    def _keep_results(self, store: ResultStore, first: Any) -> Any:
        """Keep what the ranks returned, if the user wants it, and return rank 0's."""
        if self._keeps_all_results:
            self._results = RankResults.of(store, first)
        else:
            self._results = RankResults(
                why_none='only HorovodRunner(..., results="all") keeps what ranks return'
            )
        return first

    def _store_of_key(self, root: CheckpointStore, keyed: KeyedRun) -> CheckpointStore:
        """Return where the checkpoints of all epochs of a key's run are."""
        return root.below(f"key-{keyed.place.name}").below(keyed.epoch.generation)

    def _store_of_run(
        self,
        run_id: str,
        main: Callable[..., Any],
        kwargs: Mapping[str, Any],
        keyed: KeyedRun | None,
    ) -> CheckpointStore | None:
        """Choose where this run's checkpoints are, and prove that it can be written to."""
        if self._store is None:
            return None
        from horovodrunner.flows.call.recording import record_call, record_script

        self._store.check()
        try:
            self._own_history = None
            if keyed is not None:
                of_key = self._store_of_key(self._store, keyed)
                history = of_key.begin_epoch(keyed.epoch.number, resume=self._resume)
                self._own_history = history
            elif self._resume:
                history = newest_history(self._store, recover=True)
            else:
                history = self._own_history = new_history(self._store)
        except OSError as error:
            raise ConfigurationError(
                f"the checkpoints in {self._store.location} cannot be read: {error}. Choose a "
                "checkpoint_dir that this process may read"
            ) from error
        record = (
            record_script(run_id, abs(self._np), main.name, main.named_arguments, main.code)
            if isinstance(main, ScriptCall)
            else record_call(run_id, abs(self._np), main, kwargs)
        )
        return CheckpointStore(history.location, history.keep, record, history.fence)

    def _warn(self, main: Callable[..., Any], kwargs: Mapping[str, Any], call_bytes: int) -> None:
        if self._np == 0:
            warn(
                "np=0 (all slots) is deprecated: give the number of ranks",
                DeprecationWarning,
                stacklevel=self._frames_to_user,
            )
        if call_bytes > payload.WARN_BYTES and isinstance(main, ScriptCall):
            warn(
                f"{main.what} {format_bytes(call_bytes)}, which every executor has to fetch. "
                f"Largest, before they were packed: {main.largest_entries()}. Name a directory "
                "that has only the code with code_dir=",
                UserWarning,
                stacklevel=self._frames_to_user,
            )
        elif call_bytes > payload.WARN_BYTES:
            parts = payload.largest_parts(main, kwargs, at_least_bytes=payload.WARN_BYTES // 10)
            named = "; ".join(f"{where} ({format_bytes(n)})" for where, n in parts)
            warn(
                f"the pickled main and its arguments have {format_bytes(call_bytes)}, "
                "which every executor has to fetch"
                + (f". Largest: {named}" if named else "")
                + ". Load large data inside main instead",
                UserWarning,
                stacklevel=self._frames_to_user,
            )

    def _run_locally(
        self,
        job: JobSpec,
        console: Console,
        files: BroughtFiles,
        results: ResultStore,
        *,
        data: Sequence[UnsharedDataSet],
        flows: Sequence[Handlers],
    ) -> Outcome:
        from horovodrunner.flows.rows.driver import stored_here
        from horovodrunner.processes.driver.local import run_locally

        with stored_here(data, job.run_id, console) as rows:
            return run_locally(
                job,
                console,
                files,
                results,
                rows,
                artifacts=self._artifacts,
                flows=flows,
                deals_gpus=DEVICES not in self._variables.environment,
            )

    def _run_on_spark(
        self,
        job: JobSpec,
        console: Console,
        files: BroughtFiles,
        results: ResultStore,
        *,
        data: Sequence[UnsharedDataSet],
        flows: Sequence[Handlers],
        turn: Turn,
    ) -> Outcome:
        from horovodrunner.processes.driver import slots
        from horovodrunner.processes.driver.cluster import BarrierRun
        from horovodrunner.processes.driver.resources import task_request
        from horovodrunner.spark import session

        console.show(0)
        spark = session.find_session()
        session.refuse_encrypted_cluster(spark)
        waiting_since = time.monotonic()
        request = task_request(spark, self._resources, self._ranks_per_task)
        if request.gpus and DEVICES in self._variables.environment:
            raise ConfigurationError(
                f"environment has {DEVICES}, and Spark decides which GPUs each rank has "
                f"({request.description}): leave it out"
            )
        with interrupt.only_this_run():
            turn.join(spark.conf.get("spark.app.id", None) or "")
            size = slots.require_slots(spark, self._np, request, self._start_timeout, console)
            turn.wait(
                request.tasks(size),
                request,
                lambda: slots.total_slots(spark, request),
                waiting_since=waiting_since,
                start_timeout=self._start_timeout,
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
            location, store = job.checkpoint_location, None
            if location is not None and not is_url(location):  # there rank 0 writes itself
                store = CheckpointStore(
                    location, job.keep_checkpoints, job.record, job.checkpoint_fence
                )
            return BarrierRun(
                spark,
                job,
                request,
                console,
                files,
                results=results,
                artifacts=self._artifacts,
                start_timeout=self._start_timeout,
                waiting_since=waiting_since,
                on_start=turn.start,
                name=self._name,
                store=store,
                data=data,
                flows=flows,
            ).run()

    def _note_end(
        self, spans: Spans, console: Console, began: float, error: BaseException | None
    ) -> None:
        if error is not None:
            self._results = RankResults(why_none=f"the run failed: {in_one_line(error)}")
        for phase in console.run_phases:
            spans.add(phase.name, phase.began, phase.ended, phase.last_rank)
            if phase.name == "main":
                spans.add("outcome back", phase.ended, time.time())
        self._phases = spans.phases()
        if self._profile_launch:
            console.note(f"where the time went:\n{format_phases(self._phases, since=began)}")


_OPTIONS = [*[*inspect.signature(HorovodRunner.__init__).parameters][1:], *_OLD_OPTIONS]


def _pickle(
    main: Callable[..., Any], kwargs: Mapping[str, Any]
) -> tuple[bytes, Mapping[str, UnsharedDataSet], tuple[str, ...]]:
    """Return the pickled call, the data sets that it names, and what workers import early."""
    if isinstance(main, ScriptCall):  # it is to find a fresh process, as from a shell
        return payload.dump_call(main, kwargs, with_settings=False), {}, main.early_imports()
    with payload.attachments() as attachments:
        call = payload.dump_call(main, kwargs, program_arguments())
    return call, attachments, early_imports(main, call)


def _differs(value: Any, default: Any) -> bool:
    try:
        return bool(value != default)
    except Exception:  # noqa: BLE001 - an array of several numbers is refused later, by its name
        return True


def _horovod_variables(horovodrun_args: str | Sequence[str] | None) -> dict[str, str]:
    """Return the variables that options of ``horovodrun`` stand for."""
    if horovodrun_args is None:
        return {}
    options = checked.command_line("horovodrun_args", horovodrun_args)
    try:
        from horovodrunner.placement.rendezvous import environment_of

        return environment_of(options)
    except ImportError as error:
        raise ConfigurationError(
            f"horovodrun_args={options!r}: Horovod's own parser reads them, and it cannot be "
            f"imported here: {error}. Install Horovod on the driver, too (`{sys.executable} -m "
            "horovodrunner build-horovod`), or set the HOROVOD_... variables instead"
        ) from error
