"""Models: taking the weights out, one copy of them on a host, and what predicts."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import mmap
import os
import pickle
import signal
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from horovodrunner.errors import (
    ArgumentTypeError,
    CheckpointError,
    ConfigurationError,
    DataError,
    PayloadError,
)
from horovodrunner.flows.checkpoints.manifest import Manifest, StoredFile
from horovodrunner.flows.checkpoints.saved import saved_in
from horovodrunner.flows.checkpoints.store import CheckpointStore, draft
from horovodrunner.flows.checkpoints.tree import pieces_of_tree
from horovodrunner.flows.checkpoints.worker.shards import Part as Shard
from horovodrunner.flows.checkpoints.worker.shards import write_parts
from horovodrunner.flows.checkpoints.worker.source import DATA_NAME
from horovodrunner.inference import devices, host_copy, loading
from horovodrunner.inference.chunks import Chunk, SentFile
from horovodrunner.inference.devices import Device
from horovodrunner.inference.loading import ModelHandle, load
from horovodrunner.inference.model import Model
from horovodrunner.inference.weight_file import Contents, read_model, write_model
from horovodrunner.placement.environment import KEPT_MODELS
from tests import processes

CPU = Device(None, 0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins without models, outside a task, and lets its own go."""
    monkeypatch.setattr(loading, "current_device", lambda: CPU)
    monkeypatch.setattr(loading, "_models", {})
    yield
    while loading._models:
        loading.release_oldest()
    gc.collect()


