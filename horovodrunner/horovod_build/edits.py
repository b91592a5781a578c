"""What is changed in Horovod 0.28.1 before it is built. Runs in: the command line.

Each edit replaces one piece of text that occurs exactly once in one file, so a source archive
that differs from the one they were written for is noticed instead of being built half-edited.
They are right for every Python and framework version and are always applied all together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horovodrunner.errors import HorovodBuildError

RECORD_NAME = "horovodrunner_build.json"


@dataclass(frozen=True)
class Edit:
    """One replacement in one file of the source archive.

    Attributes
    ----------
    name: how errors call it.
    why: what breaks without it.
    file: path inside the archive.
    old: text that is replaced; occurs exactly once in the file.
    new: text that takes its place.
    """

    name: str
    why: str
    file: str
    old: str
    new: str

    def apply(self, source: Path) -> None:
        """Replace the text below ``source``.

        Raises
        ------
        HorovodBuildError
            If the file is missing or does not hold the text exactly once.
        """
        path = source / self.file
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise HorovodBuildError(
                f"edit {self.name!r} cannot be applied: {self.file} is not in the source archive; "
                "these edits were written for Horovod 0.28.1"
            ) from None
        count = text.count(self.old)
        if count != 1:
            raise HorovodBuildError(
                f"edit {self.name!r} cannot be applied: {self.file} holds its target text "
                f"{count} times instead of once ({self.old.strip()!r}); "
                "these edits were written for Horovod 0.28.1"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


CXX_VARIABLES = {"torch": "HOROVODRUNNER_CXX_TORCH", "tensorflow": "HOROVODRUNNER_CXX_TENSORFLOW"}
"""Variable that tells the build the C++ standard of each framework's headers."""

WITHOUT_CUDA = "HOROVODRUNNER_WITHOUT_CUDA"
"""Variable that is set when the build is not to look for CUDA."""

_CXX = "each framework's headers need a C++ standard of their own"
_DISTUTILS = "Python 3.12 removed distutils"

_TENSORFLOW_FOR_CPUS = """\
execute_process(COMMAND ${PY_EXE} -c "\\
import tensorflow as tf
built = tf.sysconfig.get_build_info()
print('GPU' if built.get('is_cuda_build') or built.get('is_rocm_build') else 'CPU')"
                OUTPUT_VARIABLE Tensorflow_DEVICE OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(Tensorflow_DEVICE STREQUAL "CPU")
    set(HAVE_CUDA FALSE)
    set(HAVE_ROCM FALSE)
    list(FILTER SOURCES EXCLUDE REGEX "(cuda|hip|gpu|nccl|ddl)[a-z_]*\\\\.cc$")
    list(FILTER LINKER_LIBS EXCLUDE REGEX "cuda|nccl|rccl|libddl")
    get_directory_property(definitions COMPILE_DEFINITIONS)
    list(FILTER definitions EXCLUDE REGEX "^(HAVE_(CUDA|ROCM|GPU|NCCL|DDL)|HOROVOD_GPU_)")
    set_directory_properties(PROPERTIES COMPILE_DEFINITIONS "${definitions}")
endif()

include_directories(SYSTEM ${Tensorflow_INCLUDE_DIRS})
"""

_GLOO_TCP = "third_party/gloo/gloo/transport/tcp"

_GLOO_LISTENS = """\
  auto fd = socket(attr.ai_family, attr.ai_socktype, attr.ai_protocol);
  if (fd == -1) {
    signalAndThrowException(GLOO_ERROR_MSG("socket: ", strerror(errno)));
  }

  // Set SO_REUSEADDR to signal that reuse of the listening port is OK.
  int on = 1;
  rv = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (rv == -1) {
    ::close(fd);
    signalAndThrowException(GLOO_ERROR_MSG("setsockopt: ", strerror(errno)));
  }

  rv = bind(fd, (const sockaddr*)&attr.ai_addr, attr.ai_addrlen);
  if (rv == -1) {
    ::close(fd);
    signalAndThrowException(GLOO_ERROR_MSG("bind: ", strerror(errno)));
  }

  // listen(2) on socket
  fd_ = fd;
  rv = ::listen(fd_, 1024);
  if (rv == -1) {
    ::close(fd_);
    fd_ = FD_INVALID;
    signalAndThrowException(GLOO_ERROR_MSG("listen: ", strerror(errno)));
  }
"""

