"""HorovodRunner itself: choose cluster or local, launch, return or raise. Runs in: the driver."""

from __future__ import annotations

import html
import inspect
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError, ConfigurationError, RunStoppedError
from horovodrunner.flows.call.driver import Call, FunctionCall
from horovodrunner.flows.checkpoints.best import checked_retention
from horovodrunner.flows.checkpoints.saved import SavedCheckpoint
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.metrics.driver import StaysHere
from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.mlflow.driver import require_mlflow
from horovodrunner.flows.results.sequence import RankResults
from horovodrunner.flows.rundir.masking import Mask, without_secrets
from horovodrunner.flows.runkeys.driver import REFUSE, RERUN, KeyedRun, KeyRequest, keyed_run
from horovodrunner.flows.script.driver import prepare_script
from horovodrunner.flows.telemetry.phases import Phase
from horovodrunner.flows.tensorboard.driver import checked_directory
from horovodrunner.options import AUTO, Options
from horovodrunner.placement.forwarding import Variables, checked_patterns, checked_variables
from horovodrunner.processes.driver.attempts import STOPPED
from horovodrunner.processes.driver.grace import sigterm_grace
from horovodrunner.processes.driver.run import LastRun, Run, checkpoints_of, store_of_key
from horovodrunner.storage import is_url, open_storage
from horovodrunner.usage import explained, wrong_options, wrong_run, wrong_script
from horovodrunner.wire.events import SaveWanted

if TYPE_CHECKING:
    from horovodrunner.flows.metrics.records import Point

__all__ = ["HorovodRunner", "SavedCheckpoint"]

MAX_KEY = 200
MAX_NAME = 100
"""Characters of a run's name."""