class Tied(torch.nn.Module):  # type: ignore[misc]
    """Shares, slices and reinterprets memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 64)
        self.head = torch.nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.small = torch.nn.Parameter(torch.randn(7, 3, dtype=torch.bfloat16))
        self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)
        table = torch.randn(33, 31, dtype=torch.float64)
        self.register_buffer("table", table)
        self.register_buffer("row", table[3])
        self.register_buffer("turned", table.t())
        self.register_buffer("bits", table.view(torch.int64), persistent=False)
        self.register_buffer("waves", torch.randn(9, dtype=torch.complex128))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0))
        self.note = "kept"
        self.frozen.tag = "kept, too"

    def forward(self, tokens: Any) -> Any:
        return self.head(self.embed(tokens)) + self.table[0, 0].float()


def restored(thing: Any) -> tuple[Any, Contents]:
    """Write a model, and read it from a mapping."""
    file = io.BytesIO()
    contents = write_model(thing, file)
    content = file.getvalue()
    assert contents.digest == hashlib.sha256(content).hexdigest()
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return read_model(memory, contents), contents


def test_a_module_comes_back_exactly_with_what_it_shares() -> None:
    net = Tied()
    names = dict(net.named_parameters()) | dict(net.named_buffers())
    copy, contents = restored(net)
    assert contents.places[0][1] < 8000  # the pickle
    assert copy.head.weight is copy.embed.weight
    assert isinstance(copy.small, torch.nn.Parameter)
    assert (copy.small.requires_grad, copy.frozen.requires_grad) == (True, False)
    assert (copy.note, copy.frozen.tag) == ("kept", "kept, too")
    assert list(copy.state_dict()) == list(net.state_dict())
    for name, tensor in names.items():
        other = dict(copy.named_parameters()).get(name, dict(copy.named_buffers()).get(name))
        assert other is not None
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert (other.stride(), type(other)) == (tensor.stride(), type(tensor))
        assert torch.equal(other, tensor)
        assert other.data_ptr() % other.itemsize == 0
    assert copy.embed.weight.data_ptr() % 64 == 0
    copy.table.zero_()
    assert not copy.row.any()
    assert not copy.turned.any()
    assert not copy.bits.any()
    tokens = torch.arange(10)
    assert torch.equal(net.head(net.embed(tokens)), copy.head(copy.embed(tokens)))


def test_arrays_that_a_function_captures_leave_its_pickle() -> None:
    base = np.arange(24_000, dtype=np.float32).reshape(4, 6000)
    words = np.array(["a", "b"], dtype=object)
    odd = np.arange(5000, dtype=">f8")
    turned = base.T
    tensor = torch.arange(3)

    def predict(x: Any) -> Any:
        return [x, base, base, words, odd, turned, tensor]

    copy, contents = restored(predict)
    _, first, second, *others, last = copy(1)
    assert first is second
    assert first.flags.writeable
    assert first.dtype == base.dtype
    assert np.array_equal(first, base)
    assert last.tolist() == [0, 1, 2]
    for ours, original in zip(others, (words, odd, turned), strict=True):
        assert np.array_equal(ours, original)
    assert contents.places[0][1] < 3000
    assert contents.weights_size == 2 * base.nbytes + odd.nbytes + tensor.nbytes
    assert restored(lambda: 7)[0]() == 7


def test_what_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(PayloadError, match=r"cannot pickle '_thread.lock' object"):
        Model.from_function(lambda x: (x, lock))
    with Model.from_function(len) as model, pytest.raises(PayloadError, match="on the driver"):
        pickle.dumps(model)


# ---- one copy on a host

COPY = """
    import os, sys, threading, time
    from horovodrunner.inference.host_copy import HostCopy
    identity, mode = sys.argv[1:]
    def obtain():
        import tempfile
        file = tempfile.TemporaryFile()
        file.write(b"x" * 4096)
        print("writing", flush=True)
        if mode == "slow":
            time.sleep(600)
        file.write(b"y" * 4096)
        file.flush()
        return file
    copy = HostCopy(identity, 8192, obtain)
    held = copy.map()
    assert held[:] == b"x" * 4096 + b"y" * 4096
    held[0] = 0  # its own page from now on
    print(os.fstat(copy._file.fileno()).st_ino, flush=True)
    if mode == "forks":
        child = os.fork()
        if not child:
            time.sleep(600)
        print(child, flush=True)
    sys.stdin.read()
    copy.close()
    assert threading.active_count() == 1, threading.enumerate()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., processes.Process]]:
    """Start processes that share a copy; they end when the test does."""
    identity = f"test-{os.getpid()}-{time.monotonic_ns()}"
    with contextlib.ExitStack() as blocks:
        running = []

        def begin(mode: str = "quick") -> processes.Process:
            command = [sys.executable, "-c", textwrap.dedent(COPY), identity, mode]
            block = processes.started(command, stdin=processes.PIPE, stdout=processes.PIPE)
            process = blocks.enter_context(block)
            running.append(process)
            return process

        yield begin
        for process in running:
            if process.poll() is None:
                process.communicate()
                assert process.returncode == 0


def said(process: processes.Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: processes.Process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_file_without_a_name_is_shared_and_outlives_who_wrote_it(
    start: Callable[..., processes.Process],
) -> None:
    first = start()
    assert said(first) == "writing"
    inode = said(first)
    second, third = start(), start()
    assert said(second) == said(third) == inode
    kill(first)
    fourth = start()
    assert said(fourth) == inode
    second.communicate()  # leaves in good order, whether it serves or not
    fifth = start()
    assert said(fifth) == inode


def test_who_dies_while_writing_is_followed_by_one_who_waits(
    start: Callable[..., processes.Process],
) -> None:
    first = start("slow")
    assert said(first) == "writing"
    second, third = start(), start()
    time.sleep(0.3)  # both wait, most likely; they get the file in any case
    kill(first)
    lines = [[said(each)] for each in (second, third)]
    for each, line in zip((second, third), lines, strict=True):
        if line[0] == "writing":
            line[0] = said(each)
    assert lines[0] == lines[1]


def test_a_child_does_not_seem_to_serve_what_its_parent_did(
    start: Callable[..., processes.Process],
) -> None:
    first = start("forks")
    assert said(first) == "writing"
    inode, child = said(first), int(said(first))
    try:
        second = start()
        assert said(second) == inode
        kill(second)
        kill(first)
        assert said(start()) == "writing"
    finally:
        os.kill(child, signal.SIGKILL)


def test_without_abstract_sockets_each_process_has_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_copy, "_HAS_ABSTRACT_SOCKETS", False)
    (tmp_path / "file").write_bytes(b"content")
    copy = host_copy.HostCopy("anything", 7, lambda: (tmp_path / "file").open("rb"))
    assert copy.map()[:] == b"content"
    copy.close()