_GLOO_LISTENS_IN_RANGE = """\
  // HOROVOD_GLOO_PORTS=first-last: the ports that may be listened on.
  const char* range = getenv("HOROVOD_GLOO_PORTS");
  int first = 0;
  int last = 0;
  if (range != nullptr && (sscanf(range, "%d-%d", &first, &last) != 2 || last < first)) {
    signalAndThrowException(GLOO_ERROR_MSG("HOROVOD_GLOO_PORTS=", range));
  }
  static std::atomic<int> next{getpid()};
  const int count = last - first + 1;
  const int start = next++ % count;
  int fd = -1;
  for (int i = 0; i < count && fd == -1; ++i) {
    auto address = attr.ai_addr;
    const auto port = htons(first + (start + i) % count);
    if (attr.ai_family == AF_INET6) {
      ((sockaddr_in6*)&address)->sin6_port = port;
    } else {
      ((sockaddr_in*)&address)->sin_port = port;
    }
    fd = socket(attr.ai_family, attr.ai_socktype, attr.ai_protocol);
    if (fd == -1) {
      signalAndThrowException(GLOO_ERROR_MSG("socket: ", strerror(errno)));
    }
    // Let the port be one that earlier connections have left behind.
    int on = 1;
    rv = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (rv == 0) {
      rv = bind(fd, (const sockaddr*)&address, attr.ai_addrlen);
    }
    // Two sockets can be bound to a port before one of them listens.
    if (rv == 0) {
      rv = ::listen(fd, 1024);
    }
    if (rv == -1) {
      const int error = errno;
      ::close(fd);
      fd = -1;
      if (error != EADDRINUSE || i + 1 == count) {
        signalAndThrowException(GLOO_ERROR_MSG(
            "listen on ", range == nullptr ? "any port" : range, ": ", strerror(error)));
      }
    }
  }
  fd_ = fd;
"""

_STATE_BY_A_STEP = """\
        if optimizer.__module__ == DistributedOptimizer.__module__:
            super(optimizer.__class__, optimizer).step()
        else:
            optimizer.step()
        state_dict = optimizer.state_dict()
"""

_STATE_BY_A_STEP_THAT_CHANGES_NO_WEIGHT = """\
        weights = [(p, p.detach().clone()) for g in optimizer.param_groups for p in g['params']]
        if optimizer.__module__ == DistributedOptimizer.__module__:
            super(optimizer.__class__, optimizer).step()
        else:
            optimizer.step()
        with torch.no_grad():
            for p, weight in weights:
                p.copy_(weight)
        state_dict = optimizer.state_dict()
"""

_STATE_MADE_WHERE_THERE_IS_NONE = """\
    # Newly created optimizers will not have their state initialized, so
    # do that initialization here
    if len(state_dict['state']) == 0:
        for group in optimizer.param_groups:
            for p in group['params']:
                if p.requires_grad and id(p) not in state_dict['state']:
                    p.grad = p.data.new(p.size()).zero_()
"""

_STATE_MADE_WHERE_THE_ROOT_HAS_SOME = """\
    # Every rank gets the options of the root, and state for the parameters for which the root has
    # some: made here where it is missing, and dropped where the root has none.
    options = [{k: v for k, v in g.items() if k != 'params'} for g in optimizer.param_groups]
    options, kept = broadcast_object((options, set(state_dict['state'])), root_rank)
    for group, option in zip(optimizer.param_groups, options):
        group.update(option)
    without = set()
    for number, p in enumerate(p for group in optimizer.param_groups for p in group['params']):
        if number not in kept:
            optimizer.state.pop(p, None)
        elif number not in state_dict['state']:
            without.add(p)
    state_dict = optimizer.state_dict()

    if without:
        for group in optimizer.param_groups:
            for p in group['params']:
                p.grad = None
                if p in without:
                    p.grad = p.data.new(p.size()).zero_()
"""