_A_POINT = "a point that rank 0 reported"
_PREFLIGHT = {True: "refuse", "warn": "warn", False: ""}
_OLD_OPTIONS = {"checkpoint_errors": "on_checkpoint_error", "show_phases": "profile_launch"}


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
        How many checkpoints are kept, the newest; older ones are deleted.
    keep_best
        Which checkpoint is kept as well, whatever its age: ``("val_loss", "min")`` or
        ``("accuracy", "max")``; ``("val_loss", "min", 3)`` keeps the best three. The metric is one
        that main reports (:func:`horovodrunner.metrics.report`) or gives to ``checkpoint.save``.
    keep_every
        Each checkpoint whose step is a multiple of this number is kept as well.
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
    sigterm_grace
        Seconds that the ranks get to save when this process is sent SIGTERM, as schedulers and
        Kubernetes do before they end it: ``checkpoint.should_save_now()`` is True, and the run ends
        with a :class:`RunStoppedError` when main returns or the time is over. A second SIGTERM ends
        it at once. It needs :meth:`run` to be called in the main thread. None leaves SIGTERM alone.
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
        keep_best: tuple[str, str] | tuple[str, str, int] | None = None,
        keep_every: int | None = None,
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
        sigterm_grace: float | None = None,
        name: str | None = None,
    ) -> None:
        given = locals()
        changed = {
            option: given[option]
            for option, parameter in inspect.signature(HorovodRunner).parameters.items()
            if _differs(given[option], parameter.default)
        }
        variables = Variables(
            checked_variables("environment", {} if environment is None else environment),
            checked_patterns("forward", checked.names("forward", forward)),
            _horovod_variables(horovodrun_args),
        )
        if environment:
            changed["environment"] = without_secrets(variables.environment)
        number = checked.integer("np", np)
        verbosity = checked.choice(
            "driver_log_verbosity", driver_log_verbosity, ("all", "log_callback_only")
        )
        keep = checked_retention(keep_checkpoints, keep_best, keep_every, checkpoint_dir)
        self._options = Options(
            given=changed,
            np=number,
            shows_output=verbosity == "all" or number < 0,
            resources=None if resources is None else checked.resources("resources", resources),
            ranks_per_task=checked.integer_or("gpu", "ranks_per_task", ranks_per_task, 1),
            preflight=_PREFLIGHT[checked.boolean_or("warn", "preflight", preflight)],
            keeps_all_results=checked.choice("results", results, ("rank-0", "all")) == "all",
            start_timeout=checked.seconds("start_timeout", start_timeout),
            stall_timeout=(
                None if stall_timeout is None else checked.seconds("stall_timeout", stall_timeout)
            ),
            store=(
                None
                if checkpoint_dir is None
                else CheckpointStore(checked.path("checkpoint_dir", checkpoint_dir), keep)
            ),
            resume=checked.boolean("resume", resume),
            fails_on_checkpoint_error=checked.choice(
                "on_checkpoint_error", on_checkpoint_error, ("warn", "raise")
            )
            == "raise",
            max_restarts=checked.integer("max_restarts", max_restarts, at_least=0),
            restart_on=checked.exception_types("restart_on", restart_on),
            tf_config=checked.boolean("tf_config", tf_config),
            variables=variables,
            profile_launch=checked.boolean("profile_launch", profile_launch),
            keep_warm=checked.boolean_or(AUTO, "keep_warm", keep_warm),
            shows_progress=checked.boolean_or(AUTO, "progress", progress) is not False,
            run_dir=None if run_dir is None else checked.path("run_dir", run_dir),
            mlflow=checked.boolean_or(AUTO, "mlflow", mlflow),
            tensorboard_dir=(
                None
                if tensorboard_dir is None
                else checked_directory(
                    "tensorboard_dir", checked.path("tensorboard_dir", tensorboard_dir)
                )
            ),
            on_report=(
                None
                if on_report is None
                else StaysHere(checked.callback("on_report", on_report, _A_POINT))
            ),
            sigterm_grace=(
                None if sigterm_grace is None else checked.seconds("sigterm_grace", sigterm_grace)
            ),
            name="" if name is None else checked.name("name", name, MAX_NAME),
        )
        if self._options.mlflow is True:
            require_mlflow()
        self._going: list[GoingRun] = []
        self._last = LastRun(RankResults(why_none="nothing has run yet"))

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
        return self._last.results

    @property
    def checkpoints(self) -> tuple[SavedCheckpoint, ...]:
        """The checkpoints in ``checkpoint_dir`` that runs go on from now, the newest one last.

        With ``resume=False`` the last run's own, as soon as there was one.
        """
        return tuple(checkpoints_of(self._last, self._options.store))

    @property
    def best_checkpoint(self) -> SavedCheckpoint | None:
        """The best one of :attr:`checkpoints` by ``keep_best``; None if none has that metric.

        Of equally good ones it is the newest. NaN is never the best.

        Raises
        ------
        ConfigurationError
            If the runner has no ``keep_best``, which says what is best.

        Examples
        --------
        >>> runner = HorovodRunner(np=2, checkpoint_dir="c", keep_best=("val_loss", "min"))
        >>> runner.run(train)  # doctest: +SKIP
        >>> runner.best_checkpoint.metrics  # doctest: +SKIP
        {'loss': 0.21, 'val_loss': 0.3}
        """
        store = self._options.store
        if store is None or store.keep.best is None:
            raise ConfigurationError(
                "best_checkpoint needs keep_best, which says what is best: "
                'HorovodRunner(..., checkpoint_dir="checkpoints", keep_best=("val_loss", "min"))'
            )
        return next(iter(store.keep.best.among(self.checkpoints[::-1])), None)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the last run that ended, or of its last attempt, and when they were."""
        return self._last.phases

    @property
    def history(self) -> History:
        """What the last run reported with :mod:`horovodrunner.metrics`, also one that failed.

        It grows while the run goes on, for whoever looks at it in another thread.
        """
        return self._last.history

    @property
    def artifacts(self) -> Path | None:
        """The directory with what the last run's ranks left, ``rank-N/...``; None if nothing.

        See :mod:`horovodrunner.artifacts`. It is a part of the run's record in ``run_dir``. Without
        one, or behind a URL, the directory goes with the next run of this runner, and with this
        process.
        """
        return self._last.artifacts.directory

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
        return self._last.record

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels when main refers to its runner: nothing of what is the driver's."""
        given = {name: it for name, it in self._options.given.items() if name != "on_report"}
        results = RankResults(why_none="they stay in the process that ran the run")
        return {
            **self.__dict__,
            "_options": replace(self._options, given=given),
            "_going": [],
            "_last": LastRun(results),
        }

    def __repr__(self) -> str:
        """Return the call that makes this runner, without what a URL has before its ``@``."""
        options = ", ".join(
            f"{name}={checked.shown(it)}" for name, it in self._options.given.items()
        )
        return Mask().text(f"{type(self).__name__}({options})")

    def _repr_html_(self) -> str:
        """Return the same, and what the last run reported; notebooks show it."""
        parts = [f"<code>{html.escape(repr(self))}</code>"]
        if self.history.last is not None:
            parts.append(self.history._repr_html_())
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
            file such as the timeline cannot be written where it should; and with ``sigterm_grace``
            outside the main thread.
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
            If :meth:`stop` has ended the run, or SIGTERM with ``sigterm_grace``. What ``on_report``
            raises is raised as it is.

        Examples
        --------
        >>> runner = HorovodRunner(np=2, run_dir="runs", checkpoint_dir="checkpoints")
        >>> runner.run(train, run_key="nightly-2026-11-27", epochs=20)  # doctest: +SKIP
        """
        __tracebackhide__ = True
        on_change = _checked_change(run_key, on_change)
        checked.free_names(main, "run_key", "on_change")
        return self._run(self._function(main, kwargs), run_key, on_change)

    def _function(self, main: Callable[..., Any], kwargs: Mapping[str, Any]) -> FunctionCall:
        checked.main(main, kwargs, runner_options=_OPTIONS)
        return FunctionCall(main, kwargs)

    def _run(self, call: Call, run_key: str | None = None, on_change: str = REFUSE) -> Any:
        __tracebackhide__ = True
        going = GoingRun(secrets.token_hex(4), self._options.name)
        self._going.append(going)
        try:
            with going.going(), sigterm_grace(going, self._options.sigterm_grace):
                if run_key is None:
                    return self._begin(call, going).go()
                with keyed_run(self._request(going, run_key, on_change, call), going) as keyed:
                    if keyed.is_done:
                        return self._stored_value(keyed)
                    return self._begin(call, going, keyed).go()
        finally:
            self._going.remove(going)

    def _begin(self, call: Call, going: GoingRun, keyed: KeyedRun | None = None) -> Run:
        """Make a run, which takes the last one's place."""
        run = Run(self._options, call, going, keyed, stacklevel=self._frames_to_user)
        self._last.discard()
        self._last = run.left
        return run

    def _request(self, going: GoingRun, run_key: str, on_change: str, call: Call) -> KeyRequest:
        key = checked.name("run_key", run_key, MAX_KEY)
        if self._options.run_dir is None:
            raise ArgumentValueError(
                f"run_key={key!r} needs run_dir, where what was done is kept: "
                'HorovodRunner(..., run_dir="runs")'
            )
        record = call.record(going.run_id, abs(self._options.np), exactly=True)
        return KeyRequest(
            key, self._options.run_dir, record, on_change, self._options.start_timeout
        )

    def _stored_value(self, keyed: KeyedRun) -> Any:
        """Return the value of a run that was done before, and be as after that run."""
        options = self._options
        self._last.discard()
        self._last = last = LastRun(keyed.results())
        if keyed.stored is not None and keyed.stored.record and options.run_dir is not None:
            last.stored_record = open_storage(options.run_dir).url(keyed.stored.record)
        if options.store is not None:
            last.checkpoints = store_of_key(options.store, keyed).newest_epoch()
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

    def request_checkpoint(self) -> bool:
        """Have the ranks of the run that is going save a checkpoint soon, all at the same step.

        ``checkpoint.should_save_now()`` is True once on every rank, at the same call, a few
        milliseconds later or as soon as the ranks run; saving is up to main. It may be called from
        another thread, a handler of signals or ``on_report``. What is requested before any rank
        gets to that call is one checkpoint.

        Returns
        -------
        bool
            Whether there was a run to ask. A run that begins later is not affected.

        Examples
        --------
        >>> runner = HorovodRunner(np=2, checkpoint_dir="checkpoints")
        >>> runner.request_checkpoint()  # nothing is running
        False
        """
        wanted = SaveWanted("runner.request_checkpoint()")
        asked = [run.want_save(wanted) for run in [*self._going]]
        return any(asked)

    @explained(wrong_script)
    def run_script(
        self,
        script: str | os.PathLike[str],
        /,
        *arguments: object,
        code_dir: str | os.PathLike[str] | None = None,
        run_key: str | None = None,
        on_change: str = REFUSE,
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
        run_key, on_change
            As for :meth:`run`; the code of the modules beside the script counts, too.

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
        change = _checked_change(run_key, on_change)
        call = prepare_script(
            script, arguments, code_dir, travels=self._options.np >= 0, left_out=self._left_out()
        )
        self._run(call, run_key, change)

    def _left_out(self) -> list[str]:
        """List directories of the run's own, which do not travel with the code around them."""
        store = self._options.store
        own = (self._options.run_dir, self._options.tensorboard_dir, store and store.location)
        return [str(each) for each in own if each is not None and not is_url(str(each))]


_OPTIONS = [*[*inspect.signature(HorovodRunner.__init__).parameters][1:], *_OLD_OPTIONS]


def _checked_change(run_key: str | None, on_change: str) -> str:
    change = checked.choice("on_change", on_change, (REFUSE, RERUN))
    if run_key is None and change != REFUSE:
        raise ArgumentValueError(f"on_change={change!r} needs a run_key")
    return change


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
