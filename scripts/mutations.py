"""Break the package in many places and see that the tests notice. Runs in: the command line.

``.venv/bin/python scripts/mutations.py`` tries all of ``MUTATIONS``, each in a copy of the
checkout, and runs the tests that must fail then; arguments choose those that have one of them in
their names. The exit code is 1 if one survives. A text that is not there, or there twice, is an
error: whoever changes such a line changes the mutation.
"""
# ruff: noqa: T201

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIES = 2
LEFT_OUT = shutil.ignore_patterns(".*", "build", "_build", "__pycache__", "spark-warehouse")
SECONDS = 300
TESTS_FAILED = 1
"""pytest's exit code; others tell that it found no test, or could not run."""


class Mutation(NamedTuple):
    """A fault, and the tests that must notice it."""

    name: str
    file: str
    text: str
    becomes: str
    tests: str


MUTATIONS = (
    Mutation(
        "a GPU that tasks share is listed twice",
        "horovodrunner/placement/topology.py",
        "    if len(set(everything)) < len(everything):",
        "    if False:",
        "tests/unit/test_topology.py",
    ),
    Mutation(
        "a task with several workers is one rank",
        "horovodrunner/placement/topology.py",
        ".extend([member] * member.workers)",
        ".extend([member])",
        "tests/unit/test_topology.py",
    ),
    Mutation(
        "a GPU beyond those that the executor sees",
        "horovodrunner/placement/topology.py",
        "elif int(address) < len(visible):",
        "elif int(address) <= len(visible):",
        "tests/unit/test_topology.py",
    ),
    Mutation(
        "the user's network interface is overruled",
        "horovodrunner/placement/environment.py",
        "if not (name in _USER_WINS and name in forwarded)",
        "if name",
        "tests/unit/test_env.py",
    ),
    Mutation(
        "Spark's secrets reach the workers",
        "horovodrunner/placement/environment.py",
        "if name not in _NOT_INHERITED}",
        "if name}",
        "tests/unit/test_env.py",
    ),
    Mutation(
        "ranks hash differently",
        "horovodrunner/placement/environment.py",
        'chosen[HASH_SEED] = "0"',
        'chosen[HASH_SEED] = "random"',
        "tests/unit/test_env.py",
    ),
    Mutation(
        "torch's local rank is the rank",
        "horovodrunner/placement/environment.py",
        '"LOCAL_RANK": str(slot.local_rank),\n        "LOCAL_WORLD',
        '"LOCAL_RANK": str(slot.rank),\n        "LOCAL_WORLD',
        "tests/unit/test_env.py",
    ),
    Mutation(
        "versions that differ are not noticed",
        "horovodrunner/placement/versions.py",
        'not in {own, ""}',
        'in {own, ""}',
        "tests/unit/test_versions.py",
    ),
    Mutation(
        "a GPU limits no slots",
        "horovodrunner/processes/driver/resources.py",
        "return min(slots, int(gpus / self.gpus)) if self.gpus else slots",
        "return slots",
        "tests/unit/test_slots.py",
    ),
    Mutation(
        "a lost task is a failure of the run's own",
        "horovodrunner/processes/driver/stage_end.py",
        "task_was_lost=True,",
        "task_was_lost=False,",
        "tests/unit/test_stage_end.py",
    ),
    Mutation(
        "a cancelled job is a lost one",
        "horovodrunner/processes/driver/stage_end.py",
        "return StageEnd(text, was_cancelled=True)",
        "return StageEnd(text, task_was_lost=True)",
        "tests/unit/test_stage_end.py",
    ),
    Mutation(
        "every failure is worth a restart",
        "horovodrunner/processes/driver/attempts.py",
        "if len(causes) > max_restarts or not _is_worth_another(error, restart_on):",
        "if len(causes) > max_restarts:",
        "tests/process/test_restarts.py",
    ),
    Mutation(
        "who waited for a lost peer is the cause",
        "horovodrunner/flows/outcome/task.py",
        "[f for f in self._failures if not f.after_peer_loss] or self._failures",
        "self._failures",
        "tests/unit/test_run_outcome.py tests/unit/test_outcomes.py",
    ),
    Mutation(
        "the run ends with its first rank",
        "horovodrunner/flows/outcome/task.py",
        "if self._outcomes.keys() >= self._hosts.keys():",
        "if self._outcomes:",
        "tests/unit/test_run_outcome.py tests/unit/test_outcomes.py",
    ),
    Mutation(
        "each rank's notice is shown",
        "horovodrunner/flows/logs/task.py",
        "if event.key not in self._noticed:",
        "if event.key:",
        "tests/unit/test_run_outcome.py",
    ),
    Mutation(
        "a short wait is a stall",
        "horovodrunner/flows/telemetry/task.py",
        "if longest < threshold:",
        "if longest < 0:",
        "tests/unit/test_stall.py",
    ),
    Mutation(
        "all lines are from stdout",
        "horovodrunner/flows/logs/lines.py",
        'prefix = f"[{rank}]<{stream}>:".encode()',
        'prefix = f"[{rank}]<stdout>:".encode()',
        "tests/unit/test_lines.py",
    ),
    Mutation(
        "lines that were dropped twice are miscounted",
        "horovodrunner/flows/logs/lines.py",
        "sum(map(int, marks)) - len(marks)",
        "sum(map(int, marks))",
        "tests/unit/test_lines.py",
    ),
    Mutation(
        "a slow console counts handfuls for lines",
        "horovodrunner/flows/logs/driver.py",
        "self._dropped_lines += count_lines(lines)",
        "self._dropped_lines += 1",
        "tests/unit/test_console.py",
    ),
    Mutation(
        "a checkpoint leads out of its directory",
        "horovodrunner/flows/checkpoints/manifest.py",
        'part in {"", ".", ".."}',
        'part in {"", "."}',
        "tests/unit/test_manifest.py",
    ),
    Mutation(
        "a torn file is taken for whole",
        "horovodrunner/flows/checkpoints/store.py",
        'return f"has {size} bytes instead of {file.size}"',
        'return ""',
        "tests/unit/test_store.py",
    ),
    Mutation(
        "a changed file is taken for sound",
        "horovodrunner/flows/checkpoints/store.py",
        'return "does not have the content that was saved (its SHA-256 differs)"',
        'return ""',
        "tests/unit/test_store.py",
    ),
    Mutation(
        "the latest checkpoint has the highest step",
        "horovodrunner/flows/checkpoints/store.py",
        "key=lambda each: each.sequence",
        "key=lambda each: each.step",
        "tests/unit/test_store.py",
    ),
    Mutation(
        "the checkpoint that is in use is deleted",
        "horovodrunner/flows/checkpoints/store.py",
        "if name != self._held:",
        "if True:",
        "tests/unit/test_store.py",
    ),
    Mutation(
        "NaN is the best checkpoint",
        "horovodrunner/flows/checkpoints/retention.py",
        "return None if math.isnan(value) else value",
        "return value",
        "tests/unit/test_retention.py",
    ),
    Mutation(
        "numbers of one checkpoint go with the next as well",
        "horovodrunner/flows/metrics/worker.py",
        "taken, self._unsaved = self._unsaved, {}",
        "taken = self._unsaved",
        "tests/process/test_best_checkpoints.py",
    ),
    Mutation(
        "a resumed run does not say what differs",
        "horovodrunner/flows/call/record.py",
        "    if was == now:",
        "    if was:",
        "tests/unit/test_recording.py",
    ),
    Mutation(
        "secrets are shown as what differs",
        "horovodrunner/flows/call/record.py",
        "if was.startswith(HIDDEN) and now.startswith(HIDDEN):",
        "if False:",
        "tests/unit/test_recording.py",
    ),
    Mutation(
        "any peer is believed",
        "horovodrunner/wire/auth.py",
        "if not hmac.compare_digest(expected, received):",
        "if False:",
        "tests/unit/test_connections.py",
    ),
    Mutation(
        "a header of any length is read",
        "horovodrunner/wire/events.py",
        "if header_bytes > MAX_HEADER_BYTES:",
        "if False:",
        "tests/unit/test_events.py tests/unit/test_connections.py",
    ),
    Mutation(
        "any event is decoded",
        "horovodrunner/wire/events.py",
        "if body and not of_bytes:",
        "if False:",
        "tests/unit/test_events.py",
    ),
    Mutation(
        "half a file arrives as a whole one",
        "horovodrunner/wire/upload.py",
        "if sent < piece.size:",
        "if False:",
        "tests/unit/test_transfer.py",
    ),
    Mutation(
        "large buffers travel inside the pickle",
        "horovodrunner/pickling/buffers.py",
        "if view.nbytes < BESIDE_BYTES or",
        "if True or",
        "tests/unit/test_results.py",
    ),
    Mutation(
        "the smallest parts are named as the largest",
        "horovodrunner/pickling/payload.py",
        "key=lambda part: -part[1])[:3]",
        "key=lambda part: part[1])[:3]",
        "tests/unit/test_payload.py",
    ),
    Mutation(
        "what changes imports comes after them",
        "horovodrunner/flows/call/early_imports.py",
        "        if facts.changes_imports:\n",
        "        if False:\n",
        "tests/unit/test_early_imports.py",
    ),
    Mutation(
        "too small a number is accepted",
        "horovodrunner/validation.py",
        "if at_least is not None and found < at_least:",
        "if False:",
        "tests/unit/test_runner_arguments.py tests/unit/test_scalar_arguments.py",
    ),
    Mutation(
        "every epoch has the same order",
        "horovodrunner/data/order.py",
        "self._key = (seed, epoch)",
        "self._key = (seed, 0)",
        "tests/unit/test_data_order.py",
    ),
    Mutation(
        "rows beyond the last one are read",
        "horovodrunner/data/order.py",
        "np.flatnonzero(found >= count)",
        "np.flatnonzero(found > count)",
        "tests/unit/test_data_order.py",
    ),
    Mutation(
        "ranks have different numbers of steps",
        "horovodrunner/data/steps.py",
        "        return self.whole + 1\n",
        "        return self.whole + (self.left_over > self.rank)\n",
        "tests/unit/test_data_order.py tests/unit/test_data_sets.py",
    ),
    Mutation(
        "few rows in many parts go to one rank",
        "horovodrunner/data/distribution.py",
        "return (part + part // targets) % targets",
        "return part % targets",
        "tests/unit/test_unshared_data.py",
    ),
    Mutation(
        "a model runs on the first GPU it sees",
        "horovodrunner/inference/devices.py",
        "return names.index(address)",
        "return 0",
        "tests/unit/test_models.py",
    ),
    Mutation(
        "predictions for fewer rows are taken",
        "horovodrunner/inference/outputs.py",
        "    if len(values) != rows:",
        "    if False:",
        "tests/unit/test_model_outputs.py",
    ),
    Mutation(
        "too few inputs are called with",
        "horovodrunner/inference/inputs.py",
        "    if expected is not None and expected != number:",
        "    if False:",
        "tests/unit/test_model_inputs.py tests/unit/test_scoring.py",
    ),
    Mutation(
        "a Horovod for another torch fits",
        "horovodrunner/horovod_build/recipe.py",
        "if theirs != version:",
        "if False:",
        "tests/unit/test_horovod_build.py",
    ),
    Mutation(
        "a build that a job server leads",
        "horovodrunner/horovod_build/wheel.py",
        'if "-j" not in flags or "--jobserver" in flags:',
        'if "-j" not in flags:',
        "tests/unit/test_horovod_build.py",
    ),
    Mutation(
        "Petastorm's shards may be empty",
        "horovodrunner/compat/petastorm/reader.py",
        "    if rows < shards:",
        "    if False:",
        "tests/unit/test_petastorm.py",
    ),
    Mutation(
        "a library's frame is where main waits",
        "horovodrunner/processes/worker/watch.py",
        'return name.partition(".")[0] in _LIBRARIES',
        "return False",
        "tests/unit/test_watch.py",
    ),
)