_NOTHING_BROADCAST_WITHOUT_STATE = """\
    # If the state_dict is still empty after initialization, then
    # the optimizer is stateless, and there is nothing to broadcast.
    # Furthermore, attempting to access the state dict would result in
    # an error.
    if len(state_dict['state']) == 0:
        return

"""

_ONE_STATE = '''\
def _share_state(distributed, optimizer):
    """Make both one optimizer: its state, groups, defaults and hooks, whichever is used or loaded.

    A scheduler that was made for the plain one goes on changing the learning rate.
    """
    distributed.__dict__ = optimizer.__dict__
    plain_step = distributed.__dict__.pop('step', None)
    if hasattr(plain_step, '_wrapped_by_lr_sched'):
        # The scheduler wants to see that the optimizer has stepped.
        def step(*args, **kwargs):
            distributed._opt_called = True
            return type(distributed).step(distributed, *args, **kwargs)

        step._wrapped_by_lr_sched = True
        distributed.step = step


'''

_STEP_WITH_A_CLOSURE = """\
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn("optimizer.step() called without "
"""

_STEP_THAT_REDUCES_IN_THE_CLOSURE = """\
        if closure is not None and self._should_synchronize:
            evaluate = closure

            # The gradients come from the closure, and are to be reduced before they are used.
            def closure():
                loss = evaluate()
                if self._handles:
                    self.synchronize()
                    self._synchronized = False
                return loss
        if self._should_synchronize and (closure is None or self._handles):
            if self._synchronized:
                warnings.warn("optimizer.step() called without "
"""

_KERAS_OPTIMIZER_FROM_CONFIG = "    return cls.from_config(optimizer.get_config())\n"

_KERAS_OPTIMIZER_WITH_STATE = """\
    distributed = cls.from_config(optimizer.get_config())
    # What the optimizer has learnt, or has loaded: its variables become those of the new one.
    if getattr(optimizer, '_built', False) or getattr(optimizer, '_weights', None):
        own = ('_name', '_aggregated_gradients', '_allreduce_grads', '_local_vars', 'process_set',
               'scale_local_gradients', '_agg_helper')
        distributed.__dict__.update((k, v) for k, v in vars(optimizer).items() if k not in own)
    return distributed
"""

_KEEPS_STATE = "what an optimizer had learnt or loaded would be gone without a word"
_SESSIONS = "TensorFlow 2.16 has no tf.estimator, and sessions are in tf.compat.v1"