def test_an_error_in_writing_lets_the_next_one_try(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def fail() -> Any:
        raise OSError("no space")

    identity = f"test-{os.getpid()}-failing"
    with pytest.raises(OSError, match="no space"):
        host_copy.HostCopy(identity, 7, fail)
    copy = host_copy.HostCopy(identity, 7, lambda: (tmp_path / "file").open("rb"))
    again = host_copy.HostCopy(identity, 7, fail)
    copy.close()
    assert again.map()[:] == b"content"
    again.close()


# ---- what travels


class Sent:
    """A broadcast variable, as a Python worker has it."""

    def __init__(self, chunk: Chunk) -> None:
        self._data = pickle.dumps(chunk)

    @property
    def value(self) -> Any:
        if not hasattr(self, "_value"):
            self._value = pickle.loads(self._data)
        return self._value


def test_chunks_are_written_where_they_arrive_every_time(tmp_path: Path) -> None:
    def received(*chunks: Sent) -> bytes:
        with SentFile("", 1000, chunks=chunks).open() as file:
            file.seek(0)
            return file.read()

    content = os.urandom(1000)
    path = tmp_path / "file"
    path.write_bytes(content)
    chunks = [Sent(Chunk(path, start, 400)) for start in (0, 400, 800)]
    for _ in range(2):
        assert received(*chunks) == content
    encrypted = Sent(Chunk(path, 0, 1000))
    assert encrypted.value == content  # Spark asks first
    assert received(encrypted) == content
    with pytest.raises(ConfigurationError, match="of the model's 1000 bytes 400 arrived"):
        received(chunks[0])


class LocalSession:
    """Stands for a session: its broadcast variables are read in this process."""

    class _Context:
        _jsc = object()

        def broadcast(self, chunk: Chunk) -> Sent:
            return Sent(chunk)

    def __init__(self) -> None:
        self.sparkContext = self._Context()


def handle(model: Model) -> ModelHandle:
    session: Any = LocalSession()
    found = model.handle(session)
    assert model.handle(session) == found
    return found


# ---- the cache


def test_models_are_loaded_once_and_the_last_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT_MODELS, "2")
    made: list[str] = []

    def counted(name: str) -> ModelHandle:
        def make() -> Callable[[Any], Any]:
            made.append(name)
            time.sleep(0.05)
            return lambda x: x

        return ModelHandle.of_make_predict_fn(make)

    a, b, c = map(counted, "abc")
    threads = [threading.Thread(target=load, args=(a,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    for each in (b, a, c, a, b):
        load(each)
    assert made == ["a", "b", "c", "b"]
    assert load(b) is load(b)
    monkeypatch.setattr(loading, "current_device", lambda: Device(None, 1))
    load(b)
    assert made == ["a", "b", "c", "b", "b"]
    monkeypatch.setenv(KEPT_MODELS, "none")
    with pytest.raises(ConfigurationError, match="HOROVODRUNNER_MODELS='none'"):
        load(a)


def test_a_model_that_leaves_the_cache_leaves_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT_MODELS, "1")
    with Model.from_torch(torch.nn.Linear(200, 200)) as model:
        travelled = handle(model)
        before = len(list(Path("/proc/self/fd").iterdir()))
        predict = load(travelled)
        names = {thread.name for thread in threading.enumerate()}
        assert "horovodrunner-weights" in names
        load(ModelHandle.of_make_predict_fn(lambda: len))
        assert "horovodrunner-weights" not in {t.name for t in threading.enumerate()}
        assert predict(np.zeros((1, 200), np.float32)).shape == (1, 200)  # who has it, has it
        del predict
        gc.collect()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_failed_load_names_the_model_and_is_tried_again() -> None:
    attempts = []

    def make() -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("the file server is away")
        return 5 if len(attempts) == 2 else len

    travelled = ModelHandle.of_make_predict_fn(make)
    with pytest.raises(RuntimeError, match="file server"):
        load(travelled)
    with pytest.raises(ConfigurationError, match=r"make_predict_fn returned 5 \(int\)"):
        load(travelled)
    load(travelled)

    module = types.ModuleType("absent_from_executors")
    exec("import torch\nclass Net(torch.nn.Linear): pass", module.__dict__)
    sys.modules[module.__name__] = module
    with Model.from_torch(module.Net(2, 2)) as model:
        del sys.modules[module.__name__]
        with pytest.raises(ConfigurationError, match=r"Net cannot be loaded.*absent_from_exec"):
            load(handle(model))


# ---- torch


class Named(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2).to(torch.bfloat16)
        self.drop = torch.nn.Dropout(0.9)

    def forward(self, x: Any, words: Any, scale: float = 1.0) -> Any:
        assert words.tolist() == ["a", "b"]
        x.sub_(1)
        return {"y": self.drop(self.linear(x)) * scale, "length": torch.ones(2, dtype=torch.int32)}


class Several(torch.nn.Module):  # type: ignore[misc]
    def forward(self, *inputs: Any) -> Any:
        return tuple(inputs)


@pytest.mark.filterwarnings("error")
def test_a_module_predicts_with_numpy_arrays() -> None:
    net = Named()
    x = np.ones((2, 3))
    x.flags.writeable = False
    with Model.from_torch(net) as model:
        assert repr(model) == "Model(Named, torch, 16 bytes of weights)"
        predict = load(handle(model))
    outputs = predict(x, np.array(["a", "b"], dtype=object))
    assert (x == 1).all()
    assert outputs["y"].dtype == np.float32
    assert np.allclose(outputs["y"], net.linear.bias.detach().float().numpy())
    assert outputs["length"].dtype == np.int32
    assert (predict.expected_inputs, predict.stacks_scalars) == (2, False)

    with Model.from_torch(torch.nn.Sequential(torch.nn.Linear(4, 1)).double()) as model:
        predict = load(handle(model))
    assert (predict.expected_inputs, predict.stacks_scalars) == (1, True)
    assert predict.scalar_dtype == np.float64
    assert predict(np.zeros((0, 4), np.float32)).shape == (0, 1)

    with Model.from_torch(Several()) as model:
        predict = load(handle(model))
    assert predict.expected_inputs is None
    assert predict(np.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="what Several returned is a tuple of 2: name them"):
        predict(np.arange(3), np.arange(3))


def test_a_module_is_compiled_where_it_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda net: lambda x: net(x) + 1)
    net = torch.nn.Linear(1, 1)
    with Model.from_torch(net, compile=True) as compiled, Model.from_torch(net) as eager:
        x = np.zeros((1, 1), np.float32)
        assert load(handle(compiled))(x) == load(handle(eager))(x) + 1


def test_weights_are_a_mapping_that_training_on_does_not_change() -> None:
    net = torch.nn.Linear(300, 300)
    x = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    expected = net(torch.from_numpy(x)).detach().numpy()
    with Model.from_torch(torch.nn.DataParallel(net)) as model:
        torch.nn.init.zeros_(net.weight)
        predict = load(handle(model))
        assert np.array_equal(predict(x), expected)
        maps = Path("/proc/self/maps").read_text()
        assert sum("(deleted)" in line and "/#" in line for line in maps.splitlines()) == 1


def test_functions_are_called_as_they_are() -> None:
    table = np.arange(20_000.0)
    with Model.from_function(lambda a, b=1, *, c=2: table[a] + b + c) as model:
        predict = load(handle(model))
    assert predict(np.array([3]), np.array([4])).tolist() == [9.0]
    assert (predict.expected_inputs, predict.stacks_scalars) == (2, False)


def with_a_mask(function: Any) -> Any:
    """Return the last argument by itself."""

    @functools.wraps(function)
    def wrapper(*inputs: Any) -> Any:
        return function(*inputs, 2)

    return wrapper


class Scaled(torch.nn.Module):  # type: ignore[misc]
    """Takes one input more than it is given."""

    @with_a_mask
    def forward(self, x: Any, factor: int) -> Any:
        """Scale."""
        return x * factor


class WithoutGradients(torch.nn.Module):  # type: ignore[misc]
    """Says behind a decorator that it takes one input."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def forward(self, x: Any) -> Any:
        """Add up."""
        return x.sum(dim=1)


class Generates:
    """Predicts later."""

    def predict(self, x: Any) -> Any:
        """Yield."""
        yield x


def test_what_is_called_decides_how_many_inputs_there_are() -> None:
    with Model.from_function(with_a_mask(lambda x, factor: x * factor)) as model:
        predict = load(handle(model))
    assert (predict.expected_inputs, predict.stacks_scalars) == (None, False)
    assert predict(np.arange(3)).tolist() == [0, 2, 4]
    with Model.from_torch(Scaled()) as model:
        predict = load(handle(model))
    assert (predict.expected_inputs, predict.stacks_scalars) == (None, False)
    assert predict(np.arange(3)).tolist() == [0, 2, 4]
    with Model.from_torch(WithoutGradients()) as model:
        predict = load(handle(model))
    assert (predict.expected_inputs, predict.stacks_scalars) == (None, True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1)),
            r"^the model \(\S+ParametrizedLinear\) cannot .*remove_parametrizations",
        ),
        (
            lambda: torch.jit.script(torch.nn.Linear(2, 1)),
            r"^the model \(\S+ScriptModule\) cannot .*a function that calls torch.jit.load",
        ),
    ],
    ids=["weight_norm", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_what_to_do_about_a_module_that_does_not_pickle(make: Any, words: str) -> None:
    with pytest.raises(PayloadError, match=words):
        Model.from_torch(make())


def test_what_of_a_model_does_not_pickle_is_named() -> None:
    lock = threading.Lock()
    net = Named()
    net.guard = [lock]
    with pytest.raises(PayloadError, match=r"^the model \(.*Named\)\.guard\[0\] \(_thread.lock\)"):
        Model.from_torch(net)
    with pytest.raises(PayloadError, match=r"^the variable 'lock' in the closure .*_thread.lock"):
        Model.from_function(lambda x: (x, lock))


def test_the_wrong_things_are_refused() -> None:
    wrong: Any
    for make, wrong, text in (
        (Model.from_torch, 3, "it must be a torch.nn.Module, got int"),
        (Model.from_keras, torch.nn.Linear(1, 1), "it must be a model of Keras 3 or tf_keras"),
        (Model.from_function, "f", "it must be callable, got str"),
        (Model.from_function, Generates().predict, r"predict only makes a generator .*list\("),
        (Model.from_function, torch.nn.Linear(1, 1), r"use Model.from_torch\(...\)"),
    ):
        with pytest.raises(ArgumentTypeError, match=text):
            make(wrong)
    with Model.from_function(len) as model:
        pass
    with pytest.raises(ConfigurationError, match=r"Model\(len, function, deleted\) cannot be used"):
        handle(model)


def test_checkpoints_become_models(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 1)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    torch.save({}, tmp_path / "optimizer.pt")
    saved = types.SimpleNamespace(path=str(tmp_path))

    def build(directory: Path) -> Any:
        made = torch.nn.Linear(2, 1)
        made.load_state_dict(torch.load(directory / "model.pt"))
        return made

    x = np.ones((3, 2), np.float32)
    for build_it in (build, torch.nn.Linear(2, 1), lambda d: Model.from_torch(build(d))):
        with Model.from_checkpoint(saved, build_it) as model:
            assert np.array_equal(load(handle(model))(x), net(torch.ones(3, 2)).detach().numpy())
    with Model.from_checkpoint(tmp_path, lambda d: len) as model:
        assert repr(model) == "Model(len, function)"
    with pytest.raises(ArgumentTypeError, match="build returned 5"):
        Model.from_checkpoint(saved, lambda directory: 5)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        Model.from_checkpoint(tmp_path / "nowhere", build)
    (tmp_path / "model.pt").unlink()
    (tmp_path / "other.pt").touch()
    with pytest.raises(CheckpointError, match=r"no model.pt .* only optimizer.pt, other.pt"):
        Model.from_checkpoint(saved, net)


def test_a_checkpoint_behind_a_url_is_copied_and_checked(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    net = torch.nn.Linear(2, 1)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    content = buffer.getvalue()
    stored = StoredFile("deep/net.pt", len(content), hashlib.sha256(content).hexdigest())
    manifest = Manifest(3, 1, "2026-01-01T00:00:00+00:00", (stored,), ("empty",))
    url = f"memory://models-{os.getpid()}/step-3"
    files = fsspec.filesystem("memory")
    files.pipe({f"{url}/manifest.json": manifest.to_json().encode(), f"{url}/deep/net.pt": content})
    seen = []

    def build(directory: Path) -> Any:
        seen.append(directory)
        assert (directory / "empty").is_dir()
        made = torch.nn.Linear(2, 1)
        made.load_state_dict(torch.load(directory / "deep" / "net.pt"))
        return made

    with Model.from_checkpoint(url, build) as model:
        weights = load(handle(model))(np.eye(2, dtype=np.float32))
    assert np.array_equal(weights, net(torch.eye(2)).detach().numpy())
    assert not seen[0].exists()
    files.pipe(f"{url}/deep/net.pt", content[:-1])
    with pytest.raises(CheckpointError, match=r"net.pt is not what was saved there"):
        Model.from_checkpoint(url, build)
    files.rm(f"{url}/manifest.json")
    with pytest.raises(CheckpointError, match=r"cannot be read: FileNotFoundError"):
        Model.from_checkpoint(url, build)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_of_a_checkpoint_of_all_ranks_rank_0_s_files_are_taken(scheme: str, tmp_path: Path) -> None:
    nets = [torch.nn.Linear(2, 1) for _ in range(2)]
    store = CheckpointStore(f"{scheme}{tmp_path}/kept", 1)
    place = store.begin(4)
    parts = []
    for rank, each in enumerate(nets):
        own = tmp_path / f"of-{rank}"
        (own / "empty").mkdir(parents=True)
        torch.save(each.state_dict(), own / "model.pt")
        (own / "data").write_text(f"of rank {rank}")
        parts.append(store.put_part(place, rank, pieces_of_tree(own)))
    copies = {"rank-1/shared": "rank-0/data"}
    store.commit(place, draft(4, parts, {"loss": 0.5}, world_size=2, copies=copies))
    (saved,) = saved_in(store)
    assert (saved.metrics, saved.world_size) == ({"loss": 0.5}, 2)

    def build(directory: Path) -> Any:
        assert sorted(each.name for each in directory.iterdir()) == ["data", "empty", "model.pt"]
        assert (directory / "data").read_text() == "of rank 0"
        made = torch.nn.Linear(2, 1)
        made.load_state_dict(torch.load(directory / "model.pt"))
        return made

    x = torch.eye(2)
    for build_it in (build, torch.nn.Linear(2, 1)):
        with Model.from_checkpoint(saved, build_it) as model:
            assert np.array_equal(load(handle(model))(x.numpy()), nets[0](x).detach().numpy())


def test_shards_alone_make_no_model(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "kept", 1)
    place = store.begin(4)
    own = tmp_path / "own"
    (own / "model").mkdir(parents=True)
    (own / "model" / ".metadata").touch()
    (own / "model" / "__0_0.distcp").touch()
    (own / "schedule.pt").touch()  # a single one, and not the weights
    store.commit(place, draft(4, [store.put_part(place, 0, pieces_of_tree(own))], world_size=1))
    (saved,) = saved_in(store)
    with pytest.raises(CheckpointError, match=r"rank-0 has only rank 0's shards of the weights"):
        Model.from_checkpoint(saved, torch.nn.Linear(2, 1))


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_sharded_module_is_put_together(scheme: str, tmp_path: Path) -> None:
    net, other = torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(2, 4, bias=False)
    rows = net.weight.detach().clone()
    rows[2:] = rows[:2]  # so that both ranks' parts are the same bytes
    store = CheckpointStore(f"{scheme}{tmp_path}/sharded", 1)
    place = store.begin(4)
    parts = []
    for rank in range(2):
        own = tmp_path / f"of-{rank}"
        own.mkdir()
        part = Shard(
            *("model.weight", ("model", "weight"), "raw", (4, 2), "float32", (2 * rank, 0), (2, 2))
        )
        write_parts([(part, rows[2 * rank : 2 * rank + 2].contiguous())], own)
        wanted = (lambda name: name != DATA_NAME) if rank else (lambda name: True)
        parts.append(store.put_part(place, rank, pieces_of_tree(own, wanted)))
    copies = {f"rank-1/{DATA_NAME}": f"rank-0/{DATA_NAME}"}
    store.commit(place, draft(4, parts, world_size=2, copies=copies))
    (saved,) = saved_in(store)
    with Model.from_checkpoint(saved, other) as model:
        x = np.eye(2, dtype=np.float32)
        assert np.array_equal(load(handle(model))(x), (torch.eye(2) @ rows.T).numpy())
    with pytest.raises(CheckpointError, match="does not fit 'model'"):
        Model.from_checkpoint(saved, torch.nn.Conv2d(1, 1, 1))


def test_no_checkpoint_is_no_model() -> None:
    with pytest.raises(ArgumentTypeError, match=r"checkpoint=None: .* runner.best_checkpoint"):
        Model.from_checkpoint(None, torch.nn.Linear(2, 1))


# ---- devices


def test_the_gpu_is_the_task_s_own_whatever_the_process_did_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    owned: dict[str, Any] = {}
    task = types.SimpleNamespace(resources=lambda: owned, cpus=lambda: 3)
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: task)
    assert devices.current_device() == Device(None, 3)
    assert (Device(None, 3).torch_name, Device(None, 3).keras_name) == ("cpu", "cpu:0")
    for addresses, visible, gpu in (
        (["1"], None, 1),
        (["1", "0"], "4,6", 1),
        (["GPU-b"], "GPU-a, GPU-b", 1),
    ):
        owned["gpu"] = types.SimpleNamespace(addresses=addresses)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert devices.current_device() == Device(gpu, 3)
    assert (Device(1, 3).torch_name, Device(1, 3).keras_name) == ("cuda:1", "gpu:1")
    for addresses, text in (
        (["2"], r"gave this task GPU 2, and the executor sees 2"),
        (["GPU-c"], r"GPU GPU-c, which is not among those .*CUDA_VISIBLE_DEVICES=GPU-a, GPU-b"),
    ):
        owned["gpu"] = types.SimpleNamespace(addresses=addresses)
        with pytest.raises(ConfigurationError, match=text):
            devices.current_device()
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: None)
    assert devices.current_device() == Device(None, 0)