def main() -> None:
    """Try the mutations whose names contain an argument, or all of them."""
    words = sys.argv[1:] or [""]
    chosen = [each for each in MUTATIONS if any(word in each.name for word in words)]
    if not chosen:
        sys.exit(f"error: no mutation has {' or '.join(words)} in its name")
    if errors := [error for each in chosen if (error := problem_of(each))]:
        sys.exit("\n".join(f"error: {error}" for error in errors))
    copies: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        for number in range(COPIES):
            copies.put(Path(shutil.copytree(ROOT, f"{directory}/{number}", ignore=LEFT_OUT)))

        def attempt(mutation: Mutation) -> bool:
            copy = copies.get()
            try:
                return is_noticed(mutation, copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(COPIES) as threads:
            noticed = list(threads.map(attempt, chosen))
    survivors = [each.name for each, was in zip(chosen, noticed, strict=True) if not was]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations were noticed")
    if survivors:
        sys.exit(f"error: these were not: {', '.join(survivors)}")


def is_noticed(mutation: Mutation, copy: Path) -> bool:
    """Apply a mutation in a copy of the checkout, run its tests, and put the text back."""
    path = copy / mutation.file
    source = path.read_text()
    path.write_text(source.replace(mutation.text, mutation.becomes))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    environ = {
        **os.environ,
        "PYTHONPATH": f"{copy}:{copy}/horovodrunner/compat",
        "PYTHONDONTWRITEBYTECODE": "1",  # files of one second and size would be taken for the same
    }
    try:
        done = subprocess.run(
            [*command, *mutation.tests.split()],
            cwd=copy,
            env=environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    finally:
        path.write_text(source)
    if done.returncode not in (0, TESTS_FAILED):
        sys.exit(f"error: {mutation.name}: pytest says\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    noticed = done.returncode == TESTS_FAILED
    print(f"{'noticed ' if noticed else 'SURVIVED'} {mutation.name}", flush=True)
    return noticed


def problem_of(mutation: Mutation) -> str:
    """Return why a mutation cannot be applied; empty if it can."""
    path = ROOT / mutation.file
    count = path.read_text().count(mutation.text) if path.exists() else 0
    if count == 1:
        return ""
    return f"{mutation.name}: {mutation.file} has its text {count} times: {mutation.text}"


if __name__ == "__main__":
    main()