EDITS = (
    Edit(
        name="cxx-core",
        why="Gloo, which all frameworks share, is compiled for the oldest of them",
        file="CMakeLists.txt",
        old="set(CMAKE_CXX_STANDARD 14)",
        new="set(CMAKE_CXX_STANDARD 17)",
    ),
    Edit(
        name="cxx-torch",
        why=_CXX,
        file="horovod/torch/CMakeLists.txt",
        old="set(CMAKE_CXX_STANDARD 14)",
        new=f"set(CMAKE_CXX_STANDARD $ENV{{{CXX_VARIABLES['torch']}}})",
    ),
    Edit(
        name="cxx-tensorflow",
        why=_CXX,
        file="horovod/tensorflow/CMakeLists.txt",
        old="set(CMAKE_CXX_STANDARD 17)",
        new=f"set(CMAKE_CXX_STANDARD $ENV{{{CXX_VARIABLES['tensorflow']}}})",
    ),
    Edit(
        name="no-cuda-language",
        why="CMake takes any nvcc it finds, also for CPUs and one that does not run",
        file="CMakeLists.txt",
        old="include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)\n",
        new=f"""\
if(DEFINED ENV{{{WITHOUT_CUDA}}})
    unset(CMAKE_CUDA_COMPILER)
else()
    include(CheckLanguage)
    check_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{{{WITHOUT_CUDA}}})
""",
    ),
    Edit(
        name="no-cuda-torch",
        why="torch's CUDA_HOME is also set where CUDA's runtime is without its compiler",
        file="cmake/Modules/FindPytorch.cmake",
        old='string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n',
        new=f"""\
string(TOUPPER "${{Pytorch_CUDA}}" Pytorch_CUDA)
if(DEFINED ENV{{{WITHOUT_CUDA}}})
    set(Pytorch_CUDA FALSE)
endif()
""",
    ),
    Edit(
        name="no-debug-symbols",
        why="debug symbols make the compilation slower and the wheel many times larger",
        file="CMakeLists.txt",
        old="project(horovod CXX)\n",
        new=(
            "project(horovod CXX)\n"
            'string(REPLACE "-g " "" CMAKE_CXX_FLAGS_RELWITHDEBINFO '
            '"${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")\n'
        ),
    ),
    Edit(
        name="one-gloo",
        why="Gloo is C++17 here, so TensorFlow needs no second compilation of it",
        file="horovod/tensorflow/CMakeLists.txt",
        old="    set(Tensorflow_CXX17 TRUE)\n",
        new="    set(Tensorflow_CXX17 FALSE)\n",
    ),
    Edit(
        name="no-xla-ops",
        why="TensorFlow's wheel lacks a header that xla_mpi_ops.cc includes; "
        "the XLA ops are an opt-in for GPUs",
        file="horovod/tensorflow/CMakeLists.txt",
        old='list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        new="",
    ),
    Edit(
        name="tensorflow-for-cpus",
        why="where torch has CUDA and TensorFlow has not, Horovod's GPU code for TensorFlow "
        "compiles and cannot be loaded",
        file="horovod/tensorflow/CMakeLists.txt",
        old="include_directories(SYSTEM ${Tensorflow_INCLUDE_DIRS})\n",
        new=_TENSORFLOW_FOR_CPUS,
    ),
    Edit(
        name="nccl-of-torch",
        why="torch's own NCCL package has libnccl.so.2 and no libnccl.so",
        file="cmake/Modules/FindNCCL.cmake",
        old='    set(NCCL_LIBNAME "nccl")\n',
        new='    set(NCCL_LIBNAME "nccl" "libnccl.so.2")\n',
    ),
    Edit(
        name="gloo-address",
        why="Gloo takes an interface's first address, which the peers may not reach",
        file=f"{_GLOO_TCP}/device.cc",
        old="""\
    if (strcmp(attr.iface.c_str(), ifa->ifa_name) != 0) {
      continue;
    }
""",
        new="""\
    if (strcmp(attr.iface.c_str(), ifa->ifa_name) != 0) {
      continue;
    }
    // HOROVOD_GLOO_ADDRESS: the one IPv4 address to take.
    const char* wanted = getenv("HOROVOD_GLOO_ADDRESS");
    if (wanted != nullptr) {
      char text[INET_ADDRSTRLEN] = "";
      if (ifa->ifa_addr->sa_family == AF_INET) {
        inet_ntop(AF_INET, &((sockaddr_in*)ifa->ifa_addr)->sin_addr, text, sizeof(text));
      }
      if (strcmp(wanted, text) != 0) {
        continue;
      }
    }
""",
    ),
    Edit(
        name="gloo-address-includes",
        why="for the edit before it",
        file=f"{_GLOO_TCP}/device.cc",
        old='#include "gloo/transport/tcp/device.h"\n',
        new=(
            '#include "gloo/transport/tcp/device.h"\n\n'
            "#include <arpa/inet.h>\n#include <stdlib.h>\n"
        ),
    ),
    Edit(
        name="gloo-ports",
        why="Gloo listens on any port, and firewalls open a range",
        file=f"{_GLOO_TCP}/pair.cc",
        old=_GLOO_LISTENS,
        new=_GLOO_LISTENS_IN_RANGE,
    ),
    Edit(
        name="gloo-ports-includes",
        why="for the edit before it",
        file=f"{_GLOO_TCP}/pair.cc",
        old="#include <algorithm>\n",
        new="#include <algorithm>\n#include <atomic>\n#include <cstdio>\n",
    ),
    Edit(
        name="gloo-process-set-interface",
        why="every collective would go to what the host's own name resolves to",
        file="horovod/common/gloo/gloo_context.cc",
        old="""\
  device_attr.iface = gloo_iface_;
  device_attr.ai_family = AF_UNSPEC;
  auto dev = CreateDevice(device_attr);

  global_ctx = global_context.ctx;
""",
        new="""\
  gloo_iface_ = global_context.gloo_iface_;
  device_attr.iface = gloo_iface_;
  device_attr.ai_family = AF_UNSPEC;
  auto dev = CreateDevice(device_attr);

  global_ctx = global_context.ctx;
""",
    ),
    Edit(
        name="gloo-refused-says-from-where",
        why="an address that cannot be reached is found by both its ends",
        file=f"{_GLOO_TCP}/pair.cc",
        old='GLOO_ERROR_MSG("connect ", peer_.str(), ": ", strerror(optval))',
        new=(
            'GLOO_ERROR_MSG("connect from ", self_.str(), " to ", peer_.str(), ": ", '
            "strerror(optval))"
        ),
    ),
    Edit(
        name="gloo-unreachable-says-from-where",
        why="an address that cannot be reached is found by both its ends",
        file=f"{_GLOO_TCP}/pair.cc",
        old='GLOO_ERROR_MSG("connect: ", strerror(errno))',
        new=(
            'GLOO_ERROR_MSG("connect from ", self_.str(), " to ", peer_.str(), ": ", '
            "strerror(errno))"
        ),
    ),
    Edit(
        name="gloo-timeout-says-from-where",
        why="an address that cannot be reached is found by both its ends",
        file=f"{_GLOO_TCP}/pair.h",
        old='GLOO_ERROR_MSG("Connect timeout ", peer_.str())',
        new='GLOO_ERROR_MSG("Connect timeout from ", self_.str(), " to ", peer_.str())',
    ),
    Edit(
        name="gloo-port-in-words",
        why="Gloo prints ports with their bytes swapped",
        file=f"{_GLOO_TCP}/address.cc",
        old="port = in->sin_port;",
        new="port = ntohs(in->sin_port);",
    ),
    Edit(
        name="gloo-port-in-words-ipv6",
        why="Gloo prints ports with their bytes swapped",
        file=f"{_GLOO_TCP}/address.cc",
        old="port = in6->sin6_port;",
        new="port = ntohs(in6->sin6_port);",
    ),
    Edit(
        name="no-distutils-jsrun",
        why=_DISTUTILS,
        file="horovod/runner/js_run.py",
        old="from distutils.spawn import find_executable",
        new="from shutil import which as find_executable",
    ),
    Edit(
        name="no-distutils-torch",
        why=_DISTUTILS,
        file="horovod/torch/CMakeLists.txt",
        old="from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        new="import sysconfig; print(sysconfig.get_path('include', 'posix_prefix'))",
    ),
    Edit(
        name="torch-state-shared",
        why=_KEEPS_STATE,
        file="horovod/torch/optimizer.py",
        old="class _DistributedOptimizer(torch.optim.Optimizer):\n",
        new=_ONE_STATE + "class _DistributedOptimizer(torch.optim.Optimizer):\n",
    ),
    Edit(
        name="torch-state",
        why=_KEEPS_STATE,
        file="horovod/torch/optimizer.py",
        old="        super(self.__class__, self).__init__(params)\n        self._compression",
        new="        _share_state(self, params)\n        self._compression",
    ),
    Edit(
        name="torch-state-given",
        why="for the edit before it; torch's hooks of step() are run by the wrapped class's",
        file="horovod/torch/optimizer.py",
        old="        return cls(optimizer.param_groups, named_parameters, compression, "
        "backward_passes_per_step, op,\n",
        new="        cls.step.hooked = True\n"
        "        return cls(optimizer, named_parameters, compression, backward_passes_per_step, "
        "op,\n",
    ),
    Edit(
        name="torch-state-adasum",
        why=_KEEPS_STATE,
        file="horovod/torch/optimizer.py",
        old="        super(self.__class__, self).__init__(params)\n\n        self._compression",
        new="        _share_state(self, params)\n\n        self._compression",
    ),
    Edit(
        name="torch-state-given-adasum",
        why="for the edit before it",
        file="horovod/torch/optimizer.py",
        old="cls(optimizer.param_groups, named_parameters, compression, "
        "backward_passes_per_step)\n",
        new="cls(optimizer, named_parameters, compression, backward_passes_per_step)\n",
    ),
    Edit(
        name="torch-closure",
        why="gradients that step()'s closure computes would not be reduced",
        file="horovod/torch/optimizer.py",
        old=_STEP_WITH_A_CLOSURE,
        new=_STEP_THAT_REDUCES_IN_THE_CLOSURE,
    ),
    Edit(
        name="keras-2-state",
        why=_KEEPS_STATE,
        file="horovod/_keras/__init__.py",
        old=_KERAS_OPTIMIZER_FROM_CONFIG,
        new=_KERAS_OPTIMIZER_WITH_STATE,
    ),
    Edit(
        name="session-hook",
        why=_SESSIONS,
        file="horovod/tensorflow/__init__.py",
        old="    _SessionRunHook = tf.estimator.SessionRunHook\n",
        new="    _SessionRunHook = tf.compat.v1.train.SessionRunHook\n",
    ),
    Edit(
        name="session-broadcast-size",
        why=_SESSIONS,
        file="horovod/tensorflow/functions.py",
        old="sz = tf.placeholder(",
        new="sz = tf.compat.v1.placeholder(",
    ),
    Edit(
        name="session-broadcast-data",
        why=_SESSIONS,
        file="horovod/tensorflow/functions.py",
        old="t = tf.placeholder(",
        new="t = tf.compat.v1.placeholder(",
    ),
    Edit(
        name="broadcast-optimizer-from-root",
        why="ranks without optimizer state make it by a step, which the root had not made: its "
        "counter would be one ahead, or its parameters other ones",
        file="horovod/torch/functions.py",
        old=_STATE_MADE_WHERE_THERE_IS_NONE,
        new=_STATE_MADE_WHERE_THE_ROOT_HAS_SOME,
    ),
    Edit(
        name="broadcast-optimizer-options",
        why="for the edit before it",
        file="horovod/torch/functions.py",
        old=_NOTHING_BROADCAST_WITHOUT_STATE,
        new="",
    ),
    Edit(
        name="broadcast-optimizer-keeps-weights",
        why="ranks without optimizer state make it by a step, whose weight decay would set them "
        "apart from the rank that has some",
        file="horovod/torch/functions.py",
        old=_STATE_BY_A_STEP,
        new=_STATE_BY_A_STEP_THAT_CHANGES_NO_WEIGHT,
    ),
    Edit(
        name="build-record",
        why="the wheel carries what it was built for, and pip removes the record with it",
        file="setup.py",
        old="      zip_safe=False,\n",
        new=f"      zip_safe=False,\n      package_data={{'horovod': ['{RECORD_NAME}']}},\n",
    ),
)


def apply_edits(source: Path, edits: Sequence[Edit] = EDITS) -> None:
    """Apply every edit to the unpacked source archive in ``source``."""
    for edit in edits:
        edit.apply(source)


def fingerprint(edits: Sequence[Edit] = EDITS) -> str:
    """Return a short hash that changes when what any edit does changes."""
    parts = [[edit.file, edit.old, edit.new] for edit in edits]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
